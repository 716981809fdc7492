"""The process in which one model is timed. Reads a job from stdin, then does what it is told, a line of JSON each.

It computes only when it is told to, so that several such processes can take turns: ``{"do": "turn", ...}`` times one figure for a
while. Between turns it waits in a read from a pipe, which costs nothing. Torch is imported only where torch is timed, or where
pictures and texts are prepared, so that an ONNX model's memory is not torch's.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from mmcompress.runtimes.base import Predict

WARM_UP = 5
ROUNDS = 5
LEAST_CALLS = 20
MOST_CALLS = 5_000
END_TO_END = "end_to_end"
"""The figure that begins with a file's bytes and a text instead of tensors."""

Calls = list[tuple[str, int, Callable[[], Any]]]
"""Component, how often it is called for one batch, and the call."""

LIBRARIES = {
    "torch": ("torch", "safetensors.torch", "mmcompress.model", "mmcompress.training.device"),
    "onnxruntime": ("safetensors.numpy", "mmcompress.runtimes.onnx_predict"),
    "openvino": ("safetensors.numpy", "mmcompress.runtimes.openvino_predict", "openvino"),
}
"""What each runtime needs, imported before the model's own loading is timed."""


def opened(job: dict[str, Any]) -> Predict:
    """The components of an ONNX folder, or a single file."""
    from mmcompress.runtimes.openers import open_folder  # torch-free

    return open_folder(job["runtime"], Path(job["folder"]), job["threads"], own_process=__name__ == "__main__")


def onnx_calls(job: dict[str, Any], predict: Predict) -> Callable[[int], Calls]:
    """For each batch size the calls that one batch costs."""
    from safetensors.numpy import load_file

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


def timed(call: Callable[[], Any], seconds: float, least: int = LEAST_CALLS // ROUNDS, untimed: int = 1) -> list[float]:
    """Milliseconds of single calls until the time is used up and the least number of calls of a round was made.

    Args:
        untimed: calls before: the caches still hold what was timed before, and threads sleep.
    """
    times: list[float] = []
    for _ in range(untimed):
        call()
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < MOST_CALLS // ROUNDS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def run_all(calls: Calls) -> None:
    """Every call as often as one batch needs it."""
    for _, times, call in calls:
        for _ in range(times):
            call()


class Timer:
    """One model, ready to be timed.

    Figures are named ``<batch>`` (all components of one batch), ``<component>/<batch>`` and ``end_to_end``.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        for name in LIBRARIES[job["runtime"]]:
            importlib.import_module(name)
        start = time.perf_counter()
        self.predict = None if job["runtime"] == "torch" else opened(job)
        self.make = torch_calls(job) if self.predict is None else onnx_calls(job, self.predict)
        self.load_seconds = time.perf_counter() - start
        self.start_seconds = time.time() - psutil.Process().create_time()
        self.calls: dict[str, Calls] = {}
        self.preparing: list[float] = []
        first = min(job["calls"], key=int)
        calls = self._calls(first)
        start = time.perf_counter()
        run_all(calls)
        self.first_inference_ms = (time.perf_counter() - start) * 1e3
        self.figures: dict[str, Callable[[], Any]] = {}

    def _calls(self, batch: str) -> Calls:
        if batch not in self.calls:
            self.calls[batch] = self.make(int(batch))
        return self.calls[batch]

    def _figure(self, name: str) -> Callable[[], Any]:
        if name not in self.figures:
            component, _, batch = name.rpartition("/")
            if name == END_TO_END:
                self.figures[name] = self._end_to_end()
            else:
                self.figures[name] = partial(run_all, [c for c in self._calls(batch) if component in ("", c[0])])
        return self.figures[name]

    def _end_to_end(self) -> Callable[[], None]:
        from mmcompress.measure.end_to_end import Preparation  # loads torch, whatever the runtime is

        prepare = Preparation(Path(self.job["queries"]), Path(self.job["processor"]), self.job["threads"])
        calls = self._calls("1")

        def query() -> None:
            start = time.perf_counter()
            prepare()
            self.preparing.append((time.perf_counter() - start) * 1e3)
            run_all(calls)

        return query

    def ready(self) -> dict[str, Any]:
        """What starting cost, and which components there are."""
        return {
            "load_seconds": self.load_seconds,
            "start_seconds": self.start_seconds,
            "first_inference_ms": self.first_inference_ms,
            "components": list(dict.fromkeys(c for c, _, _ in next(iter(self.calls.values())))),
            "cpu_seconds": time.process_time(),
        }

    def _write_outputs(self, inputs: list[str], target: Path) -> None:
        from safetensors.numpy import load_file, save_file

        if self.predict is None:
            raise ValueError("outputs are those of ONNX files")
        (component,) = self.predict.components
        found = [next(iter(self.predict(component, load_file(path)).values())) for path in inputs]
        save_file({str(i): rows for i, rows in enumerate(found)}, target)

    def _profile(self) -> dict[str, float]:
        from safetensors.numpy import load_file

        from mmcompress.measure.profiling import milliseconds_by_operator

        (call,) = next(iter(self.job["calls"].values()))
        feeds, own_pool = load_file(call["inputs"]), __name__ != "__main__"
        return milliseconds_by_operator(Path(self.job["folder"]), feeds, self.job["threads"], own_pool)

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Does one thing that it is told to; ``cpu_seconds`` is this process's processor time before and after.

        ``turn`` times one ``figure`` for ``seconds``, and makes ``least`` calls at least after ``untimed`` ones; ``warm`` makes
        ``calls`` calls at least, for ``seconds``, and tells no times; ``peak`` asks for the memory. Of one ONNX file ``outputs``
        writes the first output for each file of ``inputs`` to ``target``, and ``profile`` tells where the time goes.
        """
        before = time.process_time()
        found: dict[str, Any] = {}
        if message["do"] == "warm":
            timed(self._figure(message["figure"]), message.get("seconds", 0.0), message["calls"], untimed=0)
        elif message["do"] == "turn":
            self.preparing.clear()
            untimed = message["untimed"]
            found["times"] = timed(self._figure(message["figure"]), message["seconds"], message["least"], untimed)
            found["preparing"] = self.preparing[untimed:]
        elif message["do"] == "peak":
            found["bytes"] = peak_memory_bytes()
        elif message["do"] == "outputs":
            self._write_outputs(message["inputs"], Path(message["target"]))
        elif message["do"] == "profile":
            found["ms"] = self._profile()
        return {**found, "cpu_seconds": [before, time.process_time()]}


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


def main() -> None:
    """Serves until stdin ends. Only answers go to stdout: what libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def say(answer: dict[str, Any]) -> None:
            out.write(json.dumps(answer) + "\n")
            out.flush()

        timer = Timer(json.loads(sys.stdin.readline()))
        say(timer.ready())
        for line in sys.stdin:
            say(timer.answer(json.loads(line)))


if __name__ == "__main__":
    main()
    sys.stderr.flush()
    os._exit(0)  # whoever started this waits, and all that torch has loaded takes a second to be taken apart
