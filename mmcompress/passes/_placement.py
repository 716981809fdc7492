"""The search for the fastest placement of int8 in one component, as `quantize` makes it.

Calibration data is read once, for all candidates; fused candidates are rewritten from the plain ones; a candidate's outputs come
from the process in which it is timed; the file that wins is the one that is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import save_file

from mmcompress.environment import cpu_features, int8_saturates
from mmcompress.errors import UnavailableError
from mmcompress.heap import keeping_blocks
from mmcompress.measure.placement import FLOAT, Choice, choose, why_not_faster
from mmcompress.measure.turns import Contestant, Turns
from mmcompress.quantization import onnx_graph
from mmcompress.quantization.arrangements import ARRANGEMENTS, arrange, candidates, fused, plain
from mmcompress.quantization.prepared import Prepared
from mmcompress.quantization.ranges import Ranges, collect_ranges
from mmcompress.quantization.result import QuantizationResult
from mmcompress.quantization.schemes import ArrangementName
from mmcompress.runtimes.onnx_predict import component_files
from mmcompress.runtimes.openers import OnnxRuntime

SAMPLES = 32
"""Calibration examples that the outputs of candidates are compared on."""
TURN_SECONDS, LEAST, UNTIMED = 0.06, 3, 1
FIGURE = "1"
PROCESS_BYTES, COPIES = 100_000_000, 2
"""What a timed process takes without a model, and how often it holds the weights: as they are, and laid out for its kernels."""

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """How placements are searched.

    Attributes:
        include: patterns of layers to quantize.
        exclude: patterns of layers to leave in float.
        narrow: whether weights take 7 bits.
        min_cosine: the least mean cosine to the float file's outputs.
        threads: of the timed processes.
        ranges: takes the ranges of a float file's activations from calibration batches.
        runtime: what files are timed in.
    """

    include: Sequence[str]
    exclude: Sequence[str]
    narrow: bool
    min_cosine: float
    threads: int
    ranges: Callable[[Path, Iterable[Arrays]], Ranges] = collect_ranges
    runtime: OnnxRuntime = "onnxruntime"


@dataclass(frozen=True)
class Found:
    """A choice with its evidence.

    Attributes:
        result: what is in the chosen file; None where none was chosen.
        runtime: what files were timed in.
        profile: milliseconds by operator of one call of the chosen file; empty in other runtimes than ONNX Runtime.
        reasons: why int8 is not faster than float32, where it is not.
        seconds: what the search took, by what it was spent on.
    """

    choice: Choice
    result: QuantizationResult | None
    runtime: OnnxRuntime
    profile: dict[str, float]
    reasons: list[str]
    seconds: dict[str, float]

    def as_data(self) -> dict[str, Any]:
        """For the report."""
        return {
            **self.choice.as_data(),
            "runtime": self.runtime,
            "profile_ms": self.profile,
            "reasons": self.reasons,
            "seconds": self.seconds,
            "cpu_features": cpu_features(),
        }


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, what: str) -> None:
        """What was done since the last call."""
        now = time.monotonic()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._last
        self._last = now


@dataclass
class Made:
    """Candidates as files.

    Attributes:
        files: by name.
        results: what is in each.
        broken: why others could not be made, or are none of their own.
    """

    files: dict[str, Path]
    results: dict[str, QuantizationResult]
    broken: dict[str, str]


def search(
    scheme: str,
    source: Path,
    target: Path,
    feeds: Callable[[], Iterable[Arrays]],
    inputs: Arrays,
    settings: Settings,
    ready: Path | None = None,
) -> Found:
    """Makes, times and judges the placements that a scheme leaves open.

    Args:
        scheme: ``int8-static`` or ``int8-dynamic``.
        source: the component's float file.
        target: where the fastest that keeps the bound is put; nothing is written where none does.
        feeds: gives calibration batches; read once.
        inputs: of the timed calls.
        ready: the float file that candidates are made from, where it is another one than they are compared with.
    """
    ready = ready or source
    clock, names = Clock(), candidates(scheme, settings.runtime)
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        few = _Few(Path(scratch), SAMPLES)
        ranges: Ranges | None = None
        if any(ARRANGEMENTS[name].ranges == "calibration" for name in names):
            ranges = settings.ranges(ready, few.watch(feeds()))
        else:
            few.take(feeds())
        clock.lap("calibration")
        with keeping_blocks():  # else the kernel takes as long as all of it: weights are read, rounded and written a dozen times
            made = _make(names, ready, Path(scratch), ranges, settings)
        clock.lap("files")
        choice, profile = _contest(source, made, few, inputs, settings, clock)
        result = None
        if choice.chosen is not None:
            result = made.results[choice.chosen]
            onnx_graph.move(made.files[choice.chosen], target)
    reasons = []
    if choice.chosen is not None and not choice.pays:
        float_ms = next(one.ms for one in choice.candidates if one.name == FLOAT)
        reasons = why_not_faster(profile, float_ms or 0.0, not int8_saturates())
    return Found(choice, result, settings.runtime, profile, reasons, clock.seconds)


def _make(names: Sequence[ArrangementName], source: Path, scratch: Path, ranges: Ranges | None, settings: Settings) -> Made:
    """All candidates' files, one in a folder; of files that are the same the first alone."""
    made, prepared = Made({}, {}, {}), Prepared(source, scratch)

    def calibrated() -> Ranges:
        if ranges is None:
            raise ValueError("this placement needs ranges from calibration")
        return ranges

    for name in names:
        target = scratch / name / source.name
        target.parent.mkdir()
        base = plain(name)
        try:
            if base != name and base in made.files:
                made.results[name] = fused(made.files[base], target, made.results[base])
            else:
                made.results[name] = arrange(
                    name,
                    prepared,
                    target,
                    calibrated,
                    include=settings.include,
                    exclude=settings.exclude,
                    reduce_range=settings.narrow,
                )
        except (ValueError, RuntimeError) as e:
            made.broken[name] = f"cannot be made: {str(e).splitlines()[0][:200]}"
            continue
        twin = next((other for other, path in made.files.items() if cmp(path, target, shallow=False)), None)
        if twin is None:
            made.files[name] = target
        else:
            made.broken[name] = f"the same file as {twin} here"
            target.unlink()
    return made


def _contest(
    source: Path, made: Made, few: _Few, inputs: Arrays, settings: Settings, clock: Clock
) -> tuple[Choice, dict[str, float]]:
    """All candidates in processes that take turns; the choice, and a profile of the chosen one."""
    given = few.folder / "inputs.safetensors"
    save_file({name: np.ascontiguousarray(values) for name, values in inputs.items()}, given)
    (component,) = component_files(source)
    calls = {FIGURE: [{"component": component, "times": 1, "inputs": str(given)}]}
    files = {FLOAT: source, **made.files}
    _check_memory(component, files)
    contestants = [Contestant(name, path, settings.runtime, calls) for name, path in files.items()]
    with Turns(contestants, settings.threads) as turns:
        clock.lap("opening")
        outputs = {name: np.concatenate([_rows(one) for one in turns.outputs(name, few.files)]) for name in files}
        cosines = {name: mean_cosine(outputs[name], outputs[FLOAT]) for name in made.files}
        clock.lap("outputs")

        def take_turns(names: Sequence[str], number: int) -> dict[str, list[float]]:
            turns.take_turns(names, FIGURE, number, TURN_SECONDS, LEAST, UNTIMED)
            return {name: turns.figures[name, FIGURE].rounds[-1] for name in names}

        choice = choose(cosines, made.broken, take_turns, settings.min_cosine)
        profiled = choice.chosen if settings.runtime == "onnxruntime" else None
        profile = turns.profile(profiled) if profiled is not None else {}
        clock.lap("timing")
    return choice, profile


def _check_memory(component: str, files: Mapping[str, Path]) -> None:
    """Refuses to open more than fits into memory at once.

    Raises:
        UnavailableError: It would not fit.
    """
    needed = sum(PROCESS_BYTES + COPIES * onnx_graph.file_bytes(path) for path in files.values())
    free = psutil.virtual_memory().available
    if needed > free:
        raise UnavailableError(
            f"quantize: placement: measure: the {len(files)} files of {component} that take turns need about "
            f"{needed / 1e9:.1f} GB of memory together, and {free / 1e9:.1f} GB are free; set placement: fixed, or name one"
        )


class _Few:
    """The first rows of calibration batches as files that other processes read."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.files = folder, list[Path]()
        self._left = count

    def watch(self, batches: Iterable[Arrays]) -> Iterator[Arrays]:
        """Hands batches on."""
        for batch in batches:
            if self._left > 0:
                rows = min(self._left, len(next(iter(batch.values()))))
                path = self.folder / f"few-{len(self.files)}.safetensors"
                save_file({name: np.ascontiguousarray(values[:rows]) for name, values in batch.items()}, path)
                self.files.append(path)
                self._left -= rows
            yield batch

    def take(self, batches: Iterable[Arrays]) -> None:
        """Reads no further than needed."""
        for _ in self.watch(batches):
            if self._left <= 0:
                break


def _rows(values: np.ndarray) -> np.ndarray:
    """An output as rows (N, D)."""
    return values.reshape(-1, values.shape[-1])


def mean_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of rows (N, D)."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.where(norms > 1e-12, (a * b).sum(-1) / np.maximum(norms, 1e-12), 1.0).mean())
