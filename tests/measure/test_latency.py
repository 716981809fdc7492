"""Percentiles that have enough calls, costs, and turns of processes; nothing here is judged by how long it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy import stats

from mmcompress.errors import UnavailableError
from mmcompress.measure import side_by_side, turns
from mmcompress.measure.end_to_end import Preparation, write_queries
from mmcompress.measure.latency import calls_needed, measure, summarize
from mmcompress.measure.neighbours import Neighbours
from mmcompress.measure.side_by_side import Entry, Settings, cost, fitting, sizes
from mmcompress.measure.turns import Contestant, Turns, write_calls
from mmcompress.model import CompressedModel
from mmcompress.report.schema import BUSY_CORES
from mmcompress.report.schema_speed import Offline
from tests import tiny_data
from tests.conftest import TimedHere


def test_calls_that_a_percentile_needs_are_mlperfs_formula() -> None:
    """With a margin of a twentieth at 99% it gives MLPerf's 23,886 queries for p90 (Reddi et al., table IV); here of a half."""
    z = stats.norm.ppf(0.995)
    assert round(z**2 * 0.9 * 0.1 / (0.1 / 20) ** 2) in (23_885, 23_886)
    assert [calls_needed(q) for q in (0.9, 0.99)] == [139, 1522]


def test_a_percentile_without_enough_calls_is_not_shown() -> None:
    few, some, many = (summarize([float(t) for t in range(n)]) for n in (138, 139, 1522))
    assert (few.p90, few.p99) == (None, None)
    assert (some.p90, some.p99) == (pytest.approx(124.2), None)
    assert many.p99 == pytest.approx(np.quantile(np.arange(1522), 0.99))
    assert (few.p50, few.mean, few.n) == (68.5, 68.5, 138)


def test_costs_by_hand() -> None:
    """At 3.60 an hour a second costs a thousandth: a million of 10 ms take 10,000 s, at 1,000 a second 1,000 s."""
    found = cost({"1": summarize([9.0, 11.0])}, Offline(batch_size=8, examples_per_second=1000.0, tried={}), 3.60)
    assert (found.single_stream, found.offline) == (pytest.approx(10.0), pytest.approx(1.0))
    assert cost({"8": summarize([9.0])}, None, 3.60).model_dump() == {"single_stream": None, "offline": None}


def test_models_that_do_not_fit_are_named() -> None:
    """Of 100 bytes 80 are used: 50, then not 40, but 30."""
    assert fitting({"a": 50, "b": 40, "c": 30, "d": None}, available=100) == (["a", "c", "d"], ["b"])


def test_batch_sizes_of_the_offline_scenario() -> None:
    assert sizes([8], False) == [1, 8]
    assert sizes([1, 8], True) == [1, 8, 16, 32]


@pytest.fixture
def saved(model: CompressedModel, tmp_path: Path) -> Path:
    model.save(tmp_path / "model")
    return tmp_path / "model"


class Scripted:
    """A worker whose calls take what a script says, and which says whether another one is at it."""

    at_work: str = ""
    log: list[str]
    spins = 0.25
    leads: ClassVar[list[tuple[str, float]]] = []

    def __init__(self, job: dict[str, Any], threads: int) -> None:
        self.name, self.ms, self.turns = job["folder"], {"slow": 20.0, "fast": 10.0}[job["folder"]], 0

    def ready(self) -> dict[str, Any]:
        return {"load_seconds": 0.5, "start_seconds": 1.0, "first_inference_ms": 30.0}

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["do"] == "peak":
            return {"bytes": 1000}
        if message["do"] == "turn":
            Scripted.log.append(self.name)
        elif "seconds" in message:
            Scripted.leads.append((self.name, message["seconds"]))
        self.turns += 1
        # The machine is three times as slow every other round, for everyone.
        slow = 3.0 if (len(Scripted.log) - 1) // 3 % 2 else 1.0
        return {"times": [self.ms * slow] * message.get("least", 0), "preparing": []}

    def cpu_seconds(self) -> float:
        return 0.0

    def close(self) -> None:
        pass


def test_turns_cancel_what_the_machine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted.log, Scripted.leads = [], []
    monkeypatch.setattr(turns, "start", Scripted)
    entries = [Entry(name, Path(name), "torch", {1: [], 2: []}) for name in ("slow", "fast")]
    found = side_by_side.side_by_side(entries, [("slow", "fast")], Settings([1, 2], 1, 0.01))
    assert Scripted.log[:6] == ["slow", "slow", "fast", "fast", "slow", "slow"]  # the twin is the second "slow"
    # Each begins with calls that nobody times, as long as the threads of the one before may spin; who goes on needs none.
    assert Scripted.leads[:4] == [("slow", 0.25), ("fast", 0.25), ("slow", 0.25), ("slow", 0.25)]
    assert found.ratios["slow", "fast"]["1"].ratio == pytest.approx(2)
    assert found.noise["2"].ratio == pytest.approx(1)
    assert found.latency["slow"]["1"].p50 in (20.0, 40.0, 60.0)
    assert set(found.latency) == {"slow", "slow (again)", "fast"}
    assert found.rounds["1"] >= 24


def test_offline_doubles_the_batch_while_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """100, 160 and 161 examples a second: the second doubling is not worth it, the third is not tried."""
    speeds = {"8": 100.0, "16": 160.0, "32": 161.0}

    class Batches(Scripted):
        def ask(self, message: dict[str, Any]) -> dict[str, Any]:
            if message["do"] != "turn":
                return {"bytes": 1}
            batch = message["figure"]
            return {"times": [1e3 * int(batch) / speeds[batch]] * message["least"], "preparing": []}

    monkeypatch.setattr(turns, "start", Batches)
    entry = Entry("slow", Path("slow"), "torch", {n: [] for n in (1, 8, 16, 32)}, scenarios=True)
    found = side_by_side.side_by_side([entry], [], Settings([8], 1, 0.01), twin=False)
    assert found.offline["slow"].tried == {b: pytest.approx(s) for b, s in speeds.items()}
    assert found.offline["slow"].batch_size == 32


def test_queries_are_files_and_texts(model: CompressedModel, saved: Path, tmp_path: Path) -> None:
    count = write_queries(tiny_data.examples(20), tmp_path / "queries")
    assert count == 16
    assert len(list((tmp_path / "queries").glob("*.bytes"))) == 16
    prepare = Preparation(tmp_path / "queries", saved, 1)
    for _ in range(17):
        prepare()  # goes round


def test_a_model_in_this_process_end_to_end(model: CompressedModel, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "start", TimedHere)
    monkeypatch.setattr(side_by_side, "FEWEST_ROUNDS", 6)
    calls = {size: model.family.calls(model.module, size) for size in sizes([1], True)}
    entry = Entry("tiny", saved, "torch", calls, saved, scenarios=True)
    found = side_by_side.side_by_side([entry], [], Settings([1], 1, 0.005), tiny_data.examples(20))
    end = found.end_to_end["tiny"]
    assert end.examples == 16
    assert 0 < end.preprocess_ms.p50 < end.total_ms.p50
    assert found.noise["1"].low <= found.noise["1"].ratio <= found.noise["1"].high
    assert found.started["tiny"]["load_seconds"] > 0
    assert found.joules == {"tiny": {}, "tiny (again)": {}} or not found.energy


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(UnavailableError, match=r"measuring .*nothing in onnxruntime failed: .*"),
        Turns([Contestant("x", tmp_path / "nothing", "onnxruntime", {"1": []})], 1),
    ):
        pass


@pytest.mark.slow
def test_a_process_of_its_own_waits_quietly_and_a_busy_neighbour_is_seen(model: CompressedModel, tmp_path: Path) -> None:
    """The neighbour is a real one, and is found by what the cores did, not by how long anything took."""
    from mmcompress.measure.headline import float_onnx  # needs the exporter
    from mmcompress.progress import SILENT

    onnx = float_onnx(model, tmp_path / "onnx", SILENT)
    given: dict[str, Any] = {"batch_sizes": [1], "threads": 1, "family": model.family, "module": model.module}
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        found = measure(onnx, "onnxruntime", seconds=1.0, **given)
    finally:
        busy.kill()
        busy.wait()
    assert found["busy_cores"] > BUSY_CORES
    assert found["start_seconds"] > found["load_seconds"] > 0
    calls = {"1": write_calls(model.family.calls(model.module, 1), tmp_path / "calls")}
    with Turns([Contestant(name, onnx, "onnxruntime", calls) for name in ("a", "b")], 2) as two:
        for number in range(10):
            two.take_turns(["a", "b"], "1", number, 0.02, 3, 1)
        assert two.idle_cores() < BUSY_CORES


def test_neighbours_are_what_the_cores_did_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 10 s the cores were busy for 19 s: 11 of them the models', 1 this process's, 7 somebody else's: 0.7 cores."""
    clock, own, machine = [100.0], [5.0], [1000.0]
    monkeypatch.setattr("mmcompress.measure.neighbours.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("mmcompress.measure.neighbours.time.process_time", lambda: own[0])
    monkeypatch.setattr(Neighbours, "_machine", lambda self: machine[0])
    others = Neighbours()
    clock[0], own[0], machine[0] = 110.0, 6.0, 1019.0
    assert others.busy_cores(11.0) == pytest.approx(0.7)
    assert others.busy_cores(30.0) == 0.0
