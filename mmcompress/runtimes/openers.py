"""The runtimes that run folders of ONNX components, by name. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mmcompress.runtimes.onnx_predict import OnnxPredict
from mmcompress.runtimes.openvino_predict import OpenVinoPredict

OnnxRuntime = Literal["onnxruntime", "openvino"]


def open_folder(
    runtime: OnnxRuntime, folder: Path, threads: int = 0, *, own_process: bool = False
) -> OnnxPredict | OpenVinoPredict:
    """A folder of ONNX components as ``Predict``.

    Args:
        threads: 0 leaves it to the runtime.
        own_process: the process does nothing else with the runtime; see ``OnnxPredict``.

    Raises:
        ModelError: a file is missing, damaged, or holds what the runtime does not know.
        UnavailableError: the runtime is not installed.
    """
    if runtime == "openvino":
        return OpenVinoPredict(folder, threads)
    return OnnxPredict(folder, threads, own_process=own_process)
