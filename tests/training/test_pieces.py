"""Micro batches give the gradients of the whole batch, and checkpointing those of no checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmcompress import registry
from mmcompress.context import Context
from mmcompress.data.examples import Examples, as_examples
from mmcompress.errors import RecipeError
from mmcompress.families.base import Outputs
from mmcompress.model import CompressedModel
from mmcompress.passes.finetune import Finetune
from mmcompress.passes.qat import Qat
from mmcompress.quantization import fake
from mmcompress.tasks.base import Task
from mmcompress.training.feed import Feed
from mmcompress.training.forward import Forward, apart, together
from mmcompress.training.objective import DistillObjective, Objective, TaskObjective
from mmcompress.training.pieces import Pieces, counted
from mmcompress.training.settings import EarlyStop
from mmcompress.training.teacher import Teacher
from tests import tiny, tiny_data
from tests.families import tiny_blip, tiny_clap, tiny_siglip, tiny_vilt, tiny_whisper

CPU = torch.device("cpu")
LOSSES = {"task": 1.0, "affinity": 1.0, "feature": 1.0, "interactive": 0.5}
ANSWERING = {
    "image-to-text": tiny_blip.captions,
    "visual-question-answering": tiny_vilt.MODELS["vilt"],
    "automatic-speech-recognition": next(iter(tiny_whisper.MODELS.values())),
}


def task_of(kind: str, **settings: Any) -> Task:
    task: Task = registry.find("tasks", kind).TASK.model_validate({"type": kind, **settings})
    return task


def batch_for(model: CompressedModel, task: Task, count: int = 12) -> dict[str, torch.Tensor]:
    return next(Feed(examples_for(task, count), model.processor, task, count, seed=0).batches(1))


def examples_for(task: Task, count: int) -> Examples:
    examples = tiny_data.examples(count)
    examples.narrow(task.roles, task.type, task.optional)
    return examples


def gradients(
    model: CompressedModel, objective: Objective, batch: dict[str, torch.Tensor], micro: int | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The parts of the loss, and the gradients of the model's and the objective's parameters."""
    model.module.zero_grad()
    objective.zero_grad()
    pieces = Pieces(Forward(model.family, model.module, CPU, "fp32"), objective, micro)
    parts = pieces(batch, 3, backward=True)
    named = [*model.module.named_parameters(), *((f"objective.{n}", p) for n, p in objective.named_parameters())]
    return parts, {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * largest, msg=name)


def distilling(student: CompressedModel, task: Task) -> DistillObjective:
    """With a teacher of another width, so that projections are learned."""
    wide = tiny.clip_config()
    wide.projection_dim = 40
    torch.manual_seed(5)
    other = tiny.clip()
    other.module = type(other.module)(wide).eval()
    objective = DistillObjective(task, LOSSES, student, Teacher(other, 12))
    objective.start(CPU, "fp32")
    return objective


@pytest.mark.parametrize("micro", [12, 5, 4, 1])
def test_micro_batches_of_a_dual_encoder_give_the_gradients_of_the_whole(model: CompressedModel, micro: int) -> None:
    task = task_of("image-text-retrieval")
    batch, objective = batch_for(model, task), distilling(model, task)
    parts, expected = gradients(model, objective, batch, None)
    assert {"objective.losses.interactive.log_scale", "objective.losses.feature.project.maps.vision.weight"} <= expected.keys()
    found, gradient = gradients(model, objective, batch, micro)
    assert {n: v.item() for n, v in found.items()} == pytest.approx({n: v.item() for n, v in parts.items()}, rel=1e-5)
    assert_close(gradient, expected)
    assert gradient["logit_scale"].abs() > 0


@pytest.mark.parametrize("make", [tiny_siglip.siglip, next(iter(tiny_clap.MODELS.values()))])
def test_other_dual_encoders_too(make: Callable[[], CompressedModel]) -> None:
    model = make()
    kind = "audio-text-retrieval" if "audio" in model.family.media else "image-text-retrieval"
    task = task_of(kind)
    batch = batch_for(model, task)
    _, expected = gradients(model, TaskObjective(task), batch, None)
    _, found = gradients(model, TaskObjective(task), batch, 5)
    assert_close(found, expected)


def test_more_texts_than_pictures_are_cut_as_well(model: CompressedModel) -> None:
    task = task_of("zero-shot-image-classification")
    batch = batch_for(model, task, count=4)
    assert len(batch["input_ids"]) == 6 > len(batch["index"])
    _, expected = gradients(model, TaskObjective(task), batch, None)
    _, found = gradients(model, TaskObjective(task), batch, 3)
    assert_close(found, expected)


def test_dropout_is_the_same_in_both_forward_passes() -> None:
    """Against all pieces with one graph, which need no second forward pass."""
    model = tiny.clip(attention_dropout=0.5)
    model.module.train()
    task = task_of("image-text-retrieval")
    batch, objective = batch_for(model, task), TaskObjective(task)
    _, found = gradients(model, objective, batch, 4)
    model.module.zero_grad()
    torch.manual_seed(3)
    texts = len(batch["input_ids"])
    outputs = []
    for start in range(0, 12, 4):
        part = {"pixel_values": batch["pixel_values"][start : start + 4]}
        if start < texts:
            part |= {name: batch[name][start : start + 4] for name in ("input_ids", "attention_mask")}
        outputs.append(model.family.forward(model.module, part))
    embeds = {t: torch.cat([out.embeds[t] for out in outputs if t in out.embeds]) for t in ("vision", "text")}
    task.loss(Outputs(embeds, outputs[0].logit_scale), batch).backward()
    assert_close(found, {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("kind", ANSWERING)
def test_pieces_of_answers_are_weighed_by_what_they_answer(kind: str) -> None:
    model, task = ANSWERING[kind](), task_of(kind)
    batch = batch_for(model, task)
    if batch["labels"].dim() > 1 and not batch["labels"].is_floating_point():
        batch["labels"][:4, 2:] = -100  # pieces of different weight, and one of none
        batch["labels"][8:10] = -100
        assert counted({"labels": batch["labels"][8:10]}) == 0
    objective = DistillObjective(task, {"task": 1.0, "logit": 0.8}, model, Teacher(model.clone(), 12))
    with torch.no_grad():
        for parameter in objective.teacher.model.module.parameters():  # type: ignore[union-attr]
            parameter.mul_(1.1)
    objective.start(CPU, "fp32")
    parts, expected = gradients(model, objective, batch, None)
    for micro in (5, 2):
        found, gradient = gradients(model, objective, batch, micro)
        assert {n: v.item() for n, v in found.items()} == pytest.approx({n: v.item() for n, v in parts.items()}, rel=1e-5)
        assert_close(gradient, expected)


def test_ranges_and_running_means_move_once_a_step(model: CompressedModel) -> None:
    """The first of both forward passes leaves no trace in buffers."""
    task = task_of("image-text-retrieval")
    fake.insert_fake_quant(model.module)
    batch = batch_for(model, task)
    gradients(model, TaskObjective(task), batch, 4)
    layer = model.module.vision_model.encoder.layers[0].mlp.fc1
    assert int(layer.batches) == 3, "one look a piece"


@pytest.mark.parametrize(
    "make",
    [tiny.clip, tiny_siglip.siglip, tiny_blip.captions, next(iter(tiny_whisper.MODELS.values()))],
    ids=lambda m: m.__name__,
)
def test_checkpointing_changes_no_gradient_and_is_off_afterwards(make: Callable[[], CompressedModel]) -> None:
    model = make()
    kind = {"clip": "image-text-retrieval", "siglip": "image-text-retrieval", "blip": "image-to-text"}.get(
        model.family.name, "automatic-speech-recognition"
    )
    where = Context(task=task_of(kind), train=examples_for(task_of(kind), 8), device="cpu")
    short = {"batch_size": 8, "precision": "fp32", "learning_rate": 1e-3, "epochs": 2}
    plain = Finetune(**short).apply(model, context=where)
    seen: list[int] = []
    layer = model.family.layers(model.module, model.family.towers[0])[0]
    counting = next(part for part in layer.modules() if isinstance(part, torch.nn.Linear))
    handle = counting.register_forward_pre_hook(lambda *_: seen.append(1))
    where.consume = True
    saved = Finetune(**short, checkpointing=True).apply(model, context=where)
    handle.remove()
    assert len(seen) == 4, "two steps, in each forward twice"
    assert not any(getattr(part, "gradient_checkpointing", False) for part in saved.module.modules())
    for name, value in plain.module.state_dict().items():
        torch.testing.assert_close(saved.module.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_checkpointing_that_a_model_cannot_do_is_refused(model: CompressedModel) -> None:
    clap = next(iter(tiny_clap.MODELS.values()))()
    where = Context(task=task_of("audio-text-retrieval"), train=tiny_data.examples(8), device="cpu")
    with pytest.raises(RecipeError, match="finetune: checkpointing: ClapModel of transformers does not support it"):
        Finetune(checkpointing=True).apply(clap, context=where)
    with pytest.raises(RecipeError, match="qat: checkpointing"):
        Qat(checkpointing=True).apply(model, context=Context(task=task_of("image-text-retrieval")))


def test_outputs_come_apart_and_together() -> None:
    outputs = Outputs({"vision": torch.ones(2)}, hidden={"text": (torch.zeros(1), torch.ones(1))})
    tensors = apart(outputs)
    assert set(tensors) == {("embeds", "vision"), ("logit_scale",), ("hidden", "text", 0), ("hidden", "text", 1)}
    assert apart(together(tensors)) == tensors
    assert together(tensors).hidden["text"][1] is outputs.hidden["text"][1]


def test_all_together_in_a_pass(model: CompressedModel) -> None:
    where = Context(task=task_of("image-text-retrieval"), train=as_examples(tiny.dataset(64)), device="cpu", baseline=tiny.clip)
    stop = EarlyStop(every=0.5, holdout=0.2, patience=1)
    new = Finetune(batch_size=16, micro_batch=4, ema=0.9, early_stop=stop, precision="fp32", epochs=2, checkpointing=True).apply(
        model, context=where
    )
    assert new.history[0]["result"]["holdout_loss"]
