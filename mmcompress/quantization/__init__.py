"""Quantizers: ONNX export of components, post-training int8 on ONNX files, and quantization-aware training."""
