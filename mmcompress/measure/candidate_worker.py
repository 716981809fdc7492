"""The process in which one ONNX file is timed among others. A job on stdin as JSON, then a line for each thing to do.

``turn`` answers with the milliseconds of single calls, ``profile`` with those of each operator. Between lines it waits.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

UNTIMED = 2
PROFILED = 10


def profile(path: str, threads: int, feeds: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by operator of one call, from ONNX Runtime's own profiler."""
    import onnxruntime as ort

    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(PROFILED):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return {kind: us / PROFILED / 1e3 for kind, us in spent.most_common()}


def main() -> None:
    """Serves until stdin ends. Only answers go to stdout: what libraries print goes to stderr."""
    from safetensors.numpy import load_file

    from mmcompress.runtimes.onnx_predict import open_session

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    session = open_session(Path(job["path"]), job["threads"])
    wanted = {i.name for i in session.get_inputs()}
    feeds = {name: values for name, values in load_file(job["inputs"]).items() if name in wanted}
    session.run(None, feeds)
    out.write("{}\n")
    out.flush()
    for line in sys.stdin:
        message = json.loads(line)
        if message["do"] == "profile":
            answer: Any = profile(job["path"], job["threads"], feeds)
        else:
            answer = []
            for _ in range(UNTIMED):
                session.run(None, feeds)
            end = time.perf_counter() + message["seconds"]
            while len(answer) < message["least"] or time.perf_counter() < end:
                start = time.perf_counter()
                session.run(None, feeds)
                answer.append((time.perf_counter() - start) * 1e3)
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
