"""FGSM and PGD: against the stock model's own gradient, within the distance, and stronger with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmcompress.data.examples import Examples
from mmcompress.measure.attack import Attack, pixels_of, why_not
from mmcompress.model import CompressedModel
from mmcompress.progress import SILENT
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.image_text_retrieval import ImageTextRetrieval
from mmcompress.tasks.visual_question_answering import VisualQuestionAnswering
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from tests import tiny, tiny_data
from tests.families import tiny_siglip, tiny_vision_text_dual_encoder

TASK = ZeroShotImageClassification(type="zero-shot-image-classification", templates=["a photo of a {} ."])


def examples(count: int = 12) -> Examples:
    found = tiny_data.examples(count)
    found.columns.pop("audio")
    return found


def clean_pixels(model: CompressedModel, count: int) -> torch.Tensor:
    own = examples(count)
    return model.processor.pixels([own.media(i) for i in range(count)])


def test_fgsm_is_a_step_along_the_sign_of_the_stock_models_gradient() -> None:
    model, own = tiny.clip(), examples(6)
    attack = Attack(model, TASK, own)
    clean, right = clean_pixels(model, 6), torch.from_numpy(attack.right)
    found = attack._attacked(clean, right, "fgsm", 2.0, 1, [0])
    asked = clean.clone().requires_grad_(True)
    tokens = model.processor.tokens([f"a photo of a {name} ." for name in tiny_data.CLASSES])
    logits = model.module(**tokens, pixel_values=asked).logits_per_image
    F.cross_entropy(logits, torch.tensor(own.labels()), reduction="sum").backward()
    assert asked.grad is not None
    std = torch.tensor(model.processor.image_processor.image_std).view(1, -1, 1, 1)
    mean = torch.tensor(model.processor.image_processor.image_mean).view(1, -1, 1, 1)
    wanted = clean + 2 / 255 / std * asked.grad.sign()
    wanted = torch.maximum(torch.minimum(wanted, (1 - mean) / std), -mean / std)
    # The sign of a gradient of next to nothing may differ in the last bit.
    sure = asked.grad.abs() > 1e-6 * asked.grad.abs().max()
    assert torch.allclose(found[sure], wanted[sure], atol=1e-5)


@pytest.mark.parametrize("method", ["fgsm", "pgd"])
def test_no_pixel_moves_further_than_it_may_or_out_of_its_range(method: str) -> None:
    model = tiny.clip()
    attack = Attack(model, TASK, examples())
    clean, right = clean_pixels(model, 12), torch.from_numpy(attack.right)
    pixels = pixels_of(model.processor, 3)
    found = attack._attacked(clean, right, method, 4.0, 5, [0])  # type: ignore[arg-type]
    moved = (found - clean).abs() / (pixels.white - pixels.black) * 255
    assert 3.9 < float(moved.max()) < 4.001
    assert bool((found <= pixels.white + 1e-6).all())
    assert bool((found >= pixels.black - 1e-6).all())
    assert float(attack.loss(found, right)) > float(attack.loss(clean, right))


def test_pgd_is_stronger_than_one_step_and_grows_with_the_distance() -> None:
    model = tiny.clip()
    attack = Attack(model, TASK, examples())
    clean, right = clean_pixels(model, 12), torch.from_numpy(attack.right)

    def loss(method: str, eps: float) -> float:
        return float(attack.loss(attack._attacked(clean, right, method, eps, 10, [0]), right))  # type: ignore[arg-type]

    assert loss("pgd", 8) >= loss("fgsm", 8)
    assert loss("pgd", 8) > loss("pgd", 2) > float(attack.loss(clean, right))


def test_without_an_attack_it_is_the_tasks_own_accuracy() -> None:
    model, own = tiny.clip(), examples()
    scores = TASK.evaluate(TorchPredict(model), model.processor, own, SILENT)
    found = Attack(model, TASK, own).scored(None, 0, 1, 0, SILENT)
    assert found.values.tolist() == scores.per_example["accuracy"].tolist()
    assert found.kept.tolist() == list(range(12))
    retrieval = ImageTextRetrieval(type="image-text-retrieval")
    scores = retrieval.evaluate(TorchPredict(model), model.processor, own, SILENT)
    found = Attack(model, retrieval, own).scored(None, 0, 1, 0, SILENT)
    assert found.values.tolist() == scores.per_example["image_to_text_r1"].tolist()


@pytest.mark.parametrize("make", [tiny_siglip.siglip, tiny_vision_text_dual_encoder.MODELS["resnet-bert"]])
def test_other_dual_encoders_are_attacked_after_they_were_scored(make: Callable[[], CompressedModel]) -> None:
    model, own = make(), examples()
    before = TASK.evaluate(TorchPredict(model), model.processor, own, SILENT)
    attack = Attack(model, TASK, own)
    assert attack.scored(None, 0, 1, 0, SILENT).values.tolist() == before.per_example["accuracy"].tolist()
    clean, right = clean_pixels(model, 12), torch.from_numpy(attack.right)
    assert float(attack.loss(attack._attacked(clean, right, "pgd", 8, 5, [0]), right)) > float(attack.loss(clean, right))


def test_attacks_are_repeatable() -> None:
    model, own = tiny.clip(), examples()
    one, two = (Attack(model, TASK, own).scored("pgd", 8, 3, 7, SILENT) for _ in range(2))
    assert np.array_equal(one.values, two.values)


def test_what_cannot_be_attacked_says_why() -> None:
    model, own = tiny.clip(), examples()
    assert why_not(model, TASK, own) == ""
    asked = VisualQuestionAnswering(type="visual-question-answering")
    assert "which visual-question-answering does not compare" in why_not(model, asked, own)
    heard = tiny_data.examples(2)
    heard.columns.pop("image")
    assert why_not(model, TASK, heard) == "attacks are on pixels, and the task has no pictures"


def test_pixels_by_hand() -> None:
    processor = tiny.processor()
    processor.image_processor.image_mean, processor.image_processor.image_std = [0.5, 0.0, 1.0], [0.5, 1.0, 2.0]
    pixels = pixels_of(processor, 3)
    assert pixels.black.ravel().tolist() == pytest.approx([-1.0, 0.0, -0.5])
    assert pixels.white.ravel().tolist() == pytest.approx([1.0, 1.0, 0.0])
    assert pixels.distance(255).ravel().tolist() == pytest.approx([2.0, 1.0, 0.5])
