"""Settings of all tests: offline, two threads, no progress bars of libraries."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# For what fixtures of whole modules make; every test has a folder of its own, see below.
os.environ["MMCOMPRESS_CACHE"] = tempfile.mkdtemp(prefix="mmcompress-tests-")

from mmcompress.politeness import be_polite

be_polite()

import pytest
import torch

from mmcompress.quantization import onnx_export
from tests import exports

# Before anything imports it by name.
onnx_export.export_component = exports.remembered(onnx_export.export_component, onnx_export._save)

from mmcompress.logs import silence_libraries
from mmcompress.measure import side_by_side, turns, worker
from mmcompress.model import CompressedModel
from tests import tiny

# Two test processes share the cores: threads that wait for each other would cost far more than they bring.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
silence_libraries()


@pytest.fixture(autouse=True)
def _no_cache_of_others(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a teacher said in another test, or in the user's own runs, must not be found."""
    monkeypatch.setenv("MMCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{uuid.uuid4().hex}"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The folder goes when the last process is done: with xdist that is the one that hands tests out."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(exports.folder(), ignore_errors=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads wait for each other longer than so small a model computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> CompressedModel:
    """A tiny CLIP."""
    return tiny.clip()


class TimedHere:
    """A worker that computes in this process."""

    spins = 0.0

    def __init__(self, job: dict[str, Any], threads: int) -> None:
        self.timer = worker.Timer(job)

    def ready(self) -> dict[str, Any]:
        return self.timer.ready()

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        return self.timer.answer(message)

    def cpu_seconds(self) -> float:
        return 0.0

    def close(self) -> None:
        pass


@pytest.fixture
def timed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency jobs run in the test's own process instead of a new one each, which would load torch every time."""
    monkeypatch.setattr(turns, "start", TimedHere)
    monkeypatch.setattr(side_by_side, "FEWEST_ROUNDS", 2)
