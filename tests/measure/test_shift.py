"""AUROC and FPR95 of confidence: by hand, against scipy, and against a search of all thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mmcompress.measure import shift
from mmcompress.progress import SILENT
from mmcompress.runtimes.torch_predict import TorchPredict
from tests import tiny, tiny_data


def test_auroc_by_hand() -> None:
    # Of six pairs four are in order and one is a tie.
    assert shift.auroc(np.array([0.9, 0.5, 0.3]), np.array([0.5, 0.2])) == pytest.approx(4.5 / 6)


def test_both_are_those_of_scipys_rank_test_and_of_trying_every_threshold() -> None:
    rng = np.random.default_rng(0)
    inside, outside = np.round(rng.random(200), 2), np.round(rng.random(150) ** 1.5, 2)
    statistic = stats.mannwhitneyu(inside, outside).statistic
    assert shift.auroc(inside, outside) == pytest.approx(statistic / (200 * 150))
    rates = [np.mean(outside >= t) for t in np.unique(np.r_[inside, outside]) if np.mean(inside >= t) >= 0.95]
    assert shift.fpr95(inside, outside) == min(rates)


def test_fpr95_by_hand() -> None:
    # 19 of 20 own examples lie at or above 2; 2 and 5 of the other four do.
    inside = np.arange(1.0, 21.0)
    assert shift.fpr95(inside, np.array([0.0, 1.5, 2.0, 5.0])) == 0.5


def test_both_models_are_compared_on_the_same_resamples() -> None:
    rng = np.random.default_rng(1)
    inside, outside = rng.random(80) + 0.5, rng.random(60)
    same = shift.compared((inside, inside), (outside, outside), "other", softmax=True)
    assert same.auroc["difference"].value == 0
    assert same.auroc["difference"].high < 0.1
    found = shift.compared((inside, rng.random(80)), (outside, outside), "other", softmax=True)
    assert found.auroc["baseline"].low < shift.auroc(inside, outside) < found.auroc["baseline"].high
    assert found.auroc["difference"].high < 0
    assert found.fpr95["difference"].value > 0
    assert (found.n_inside, found.n_outside, found.score) == (80, 60, "softmax")


def test_confidence_is_the_largest_softmax_probability_of_the_stock_model() -> None:
    import torch

    model, examples = tiny.clip(), tiny_data.examples(7)
    texts = [[f"a photo of a {name} ."] for name in tiny_data.CLASSES]
    scale = float(model.module.logit_scale.exp())
    examples.columns.pop("audio")
    kept, found = shift.confidences(TorchPredict(model), model.processor, examples, texts, scale, SILENT)
    pixels = model.processor.pixels([examples.media(i) for i in range(7)])
    with torch.no_grad():
        logits = model.module(**model.processor.tokens([t for g in texts for t in g]), pixel_values=pixels).logits_per_image
    assert kept.tolist() == list(range(7))
    assert found == pytest.approx(logits.softmax(1).max(1).values.numpy(), rel=1e-4)
    _, nearest = shift.confidences(TorchPredict(model), model.processor, examples, texts, None, SILENT)
    assert nearest == pytest.approx((logits / scale).max(1).values.numpy(), rel=1e-4)
