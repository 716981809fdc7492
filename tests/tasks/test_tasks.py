"""The two tasks: batches, losses and metrics, on embeddings made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmcompress.data.examples import Examples, as_examples
from mmcompress.errors import DataError, ModelError
from mmcompress.families.base import Outputs
from mmcompress.measure.quality import changes, qualities
from mmcompress.progress import SILENT
from mmcompress.recipe import make_recipe
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks._contrastive import contrastive_loss
from mmcompress.tasks._retrieval import best_rank
from mmcompress.tasks._zero_shot import per_class
from mmcompress.tasks.base import Scores
from mmcompress.tasks.image_text_retrieval import ImageTextRetrieval
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from tests import tiny

ZERO_SHOT = ZeroShotImageClassification(type="zero-shot-image-classification", templates=["a photo of a {} .", "a {} ."])
RETRIEVAL = ImageTextRetrieval(type="image-text-retrieval")


class Oracle:
    """Knows the answer: a picture's embedding is its mean colour, a text's the colour it names, unless told to err."""

    runtime = "torch"
    components = ("vision_model", "text_model")

    def __init__(self, swap: Mapping[str, str] | None = None) -> None:
        self.swap = swap or {}

    def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if component == "vision_model":
            mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
            pixels = inputs["pixel_values"].mean(axis=(2, 3)) * std + mean
            return {"image_embeds": pixels - 0.5}
        found = []
        for ids in inputs["input_ids"]:
            name = next(tiny.WORDS[i] for i in ids if tiny.WORDS[i] in tiny.COLOURS)
            found.append(np.array(tiny.COLOURS[self.swap.get(name, name)]) / 255 - 0.5)
        return {"text_embeds": np.array(found)}


def examples(count: int = 30) -> Examples:
    return as_examples(tiny.dataset(count))


def test_zero_shot_finds_every_colour() -> None:
    scores = ZERO_SHOT.evaluate(Oracle(), tiny.processor(), examples(), SILENT)
    assert scores.per_example["accuracy"].mean() == 1.0
    assert scores.classes["red"] == {"precision": 1.0, "recall": 1.0, "n": 5}


def test_two_swapped_classes_show_in_accuracy_classes_and_flips() -> None:
    right = ZERO_SHOT.evaluate(Oracle(), tiny.processor(), examples(), SILENT)
    wrong = ZERO_SHOT.evaluate(Oracle({"red": "blue", "blue": "red"}), tiny.processor(), examples(), SILENT)
    assert wrong.per_example["accuracy"].mean() == pytest.approx(20 / 30)
    assert wrong.classes["red"]["recall"] == wrong.classes["blue"]["recall"] == 0.0
    assert wrong.classes["green"]["recall"] == 1.0
    change = changes(wrong, right)["accuracy"]
    assert (change.lost, change.won, change.n, change.verdict) == (10, 0, 30, "worse")
    assert change.difference == pytest.approx(-1 / 3)
    assert changes(right, right)["accuracy"].verdict == "identical"
    assert qualities(right)["accuracy_top5"].value == 1.0


def test_per_class_by_hand() -> None:
    found = per_class(np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0]), ["a", "b", "c"])
    assert found["a"] == {"precision": 0.5, "recall": 0.5, "n": 2}
    assert found["b"] == {"precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3), "n": 3}
    assert found["c"] == {"precision": None, "recall": None, "n": 0}


def test_retrieval_counts_equal_texts_as_one_candidate() -> None:
    data = as_examples(tiny.dataset(12))
    scores = RETRIEVAL.evaluate(Oracle(), tiny.processor(), data, SILENT)
    assert {k: len(v) for k, v in scores.per_example.items()} == {
        **{f"image_to_text_r{k}": 12 for k in (1, 5, 10)},
        **{f"text_to_image_r{k}": 6 for k in (1, 5, 10)},
    }
    assert all(values.mean() == 1.0 for values in scores.per_example.values())


def test_best_rank_by_hand_ties_count_against() -> None:
    scores = np.array([[0.9, 0.5, 0.1], [0.2, 0.2, 0.1], [0.3, 0.2, 0.1]])
    relevant = np.array([[False, True, True], [True, False, False], [True, False, True]])
    assert best_rank(scores, relevant).tolist() == [1, 1, 0]


def test_several_texts_of_a_picture_are_all_right() -> None:
    rows = tiny.rows(6)
    rows["caption"] = [[text, text.replace("a ", "a photo of a ")] for text in rows["caption"]]
    data = as_examples([dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)])
    scores = RETRIEVAL.evaluate(Oracle(), tiny.processor(), data, SILENT)
    assert len(scores.per_example["text_to_image_r1"]) == 12
    assert scores.per_example["text_to_image_r1"].mean() == 1.0


def test_batches_hold_distinct_texts_and_targets() -> None:
    data = examples(12)
    batch = ZERO_SHOT.collate([data[i] for i in range(8)], tiny.processor(), data, 0)
    assert batch["pixel_values"].shape == (8, 3, 16, 16)
    assert batch["input_ids"].shape[0] == 6
    assert batch["target"].tolist() == [data[i]["label"] for i in range(8)]
    again = RETRIEVAL.collate([data[i] for i in (0, 6, 1)], tiny.processor(), data, 0)
    assert again["input_ids"].shape[0] == 2
    assert again["target"].tolist() == [0, 0, 1]


def test_contrastive_loss_is_clips_with_one_text_a_picture() -> None:
    torch.manual_seed(0)
    outputs = Outputs({"vision": torch.randn(4, 8), "text": torch.randn(4, 8)}, torch.tensor(7.0))
    logits = 7.0 * F.normalize(outputs.embeds["vision"], dim=-1) @ F.normalize(outputs.embeds["text"], dim=-1).T
    target = torch.arange(4)
    clip = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert contrastive_loss(outputs, target).item() == pytest.approx(clip.item(), rel=1e-6)


def test_contrastive_loss_with_a_shared_text_by_hand() -> None:
    # Two pictures of one text; a second text has no picture. Unit vectors, scale 1: logits [[1, 0], [0, 1]].
    outputs = Outputs({"vision": torch.eye(2), "text": torch.eye(2)}, torch.tensor(1.0))
    e = float(np.e)
    to_text = (-np.log(e / (e + 1)) - np.log(1 / (e + 1))) / 2
    to_image = -0.5 * np.log(e / (e + 1)) - 0.5 * np.log(1 / (e + 1))
    assert contrastive_loss(outputs, torch.tensor([0, 0])).item() == pytest.approx((to_text + to_image) / 2, rel=1e-6)


def test_a_model_that_gives_nan_is_not_scored() -> None:
    class Broken(Oracle):
        def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {k: v * np.nan for k, v in super().__call__(component, inputs).items()}

    with pytest.raises(ModelError, match="zero or not finite"):
        ZERO_SHOT.evaluate(Broken(), tiny.processor(), examples(), SILENT)


def test_damaged_pictures_are_an_error_or_a_counted_skip() -> None:
    rows = tiny.rows(12)
    rows["image"][3] = {"bytes": b"no picture", "path": None}
    listed: list[dict[str, Any]] = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    columns = {"image": "image", "label": "label"}
    strict = Examples(listed, "data.eval", columns, list(tiny.COLOURS))
    with pytest.raises(DataError, match=r"data.eval, row 3, column 'image': the picture does not decode"):
        ZERO_SHOT.evaluate(Oracle(), tiny.processor(), strict, SILENT)
    lenient = Examples(listed, "data.eval", columns, list(tiny.COLOURS), skip_damaged=True)
    scores = ZERO_SHOT.evaluate(Oracle(), tiny.processor(), lenient, SILENT)
    assert (scores.skipped, len(scores.per_example["accuracy"])) == (1, 11)
    assert scores.per_example["accuracy"].mean() == 1.0


def test_a_real_model_is_scored_alike_in_any_order_of_examples() -> None:
    model = tiny.clip()
    data = examples(20)
    forwards = ZERO_SHOT.evaluate(TorchPredict(model), model.processor, data, SILENT)
    backwards = ZERO_SHOT.evaluate(TorchPredict(model), model.processor, data.take(range(19, -1, -1)), SILENT)
    assert forwards.answers is not None
    assert backwards.answers is not None
    assert forwards.answers.tolist() == backwards.answers.tolist()[::-1]


@pytest.mark.parametrize("template", ["no place", "{} and {}"])
def test_a_template_needs_one_place(template: str) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        ZeroShotImageClassification(type="zero-shot-image-classification", templates=[template])


def test_changes_leave_out_what_cannot_be_paired() -> None:
    a, b = Scores({"accuracy": np.ones(3)}), Scores({"accuracy": np.ones(4)})
    assert changes(a, b) == {}


def test_a_column_that_is_missing_is_named() -> None:
    data = Examples([{"image": None}], "data.eval", {"image": "image"})
    with pytest.raises(DataError, match="needs a column for 'label'"):
        data.need(ZERO_SHOT.roles, ZERO_SHOT.type)


def test_both_tasks_are_in_the_recipe_schema() -> None:
    for name in ("zero-shot-image-classification", "image-text-retrieval"):
        recipe = make_recipe({"name": "x", "model": "m", "task": {"type": name}, "data": {"eval": {"path": "p"}}})
        assert recipe.task.type == name
