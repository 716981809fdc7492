"""Components run by ONNX Runtime. Torch-free: its measurements run in processes that never load torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from mmcompress.errors import ModelError

SUFFIXES = ("_quantized", "")


def component_files(folder: Path, names: tuple[str, ...] | None = None) -> dict[str, Path]:
    """For each component its file: the quantized one where there is one, else the float one.

    Args:
        folder: holds the ``.onnx`` files, or an ``onnx`` folder that does (the layout of transformers.js).
        names: the components wanted; all found where None. ``model`` (all components in one) is never one of them.

    Raises:
        ModelError: a component has no file.
    """
    where = folder / "onnx" if (folder / "onnx").is_dir() else folder
    stems = {p.stem for p in where.glob("*.onnx")}
    if names is None:
        names = tuple(sorted({s.removesuffix("_quantized") for s in stems} - {"model"}))
    found = {}
    for name in names:
        stem = next((name + s for s in SUFFIXES if name + s in stems), None)
        if stem is None:
            raise ModelError(f"{folder}: has no {name}.onnx; found: {', '.join(sorted(stems)) or 'no ONNX file'}")
        found[name] = where / f"{stem}.onnx"
    if not found:
        raise ModelError(f"{folder}: holds no ONNX components")
    return found


class OnnxPredict:
    """A folder of ONNX components as ``Predict``; see ``runtimes.base``."""

    runtime = "onnxruntime"

    def __init__(self, folder: str | Path, threads: int = 0, names: tuple[str, ...] | None = None) -> None:
        """Opens one session for each component.

        Args:
            threads: 0 leaves it to ONNX Runtime.
            names: the components to open; all found where None.

        Raises:
            ModelError: a file is missing or damaged.
        """
        self.files = component_files(Path(folder), names)
        self.sessions = {name: open_session(path, threads) for name, path in self.files.items()}
        self.components = tuple(self.sessions)

    def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = self.sessions[component]
        wanted = {i.name for i in session.get_inputs()}
        names = [o.name for o in session.get_outputs()]
        given = {name: np.ascontiguousarray(value) for name, value in inputs.items() if name in wanted}
        return dict(zip(names, session.run(names, given), strict=True))


def open_session(path: Path, threads: int = 0) -> ort.InferenceSession:
    """A CPU session over one file.

    Raises:
        ModelError: the file is missing or damaged.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (RuntimeError, ValueError, OSError) as e:
        raise ModelError(f"{path}: ONNX Runtime cannot open it: {str(e).splitlines()[0][:300]}") from e
