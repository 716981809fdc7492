"""Components run by ONNX Runtime. Torch-free: its measurements run in processes that never load torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from mmcompress.errors import ModelError
from mmcompress.runtimes.decoding import PAST
from mmcompress.runtimes.precision import PRECISIONS, split

_FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    *(
        getattr(_state, name)
        for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    ),
)
"""ONNX Runtime's own errors derive from Exception alone."""
COMBINED = "model"
"""The name of a file that holds all components in one graph."""


def component_files(folder: Path, names: tuple[str, ...] | None = None) -> dict[str, Path]:
    """For each component its file: the quantized one where there is one, else the float one (see `runtimes.precision`).

    Args:
        folder: holds the ``.onnx`` files, or an ``onnx`` folder that does (the layout of transformers.js); or one such file.
        names: the components wanted; all found where None. ``model`` is one only where it stands alone: beside others it is
            all of them in one graph.

    Raises:
        ModelError: a component has no file.
    """
    if folder.is_file():
        return {split(folder.stem)[0]: folder}
    where = folder / "onnx" if (folder / "onnx").is_dir() else folder
    stems = {p.stem for p in where.glob("*.onnx")}
    if names is None:
        every = {split(s)[0] for s in stems}
        names = tuple(sorted(every - {COMBINED} or every))
    found = {}
    for name in names:
        stem = next((name + s for s in PRECISIONS if name + s in stems), None)
        if stem is None:
            raise ModelError(f"{folder}: has no {name}.onnx; found: {', '.join(sorted(stems)) or 'no ONNX file'}")
        found[name] = where / f"{stem}.onnx"
    if not found:
        raise ModelError(f"{folder}: holds no ONNX components")
    return found


class OnnxPredict:
    """A folder of ONNX components as ``Predict``; see ``runtimes.base``."""

    runtime = "onnxruntime"

    def __init__(
        self, folder: str | Path, threads: int = 0, names: tuple[str, ...] | None = None, *, own_process: bool = False
    ) -> None:
        """Opens one session for each component.

        Args:
            threads: 0 leaves it to ONNX Runtime.
            names: the components to open; all found where None.
            own_process: the process does nothing else with ONNX Runtime, so that its sessions may share one thread pool. The
                spinning threads of a session with a pool of its own slow the next session down by up to a half.

        Raises:
            ModelError: a file is missing or damaged.
        """
        self.files = component_files(Path(folder), names)
        if own_process:
            ort.set_global_thread_pool_sizes(threads, 1)
        self.sessions = {name: open_session(path, threads, not own_process) for name, path in self.files.items()}
        self.components = tuple(self.sessions)

    def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = self.sessions[component]
        wanted = {i.name for i in session.get_inputs()}
        names = [o.name for o in session.get_outputs()]
        given = {name: np.ascontiguousarray(value) for name, value in inputs.items() if name in wanted}
        return dict(zip(names, session.run(names, given), strict=True))

    def cache(self, component: str) -> Mapping[str, tuple[int, int]]:
        """Read from the graph: the second and the last axis of the inputs ``past_key_values.*`` are constants there."""
        inputs = self.sessions[component].get_inputs()
        return {i.name: (int(i.shape[1]), int(i.shape[3])) for i in inputs if i.name.startswith(PAST)}


def open_session(path: Path, threads: int = 0, own_pool: bool = True) -> ort.InferenceSession:
    """A CPU session over one file.

    Args:
        own_pool: False takes the process's shared thread pool, which must have been made before.

    Raises:
        ModelError: the file is missing or damaged.
    """
    options = ort.SessionOptions()
    options.use_per_session_threads = own_pool
    if own_pool:
        options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _FAILURES as e:
        raise ModelError(f"{path}: ONNX Runtime cannot open it: {str(e).splitlines()[0][:300]}") from e
