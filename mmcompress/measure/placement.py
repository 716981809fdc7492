"""The fastest of several ONNX files that keep a model's answers, found by timing them and dropping the slow ones early.

Successive halving (Jamieson and Talwalkar, Non-stochastic Best Arm Identification, 2016): all files take turns for a few short
rounds, the slower half goes, those that are left take more turns. What slows the machine down for a while slows all of them down.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmcompress.measure.ratios import ratio
from mmcompress.report.schema_speed import Ratio

FLOAT = "float32"
"""What the unquantized file is called among the candidates; it is never dropped, as it is what the others are compared with."""
ROUNDS = (3, 6, 16)
"""Rounds of each stage; after a stage the slower half goes, and whatever is clearly slower than the fastest."""
CLEARLY = 1.05
"""A file is clearly slower if even its fastest round took this times the median round of the fastest file."""

WORTH = 1.02
"""A speed-up below this is none."""

TakeTurns = Callable[[Sequence[str], int], dict[str, list[float]]]
"""One round and its number: each of the named files for a short while; milliseconds of single calls by name."""


@dataclass(frozen=True)
class Candidate:
    """What came of one file.

    Attributes:
        name: the arrangement.
        ms: median over the rounds of each round's median; None where it was not timed.
        low: the fastest round's median.
        high: the slowest round's.
        rounds: how many rounds it took part in.
        cosine: mean cosine of its outputs to the float file's on calibration data; None where it was not built.
        why: why it was not chosen, or "chosen".
    """

    name: str
    ms: float | None
    low: float | None
    high: float | None
    rounds: int
    cosine: float | None
    why: str


@dataclass(frozen=True)
class Choice:
    """Which file was chosen, and what was seen on the way.

    Attributes:
        chosen: the arrangement's name; None where none keeps the bound.
        speedup: the time of float32 over that of the chosen one, round by round, see ``measure.ratios``.
        candidates: all of them, the fastest first.
    """

    chosen: str | None
    speedup: Ratio | None
    candidates: tuple[Candidate, ...]

    @property
    def pays(self) -> bool:
        """Whether the chosen file is faster than the float one: the whole interval says so, and by more than a trifle."""
        return self.speedup is not None and self.speedup.low > 1 and self.speedup.ratio >= WORTH

    def as_data(self) -> dict[str, Any]:
        """For the report."""
        speedup = None if self.speedup is None else self.speedup.model_dump()
        return {**asdict(self), "speedup": speedup, "pays": self.pays}


def choose(cosines: Mapping[str, float], broken: Mapping[str, str], take_turns: TakeTurns, min_cosine: float) -> Choice:
    """Times candidates in stages and picks the fastest that keeps the bound.

    Args:
        cosines: of every candidate that was built; those under the bound are not timed.
        broken: why the others could not be built, or need not be timed.
        take_turns: times one round; is given ``FLOAT`` as well.
        min_cosine: the bound.
    """
    alive = [name for name, cosine in cosines.items() if cosine >= min_cosine]
    calls: dict[str, list[list[float]]] = {FLOAT: [], **{name: [] for name in alive}}
    dropped: dict[str, int] = {}
    number = 0
    for stage, rounds in enumerate(ROUNDS):
        for _ in range(rounds):
            for name, times in take_turns([FLOAT, *alive], number).items():
                calls[name].append(times)
            number += 1
        alive.sort(key=lambda name: _middle(calls[name]))
        if stage < len(ROUNDS) - 1:
            kept = _kept(alive, calls)
            dropped |= dict.fromkeys([name for name in alive if name not in kept], stage + 1)
            alive = kept
            if stage and len(alive) == 1:
                break  # there is nothing left to decide, and the rounds do for the speed-up
    best = alive[0] if alive else None
    found = [_timed(name, calls, best, dropped, cosines) for name in calls]
    for name, cosine in cosines.items():
        if name not in calls:
            why = f"its cosine of {cosine:.4f} is under the bound of {min_cosine}"
            found.append(Candidate(name, None, None, None, 0, cosine, why))
    found += [Candidate(name, None, None, None, 0, None, why) for name, why in broken.items()]
    found.sort(key=lambda one: (one.ms is None, one.ms or 0.0, one.name))
    return Choice(best, ratio(calls[FLOAT], calls[best]) if best is not None else None, tuple(found))


def _middle(calls: Sequence[Sequence[float]]) -> float:
    """The median over rounds of each round's median."""
    return statistics.median(statistics.median(times) for times in calls)


def _kept(alive: Sequence[str], calls: Mapping[str, Sequence[Sequence[float]]]) -> list[str]:
    """Those that go on, of candidates in the order of their medians: the faster half, less what is clearly slower."""
    limit = CLEARLY * _middle(calls[alive[0]]) if alive else 0.0
    near = [name for name in alive if min(statistics.median(times) for times in calls[name]) <= limit]
    return near[: max(2, (len(alive) + 1) // 2)]


def _timed(
    name: str,
    calls: Mapping[str, Sequence[Sequence[float]]],
    best: str | None,
    dropped: Mapping[str, int],
    cosines: Mapping[str, float],
) -> Candidate:
    rounds = [statistics.median(times) for times in calls[name]]
    if name == best:
        why = "chosen"
    elif name == FLOAT:
        why = "what the others are compared with"
    else:
        # In the rounds that both took part in: the machine may have been slower in others.
        theirs = statistics.median(statistics.median(times) for times in calls[str(best)][: len(rounds)])
        slower = 100 * (statistics.median(rounds) / theirs - 1)
        when = f"dropped after stage {dropped[name]}" if name in dropped else "slower in the last stage"
        why = f"{when}: {slower:.1f}% slower than {best}"
    middle = statistics.median(rounds)
    return Candidate(name, middle, min(rounds), max(rounds), len(rounds), cosines.get(name, 1.0), why)


INTEGER_KERNELS = (
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QAttention",
    "QGemm",
    "QLinearMatMul",
    "QLinearConv",
    "MatMulInteger",
    "ConvInteger",
)
"""ONNX Runtime's operators that multiply integers."""
SMALL_MS, MOSTLY = 1.0, 0.5


def why_not_faster(profile: Mapping[str, float], float_ms: float, vnni: bool) -> list[str]:
    """Reasons from evidence why int8 is no faster than float32, a sentence each.

    Args:
        profile: milliseconds by operator of one call of the fastest int8 file.
        float_ms: of one call of the float file.
        vnni: whether the processor multiplies and adds bytes in one instruction.
    """
    found = []
    if not vnni:
        found.append("this processor has no VNNI: integer products take as many instructions as float ones")
    total = sum(profile.values())
    integer = sum(ms for kind, ms in profile.items() if kind in INTEGER_KERNELS)
    if total and integer / total < MOSTLY:
        rest = sorted(((ms, kind) for kind, ms in profile.items() if kind not in INTEGER_KERNELS), reverse=True)[:3]
        words = ", ".join(f"{kind} {100 * ms / total:.0f}%" for ms, kind in rest)
        found.append(f"only {100 * integer / total:.0f}% of a call's time are integer products; most of the rest: {words}")
    if float_ms < SMALL_MS:
        found.append(f"a call takes {float_ms:.2f} ms in float32: starting operators costs as much as multiplying")
    if not found:
        share = f"{100 * integer / total:.0f}% of a call's time are" if total else "its time is that of"
        found.append(f"{share} integer products, which are no faster here than float ones for these shapes")
    return found
