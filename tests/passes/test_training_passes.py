"""The passes finetune, distill and qat on a tiny CLIP."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mmcompress.context import Context
from mmcompress.data.examples import as_examples
from mmcompress.errors import DataError, ModelError, RecipeError, TrainingError
from mmcompress.families.base import Batch, Outputs
from mmcompress.families.clip import FAMILY
from mmcompress.model import CompressedModel
from mmcompress.passes.base import Pass
from mmcompress.passes.distill import Distill
from mmcompress.passes.finetune import Finetune
from mmcompress.passes.qat import Qat, distance
from mmcompress.quantization import fake
from mmcompress.quantization.fake import FakeQuantLinear
from mmcompress.runtimes.onnx_predict import OnnxPredict
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from mmcompress.training import teacher as teachers
from mmcompress.training.feed import Feed
from mmcompress.training.teacher import Teacher, check_fits
from tests import tiny

TASK = ZeroShotImageClassification(type="zero-shot-image-classification", templates=["a photo of a {}.", "a {} square"])
SHORT: dict[str, Any] = {"batch_size": 16, "learning_rate": 1e-3, "precision": "fp32"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def teacher() -> CompressedModel:
    """Another tiny CLIP."""
    return tiny.clip(seed=5)


def context(teacher: CompressedModel | None = None, count: int = 32, **more: Any) -> Context:
    baseline = None if teacher is None else teacher.clone
    return Context(task=TASK, train=as_examples(tiny.dataset(count)), baseline=baseline, device="cpu", **more)


def weights(model: CompressedModel) -> dict[str, torch.Tensor]:
    return copy.deepcopy(dict(model.module.state_dict()))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def embeddings(model: CompressedModel, count: int = 32) -> tuple[Outputs, Batch]:
    examples = as_examples(tiny.dataset(count))
    batch = next(Feed(examples, model.processor, TASK, count, seed=0).batches(1))
    with torch.no_grad():
        return model.family.forward(model.module, batch), batch


@pytest.mark.parametrize("kind", [Finetune, Distill])
def test_the_model_stays_as_it_was_and_the_new_one_has_a_history(
    kind: type[Pass], model: CompressedModel, teacher: CompressedModel
) -> None:
    before, theirs = weights(model), weights(teacher)
    new = kind(**SHORT).apply(model, context=context(teacher))
    assert equal(weights(model), before)
    assert equal(weights(teacher), theirs)
    assert all(p.requires_grad for p in [*model.module.parameters(), *teacher.module.parameters()])
    assert not equal(weights(new), before)
    assert model.history == []
    (entry,) = new.history
    assert entry["pass"] == kind.__name__.lower()
    assert entry["settings"]["batch_size"] == 16
    assert entry["result"]["steps"] == 2
    again = kind(**SHORT).apply(model, context=context(teacher))
    assert equal(weights(again), weights(new))
    assert again.history == new.history


def test_a_failed_training_leaves_the_model_as_it_was(model: CompressedModel) -> None:
    model.module.text_projection.weight.data[0, 0] = torch.inf
    before = weights(model)
    with pytest.raises(TrainingError, match="finetune: step 1 of 2: the loss 'task' is nan"):
        Finetune(**SHORT).apply(model, context=context())
    assert equal(weights(model), before)
    assert not model.module.training
    assert model.history == []


def test_a_trained_model_saves_and_reloads_as_stock(model: CompressedModel, teacher: CompressedModel, tmp_path: Path) -> None:
    # Widths differ, so that a projection is learned; it must not be left behind in the model.
    wide = tiny.clip(seed=5)
    config = copy.deepcopy(wide.module.config)
    config.projection_dim = 40
    wide.module = type(wide.module)(config).eval()
    new = Distill(**SHORT, losses={"feature": 1.0, "interactive": 1.0}).apply(model, context=context(wide))
    assert weights(new).keys() == weights(model).keys()
    new.save(tmp_path / "model")


def test_distillation_brings_the_student_to_its_teacher(model: CompressedModel, teacher: CompressedModel) -> None:
    losses = {"task": 0.0, "feature": 1.0}
    new = Distill(**{**SHORT, "epochs": 15}, losses=losses).apply(model, context=context(teacher))
    aim = embeddings(teacher)[0].embeds
    for tower in ("vision", "text"):
        near, far = (torch.cosine_similarity(embeddings(m)[0].embeds[tower], aim[tower]).mean() for m in (new, model))
        assert near > 0.9
        assert near > far + 0.3
    assert list(new.history[0]["result"]["final_losses"]) == ["feature"]


def test_all_losses_together_are_reported_by_part(model: CompressedModel, teacher: CompressedModel) -> None:
    losses = {"affinity": 1.0, "feature": 2.0, "interactive": 0.5, "logit": 1.0, "relational": 1.0}
    where = context(teacher)
    result = Distill(**SHORT, losses=losses, max_steps=1).apply(model, context=where).history[0]["result"]
    assert set(result["final_losses"]) == {*losses, "task"}
    assert sum(result["final_losses"].values()) == pytest.approx(result["final_loss"], abs=1e-4)


def test_the_teacher_is_asked_once(model: CompressedModel, teacher: CompressedModel) -> None:
    where = context(teacher)
    Distill(**{**SHORT, "epochs": 5}).apply(model, context=where)
    assert where.facts["examples_seen"] == 160
    assert where.facts["teacher_examples"] == 32
    assert where.facts["teacher_texts"] == 12, "six classes in two templates"
    assert where.facts["teacher_seconds"] > 0


@pytest.mark.parametrize("room", [0, 10**9])
def test_what_the_teacher_remembers_is_what_it_says(teacher: CompressedModel, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "CACHE_BYTES", room)
    asked = Teacher(teacher.clone(), 24)
    feed = Feed(as_examples(tiny.dataset(24)), teacher.processor, TASK, 10, seed=0)
    for batch in feed.batches(6):
        found = asked(batch)
        with torch.no_grad():
            truth = teacher.family.forward(teacher.module, batch)
        for tower in ("vision", "text"):
            torch.testing.assert_close(found.embeds[tower], truth.embeds[tower], atol=1e-5, rtol=1e-5)
        assert torch.equal(found.logit_scale, truth.logit_scale)
    assert asked.examples_asked == (60 if room == 0 else 24)


def test_a_teacher_from_a_folder(model: CompressedModel, tmp_path: Path) -> None:
    folder = tiny.clip_folder(tmp_path / "teacher", seed=5)
    by_folder = Distill(**SHORT, teacher=str(folder)).apply(model, context=context())
    by_run = Distill(**SHORT).apply(model, context=context(tiny.clip(seed=5)))
    assert equal(weights(by_folder), weights(by_run))


def test_baseline_without_a_run_says_what_to_do(model: CompressedModel) -> None:
    with pytest.raises(DataError, match="pass teacher="):
        Distill(**SHORT).apply(model, context=context())


def test_a_teacher_that_reads_other_pictures_or_texts_is_refused(model: CompressedModel) -> None:
    other = tiny.clip(image_size=24)
    with pytest.raises(ModelError, match=r"made for pictures of shape \(1, 3, 24, 24\)"):
        check_fits(other, model, "x")
    other.processor.image_processor.size = {"shortest_edge": 24}
    other.processor.image_processor.crop_size = {"height": 24, "width": 24}
    with pytest.raises(ModelError, match="pictures of 24 x 24 pixels, the student of 16 x 16"):
        check_fits(other, model, "x")
    other = tiny.clip()
    other.processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    with pytest.raises(ModelError, match="prepares pictures in another way"):
        check_fits(other, model, "x")
    other = tiny.clip()
    other.module.config.text_config.vocab_size = 99
    with pytest.raises(ModelError, match="vocabulary of 99 tokens"):
        check_fits(other, model, "x")
    other = tiny.clip()
    other.processor.tokenizer.model_max_length = 9
    with pytest.raises(ModelError, match="other tokens"):
        check_fits(other, model, "x")


def test_settings_are_checked_without_torch() -> None:
    code = (
        "import sys; from mmcompress.passes.distill import Distill; from mmcompress.passes.qat import Qat; "
        "from mmcompress.passes.finetune import Finetune; Distill(); Qat(); Finetune(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    with pytest.raises(ValidationError, match=r"unknown loss 'featur'.*did you mean 'feature'"):
        Distill(losses={"featur": 1})
    with pytest.raises(ValidationError, match="the pass `finetune`"):
        Distill(losses={"feature": 0})
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Distill(losses={"feature": -1})
    with pytest.raises(ValidationError, match="Extra inputs"):
        Finetune.model_validate({"pass": "finetune", "lr": 1})
    assert Distill(losses={"feature": 2}).losses == {"task": 1.0, "feature": 2}
    assert Finetune().check_against(FAMILY, {}) == []
    assert "did you mean 'text'" in Finetune(freeze=["txt"]).check_against(FAMILY, {})[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> CompressedModel:
    """After qat with small steps; tests only read it.

    AdamW's first steps are as large as the learning rate whatever the gradient, so that rounding decides where a unit without a
    gradient goes: with small ones all machines have nearly the same weights to quantize.
    """
    torch.set_num_threads(1)
    where = context(tiny.clip(seed=5), workdir=tmp_path_factory.mktemp("qat"))
    return Qat(**{**SHORT, "learning_rate": 1e-5}, exclude=["visual_projection"]).apply(tiny.clip(), context=where)


def test_qat_leaves_a_stock_model_and_files_that_agree(model: CompressedModel, trained: CompressedModel) -> None:
    assert not any(isinstance(part, FakeQuantLinear) for part in trained.module.modules())
    assert weights(trained).keys() == weights(model).keys()
    assert not equal(weights(trained), weights(model))
    assert trained.onnx is not None
    assert sorted(p.name for p in trained.onnx.iterdir()) == ["text_model_quantized.onnx", "vision_model_quantized.onnx"]
    result = trained.history[0]["result"]
    layers = "five layers of six Linear layers, one of the two projections, and the patches"
    assert result["quantized_layers"] == 5 * 6 + 1 + 1, layers
    out, batch = embeddings(trained)
    predict = OnnxPredict(trained.onnx)
    inputs = {k: v.numpy() for k, v in batch.items()}
    for name, tower, output in (("vision_model", "vision", "image_embeds"), ("text_model", "text", "text_embeds")):
        exported = torch.from_numpy(predict(name, inputs)[output])
        # int8 is near the float weights, but is not them. Weights of 7 bits have half the levels, so twice the rounding error.
        least = {8: 0.995, 7: 0.99}[result["weight_bits"]]
        assert least < distance(exported, out.embeds[tower])["least_cosine"] < 1
        assert not torch.equal(exported, out.embeds[tower])
        facts = result["components"][name]
        assert facts["onnx_to_fake"]["least_cosine"] > 0.999
        assert facts["fake_to_float"]["max_abs_difference"] > 0


def test_qat_saves_both_and_the_float_model_reloads(trained: CompressedModel, tmp_path: Path) -> None:
    folder = trained.save(tmp_path / "saved")
    assert (folder / "onnx" / "vision_model_quantized.onnx").exists()


def test_ranges_come_from_calibration_and_freeze(
    model: CompressedModel, teacher: CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    plain = FakeQuantLinear.forward

    def forward(self: FakeQuantLinear, inputs: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            seen.append((self.observing, int(self.batches)))
        return plain(self, inputs)

    monkeypatch.setattr(FakeQuantLinear, "forward", forward)
    monkeypatch.setattr(Qat, "_export", lambda *_: {})  # slow, and not what this is about
    before = weights(model)
    settings = {**SHORT, "epochs": 2, "freeze_ranges": 0.5, "exclude": ["vision_model", "text_model", "text_projection"]}
    Qat(**settings).apply(model, context=context(teacher, workdir=tmp_path))
    # 32 examples in batches of 16: 2 batches calibrate; of 4 steps the first two still move the range.
    assert seen == [(True, 2), (True, 3), (False, 4), (False, 4)]
    assert equal(weights(model), before)
    assert not any(isinstance(part, FakeQuantLinear) for part in model.module.modules())


def test_layers_begin_to_round_one_after_another(
    model: CompressedModel, teacher: CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    on = fake.set_fake_quant

    def noted(module: torch.nn.Module, share: bool | float) -> None:
        on(module, share)
        if not isinstance(share, bool):
            layers = [part for part in module.modules() if isinstance(part, FakeQuantLinear)]
            rounding = [layer.fake_quant for layer in layers]
            assert rounding == sorted(rounding, reverse=True)
            seen.append(sum(rounding) / len(rounding))

    monkeypatch.setattr(fake, "set_fake_quant", noted)
    monkeypatch.setattr(Qat, "_export", lambda *_: {})  # slow, and not what this is about
    settings = {**SHORT, "epochs": 4, "switch_on": 0.5}
    Qat(**settings).apply(model, context=context(teacher, workdir=tmp_path))
    # 32 examples in batches of 16: eight steps, all layers from the fourth on.
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1], abs=1 / 32)


def test_a_tower_that_is_excluded_is_exported_in_float(model: CompressedModel, teacher: CompressedModel, tmp_path: Path) -> None:
    settings = {**SHORT, "max_steps": 1, "exclude": ["text_model", "text_projection"]}
    new = Qat(**settings).apply(model, context=context(teacher, workdir=tmp_path))
    assert new.onnx is not None
    assert sorted(p.name for p in new.onnx.iterdir()) == ["text_model.onnx", "vision_model_quantized.onnx"]
    out, batch = embeddings(new)
    text = OnnxPredict(new.onnx)("text_model", {k: v.numpy() for k, v in batch.items()})["text_embeds"]
    torch.testing.assert_close(torch.from_numpy(text), out.embeds["text"], atol=1e-4, rtol=1e-4)


def test_qat_refuses_what_cannot_work(model: CompressedModel, teacher: CompressedModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs a folder"):
        Qat(**SHORT).apply(model, context=context(teacher))
    with pytest.raises(RecipeError, match=r"qat: exclude: no layer to be rounded is called nowhere"):
        Qat(**SHORT, exclude=["nowhere"]).apply(model, context=context(teacher, workdir=tmp_path))


def test_distance_by_hand() -> None:
    found = distance(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[2.0, 0.0], [4.0, 3.0]]))
    assert found == {"least_cosine": 0.96, "max_abs_difference": 1.0}


def test_a_model_that_may_be_consumed_is_not_copied(model: CompressedModel) -> None:
    kept = Finetune(max_steps=2, batch_size=8).apply(model, context=context())
    assert kept.module is not model.module
    module = model.module
    taken = Finetune(max_steps=2, batch_size=8).apply(model, context=context(consume=True))
    assert taken.module is module
    assert taken.history == kept.history
    assert all(torch.equal(a, b) for a, b in zip(kept.module.parameters(), taken.module.parameters(), strict=True))
