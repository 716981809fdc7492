"""Faults that a compressed model may have are planted in the bundled model, and must be named on the report's first screen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
import torch

from mmcompress.data import shapes
from mmcompress.data.examples import Examples
from mmcompress.data.prepare import prepared
from mmcompress.measure.rows import Meter
from mmcompress.model import CompressedModel, load
from mmcompress.progress import SILENT
from mmcompress.recipe import Recipe, make_recipe
from mmcompress.report.schema import Report, Row
from mmcompress.report.sections import behaviour, calibration
from mmcompress.report.text import bad_news
from mmcompress.runtimes.base import Predict
from mmcompress.runtimes.torch_predict import TorchPredict
from tests.report import examples as made_up

CLASSES = ["red circle", "red hexagon", "orange circle", "orange hexagon", "blue diamond", "purple diamond"]
NOISE = 0.8


@cache
def recipe() -> Recipe:
    return make_recipe(
        {
            "name": "faults",
            "model": "bundled:shapes-clip",
            "task": {"type": "zero-shot-image-classification", "templates": ["a {}"]},
            "data": {"eval": {"path": "bundled:shapes"}},
        }
    )


@cache
def examples() -> Examples:
    """171 pictures of six classes that are easily taken for one another, with a column that means nothing."""
    numbers = [shapes.CLASSES.index(name) for name in CLASSES]
    found = [row for row in shapes.Shapes("test", 1200, 0) if row["label"] in numbers]
    rows = [
        {"image": row["image"], "label": numbers.index(row["label"]), "side": ("left", "right")[i % 2]}
        for i, row in enumerate(found)
    ]
    return Examples(rows, "shapes", {"image": "image", "label": "label"}, CLASSES)


def noisy(seed: int, share: float) -> CompressedModel:
    """The bundled model with noise in its weights: one that makes mistakes."""
    model = load("bundled:shapes-clip")
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.module.vision_model.parameters():
            if p.dim() > 1:
                p += share * p.std() * torch.randn_like(p)
    return model


class Faulty:
    """A model whose text tower takes one class for another, or whose vision tower sees nothing in the dark."""

    runtime = "torch"

    def __init__(self, inner: Predict, swap: tuple[np.ndarray, np.ndarray] | None = None, dark: float = -math.inf) -> None:
        self.inner, self.components, self.swap, self.dark = inner, inner.components, swap, dark

    def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self.inner(component, inputs)
        name, values = next(iter(found.items()))
        values = values.copy()
        if component == "text_model" and self.swap is not None:
            a, b = self.swap
            ids = inputs["input_ids"]
            one, two = ((ids == tokens).all(axis=1) for tokens in (a, b))
            values[one], values[two] = values[two], values[one]
        if component == "vision_model":
            below = inputs["pixel_values"].mean(axis=(1, 2, 3)) < self.dark
            values[below] = np.roll(values, 1, axis=1)[below]
        return {**found, name: values}

    def cache(self, component: str) -> Mapping[str, tuple[int, int]]:
        return self.inner.cache(component)


def score(meter: Meter, step: str, model: CompressedModel, predict: Predict | None = None) -> Row:
    row = Row(step=step, runtime="torch", parameters=1, disk_bytes=1)
    meter._score(row, predict or TorchPredict(model), model)
    if step == "baseline":
        meter.baseline = meter.scores["baseline.torch"]
    return row


def report_of(before: Row, after: Row) -> Report:
    full = made_up.full()
    totals = full.totals.model_copy(update={"final_step": after.step, "final_runtime": "torch", "metric": "accuracy"})
    return full.model_copy(update={"rows": [before, after], "totals": totals, "gates": [], "warnings": []})


@pytest.fixture(scope="module")
def run() -> tuple[Meter, CompressedModel, Row]:
    meter = Meter(recipe().task, examples(), recipe().report, SILENT)
    model = noisy(0, NOISE)
    return meter, model, score(meter, "baseline", model)


def told(report: Report) -> list[str]:
    """What the two parts put on the first screen; all of it must be among the report's alerts."""
    own = [a.text for a in [*behaviour.alerts(report), *calibration.alerts(report)]]
    assert set(own) <= {a.text for a in bad_news(report)}
    return own


def test_the_baseline_makes_mistakes_but_is_no_guesser(run: tuple[Meter, CompressedModel, Row]) -> None:
    assert 0.7 < run[2].quality["accuracy"].value < 0.95


def test_two_swapped_classes_are_named(run: tuple[Meter, CompressedModel, Row]) -> None:
    meter, model, before = run
    tokens = model.processor.tokens([f"a {name}" for name in examples().classes or []])["input_ids"].numpy()
    after = score(meter, "1-swapped", model, Faulty(TorchPredict(model), swap=(tokens[0], tokens[4])))
    report = report_of(before, after)
    first = told(report)[0]
    assert "“red circle” and “blue diamond” look swapped" in first
    # The slices of these classes are worse because they are swapped: that is not told twice.
    assert not any("Clearly worse on class red circle" in text for text in told(report))
    page = behaviour.section(report, None)
    assert page is not None
    assert "look swapped" in page.html


def test_an_over_confident_model_is_named(run: tuple[Meter, CompressedModel, Row]) -> None:
    meter, _, before = run
    sure = noisy(0, NOISE)
    with torch.no_grad():
        sure.module.logit_scale += math.log(4)
    after = score(meter, "1-sure", sure)
    texts = told(report_of(before, after))
    assert len(texts) == 1
    assert texts[0].startswith("The final model is over-confident")
    assert after.behaviour is not None
    assert after.behaviour.flips is not None
    assert after.behaviour.flips.share.value == 0
    with torch.no_grad():
        sure.module.logit_scale -= 2 * math.log(4)
    texts = told(report_of(before, score(meter, "1-unsure", sure)))
    assert [t.startswith("The final model is under-confident") for t in texts] == [True]


def test_a_model_that_fails_in_the_dark_is_named(run: tuple[Meter, CompressedModel, Row]) -> None:
    meter, model, before = run
    blocks = [media["pixel_values"].mean(axis=(1, 2, 3)) for _, media in prepared(meter.examples, model.processor)]
    limit = float(np.quantile(np.concatenate(blocks), 1 / 3))
    after = score(meter, "1-blind", model, Faulty(TorchPredict(model), dark=limit))
    texts = told(report_of(before, after))
    assert any(text.startswith("Clearly worse on dark pictures (brightness up to") for text in texts)
    assert not any("bright pictures" in text or "side" in text for text in texts)
    assert after.behaviour is not None
    assert after.behaviour.slices is not None
    assert after.behaviour.slices.worst[0].by == "brightness"


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_healthy_models_raise_no_alarm(run: tuple[Meter, CompressedModel, Row], seed: int | None) -> None:
    """The baseline against itself, and models with a little more noise, whose answers flip here and there."""
    meter, model, before = run
    other = model
    if seed is not None:
        other = noisy(0, NOISE)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in other.module.vision_model.parameters():
                p += 0.15 * p.std() * torch.randn_like(p) if p.numel() > 1 else 0
    after = score(meter, "1-healthy", other)
    assert told(report_of(before, after)) == []
    found = after.behaviour
    assert found is not None
    assert found.flips is not None
    assert (found.flips.share.value == 0) == (seed is None)
    if seed is None:
        assert found.agreement is not None
        assert found.agreement.kl is not None
        assert found.agreement.kl.value == pytest.approx(0, abs=1e-9)
        assert found.drift["vision"].cosine is not None
        assert found.drift["vision"].cosine.value == pytest.approx(1)
        assert found.slices is not None
        assert found.slices.worst == []
