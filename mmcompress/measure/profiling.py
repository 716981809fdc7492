"""What a call of one ONNX file spends its time on, by ONNX Runtime's own profiler. Torch-free."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime as ort

CALLS = 10


def milliseconds_by_operator(path: Path, feeds: Mapping[str, Any], threads: int, own_pool: bool = True) -> dict[str, float]:
    """Milliseconds of one call by operator, the most first; what the profiler itself costs is in them.

    Args:
        path: the file.
        feeds: its inputs, and maybe more.
        threads: of the session.
        own_pool: False takes the process's shared thread pool, see ``runtimes.onnx_predict.open_session``.
    """
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        options = ort.SessionOptions()
        options.use_per_session_threads = own_pool
        if own_pool:
            options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        given = {i.name: feeds[i.name] for i in session.get_inputs()}
        for _ in range(CALLS):
            session.run(None, given)
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return {kind: us / CALLS / 1e3 for kind, us in spent.most_common()}
