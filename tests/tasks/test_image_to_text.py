"""Captions, matching, and what all answering tasks share: batches, losses and scores on answers made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import mmcompress as mm
from mmcompress.context import Context
from mmcompress.data.examples import Examples
from mmcompress.errors import DataError, ModelError
from mmcompress.families.base import Outputs
from mmcompress.families.blip import BlipCaptions, BlipMatches
from mmcompress.measure.quality import changes, load_scores, qualities, save_scores
from mmcompress.processor import Processor
from mmcompress.progress import SILENT
from mmcompress.recipe import make_recipe
from mmcompress.runtimes.base import Predict
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks._respond import AT_ONCE, answer_loss
from mmcompress.tasks.image_text_matching import ImageTextMatching
from mmcompress.tasks.image_to_text import ImageToText
from tests import tiny
from tests.families import tiny_blip

CAPTIONS = ImageToText(type="image-to-text")
MATCHING = ImageTextMatching(type="image-text-matching")


def examples(count: int = 30, **changed: Any) -> Examples:
    """Colours with a caption each, or with what ``changed`` puts into the columns."""
    columns = {**tiny.rows(count), **changed}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return Examples(rows, "test", {"image": "image", "text": "caption"})


def colour(values: np.ndarray) -> str:
    """The colour of a prepared picture (3, H, W)."""
    processor = tiny_blip.captions().processor.image_processor
    mean = values.mean(axis=(1, 2)) * np.array(processor.image_std) + np.array(processor.image_mean)
    return min(tiny.COLOURS, key=lambda name: float(np.abs(np.array(tiny.COLOURS[name]) / 255 - mean).sum()))


class Eyes(BlipCaptions, BlipMatches):
    """Says what colour a picture has, unless told to err; never runs a model."""

    def __init__(self, swap: Mapping[str, str] | None = None) -> None:
        self.swap = swap or {}
        self.asked: list[Any] = []

    def _says(self, values: np.ndarray) -> str:
        return self.swap.get(colour(values), colour(values))

    def respond(
        self, predict: Predict, processor: Processor, media: Any, prompts: Sequence[str] | None, max_new_tokens: int
    ) -> list[str]:
        self.asked.append((len(media["pixel_values"]), prompts, max_new_tokens))
        return [f"A {self._says(values)} square." for values in media["pixel_values"]]

    def match(self, predict: Predict, processor: Processor, media: Any, texts: Sequence[str]) -> np.ndarray:
        return np.array([0.9 if self._says(v) in text else 0.2 for v, text in zip(media["pixel_values"], texts, strict=True)])


def eyes(swap: Mapping[str, str] | None = None) -> tuple[Predict, Processor, Eyes]:
    model = tiny_blip.captions()
    family = Eyes(swap)
    model.processor.family = family
    return TorchPredict(model), model.processor, family


def test_right_captions_score_in_full() -> None:
    predict, processor, family = eyes()
    scores = CAPTIONS.evaluate(predict, processor, examples(), SILENT)
    found = qualities(scores)
    assert set(found) == set(CAPTIONS.metrics)
    assert found["exact_match"].value == 1
    assert found["exact_match"].n == 30
    assert found["cider"].value > 5
    assert found["bleu4"].value == 0, "no caption has four words"
    assert family.asked == [(AT_ONCE, None, 30), (30 - AT_ONCE, None, 30)]


def test_a_wrong_colour_costs_every_metric_and_is_counted_against_the_baseline(tmp_path: Path) -> None:
    references = [f"a {text.split()[1]} square on the floor" for text in tiny.rows(30)["caption"]]
    data = examples(caption=[[text, short] for text, short in zip(references, tiny.rows(30)["caption"], strict=True)])
    predict, processor, _ = eyes()
    best = CAPTIONS.evaluate(predict, processor, data, SILENT)
    predict, processor, _ = eyes({"red": "blue"})
    worse = CAPTIONS.evaluate(predict, processor, data, SILENT)
    red = sum("red" in text for text in references)
    assert qualities(best)["exact_match"].value == 1
    assert qualities(worse)["exact_match"].value == pytest.approx(1 - red / 30)
    save_scores(best, tmp_path / "scores.safetensors")
    found = changes(worse, load_scores(tmp_path / "scores.safetensors"))
    assert found["exact_match"].lost == red
    assert found["cider"].difference < 0
    assert found["cider"].verdict == "worse"
    assert (worse.answers != best.answers).sum() == red  # type: ignore[union-attr]
    assert found["bleu4"].difference == pytest.approx(qualities(worse)["bleu4"].value - qualities(best)["bleu4"].value)


def test_the_prompt_reaches_the_model_and_the_answer_is_cut() -> None:
    predict, processor, family = eyes()
    ImageToText(type="image-to-text", prompt="a photo of", max_new_tokens=3).evaluate(predict, processor, examples(4), SILENT)
    assert family.asked == [(4, ["a photo of"] * 4, 3)]


def test_damaged_pictures_are_left_out_where_that_is_allowed() -> None:
    pictures = tiny.rows(20)["image"]
    pictures[7] = {"bytes": b"no picture", "path": None}
    data = examples(20, image=pictures)
    predict, processor, _ = eyes()
    with pytest.raises(DataError, match="row 7"):
        CAPTIONS.evaluate(predict, processor, data, SILENT)
    data.skip_damaged = True
    scores = CAPTIONS.evaluate(predict, processor, data, SILENT)
    assert scores.skipped == 1
    assert scores.kept is not None
    assert 7 not in scores.kept
    assert len(scores.per_example["cider"]) == 19


def test_training_takes_each_of_several_captions_in_turn() -> None:
    model = tiny_blip.captions()
    data = examples(2, caption=[["a red square", "red"], ["a blue square", "the blue square"]])
    words = []
    for draw in range(2):
        batch = CAPTIONS.collate([data[0], data[1]], model.processor, data, draw)
        words.append([model.processor.tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in batch["labels"]])
        assert batch["pixel_values"].shape == (2, 3, 16, 16)
        loss = CAPTIONS.loss(model.family.forward(model.module, batch), batch)
        assert torch.isfinite(loss)
    assert words == [["a red square", "the blue square"], ["red", "a blue square"]]


def test_answer_loss_by_hand() -> None:
    """Two positions count, with probabilities 1/2 and 1/4 for the right token: (log 2 + log 4) / 2."""
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]]))
    batch = {"labels": torch.tensor([[0, 1, -100]])}
    assert answer_loss(Outputs(logits=logits), batch).item() == pytest.approx((np.log(2) + np.log(4)) / 2)
    assert answer_loss(Outputs(logits=logits), {"labels": torch.full((1, 3), -100)}).item() == 0
    assert answer_loss(Outputs(logits=logits[0]), {"labels": torch.tensor([0, 0, 0])}).item() == pytest.approx(
        (2 * np.log(2) - np.log(0.8)) / 3
    )


def test_answer_loss_of_soft_targets_is_the_sum_over_classes() -> None:
    """log(1 + exp(-z)) for a target of 1 and log(1 + exp(z)) for 0, each class once, mean over examples."""
    logits, labels = torch.tensor([[0.0, 2.0], [1.0, -1.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    first = np.log(2) + np.log1p(np.exp(2))
    second = 0.5 * np.log1p(np.exp(-1)) + 0.5 * np.log1p(np.exp(1)) + np.log1p(np.exp(-1))
    assert answer_loss(Outputs(logits=logits), {"labels": labels}).item() == pytest.approx((first + second) / 2)


def test_answer_loss_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="no logits"):
        answer_loss(Outputs(), {"labels": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"\(2, 3\) do not fit logits of shape \(2, 4, 5\)"):
        answer_loss(Outputs(logits=torch.zeros(2, 4, 5)), {"labels": torch.zeros((2, 3), dtype=torch.int64)})


def test_matching_draws_one_text_that_does_not_fit_for_each_picture() -> None:
    predict, processor, _ = eyes()
    scores = MATCHING.evaluate(predict, processor, examples(), SILENT)
    assert qualities(scores)["accuracy"].value == qualities(scores)["auroc"].value == 1
    assert qualities(scores)["accuracy"].n == 30
    predict, processor, _ = eyes({"red": "blue"})
    worse = MATCHING.evaluate(predict, processor, examples(), SILENT)
    red = np.array(["red" in text for text in tiny.rows(30)["caption"]])
    values = worse.per_example["accuracy"]
    assert (values[~red] == 1).all()
    # "a red square" is denied, and so is what was drawn, unless it was the blue square
    assert set(values[red]) <= {0.0, 0.5}
    assert 0.5 in values[red]
    again = MATCHING.evaluate(predict, processor, examples(), SILENT)
    np.testing.assert_array_equal(values, again.per_example["accuracy"])


def test_matching_takes_labels_where_they_are_asked_for() -> None:
    captions = tiny.rows(20)["caption"]
    shown = [text if i % 2 else captions[(i + 1) % 20] for i, text in enumerate(captions)]
    fits = [int(text == right) for text, right in zip(shown, captions, strict=True)]
    assert 0 < sum(fits) < 20
    data = examples(20, caption=shown, fits=fits)
    data.columns["label"], data.classes = "fits", ["no", "yes"]
    task = ImageTextMatching(type="image-text-matching", pairs="labelled")
    predict, processor, _ = eyes()
    scores = task.evaluate(predict, processor, data, SILENT)
    assert qualities(scores)["accuracy"].value == 1
    batch = task.collate([data[i] for i in range(20)], processor, data, 0)
    assert batch["labels"].tolist() == fits
    data.classes = ["a", "b", "c"]
    with pytest.raises(DataError, match="3 classes"):
        task.evaluate(predict, processor, data, SILENT)
    data.classes = None
    with pytest.raises(DataError, match="classes"):
        task.evaluate(predict, processor, data, SILENT)


def test_matching_refuses_what_it_cannot_score() -> None:
    predict, processor, family = eyes()
    with pytest.raises(DataError, match="drawn"):
        MATCHING.evaluate(predict, processor, examples(4, caption=["a red square"] * 4), SILENT)
    family.match = lambda *given: np.full(len(given[-1]), np.nan)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="not finite"):
        MATCHING.evaluate(predict, processor, examples(4), SILENT)


def test_matching_batches_hold_both_kinds_and_take_turns() -> None:
    model = tiny_blip.matches()
    data = examples(6)
    rows = [data[i] for i in range(6)]
    right = [row["text"] for row in rows]
    seen = []
    for draw in range(2):
        batch = MATCHING.collate(rows, model.processor, data, draw)
        texts = [model.processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]
        assert batch["labels"].tolist() == [int(text == own) for text, own in zip(texts, right, strict=True)]
        seen.append(batch["labels"])
        outputs = model.family.forward(model.module, batch)
        assert outputs.logits is not None
        assert MATCHING.loss(outputs, batch).item() == pytest.approx(F.cross_entropy(outputs.logits, batch["labels"]).item())
    assert (seen[0] + seen[1] == 1).all()
    alone = MATCHING.collate(rows[:1], model.processor, data, 1)
    assert alone["labels"].tolist() == [1], "nothing else is there to draw from"


def test_a_captioner_learns_its_pictures() -> None:
    """After some steps of fine-tuning it names the colours, through the components."""
    model = tiny_blip.captions()
    data = examples(48)
    context = Context(task=CAPTIONS, train=data, seed=0, device="cpu")
    finetune = mm.passes.Finetune(epochs=40, batch_size=24, learning_rate=3e-3)
    before = CAPTIONS.evaluate(TorchPredict(model), model.processor, examples(24), SILENT)
    better = finetune.apply(model, context=context)
    after = CAPTIONS.evaluate(TorchPredict(better), better.processor, examples(24), SILENT)
    assert qualities(before)["exact_match"].value < 0.2
    assert qualities(after)["exact_match"].value > 0.9
    assert qualities(after)["cider"].value > 1


def test_a_recipe_with_the_wrong_model_is_refused_before_it_runs(tmp_path: Path) -> None:
    data = tiny.recipe(tmp_path, task={"type": "image-to-text"}, passes=[{"pass": "export"}])
    with pytest.raises(mm.errors.RecipeError, match="captions"):
        mm.run(make_recipe(data), tmp_path / "run")
