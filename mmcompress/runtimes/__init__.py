"""Ways to run a model: torch and ONNX Runtime behind one ``Predict``."""
