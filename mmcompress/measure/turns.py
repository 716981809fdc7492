"""Models that take turns, each in a process of its own, so that only one computes at a time.

A process of its own keeps the thread pools, allocators and caches of one model away from the next one's (two ONNX Runtime
sessions in one process disturb each other), and its peak resident memory is that model's alone. Taking turns makes whatever
slows the machine down for a while slow all of them down.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import psutil
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import save_file

from mmcompress.errors import UnavailableError
from mmcompress.families.base import Call
from mmcompress.heap import STEADY
from mmcompress.measure.energy import Counters
from mmcompress.measure.neighbours import Neighbours
from mmcompress.politeness import environment_for_timing

WORKER = "mmcompress.measure.worker"
SPIN_SECONDS = {"torch": 0.015, "onnxruntime": 0.045, "openvino": 0.045}
"""How long the threads of a runtime go on spinning after a call, at the most: only after that the next one is timed."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Contestant:
    """One model in one runtime.

    Attributes:
        name: what it is called here.
        folder: a model folder (torch), one with ONNX components, or one ONNX file.
        calls: for each batch size the calls of one batch, as ``write_calls`` gives them.
        end_to_end: where the queries and the model's processor are; None where they are not timed.
    """

    name: str
    folder: Path
    runtime: str
    calls: dict[str, list[Message]]
    device: str = "cpu"
    end_to_end: tuple[Path, Path] | None = None

    def job(self, threads: int) -> Message:
        """What its process is told first."""
        found = {
            "folder": str(self.folder),
            "runtime": self.runtime,
            "threads": threads,
            "device": self.device,
            "calls": self.calls,
        }
        if self.end_to_end is not None:
            found |= {"queries": str(self.end_to_end[0]), "processor": str(self.end_to_end[1])}
        return found


def write_calls(calls: Sequence[Call], folder: Path) -> list[Message]:
    """The calls of one batch as data: component, times, and the file that holds the inputs.

    They are made by who starts the processes: only a family knows them, and a process must not load torch to time ONNX Runtime.
    """
    folder.mkdir(parents=True)
    found = []
    for i, call in enumerate(calls):
        path = folder / f"{i}.safetensors"
        save_file({name: values.contiguous().clone() for name, values in call.inputs.items()}, path)
        found.append({"component": call.component, "times": call.times, "inputs": str(path)})
    return found


class Worker(Protocol):
    """What times one model; see ``measure.worker.Timer``."""

    def ready(self) -> Message:
        """Waits until the model is loaded; what that cost."""

    def ask(self, message: Message) -> Message:
        """Has it do one thing, and waits for the answer."""

    spins: float
    """For how many seconds its threads disturb others after a turn."""

    def cpu_seconds(self) -> float:
        """Processor time that it has used; 0 where that is this process's own."""

    def close(self) -> None:
        """Ends it."""


class InAProcess:
    """A worker in a process of its own."""

    def __init__(self, job: Message, threads: int) -> None:
        # The number of threads is set in the environment too: some pools read it only when they are loaded.
        env = {
            **environment_for_timing(),
            **STEADY,  # else two processes of one file differ by a tenth
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.spins = SPIN_SECONDS[job["runtime"]]
        self.what = f"{job['folder']} in {job['runtime']}"
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process is; closed with it)
        self.process = subprocess.Popen(
            [sys.executable, "-m", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, env=env
        )
        self._tell(job)

    def _tell(self, message: Message) -> None:
        try:
            if self.process.stdin is not None:
                self.process.stdin.write(json.dumps(message) + "\n")
                self.process.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None

    def _hear(self) -> Message:
        line = self.process.stdout.readline() if self.process.stdout is not None else ""
        if not line:
            raise self._failed()
        answer: Message = json.loads(line)
        return answer

    def _failed(self) -> UnavailableError:
        code = self.process.wait()
        self.said.seek(0)
        last = [line for line in self.said.read().splitlines() if line.strip()][-1:] or [f"exit code {code}"]
        return UnavailableError(f"measuring {self.what} failed: {last[0]}")

    def ready(self) -> Message:
        return self._hear()

    def ask(self, message: Message) -> Message:
        self._tell(message)
        return self._hear()

    def cpu_seconds(self) -> float:
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.said.close()


def start(job: Message, threads: int) -> Worker:
    """Starts a worker for a job."""
    return InAProcess(job, threads)


@dataclass
class Figure:
    """What one model took for one thing.

    Attributes:
        rounds: milliseconds of each call, round by round.
        preparing: end to end, the part before the model, in the same way.
        joules: of all calls, those that were not timed included; None where the machine cannot tell.
        calls: how many that were.
    """

    rounds: list[list[float]] = field(default_factory=list)
    preparing: list[list[float]] = field(default_factory=list)
    joules: float | None = 0.0
    calls: int = 0

    @property
    def times(self) -> list[float]:
        """All calls."""
        return [t for calls in self.rounds for t in calls]


class Turns:
    """Several models, started at once; a context manager that ends them."""

    def __init__(self, contestants: Sequence[Contestant], threads: int, counters: Counters | None = None) -> None:
        self.contestants = {c.name: c for c in contestants}
        self.threads = threads
        self.counters = counters or Counters()
        self.figures: dict[tuple[str, str], Figure] = {}
        self.workers: dict[str, Worker] = {}
        self.started: dict[str, Message] = {}
        self.idle_seconds = 0.0
        self._rested: dict[str, float] = {}
        self._last = ""

    def __enter__(self) -> Self:
        try:
            for name, contestant in self.contestants.items():
                self.workers[name] = start(contestant.job(self.threads), self.threads)
            for name, worker in self.workers.items():
                self.started[name] = worker.ready()
        except BaseException:
            self._close()
            raise
        self.begin()
        return self

    def begin(self) -> None:
        """From here on it is looked at what else the machine does."""
        self._began, self._others = time.perf_counter(), Neighbours()
        self._cpu = {name: worker.cpu_seconds() for name, worker in self.workers.items()}
        self._rested, self.idle_seconds, self._last = {}, 0.0, ""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        for worker in self.workers.values():
            worker.close()

    def warm(self, name: str, figure: str, calls: int) -> None:
        """Calls that are not timed."""
        self.workers[name].ask({"do": "warm", "figure": figure, "calls": calls})

    def turn(self, name: str, figure: str, seconds: float, least: int, untimed: int = 1) -> list[float]:
        """Times one figure of one model for a while, as one more round of it.

        While the threads of the one before still spin it makes calls that are not timed. Sleeping instead lets the cores go, and
        what comes back is slower by up to a third for some time: rounds then differ by a tenth instead of a thirtieth.
        """
        worker = self.workers[name]
        if name in self._rested:
            self.idle_seconds += worker.cpu_seconds() - self._rested.pop(name)
        if self._last not in ("", name):
            worker.ask({"do": "warm", "figure": figure, "calls": 1, "seconds": self.workers[self._last].spins})
            self._rested[self._last] = self.workers[self._last].cpu_seconds()
        self._last = name
        before = self.counters.read()
        message = {"do": "turn", "figure": figure, "seconds": seconds, "least": least, "untimed": untimed}
        answer = worker.ask(message)
        joules = self.counters.joules(before, self.counters.read())
        found = self.figures.setdefault((name, figure), Figure())
        found.rounds.append(answer["times"])
        found.preparing.append(answer["preparing"])
        found.calls += untimed + len(answer["times"])
        found.joules = None if joules is None or found.joules is None else found.joules + joules
        times: list[float] = answer["times"]
        return times

    def take_turns(self, names: Sequence[str], figure: str, number: int, seconds: float, least: int, untimed: int) -> None:
        """One round: everyone once, in turn from the first to the last and from the last to the first."""
        for name in names if number % 2 == 0 else reversed(names):
            self.turn(name, figure, seconds, least, untimed)

    def peak_memory_bytes(self, name: str) -> int:
        """The peak resident memory of a model's process so far."""
        return int(self.workers[name].ask({"do": "peak"})["bytes"])

    def outputs(self, name: str, inputs: Sequence[Path]) -> list[np.ndarray]:
        """The first output of one ONNX file for each of several files of inputs."""
        with TemporaryDirectory(prefix="mmcompress-") as scratch:
            target = Path(scratch) / "outputs.safetensors"
            self.workers[name].ask({"do": "outputs", "inputs": [str(path) for path in inputs], "target": str(target)})
            found = load_arrays(target)
        return [found[str(i)] for i in range(len(inputs))]

    def profile(self, name: str) -> dict[str, float]:
        """Milliseconds by operator of one call of one ONNX file in ONNX Runtime."""
        spent: dict[str, float] = self.workers[name].ask({"do": "profile"})["ms"]
        return spent

    def busy_cores(self) -> float:
        """Cores that were busy with something other than the models and this process, on average."""
        own = sum(worker.cpu_seconds() - self._cpu[name] for name, worker in self.workers.items())
        return self._others.busy_cores(own)

    def idle_cores(self) -> float:
        """Cores that models used which were to wait, on average."""
        return self.idle_seconds / max(1e-9, time.perf_counter() - self._began)
