"""The choice among placements, from timings that are given; and the reasons where int8 does not pay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from mmcompress.measure.placement import FLOAT, ROUNDS, choose, why_not_faster

SPEED = {FLOAT: 30.0, "a": 11.5, "b": 10.0, "c": 11.0, "d": 20.0, "e": 25.0}


class Fake:
    """Gives the same times, and counts how often each was asked for."""

    def __init__(self, speed: dict[str, float]) -> None:
        self.speed, self.asked = speed, Counter[str]()

    def __call__(self, names: Sequence[str], number: int) -> dict[str, list[float]]:
        self.asked.update(names)
        return {name: [self.speed[name], self.speed[name] + 1, self.speed[name] - 1] for name in names}


def test_the_fastest_that_keeps_the_bound_is_chosen_and_slow_ones_are_dropped_early() -> None:
    fake = Fake(SPEED)
    cosines = {"a": 0.999, "b": 0.99, "c": 0.998, "d": 0.9999, "e": 0.9999}
    choice = choose(cosines, {"f": "cannot be made: too large"}, fake, 0.995)
    assert choice.chosen == "c"
    assert choice.speedup is not None
    assert (choice.speedup.ratio, choice.speedup.rounds) == (pytest.approx(30 / 11), sum(ROUNDS))
    assert choice.pays
    # b is fastest but wrong: it is not even timed. d and e go after the first stage, a and c stay to the end.
    assert fake.asked == {FLOAT: sum(ROUNDS), "a": sum(ROUNDS), "c": sum(ROUNDS), "d": ROUNDS[0], "e": ROUNDS[0]}
    why = {one.name: one.why for one in choice.candidates}
    assert why == {
        "c": "chosen",
        "a": "slower in the last stage: 4.5% slower than c",
        "d": "dropped after stage 1: 81.8% slower than c",
        "e": "dropped after stage 1: 127.3% slower than c",
        FLOAT: "what the others are compared with",
        "b": "its cosine of 0.9900 is under the bound of 0.995",
        "f": "cannot be made: too large",
    }
    assert [one.name for one in choice.candidates] == ["c", "a", "d", "e", FLOAT, "b", "f"]


def test_a_clear_winner_ends_the_contest() -> None:
    fake = Fake(SPEED)
    choice = choose(dict.fromkeys(("c", "d", "e"), 1.0), {}, fake, 0.9)
    # d and e are slower by more than a twentieth in their fastest rounds too; then c runs alone for one stage.
    assert fake.asked == {FLOAT: 9, "c": 9, "d": 3, "e": 3}
    assert choice.chosen == "c"


def test_what_is_near_in_its_fastest_round_goes_on_up_to_half() -> None:
    slow_rounds = iter((1.0, 1.1, 1.1))

    def noisy(names: Sequence[str], number: int) -> dict[str, list[float]]:
        factor = next(slow_rounds, 1.0)
        return {name: [SPEED[name] * (factor if name == "a" else 1.0)] for name in names}

    choice = choose({"a": 1.0, "c": 1.0, "d": 1.0}, {}, noisy, 0.9)
    rounds = {one.name: one.rounds for one in choice.candidates}
    assert rounds == {FLOAT: sum(ROUNDS), "c": sum(ROUNDS), "a": sum(ROUNDS), "d": ROUNDS[0]}


def test_nothing_is_chosen_where_nothing_keeps_the_bound() -> None:
    choice = choose({"a": 0.9}, {}, Fake(SPEED), 0.995)
    assert (choice.chosen, choice.speedup, choice.pays) == (None, None, False)


def test_one_busy_round_changes_nothing() -> None:
    calls = 0

    def disturbed(names: Sequence[str], number: int) -> dict[str, list[float]]:
        nonlocal calls
        calls += 1
        return {name: [SPEED[name] * (5 if calls == 2 and name == "c" else 1)] for name in names}

    choice = choose({"a": 1.0, "c": 1.0}, {}, disturbed, 0.9)
    assert choice.chosen == "c"
    found = next(one for one in choice.candidates if one.name == "c")
    assert (found.ms, found.low, found.high, found.rounds) == (11, 11, 55, sum(ROUNDS))


def test_int8_that_is_no_faster_is_said_so_with_reasons() -> None:
    choice = choose({"a": 1.0}, {}, Fake({FLOAT: 10.0, "a": 9.9}), 0.9)
    assert choice.chosen == "a"
    assert not choice.pays
    profile = {"MatMulIntegerToFloat": 3.0, "Add": 5.0, "Transpose": 2.0}
    slow, unfused, small = why_not_faster(profile, 0.5, vnni=False)
    assert "no VNNI" in slow
    assert unfused == "only 30% of a call's time are integer products; most of the rest: Add 50%, Transpose 20%"
    assert small == "a call takes 0.50 ms in float32: starting operators costs as much as multiplying"
    assert why_not_faster({"QGemm": 9.0, "Add": 1.0}, 50.0, vnni=True) == [
        "90% of a call's time are integer products, which are no faster here than float ones for these shapes"
    ]
