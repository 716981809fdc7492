"""One contender of ``int8.py`` in a process of its own: loads, answers ``{}``, then times itself for each line.

A line holds two numbers: seconds to time calls for, and seconds to make calls before that are not timed.

    python benchmarks/int8_worker.py RUNTIME MODEL INPUTS.npz THREADS

RUNTIME is ``onnxruntime``, ``openvino``, ``torch`` or ``torch-bf16``. It needs numpy and that runtime alone, so that it runs in
other tools' environments too; for torch it needs mmcompress, and MODEL is ``<subject>/<component>``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

UNTIMED, LEAST, PATIENCE = 1, 3, 4
"""Calls before and in a turn, at least; a call that is very slow ends the turn after so many times its seconds."""


def onnxruntime_call(path: str, inputs: dict[str, np.ndarray], threads: int) -> Callable[[], Any]:
    """A session with a pool of its own."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {i.name: inputs[i.name] for i in session.get_inputs()}
    return lambda: session.run(None, given)


def openvino_call(path: str, inputs: dict[str, np.ndarray], threads: int) -> Callable[[], Any]:
    """A compiled model, in float32 where it is float."""
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().compile_model(path, "CPU", settings)
    request = model.create_infer_request()
    given = {i.get_any_name(): inputs[i.get_any_name()] for i in model.inputs}
    return lambda: request.infer(given)


def torch_call(path: str, inputs: dict[str, np.ndarray], threads: int, half: bool) -> Callable[[], Any]:
    """The component's own module, eager."""
    import torch
    from int8 import subject

    torch.set_num_threads(threads)
    name, component = path.split("/")
    family, module = subject(name)
    part = family.components(module)[component]
    given = [torch.from_numpy(inputs[i]) for i in part.inputs]
    if half:
        part.module.to(torch.bfloat16)
        given = [x.to(torch.bfloat16) if x.is_floating_point() else x for x in given]

    def call() -> Any:
        with torch.inference_mode():
            return part.module(*given)

    return call


def main() -> None:
    """Serves until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runtime, path, inputs, threads = sys.argv[1], sys.argv[2], dict(np.load(sys.argv[3])), int(sys.argv[4])
    if runtime == "onnxruntime":
        call = onnxruntime_call(path, inputs, threads)
    elif runtime == "openvino":
        call = openvino_call(path, inputs, threads)
    else:
        call = torch_call(path, inputs, threads, runtime == "torch-bf16")
    call()
    out.write("{}\n")
    out.flush()
    for line in sys.stdin:
        times: list[float] = []
        seconds, lead = (float(number) for number in line.split())
        begin, untimed = time.perf_counter() + lead, 0
        while untimed < UNTIMED or time.perf_counter() < begin:
            call()
            untimed += 1
        now = time.perf_counter()
        end, late = now + seconds, now + PATIENCE * seconds
        while not times or time.perf_counter() < end or (len(times) < LEAST and time.perf_counter() < late):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        out.write(json.dumps(times) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
