"""The training loop: repeatable, careful with bad numbers and pictures, and gone without a trace."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional as F

from mmcompress.context import Context
from mmcompress.data.examples import Examples, as_examples
from mmcompress.data.prepare import prepared
from mmcompress.errors import DataError, RecipeError, TrainingError
from mmcompress.families.base import Batch, Outputs
from mmcompress.model import CompressedModel
from mmcompress.progress import Reporter
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from mmcompress.training import feed as feeds
from mmcompress.training import loop
from mmcompress.training.autocast import Float32Attention, computing
from mmcompress.training.feed import Feed
from mmcompress.training.loop import train
from mmcompress.training.memory import lean_gradients
from mmcompress.training.objective import Objective, TaskObjective
from mmcompress.training.schedule import count_steps, parameter_groups, rate_share
from mmcompress.training.settings import TrainingSettings
from tests import tiny

TASK = ZeroShotImageClassification(type="zero-shot-image-classification", templates=["a photo of a {}.", "a {} square"])
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def context(count: int = 48, **more: Any) -> Context:
    return Context(task=TASK, train=as_examples(tiny.dataset(count)), device="cpu", **more)


def settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings(**{"batch_size": 16, "learning_rate": 1e-3, "precision": "fp32", **changes})


def run(model: CompressedModel, where: Context | None = None, **changes: Any) -> tuple[CompressedModel, dict[str, Any]]:
    new = model.clone()
    return new, train(new, where if where is not None else context(), settings(**changes), TaskObjective(TASK))


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in a.state_dict().items())


def test_sparse_gradients_of_embeddings_train_the_same(model: CompressedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = run(model, max_steps=3)
    monkeypatch.setattr(loop, "lean_gradients", partial(lean_gradients, least_bytes=0))
    lean, facts = run(model, max_steps=3)
    assert facts["steps"] == 3
    assert not same(lean.module, model.module)
    for name, values in plain.module.state_dict().items():
        torch.testing.assert_close(lean.module.state_dict()[name], values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twice_is_bit_equal_whatever_was_drawn_before(model: CompressedModel, precision: str) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(1)
    first, facts = run(model, max_steps=2, precision=precision)
    torch.manual_seed(2)
    torch.rand(7)
    before = torch.get_rng_state()
    second, again = run(model, max_steps=2, precision=precision)
    assert same(first.module, second.module)
    assert facts == again
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state was touched"
    assert not same(first.module, model.module), "nothing was trained"


def test_another_seed_is_another_training(model: CompressedModel) -> None:
    assert not same(run(model, context(seed=1))[0].module, run(model, context(seed=2))[0].module)


def test_workers_and_an_overflowing_cache_change_nothing(model: CompressedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = run(model, epochs=2)
    with_workers, _ = run(model, epochs=2, workers=2)
    monkeypatch.setattr(feeds, "CACHE_BYTES", 0)
    uncached, _ = run(model, epochs=2)
    assert same(plain.module, with_workers.module)
    assert same(plain.module, uncached.module)


def test_the_loss_falls_to_a_right_answer(model: CompressedModel) -> None:
    new, facts = run(model, context(60), batch_size=30, epochs=30)
    assert facts["final_loss"] < 0.75 * facts["first_loss"]
    batch = next(Feed(as_examples(tiny.dataset(60, seed=1)), new.processor, TASK, 60, seed=0).batches(1))
    with torch.no_grad():
        out = new.family.forward(new.module, {k: batch[k] for k in ("pixel_values", "input_ids", "attention_mask")})
    v, t = (F.normalize(out.embeds[k], dim=-1) for k in ("vision", "text"))
    assert ((v @ t.T).argmax(1) == batch["target"]).float().mean() > 0.9
    assert not new.module.training


def test_bf16_and_fp32_in_one_process_beside_the_callers_accelerator(model: CompressedModel) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    mine = Accelerator(cpu=True, mixed_precision="bf16")
    losses = {}
    for precision in ("fp32", "bf16", "fp32", "bf16"):
        new, facts = run(model, max_steps=2, precision=precision)
        assert facts["precision"] == precision
        assert {p.dtype for p in new.module.parameters()} == {torch.float32}
        losses.setdefault(precision, set()).add(facts["final_loss"])
    assert mine.mixed_precision == "bf16"
    assert Accelerator(cpu=True).state is not None
    AcceleratorState._reset_state(reset_partial_state=True)
    assert all(len(found) == 1 for found in losses.values())
    assert losses["fp32"] != losses["bf16"]
    assert losses["fp32"].pop() == pytest.approx(losses["bf16"].pop(), rel=0.02)


def test_freeze_leaves_a_tower_bit_equal(model: CompressedModel) -> None:
    new, _ = run(model, freeze=["text"], weight_decay=1.0)
    assert same(new.module.text_model, model.module.text_model)
    assert same(new.module.text_projection, model.module.text_projection)
    assert not same(new.module.vision_model, model.module.vision_model)
    assert all(p.requires_grad for p in new.module.parameters())


def test_freezing_nothing_that_is_there_or_everything_is_refused(model: CompressedModel) -> None:
    with pytest.raises(RecipeError, match="did you mean 'vision'"):
        run(model, freeze=["visoin"])
    with pytest.raises(RecipeError, match="nothing is left to train"):
        run(model, freeze=["text", "vision"])


class Broken(Objective):
    """Is not a number from its third call on, in one of two parts."""

    calls = 0

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        self.calls += 1
        good = outputs.embeds["vision"].square().mean()
        return {"good": good, "bad": good * (math.nan if self.calls > 2 else 1)}


def test_a_loss_that_is_not_finite_stops_at_once_and_is_named(model: CompressedModel) -> None:
    objective = Broken()
    with pytest.raises(TrainingError, match=r"distill: step 3 of 9: the loss 'bad' is nan"):
        train(model.clone(), context(), settings(epochs=3), objective, "distill")
    assert objective.calls == 3


def test_a_poisoned_weight_stops_the_first_step(model: CompressedModel) -> None:
    model.module.visual_projection.weight.data[0, 0] = math.inf
    with pytest.raises(TrainingError, match="step 1 of 3: the loss 'task' is nan"):
        run(model)


class Endless(Objective):
    """A finite loss whose gradient is not."""

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        return {"root": (outputs.embeds["vision"].sum() * 0).abs().sqrt()}


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(model: CompressedModel) -> None:
    new = model.clone()
    with pytest.raises(TrainingError, match="norm of the gradients"):
        train(new, context(), settings(), Endless())
    assert same(new.module, model.module)


def damaged(count: int, bad: list[int], skip: bool) -> Examples:
    columns = tiny.rows(count)
    for i in bad:
        columns["image"][i] = {"bytes": b"no picture", "path": None}
    rows = [{k: v[i] for k, v in columns.items()} for i in range(count)]
    roles = {"image": "image", "label": "label"}
    return Examples(rows, "data.train", roles, list(tiny.COLOURS), skip_damaged=skip)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_an_error_or_left_out_and_counted(model: CompressedModel, workers: int) -> None:
    where = context()
    where.train = damaged(32, [4, 20], skip=False)
    with pytest.raises(DataError, match=r"^data\.train, row (4|20), column 'image': the picture does not decode"):
        run(model, where, workers=workers)
    where.train = damaged(32, [4, 20], skip=True)
    _, facts = run(model, where, workers=workers, epochs=2)
    assert (facts["skipped"], facts["examples"], facts["steps"]) == (2, 60, 4)
    assert len(where.warnings) == 1
    assert "2 of 32 training examples were left out" in where.warnings[0]


def test_nothing_but_damaged_pictures_is_an_error(model: CompressedModel) -> None:
    where = context()
    where.train = damaged(4, [0, 1, 2, 3], skip=True)
    with pytest.raises(DataError, match="not one picture can be used"):
        run(model, where)


def test_a_picture_that_the_image_processor_refuses_is_named(model: CompressedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = type(model.processor).media

    def media(self: Any, kind: str, images: list[Any]) -> list[dict[str, torch.Tensor]]:
        if any(image.size == (1, 1) for image in images):
            raise ValueError("too small")
        return plain(self, kind, images)

    monkeypatch.setattr(type(model.processor), "media", media)
    where = context()
    where.train = damaged(16, [], skip=False)
    where.train.rows[5]["image"] = tiny.Pillow.new("RGB", (1, 1))  # type: ignore[index]
    with pytest.raises(DataError, match="row 5: the image processor refuses it: too small"):
        run(model, where)
    # Scoring prepares in blocks, and says the same; or goes on without the one.
    with pytest.raises(DataError, match="row 5: the image processor refuses it: too small"):
        list(prepared(where.train, model.processor))
    where.train.skip_damaged = True
    assert [len(indices) for indices, _ in prepared(where.train, model.processor)] == [15]


def test_batches_cover_an_epoch_and_pictures_stay_with_their_texts(model: CompressedModel) -> None:
    examples = as_examples(tiny.dataset(40))
    feed = Feed(examples, model.processor, TASK, 16, seed=3)
    assert feed.steps_per_epoch == 2, "an incomplete last batch is dropped"
    epochs = [b["index"].tolist() for b in feed.batches(4)]
    assert len({*epochs[0], *epochs[1]}) == 32
    assert epochs[:2] != epochs[2:]
    for batch in Feed(examples, model.processor, TASK, 16, seed=3).batches(4):
        for k, i in enumerate(batch["index"].tolist()):
            assert torch.equal(batch["pixel_values"][k], model.processor.pixels([examples[i]["image"]])[0])
            assert batch["target"][k] == examples[i]["label"]


def test_a_step_is_given_the_same_wherever_one_begins(model: CompressedModel) -> None:
    examples = as_examples(tiny.dataset(40))
    whole = list(Feed(examples, model.processor, TASK, 16, seed=3).batches(7))
    for start in (0, 1, 2, 5, 7):
        part = list(Feed(examples, model.processor, TASK, 16, seed=3).batches(7, start))
        assert len(part) == 7 - start
        for a, b in zip(part, whole[start:], strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_fewer_examples_than_a_batch_are_one_smaller_batch(model: CompressedModel) -> None:
    _, facts = run(model, context(5), batch_size=128, epochs=2)
    assert (facts["batch_size"], facts["steps"], facts["examples"]) == (5, 2, 10)


def test_epochs_become_steps() -> None:
    assert [count_steps(settings(epochs=e), 10) for e in (0.01, 0.25, 1, 2.5)] == [1, 2, 10, 25]
    assert count_steps(settings(epochs=5, max_steps=7), 10) == 7


def test_trainings_in_a_row_share_one_schedule() -> None:
    whole = [rate_share(k, 30, 0.1) for k in range(30)]
    thirds = [rate_share(k, 10, 0.1, (part / 3, (part + 1) / 3)) for part in range(3) for k in range(10)]
    assert thirds == pytest.approx(whole)


def test_learning_rate_by_hand() -> None:
    # 10 steps, 2 of them rise: 1/2, 1, then half a cosine over 8 from 1, through 1/2 in its middle.
    found = [rate_share(k, 10, 0.2) for k in range(10)]
    assert found[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert found[6] == pytest.approx(0.5)
    assert found[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert rate_share(0, 1, 0.0) == 1.0
    assert rate_share(0, 1, 0.5) == 1.0


def test_the_schedule_reaches_the_optimiser(model: CompressedModel) -> None:
    biases: list[torch.Tensor] = []
    new = model.clone()

    def before_step(step: int, steps: int) -> None:
        assert steps == 4
        biases.append(new.module.vision_model.post_layernorm.bias.detach().clone())

    where = context(64)
    train(new, where, settings(warmup=0.5), TaskObjective(TASK), before_step=before_step)
    # Adam's first step moves every number by the learning rate, which is half of its peak in the first of two warm-up steps.
    assert (biases[1] - biases[0]).abs().max().item() == pytest.approx(0.5e-3, rel=0.02)


def test_gradients_are_clipped_together(model: CompressedModel) -> None:
    # A norm far below Adam's epsilon of 1e-6 stops it; without clipping a step is about the learning rate.
    moved = {}
    for clip in (1e-12, 0.0):
        new, _ = run(model, grad_clip=clip, max_steps=1, weight_decay=0)
        moved[clip] = (new.module.visual_projection.weight - model.module.visual_projection.weight).abs().max().item()
    assert moved[1e-12] < 1e-8
    assert moved[0.0] == pytest.approx(1e-3, rel=0.05)


def test_decay_is_for_matrices_that_are_no_tables(model: CompressedModel) -> None:
    extra = nn.Parameter(torch.ones(2, 2))
    decayed, rest = parameter_groups(model.module, [extra], 0.3)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    names = {id(p): n for n, p in model.module.named_parameters()}
    kept = {names.get(id(p), "extra") for p in rest["params"]}
    assert {"logit_scale", "extra", "text_model.embeddings.token_embedding.weight", "vision_model.post_layernorm.weight"} <= kept
    assert {names[id(p)].rsplit(".", 1)[1] for p in decayed["params"]} == {"weight"}
    assert len(kept) + len(decayed["params"]) == len(names) + 1
    assert "visual_projection.weight" in {names[id(p)] for p in decayed["params"]}


def test_the_logit_scale_stays_at_most_100_unless_it_came_higher(model: CompressedModel) -> None:
    class Rising(Objective):
        def forward(self, outputs: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
            return {"up": -outputs.logit_scale}

    for start, limit in ((4.6, math.log(100)), (4.8, 4.8)):
        new = model.clone()
        new.module.logit_scale.data.fill_(start)
        train(new, context(), settings(learning_rate=0.5, epochs=3), Rising())
        assert new.module.logit_scale.item() == pytest.approx(limit, abs=1e-6)


def test_attention_in_float32_is_what_autocast_would_give_and_keeps_its_dtype() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 8).bfloat16() for _ in range(3))
    mask = torch.ones(5, 5).tril().bool()
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, scale=0.3)
    with computing(CPU, "bf16"):
        found = F.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.3)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    with Float32Attention():
        float_mask = torch.zeros(5, 5).masked_fill(~mask, -math.inf).bfloat16()
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, attn_mask=float_mask, scale=0.3), found)


def test_progress_counts_steps_and_says_the_loss(model: CompressedModel) -> None:
    class Listening(Reporter):
        def __init__(self) -> None:
            self.tracked: list[tuple[str, int | None]] = []
            self.notes: list[str] = []

        def track(self, items: Any, what: str, total: int | None = None) -> Any:
            self.tracked.append((what, total))
            return iter(items)

        def note(self, text: str) -> None:
            self.notes.append(text)

    reporter = Listening()
    where = context(reporter=reporter)
    _, facts = run(model, where)
    assert reporter.tracked == [("finetune", 3)]
    assert reporter.notes[0] == f"loss {facts['first_loss']:.3f}"
    assert where.facts["examples_seen"] == 48
    assert where.facts["seconds"] >= where.facts["data_seconds"] > 0
