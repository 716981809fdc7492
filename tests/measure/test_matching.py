"""Accuracy and the area under the ROC curve of pairs."""

from __future__ import annotations

import numpy as np
import pytest

from mmcompress.measure.matching import accuracy, auroc


def test_accuracy_is_at_one_half() -> None:
    assert accuracy(np.array([0.5, 0.49, 0.9, 0.1]), np.array([1, 1, 0, 0])).tolist() == [1, 0, 0, 1]


def test_auroc_by_hand() -> None:
    """Of 2 x 3 pairs: 0.8 is above all three, 0.4 above one and level with one: 4.5 of 6."""
    found = auroc(np.array([0.8, 0.4, 0.5, 0.4, 0.1]), np.array([1, 1, 0, 0, 0]))
    assert found.mean() == pytest.approx(4.5 / 6)
    # placements 1 and 1/2 of those that fit; 1/2, 3/4 and 1 of those that do not
    expected = 0.75 + np.array([5 / 2 * 0.25, 5 / 2 * -0.25, 5 / 3 * -0.25, 0, 5 / 3 * 0.25])
    np.testing.assert_allclose(found, expected)


def test_auroc_is_the_share_of_pairs_and_its_spread_is_the_bootstrap_s() -> None:
    rng = np.random.default_rng(0)
    fits = (rng.random(400) < 0.3).astype(int)
    chance = np.round(rng.normal(size=400) + fits, 1)  # rounded: ties
    values = auroc(chance, fits)
    above = chance[fits == 1][:, None] - chance[fits == 0][None, :]
    area = (above > 0).mean() + (above == 0).mean() / 2
    assert values.mean() == pytest.approx(area)
    resampled = []
    for _ in range(400):
        rows = rng.integers(400, size=400)
        resampled.append(auroc(chance[rows], fits[rows]).mean())
    assert values.std() / np.sqrt(400) == pytest.approx(np.std(resampled), rel=0.15)


def test_auroc_needs_both_kinds() -> None:
    with pytest.raises(ValueError, match="fit"):
        auroc(np.array([0.1, 0.2]), np.array([1, 1]))
