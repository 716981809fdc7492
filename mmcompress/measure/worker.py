"""The process in which one model is timed. Reads a job as JSON from stdin and prints the times as JSON.

Torch is imported only where torch is timed, so that an ONNX model's memory is not torch's.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

WARM_UP = 5
ROUNDS = 5
LEAST_CALLS = 20
MOST_CALLS = 5_000


Calls = list[tuple[str, int, Callable[[], Any]]]
"""Component, how often it is called for one batch, and the call."""


def onnx_calls(job: dict[str, Any]) -> Callable[[int], Calls]:
    """Sessions are opened once; for each batch size the calls that one batch costs."""
    from safetensors.numpy import load_file

    from mmcompress.runtimes.onnx_predict import OnnxPredict  # torch-free

    predict = OnnxPredict(Path(job["folder"]), job["threads"], own_process=__name__ == "__main__")

    def calls(batch: int) -> Calls:
        found: Calls = []
        for one in job["calls"][str(batch)]:
            arrays = load_file(one["inputs"])
            found.append((one["component"], one["times"], partial(predict, one["component"], arrays)))
        return found

    return calls


def torch_calls(job: dict[str, Any]) -> Callable[[int], Calls]:
    """The model is loaded once; for each batch size the calls that one batch costs."""
    import torch
    from safetensors.torch import load_file

    from mmcompress.model import load
    from mmcompress.training.device import pick_device

    torch.set_num_threads(job["threads"])
    device = pick_device(job["device"])
    model = load(job["folder"])
    parts = model.family.components(model.module.to(device).eval())

    def call(name: str, inputs: list[torch.Tensor]) -> Any:
        with torch.inference_mode():
            found = parts[name].module(*inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elif device.type == "mps":
                torch.mps.synchronize()
        return found

    def calls(batch: int) -> Calls:
        found: Calls = []
        for one in job["calls"][str(batch)]:
            tensors = load_file(one["inputs"])
            inputs = [tensors[i].to(device) for i in parts[one["component"]].inputs]
            found.append((one["component"], one["times"], partial(call, one["component"], inputs)))
        return found

    return calls


def timed(call: Callable[[], Any], seconds: float) -> list[float]:
    """Milliseconds of single calls until the time is used up and the least number of calls of a round was made."""
    times: list[float] = []
    call()  # the caches still hold the figure timed before
    end = time.perf_counter() + seconds
    while len(times) < LEAST_CALLS // ROUNDS or (time.perf_counter() < end and len(times) < MOST_CALLS // ROUNDS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def run_all(calls: Calls) -> None:
    """Every call as often as one batch needs it."""
    for _, times, call in calls:
        for _ in range(times):
            call()


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Times one model: all components together, and each by itself, at each batch size."""
    start = time.perf_counter()
    make = onnx_calls(job) if job["runtime"] == "onnxruntime" else torch_calls(job)
    loaded = time.perf_counter() - start
    together: dict[str, list[float]] = {}
    components: dict[str, dict[str, list[float]]] = {}
    figures: list[tuple[list[float], Callable[[], Any], float]] = []
    for batch in job["batch_sizes"]:
        calls = make(batch)
        figures.append((together.setdefault(str(batch), []), partial(run_all, calls), job["seconds"]))
        for name in dict.fromkeys(name for name, _, _ in calls):
            own = [call for call in calls if call[0] == name]
            figures.append(
                (components.setdefault(name, {}).setdefault(str(batch), []), partial(run_all, own), job["seconds"] / 2)
            )
    for _, call, _ in figures:
        for _ in range(WARM_UP):
            call()
    others = Neighbours()
    # All figures take turns, so that a busy second of the machine touches a fifth of each and no median.
    for _ in range(ROUNDS):
        for times, call, seconds in figures:
            times += timed(call, seconds / ROUNDS)
    return {
        "together": together,
        "components": components,
        "peak_memory_bytes": peak_memory_bytes(),
        "load_seconds": loaded,
        "busy_cores": others.busy_cores(),
    }


class Neighbours:
    """How much of the machine other programs used since this was made.

    A steady neighbour leaves no trace in the spread of the times: it makes all of them slow, and thread pools that wait for a
    core that is taken make them many times slower. So the processor time that was used and was not ours is looked at.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.machine, self.own = self._machine(), time.process_time()

    def busy_cores(self) -> float:
        """Cores that were busy with something else, on average; 0 on an idle machine."""
        seconds = time.perf_counter() - self.start
        used = self._machine() - self.machine - (time.process_time() - self.own)
        return max(0.0, used / seconds)

    def _machine(self) -> float:
        """Seconds of all cores that were not idle, time that a hypervisor took away included."""
        times = psutil.cpu_times()
        return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def peak_memory_bytes() -> int:
    """Peak resident memory of this process.

    On Linux from /proc: what getrusage says there can be the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    # ru_maxrss is in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(run_job(json.loads(sys.stdin.read()))) + "\n")
