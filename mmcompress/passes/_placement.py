"""The search for the fastest placement of int8 in one component, as `quantize` makes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mmcompress.environment import cpu_features, int8_saturates
from mmcompress.measure.candidates import Candidates
from mmcompress.measure.placement import FLOAT, Choice, choose, why_not_faster
from mmcompress.quantization.arrangements import arrange, candidates
from mmcompress.runtimes.onnx_predict import open_session

SAMPLES = 32
"""Calibration examples that candidates are made and compared with; the one that is chosen is made again with all of them."""

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
    """

    include: Sequence[str]
    exclude: Sequence[str]
    narrow: bool
    min_cosine: float
    threads: int


@dataclass(frozen=True)
class Found:
    """A choice with its evidence.

    Attributes:
        profile: milliseconds by operator of one call of the chosen file.
        reasons: why int8 is not faster than float32, where it is not.
        seconds: what the search took.
    """

    choice: Choice
    profile: dict[str, float]
    reasons: list[str]
    seconds: float

    def as_data(self) -> dict[str, Any]:
        """For the report."""
        return {
            **self.choice.as_data(),
            "profile_ms": self.profile,
            "reasons": self.reasons,
            "seconds": self.seconds,
            "cpu_features": cpu_features(),
        }


def search(scheme: str, source: Path, feeds: Callable[[], Iterable[Arrays]], inputs: Arrays, settings: Settings) -> Found:
    """Makes, times and judges the placements that a scheme leaves open.

    Args:
        scheme: ``int8-static`` or ``int8-dynamic``.
        source: the component's float file.
        feeds: gives calibration batches.
        inputs: of the timed calls.
    """
    start = time.monotonic()
    few = _some(feeds(), SAMPLES)
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        files: dict[str, Path] = {FLOAT: source}
        broken: dict[str, str] = {}
        for name in candidates(scheme):
            target = Path(scratch) / f"{name}.onnx"
            try:
                arrange(
                    name,
                    source,
                    target,
                    lambda: few,
                    include=settings.include,
                    exclude=settings.exclude,
                    reduce_range=settings.narrow,
                )
                files[name] = target
            except (ValueError, RuntimeError) as e:
                broken[name] = f"cannot be made: {str(e).splitlines()[0][:200]}"
        wanted = outputs(source, few)
        cosines = {name: mean_cosine(outputs(path, few), wanted) for name, path in files.items() if name != FLOAT}
        timed = {name: path for name, path in files.items() if cosines.get(name, 1.0) >= settings.min_cosine}
        with Candidates(timed, inputs, settings.threads) as processes:
            choice = choose(cosines, broken, processes.take_turns, settings.min_cosine)
            profile = processes.profile(choice.chosen) if choice.chosen is not None else {}
    reasons = []
    if choice.chosen is not None and not choice.pays:
        float_ms = next(one.ms for one in choice.candidates if one.name == FLOAT)
        reasons = why_not_faster(profile, float_ms or 0.0, not int8_saturates())
    return Found(choice, profile, reasons, time.monotonic() - start)


def _some(batches: Iterable[Arrays], count: int) -> list[Arrays]:
    """The first rows of batches, as batches."""
    found: list[Arrays] = []
    have = 0
    for batch in batches:
        rows = len(next(iter(batch.values())))
        found.append({name: values[: count - have] for name, values in batch.items()})
        have += rows
        if have >= count:
            break
    return found


def outputs(path: Path, feeds: Iterable[Arrays]) -> np.ndarray:
    """A file's first output on batches, as rows (N, D)."""
    session = open_session(path)
    wanted = {i.name for i in session.get_inputs()}
    rows = []
    for batch in feeds:
        found = session.run(None, {name: values for name, values in batch.items() if name in wanted})[0]
        rows.append(found.reshape(-1, found.shape[-1]))
    return np.concatenate(rows)


def mean_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of rows (N, D)."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.where(norms > 1e-12, (a * b).sum(-1) / np.maximum(norms, 1e-12), 1.0).mean())
