"""The moving average of the weights, and early stop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mmcompress.context import Context
from mmcompress.data.examples import Examples, as_examples
from mmcompress.data.leaks import same_media
from mmcompress.errors import DataError
from mmcompress.model import CompressedModel
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from mmcompress.training import holdout
from mmcompress.training.average import Average
from mmcompress.training.holdout import Watch, hold_out
from mmcompress.training.loop import train
from mmcompress.training.objective import TaskObjective
from mmcompress.training.settings import EarlyStop, TrainingSettings
from tests import tiny

TASK = ZeroShotImageClassification(type="zero-shot-image-classification", templates=["a photo of a {}."])


def settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings(**{"batch_size": 16, "learning_rate": 1e-3, "precision": "fp32", **changes})


def context(count: int = 48) -> Context:
    return Context(task=TASK, train=as_examples(tiny.dataset(count)), device="cpu")


def test_the_average_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([0.0]))
    average = Average([weight], 0.15)
    weight.data.fill_(10.0)
    average.update()  # decay min(0.15, 1/10): 0.1 * 0 + 0.9 * 10
    assert average.values[0].item() == pytest.approx(9.0)
    weight.data.fill_(1.0)
    average.update()  # min(0.15, 2/11) = 0.15: 0.15 * 9 + 0.85 * 1
    assert average.values[0].item() == pytest.approx(2.2)
    with average.in_place():
        assert weight.item() == pytest.approx(2.2)
    assert weight.item() == 1.0


def test_what_is_left_is_the_average_of_the_steps(model: CompressedModel) -> None:
    """Against torch's AveragedModel with the same decays, over the weights of a training without an average."""
    seen: list[dict[str, torch.Tensor]] = []
    plain = model.clone()

    def before_step(step: int, steps: int) -> None:
        seen.append({n: p.detach().clone() for n, p in plain.module.named_parameters()})

    train(plain, context(), settings(epochs=2), TaskObjective(TASK), before_step=before_step)
    seen.append({n: p.detach().clone() for n, p in plain.module.named_parameters()})
    decays = [min(0.5, (1 + t) / (10 + t)) for t in range(6)]
    steps = iter(decays)

    def average(mean: torch.Tensor, weight: torch.Tensor, count: Any) -> torch.Tensor:
        return decay * mean + (1 - decay) * weight

    module = model.clone().module
    reference = AveragedModel(module, avg_fn=average)
    reference.update_parameters(module)
    for weights in seen[1:]:
        decay = next(steps)
        for name, parameter in module.named_parameters():
            parameter.data.copy_(weights[name])
        reference.update_parameters(module)
    averaged = model.clone()
    train(averaged, context(), settings(epochs=2, ema=0.5), TaskObjective(TASK))
    for name, parameter in averaged.module.named_parameters():
        expected = reference.module.get_parameter(name)
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-7, msg=name)
        assert not torch.equal(parameter, seen[-1][name])


def test_held_out_examples_are_seeded_and_pictures_stay_on_one_side() -> None:
    columns = tiny.rows(30)
    columns["image"] = [columns["image"][i // 3] for i in range(30)]  # ten pictures, three times each
    data = as_examples(tiny.Dataset.from_dict(columns, features=tiny.dataset(1).features))
    kept, held = hold_out(data, 0.2, 1, "finetune")
    assert sorted(kept + held) == list(range(30))
    assert len(held) == 6
    groups = same_media(data)
    assert not {groups[i] for i in kept} & {groups[i] for i in held}
    assert hold_out(data, 0.2, 1, "finetune") == (kept, held)
    assert hold_out(data, 0.2, 2, "finetune") != (kept, held)
    with pytest.raises(DataError, match="finetune: early_stop: 3 training examples are too few"):
        hold_out(data[:3], 0.2, 1, "finetune")


def test_training_ends_when_the_held_out_loss_does_not_fall_and_the_best_weights_stay(
    model: CompressedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, seen = iter([3.0, 2.0, 2.5, 2.0, 9.0]), []

    def loss(self: Watch) -> float:
        seen.append({n: p.detach().clone() for n, p in self.runner.model.module.named_parameters()})
        assert not self.runner.model.module.training
        return next(losses)

    monkeypatch.setattr(Watch, "_loss", loss)
    stop = EarlyStop(patience=2, every=0.5, holdout=0.2)
    new = model.clone()
    facts = train(new, context(40), settings(epochs=30, early_stop=stop), TaskObjective(TASK))
    # 32 to train on, 2 steps an epoch, a look after each: the second is the best, and two more bring nothing lower.
    assert facts["steps"] == 4
    assert facts["best_step"] == 2
    assert facts["holdout_loss"] == [[1, 3.0], [2, 2.0], [3, 2.5], [4, 2.0]]
    for name, parameter in new.module.named_parameters():
        assert torch.equal(parameter, seen[1][name])
    assert any(not torch.equal(seen[3][name], seen[1][name]) for name in seen[1])


def test_the_held_out_loss_is_the_tasks_own_in_eval_mode_and_of_examples_never_trained_on(
    model: CompressedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, watched = set(), []
    real = holdout.Watch._loss

    def loss(self: Watch) -> float:
        watched.append({i for batch in self.feed.batches(1) for i in batch["index"].tolist()})
        (batch,) = self.feed.batches(1)
        with torch.no_grad():
            expected = TASK.loss(model.family.forward(self.runner.model.module, {k: batch[k] for k in inputs}), batch)
        found = real(self)
        assert found == pytest.approx(expected.item(), rel=1e-5)
        return found

    inputs = ("pixel_values", "input_ids", "attention_mask")
    monkeypatch.setattr(Watch, "_loss", loss)
    objective = TaskObjective(TASK)
    plain = objective.forward

    def forward(outputs: Any, batch: Any) -> Any:
        if torch.is_grad_enabled():
            trained.update(batch["index"].tolist())
        return plain(outputs, batch)

    monkeypatch.setattr(objective, "forward", forward)
    stop = EarlyStop(holdout=0.25, every=1)
    train(model.clone(), context(64), settings(epochs=3, early_stop=stop), objective)
    assert len(watched[0]) == 16
    assert watched[0] == watched[1] == watched[2], "always the same"
    assert len(trained) == 48
    assert not trained & watched[0]


def test_looking_changes_nothing_in_what_is_trained(model: CompressedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws the same with many looks and with few."""
    weights = []
    monkeypatch.setattr(Watch, "restore", lambda self: None)
    for every in (0.3, 1.0):
        new = tiny.clip(attention_dropout=0.3)
        train(
            new, context(), settings(epochs=2, early_stop=EarlyStop(patience=99, every=every, holdout=0.2)), TaskObjective(TASK)
        )
        weights.append(new.module.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_made_data_has_no_picture_twice() -> None:
    assert same_media(Examples([{"image": b""}, {"image": b""}], "made", {"image": "image"})) == [0, 1]
