"""The choice of ratios from curves: worked by hand, against brute force, and how a cut is spread over rounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from mmcompress.pruning.allocate import Choice, allocate, envelope, interpolate, spread


def choices(costs: Sequence[float], losses: Sequence[float]) -> list[Choice]:
    """From the uncut size down."""
    return [Choice(len(costs) - i, i / len(costs), c, loss) for i, (c, loss) in enumerate(zip(costs, losses, strict=True))]


def brute(given: Mapping[str, Sequence[Choice]], budget: float) -> float:
    """The least sum of losses that fits, over all combinations."""
    sums = [
        sum(c.loss for c in combination)
        for combination in itertools.product(*given.values())
        if sum(c.cost for c in combination) <= budget
    ]
    return min(sums, default=math.inf)


def test_two_towers_worked_by_hand() -> None:
    # Saving 20 of the vision tower costs 1 point and of the text tower 4; 40 cost 5 and 9; 60 cost 20 and 10.
    vision, text = choices([0, -20, -40, -60], [0, 0.01, 0.05, 0.20]), choices([0, -20, -40, -60], [0, 0.04, 0.09, 0.10])
    picks = {budget: allocate({"vision": vision, "text": text}, budget) for budget in (-20, -40, -60, -80, -120)}
    found = {b: (p["vision"].cost, p["text"].cost) for b, p in picks.items() if p is not None}
    assert found == {
        -20: (-20, 0),  # 1 point
        -40: (-20, -20),  # 5 points, as (-40, 0), and more even
        -60: (-40, -20),  # 9 points, against 10 for (0, -60), 10 for (-20, -40) and 20 for (-60, 0)
        -80: (-20, -60),  # 11 points, against 14 for (-40, -40)
        -120: (-60, -60),
    }
    assert allocate({"vision": vision, "text": text}, -121) is None


def test_of_equal_losses_the_even_one_is_taken() -> None:
    flat = choices([0, -10, -20, -30], [0, 0, 0, 0])
    picked = allocate({"vision": flat, "text": flat}, -20)
    assert picked is not None
    assert [c.cost for c in picked.values()] == [-10, -10]
    # And no more than is asked for.
    nothing = allocate({"vision": flat, "text": flat}, 0)
    assert nothing is not None
    assert [c.share for c in nothing.values()] == [0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_as_good_as_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    given = {}
    for tower in ("vision", "text", "question"):
        size = int(rng.integers(4, 9))
        costs, losses = -np.sort(rng.uniform(0, 50, size)), np.sort(rng.uniform(0, 0.4, size))
        given[tower] = choices([0.0, *costs], [0.0, *losses])
    for budget in (-5.0, -30.0, -70.0, -110.0, -500.0):
        picked, least = allocate(given, budget), brute(given, budget)
        if picked is None:
            assert least == math.inf
        else:
            assert sum(c.cost for c in picked.values()) <= budget
            # The share's own little price may decide between losses that differ by less.
            assert sum(c.loss for c in picked.values()) == pytest.approx(least, abs=3e-6)


def test_the_envelope_rises_and_lies_on_or_above_what_was_measured() -> None:
    assert envelope([-0.01, 0.02, 0.01, 0.05]) == [0.0, 0.02, 0.02, 0.05]
    assert envelope([]) == []
    measured = np.random.default_rng(0).normal(size=50).tolist()
    found = envelope(measured)
    # An independent way: the largest of what came before.
    assert found == [max(0.0, *measured[: i + 1]) for i in range(50)]


def test_between_measured_points_lies_a_straight_line_and_beyond_them_nothing() -> None:
    assert interpolate(0.375, [0.0, 0.25, 0.5], [0.0, 0.1, 0.3]) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"0\.6 lies outside"):
        interpolate(0.6, [0.0, 0.25, 0.5], [0.0, 0.1, 0.3])


def test_rounds_cut_the_same_share_each() -> None:
    assert spread(800, 100, 3) == [400, 200, 100]  # half each time
    assert spread(96, 24, 3, 8) == [64, 40, 24]  # 60.5, 38.1: to the nearest multiple of 8
    assert spread(12, 3, 1) == [3]
    assert spread(3, 2, 3) == [3, 2, 2]  # 2.6, 2.3


@pytest.mark.parametrize(("size", "final", "rounds", "step"), [(3072, 768, 5, 8), (100, 96, 4, 8), (7, 1, 10, 1), (64, 64, 3, 8)])
def test_rounds_never_grow_and_end_where_they_should(size: int, final: int, rounds: int, step: int) -> None:
    found = spread(size, final, rounds, step)
    assert len(found) == rounds
    assert found[-1] == final
    assert all(a >= b for a, b in itertools.pairwise([size, *found]))
    assert all(kept % step == 0 or kept == size for kept in found)
