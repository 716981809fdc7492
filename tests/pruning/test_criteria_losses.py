"""Criteria that read gradients, on the tasks' own losses: captions, transcripts, the sigmoid loss."""

from __future__ import annotations

import copy

import pytest
import torch

from mmcompress.model import CompressedModel
from mmcompress.pruning.criteria.base import Probe, inputs_of
from mmcompress.pruning.criteria.hessian import Hessian, sample_size
from mmcompress.pruning.criteria.taylor import Taylor
from mmcompress.pruning.units import CoupledGroup
from tests.families.test_all_families import context, made
from tests.pruning.helpers import coupled, toy, two_units

# Caption loss, seq2seq loss, sigmoid loss; and a tower in which it is looked at.
LOSSES = [("blip-captions", "text"), ("blip-captions", "vision"), ("whisper", "encoder"), ("whisper", "decoder")]
LOSSES += [("siglip", "vision"), ("siglip", "text")]


def probe_of(name: str, model: CompressedModel, samples: int = 8, batch_size: int = 8) -> Probe:
    given = context(name, count=samples)
    return Probe(model, task=given.task, examples=given.train, samples=samples, batch_size=batch_size)


def scaled(model: CompressedModel, group: CoupledGroup, unit: int, factor: float) -> CompressedModel:
    """A copy in which all weights of one unit are larger by a factor."""
    other = copy.deepcopy(model)
    own = dict(other.module.named_parameters())
    with torch.no_grad():
        for part in group.slices:
            places = part.index[part.unit == unit]
            own[part.name].index_copy_(part.dim, places, own[part.name].index_select(part.dim, places) * factor)
    return other


@pytest.mark.parametrize(("name", "tower"), LOSSES)
def test_taylor_is_the_slope_of_the_tasks_own_loss(name: str, tower: str) -> None:
    model = made(name)
    probe, group = probe_of(name, model), coupled(model, tower, "ffn")
    (scores,) = Taylor().unit_scores([group], probe)
    unit = int(scores.argmax())
    task, _ = probe.need()
    (batch,) = probe.batches()
    losses = []
    for factor in (1.02, 0.98):
        other = scaled(model, group, unit, factor)
        with torch.no_grad():
            losses.append(float(task.loss(other.family.forward(other.module, inputs_of(batch)), batch).double()))
    assert float(scores[unit]) == pytest.approx(abs(losses[0] - losses[1]) / 0.04, rel=0.03)


def test_hessian_by_hand() -> None:
    # w g is 10 x for either weight of the first unit and -21 x for those of the second: halves of 200 x^2 and 882 x^2.
    net, group = two_units()
    data = [{"x": torch.tensor([[1.0]])}, {"x": torch.tensor([[-2.0]])}]
    (scores,) = Hessian().unit_scores([group], toy(net, data))
    assert scores.tolist() == [100 * 2.5, 441 * 2.5]
    layers = Hessian().layer_scores({"t": list(net)}, toy(net, data))
    assert layers["t"].tolist() == [(100 + 441) / 2 * 2.5] * 2
    assert net[0].weight.grad is None


def test_a_sample_of_the_hessian_is_an_example_or_a_small_batch() -> None:
    captions, contrast = made("blip-captions"), made("siglip")
    probe = probe_of("blip-captions", captions)
    assert sample_size(probe) == 1
    assert sample_size(probe_of("siglip", contrast, batch_size=64)) == 16
    assert sample_size(probe_of("siglip", contrast, batch_size=8)) == 8
    calls: list[int] = []
    captions.module.vision_model.register_forward_pre_hook(lambda *_: calls.append(1))
    Hessian().layer_scores(
        {"vision": list(captions.family.layers(captions.module, "vision"))}, probe_of("blip-captions", captions)
    )
    assert len(calls) == 8


def test_hessian_is_the_mean_over_examples_of_squared_gradients() -> None:
    model = made("blip-captions")
    probe, group = probe_of("blip-captions", model, samples=3), coupled(model, "text", "ffn")
    (scores,) = Hessian().unit_scores([group], probe)
    task, examples = probe.need()
    expected = torch.zeros(group.units, dtype=torch.float64)
    for number in range(3):
        batch = task.collate([examples[number]], model.processor, examples, 0)
        loss = task.loss(model.family.forward(model.module, inputs_of(batch)), batch)
        parameters = [part.parameter for part in group.slices]
        for part, found in zip(group.slices, torch.autograd.grad(loss, parameters), strict=True):
            products = (part.parameter.detach() * found).double().square() / 2
            expected += products if products.dim() == 1 else products.sum(1 - part.dim)
    torch.testing.assert_close(scores, expected / 3, rtol=1e-4, atol=1e-12)
    assert scores.max() > 0
