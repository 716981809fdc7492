"""Components run by OpenVINO, from the same ONNX files. Torch-free, and an extra: ``pip install 'mmcompress[openvino]'``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.errors import ModelError, UnavailableError
from mmcompress.runtimes.decoding import PAST
from mmcompress.runtimes.onnx_predict import component_files

HINT = "OpenVINO is not installed; pip install 'mmcompress[openvino]'"


def is_installed() -> bool:
    """Whether the extra is there; nothing is loaded."""
    return importlib.util.find_spec("openvino") is not None


class OpenVinoPredict:
    """A folder of ONNX components as ``Predict``; see ``runtimes.base``."""

    runtime = "openvino"

    def __init__(self, folder: str | Path, threads: int = 0, names: tuple[str, ...] | None = None) -> None:
        """Compiles each component for the CPU.

        Args:
            threads: 0 leaves it to OpenVINO.
            names: the components to open; all found where None.

        Raises:
            UnavailableError: OpenVINO is not installed.
            ModelError: a file is missing or damaged, or holds operators that OpenVINO does not know.
        """
        if not is_installed():
            raise UnavailableError(HINT)
        import openvino  # an extra

        self.files = component_files(Path(folder), names)
        core = openvino.Core()
        # Without the hint OpenVINO computes float32 files in bfloat16 where the processor can, which is another precision.
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        self._models: dict[str, Any] = {}
        for name, path in self.files.items():
            try:
                self._models[name] = core.compile_model(str(path), "CPU", settings)
            except RuntimeError as e:
                lines = [line for line in str(e).splitlines() if line.strip() and not line.startswith("Exception from")]
                raise ModelError(f"{path}: OpenVINO cannot open it: {' '.join(lines)[:300]}") from e
        self._requests = {name: model.create_infer_request() for name, model in self._models.items()}
        self.capabilities = list(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        self.components = tuple(self._models)

    def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        model, request = self._models[component], self._requests[component]
        given = {i.get_any_name(): np.ascontiguousarray(inputs[i.get_any_name()]) for i in model.inputs}
        request.infer(given)
        return {o.get_any_name(): np.array(request.get_tensor(o).data) for o in model.outputs}

    def cache(self, component: str) -> Mapping[str, tuple[int, int]]:
        """Read from the graph: the second and the last axis of the inputs ``past_key_values.*`` are constants there."""
        found = {}
        for one in self._models[component].inputs:
            name = one.get_any_name()
            if name.startswith(PAST):
                shape = one.get_partial_shape()
                found[name] = (shape[1].get_length(), shape[3].get_length())
        return found

    def words(self) -> str:
        """The same as a sentence for the report."""
        found = self.settings()
        pinned = "pinned to cores" if found["pinned"] else "not pinned to cores"
        return f"OpenVINO ran with {found['threads']} threads, {pinned}; the CPU device offers {', '.join(self.capabilities)}."

    def settings(self) -> dict[str, Any]:
        """What the first component is run with: threads, whether they are pinned to cores, what the CPU device can do."""
        model = next(iter(self._models.values()))
        return {
            "threads": int(model.get_property("INFERENCE_NUM_THREADS")),
            "pinned": bool(model.get_property("ENABLE_CPU_PINNING")),
            "capabilities": self.capabilities,
        }
