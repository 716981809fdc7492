"""Several ONNX files of one component, each in a process of its own, that take turns being timed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import numpy as np
from safetensors.numpy import save_file

from mmcompress.errors import UnavailableError
from mmcompress.politeness import environment_for_timing

WORKER = "mmcompress.measure.candidate_worker"
TURN_SECONDS, LEAST = 0.06, 3


class Candidates:
    """Processes that wait for their turn; a context manager that ends them."""

    def __init__(self, files: Mapping[str, Path], inputs: Mapping[str, np.ndarray], threads: int) -> None:
        self.files, self.threads = files, threads
        self._scratch = TemporaryDirectory(prefix="mmcompress-")
        self._inputs = Path(self._scratch.name) / "inputs.safetensors"
        save_file({name: np.ascontiguousarray(values) for name, values in inputs.items()}, self._inputs)
        self._workers: dict[str, subprocess.Popen[str]] = {}
        self._said: dict[str, Any] = {}

    def __enter__(self) -> Self:
        env = {**environment_for_timing(), "OMP_NUM_THREADS": str(self.threads)}
        try:
            for name, path in self.files.items():
                self._said[name] = tempfile.TemporaryFile("w+")
                self._workers[name] = subprocess.Popen(
                    [sys.executable, "-m", WORKER],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._said[name],
                    text=True,
                    env=env,
                )
                job = {"path": str(path), "inputs": str(self._inputs), "threads": self.threads}
                self._ask(name, job)  # one after the other: opening a file takes all cores
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        for name, worker in self._workers.items():
            if worker.stdin is not None:
                worker.stdin.close()
            if worker.stdout is not None:
                worker.stdout.close()
            try:
                worker.wait(timeout=10)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            self._said[name].close()
        self._scratch.cleanup()

    def _ask(self, name: str, message: dict[str, Any]) -> Any:
        worker = self._workers[name]
        line = ""
        if worker.stdin is not None and worker.stdout is not None:
            try:
                worker.stdin.write(json.dumps(message) + "\n")
                worker.stdin.flush()
            except BrokenPipeError:
                pass
            else:
                line = worker.stdout.readline()
        if not line:
            code = worker.wait()
            self._said[name].seek(0)
            last = [text for text in self._said[name].read().splitlines() if text.strip()][-1:] or [f"exit code {code}"]
            raise UnavailableError(f"timing {self.files[name].name} failed: {last[0]}")
        return json.loads(line)

    def take_turns(self, names: Sequence[str]) -> dict[str, list[float]]:
        """One round; milliseconds of single calls by name."""
        return {name: self._ask(name, {"do": "turn", "seconds": TURN_SECONDS, "least": LEAST}) for name in names}

    def profile(self, name: str) -> dict[str, float]:
        """Milliseconds by operator of one call."""
        found: dict[str, float] = self._ask(name, {"do": "profile"})
        return found
