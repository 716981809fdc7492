"""Layers at maximal spacing, worked by hand, and through the pass."""

from __future__ import annotations

import itertools

import pytest
from pydantic import ValidationError

from mmcompress import passes
from mmcompress.context import Context
from mmcompress.errors import RecipeError
from mmcompress.pruning.criteria.base import Probe
from mmcompress.pruning.criteria.spacing import Spacing, spaced
from tests import tiny


@pytest.mark.parametrize(
    ("count", "keep", "places"),
    [
        (32, 2, [0, 31]),  # Distil-Whisper large
        (12, 3, [0, 5, 11]),
        (12, 4, [0, 3, 7, 11]),
        (12, 6, [0, 2, 4, 6, 8, 11]),
        (4, 1, [3]),
        (3, 3, [0, 1, 2]),
    ],
)
def test_places_by_hand(count: int, keep: int, places: list[int]) -> None:
    assert spaced(count, keep) == places


@pytest.mark.parametrize("count", [5, 12, 24])
def test_the_ends_stay_and_gaps_are_nearly_equal(count: int) -> None:
    for keep in range(2, count + 1):
        places = spaced(count, keep)
        gaps = {b - a for a, b in itertools.pairwise(places)}
        assert (places[0], places[-1], len(places)) == (0, count - 1, keep)
        assert max(gaps) - min(gaps) <= 1


def test_the_pass_keeps_them_and_their_weights() -> None:
    model = tiny.clip(num_hidden_layers=6)
    step = passes.Prune(axis="depth", ratio={"vision": 0.5}, criterion="spacing")
    pruned, facts = step.run(model, Context())
    assert facts["kept_layers"] == {"vision": [0, 2, 5]}
    ours, theirs = pruned.module.state_dict(), model.module.state_dict()
    for new, old in enumerate([0, 2, 5]):
        name = "vision_model.encoder.layers.{}.mlp.fc1.weight"
        assert ours[name.format(new)].equal(theirs[name.format(old)])


def test_other_axes_are_refused() -> None:
    with pytest.raises(ValidationError, match="spacing chooses whole layers; use it with axis: depth"):
        passes.Prune(axis="ffn", ratio=0.5, criterion="spacing")
    with pytest.raises(RecipeError, match="spacing chooses whole layers"):
        Spacing().unit_scores([], Probe(tiny.clip()))
