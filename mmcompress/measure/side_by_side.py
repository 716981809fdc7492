"""The models that the headline compares, timed side by side at the end of a run; the baseline twice, which shows the noise.

Rows that are measured when their step ends lie minutes or hours apart, and a machine changes meanwhile. So what is quoted is
measured again: the processes of all models are there at once and take short turns (``turns.py``), until the ratios are known to
within 2% or the time is used up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from mmcompress.data.examples import Examples
from mmcompress.environment import affinity
from mmcompress.families.base import Call
from mmcompress.measure.end_to_end import write_queries
from mmcompress.measure.energy import Counters
from mmcompress.measure.latency import summarize
from mmcompress.measure.ratios import ratio
from mmcompress.measure.turns import Contestant, Figure, Turns, write_calls
from mmcompress.measure.worker import END_TO_END, WARM_UP
from mmcompress.report.schema_speed import Cost, EndToEnd, Latency, Offline, Ratio

TWIN = " (again)"
"""What the name of the first model's second process ends with."""
TURN_SECONDS, LEAST, UNTIMED = 0.06, 3, 2
FEWEST_ROUNDS = 24
PRECISE = 0.02
"""Ratios whose intervals reach no further than this to both sides are known well enough."""
PATIENCE = 5.0
"""How many times the recipe's seconds one figure may take, times the models that take turns."""
LARGEST_BATCH, WORTH = 32, 1.03
"""How far the batch size is doubled for the offline scenario, and by how much a doubling must raise the throughput."""


@dataclass(frozen=True)
class Entry:
    """A model to be timed.

    Attributes:
        name: what it is called in the result.
        folder: a model folder (torch) or one with ONNX components.
        calls: for each size of ``sizes`` the calls of one batch.
        model_folder: a folder with the processor's files; None where there is none.
        scenarios: whether the offline throughput and the time from file to answer are measured too.
    """

    name: str
    folder: Path
    runtime: str
    calls: Mapping[int, Sequence[Call]]
    model_folder: Path | None = None
    device: str = "cpu"
    scenarios: bool = False


@dataclass(frozen=True)
class Settings:
    """How long and with what models are timed; see the recipe's ``report``."""

    batch_sizes: Sequence[int]
    threads: int
    seconds: float


@dataclass
class Result:
    """What came of it.

    Attributes:
        latency: by model and batch size.
        ratios: of the first model to each, by name and batch size; that of its twin is the noise.
        rounds: by batch size.
        busy_cores: cores that other programs used.
        idle_cores: cores that the models used while they were to wait.
        energy: why joules are not known, or nothing.
        started: what starting each process cost, see ``worker.Timer.ready``.
    """

    latency: dict[str, dict[str, Latency]] = field(default_factory=dict)
    ratios: dict[tuple[str, str], dict[str, Ratio]] = field(default_factory=dict)
    offline: dict[str, Offline] = field(default_factory=dict)
    end_to_end: dict[str, EndToEnd] = field(default_factory=dict)
    joules: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    started: dict[str, dict[str, Any]] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    busy_cores: float = 0.0
    idle_cores: float = 0.0
    energy: str = ""
    affinity: list[int] = field(default_factory=list)
    noise: dict[str, Ratio] = field(default_factory=dict)


def fitting(memory: Mapping[str, int | None], available: int | None = None) -> tuple[list[str], list[str]]:
    """Which models can be in memory at once: names in the order of their importance, and those that there is no room for.

    Args:
        memory: each model's peak memory; None where it is not known, and then it is taken to fit.
        available: bytes that are free; of them four fifths are used.
    """
    room = 0.8 * (psutil.virtual_memory().available if available is None else available)
    kept: list[str] = []
    out: list[str] = []
    for name, bytes_ in memory.items():
        room -= bytes_ or 0
        (kept if room >= 0 else out).append(name)
        room += 0 if room >= 0 else bytes_ or 0
    return kept, out


def side_by_side(
    entries: Sequence[Entry],
    pairs: Sequence[tuple[str, str]],
    settings: Settings,
    examples: Examples | None = None,
    *,
    twin: bool = True,
) -> Result:
    """Times models that take turns.

    Args:
        entries: the first is the one that is timed twice.
        pairs: the ratios that are asked for, (slower, faster) by name.
        examples: for the time from file to answer; left out where None.
        twin: whether the first model is timed twice.

    Raises:
        UnavailableError: a process failed.
    """
    began, counters = time.monotonic(), Counters()
    batches = [str(size) for size in settings.batch_sizes]
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        queries = Path(scratch) / "queries"
        count = write_queries(examples, queries) if examples is not None and any(e.scenarios for e in entries) else 0
        contestants = [_contestant(e, settings, Path(scratch), queries if count else None) for e in entries]
        every = list(pairs)
        if twin:
            first = contestants[0]
            again = Contestant(first.name + TWIN, first.folder, first.runtime, first.calls, first.device)
            contestants.insert(1, again)
            every.append((first.name, again.name))
        with Turns(contestants, settings.threads, counters) as turns:
            result = Result(started=turns.started, affinity=affinity())
            for batch in batches:
                _in_turns(turns, batch, every, settings)
            result.busy_cores, result.idle_cores = turns.busy_cores(), turns.idle_cores()
            result.peak_memory_bytes = {name: turns.peak_memory_bytes(name) for name in turns.contestants}
            for entry in entries:
                if entry.scenarios:
                    result.offline[entry.name] = _offline(turns, entry.name, batches, settings)
            asked = [e.name for e in entries if turns.contestants[e.name].end_to_end is not None]
            if asked:
                _queries(turns, asked, settings)
    _collect(result, turns, batches, every, count)
    result.energy, result.seconds = counters.reason, time.monotonic() - began
    return result


def _contestant(entry: Entry, settings: Settings, scratch: Path, queries: Path | None) -> Contestant:
    place = scratch / f"{len(list(scratch.iterdir()))}"
    calls = {
        str(size): write_calls(entry.calls[size], place / str(size)) for size in sizes(settings.batch_sizes, entry.scenarios)
    }
    end_to_end = (queries, entry.model_folder) if entry.scenarios and queries and entry.model_folder else None
    return Contestant(entry.name, entry.folder, entry.runtime, calls, entry.device, end_to_end)


def sizes(batch_sizes: Sequence[int], scenarios: bool) -> list[int]:
    """The batch sizes that calls are needed for: those that are asked for, 1, and for the offline scenario larger ones."""
    return sorted({1, *batch_sizes, *(_doubled(max(batch_sizes)) if scenarios else ())})


def _doubled(size: int) -> list[int]:
    found = []
    while (size := 2 * size) <= LARGEST_BATCH:
        found.append(size)
    return found


def _in_turns(turns: Turns, batch: str, pairs: Sequence[tuple[str, str]], settings: Settings) -> None:
    """Rounds until all ratios are known well enough, or the time is used up."""
    names = list(turns.contestants)
    for name in names:
        turns.warm(name, batch, WARM_UP)
    end, number = time.monotonic() + PATIENCE * settings.seconds * len(names), 0
    while number < FEWEST_ROUNDS or time.monotonic() < end:
        turns.take_turns(names, batch, number, min(TURN_SECONDS, settings.seconds / FEWEST_ROUNDS), LEAST, UNTIMED)
        number += 1
        # Checking each time would find a narrow interval by chance sooner or later.
        if number % FEWEST_ROUNDS == 0 and all(_precise(turns, batch, *pair) for pair in pairs):
            break


def _precise(turns: Turns, batch: str, above: str, below: str) -> bool:
    found = ratio(turns.figures[above, batch].rounds, turns.figures[below, batch].rounds)
    return max(found.high / found.ratio, found.ratio / found.low) <= 1 + PRECISE


def _offline(turns: Turns, name: str, batches: Sequence[str], settings: Settings) -> Offline:
    """The batch size is doubled while that raises the throughput."""
    tried = {batch: throughput(turns.figures[name, batch], int(batch)) for batch in batches}
    for size in _doubled(max(map(int, batches))):
        best = max(tried.values())
        turns.warm(name, str(size), 1)
        turns.turn(name, str(size), settings.seconds / 4, LEAST)
        tried[str(size)] = throughput(turns.figures[name, str(size)], size)
        if tried[str(size)] < WORTH * best:
            break
    best_size = max(tried, key=lambda batch: tried[batch])
    return Offline(batch_size=int(best_size), examples_per_second=tried[best_size], tried=tried)


def throughput(figure: Figure, batch: int) -> float:
    """Examples a second over all timed calls."""
    return 1e3 * batch * len(figure.times) / sum(figure.times)


def _queries(turns: Turns, names: Sequence[str], settings: Settings) -> None:
    for name in names:
        turns.warm(name, END_TO_END, WARM_UP)
    end, number = time.monotonic() + settings.seconds * len(names), 0
    while number < FEWEST_ROUNDS or time.monotonic() < end:
        turns.take_turns(names, END_TO_END, number, min(TURN_SECONDS, settings.seconds / FEWEST_ROUNDS), LEAST, UNTIMED)
        number += 1


def _collect(result: Result, turns: Turns, batches: Sequence[str], pairs: Sequence[tuple[str, str]], queries: int) -> None:
    for name in turns.contestants:
        result.latency[name] = {batch: summarize(turns.figures[name, batch].times) for batch in batches}
        joules = {batch: _joules(turns.figures[name, batch], int(batch)) for batch in batches}
        result.joules[name] = {batch: value for batch, value in joules.items() if value is not None}
        asked = turns.figures.get((name, END_TO_END))
        if asked is not None:
            before = [t for times in asked.preparing for t in times]
            result.end_to_end[name] = EndToEnd(total_ms=summarize(asked.times), preprocess_ms=summarize(before), examples=queries)
    result.rounds = {batch: len(turns.figures[next(iter(turns.contestants)), batch].rounds) for batch in batches}
    for above, below in pairs:
        figures = {b: (turns.figures[above, b].rounds, turns.figures[below, b].rounds) for b in batches}
        found = {b: ratio(*rounds) for b, rounds in figures.items()}
        if below == above + TWIN:
            result.noise = found
        else:
            result.ratios[above, below] = found


def _joules(figure: Figure, batch: int) -> float | None:
    return None if figure.joules is None or not figure.calls else figure.joules / figure.calls / batch


def cost(latency: Mapping[str, Latency], offline: Offline | None, price_per_hour: float) -> Cost:
    """What a million examples cost: the hours that they take, times the price of an hour."""
    one = latency["1"].mean if "1" in latency else None
    return Cost(
        single_stream=None if one is None else one / 1e3 * 1e6 / 3600 * price_per_hour,
        offline=None if offline is None else 1e6 / offline.examples_per_second / 3600 * price_per_hour,
    )
