"""MoPE by hand, and that leaving out is what cutting does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcompress.families.base import UnitGroup
from mmcompress.model import CompressedModel
from mmcompress.pruning import cut
from mmcompress.pruning.criteria.base import Probe, inputs_of
from mmcompress.pruning.criteria.mope import CHUNKS, Mope, _without_units
from mmcompress.pruning.criteria.taylor import Taylor
from mmcompress.pruning.units import CoupledGroup, Slice
from tests import tiny
from tests.families.test_all_families import context, made
from tests.pruning.helpers import coupled, full, linear, probe, toy, two_units


def probe_of(name: str, model: CompressedModel) -> Probe:
    given = context(name)
    return Probe(model, task=given.task, examples=given.train, samples=16, batch_size=8)


def loss(model: CompressedModel, where: Probe) -> float:
    """The mean of the task's loss over the probe's batches, all towers run."""
    task, _ = where.need()
    with torch.no_grad():
        found = [float(task.loss(model.family.forward(model.module, inputs_of(b)), b)) for b in where.batches()]
    return sum(found) / len(found)


def test_units_by_hand() -> None:
    # 10x - 21x: without the first unit 10x less, without the second 21x more; the mean of x is 3/2.
    net, group = two_units()
    data = [{"x": torch.tensor([[1.0]])}, {"x": torch.tensor([[2.0]])}]
    (scores,) = Mope().unit_scores([group], toy(net, data))
    assert scores.tolist() == pytest.approx([-10 * 1.5, 21 * 1.5])
    assert [p.tolist() for p in net.parameters()] == [[[2.0], [3.0]], [[5.0, -7.0]]]


def test_layers_by_hand() -> None:
    # 2 * 3 * x: without the doubling 3x, without the tripling 2x.
    net = nn.Sequential(linear([[2.0]]), linear([[3.0]]))
    scores = Mope().layer_scores({"t": list(net)}, toy(net, [{"x": torch.tensor([[1.0]])}]))
    assert scores["t"].tolist() == pytest.approx([3 - 6, 2 - 6])
    assert not net[0]._forward_hooks


@pytest.mark.parametrize(("name", "tower"), [("clip", "vision"), ("clip", "text"), ("whisper", "decoder"), ("smolvlm", "text")])
def test_leaving_a_layer_out_is_dropping_it(name: str, tower: str) -> None:
    model = made(name)
    where = probe_of(name, model)
    layers = list(model.family.layers(model.module, tower))
    scores = Mope().layer_scores({tower: layers}, where)[tower]
    whole = loss(model, where)
    for place in range(len(layers)):
        other = made(name)
        other.family.drop_layers(other.module, tower, [i for i in range(len(layers)) if i != place])
        assert float(scores[place]) == pytest.approx(loss(other, where) - whole, abs=1e-5)


@pytest.mark.parametrize(("name", "tower"), [("clip", "vision"), ("whisper", "decoder"), ("smolvlm", "text")])
def test_leaving_a_head_out_is_cutting_it(name: str, tower: str) -> None:
    model = made(name)
    where, group = probe_of(name, model), coupled(model, tower, "heads")
    (scores,) = Mope().unit_scores([group], where)
    whole = loss(model, where)
    other = made(name)
    graph = None if group.group.explicit else cut.trace(other.family, other.module, tower)
    cut.cut_units(graph, other.family.unit_groups(other.module, tower, "heads")[0], list(range(1, group.units)))
    cut.rebuild(other, allow_custom=True)
    assert float(scores[0]) == pytest.approx(loss(other, where) - whole, abs=1e-5)
    assert abs(float(scores[0])) > 1e-5


def test_units_are_left_out_in_chunks_of_like_ones() -> None:
    model = full(tiny.clip())
    where, group = probe(model), coupled(model, "vision", "ffn")
    before = {name: values.clone() for name, values in model.module.state_dict().items()}
    (scores,) = Mope().unit_scores([group], where)
    assert all(torch.equal(values, before[name]) for name, values in model.module.state_dict().items())
    (order,) = Taylor().unit_scores([group], where)
    ranked = order.argsort(stable=True)
    size = group.units // CHUNKS
    whole = loss(model, where)
    for number in (0, CHUNKS - 1):
        chunk = ranked[number * size : (number + 1) * size]
        own = scores[chunk]
        assert bool((own.diff() > 0).all())
        with torch.no_grad():
            model.module.vision_model.encoder.layers[0].mlp.fc2.weight[:, chunk] = 0
        assert float(own[0]) == pytest.approx((loss(model, where) - whole) / size, abs=1e-6)
        model.module.load_state_dict(before)
    # Chunks whose drops differ keep their order, whatever is added within them.
    drops = torch.stack([scores[ranked[i * size]] for i in range(CHUNKS)])
    tops = torch.stack([scores[ranked[(i + 1) * size - 1]] for i in range(CHUNKS)])
    assert torch.equal(drops.argsort(), tops.argsort())


def test_the_other_tower_runs_once_per_batch() -> None:
    model = tiny.clip()
    groups = [coupled(model, "vision", "heads", i) for i in range(3)]
    calls = {"vision": 0, "text": 0}
    for tower in calls:

        def count(*_: object, tower: str = tower) -> None:
            calls[tower] += 1

        model.module.get_submodule(f"{tower}_model").register_forward_pre_hook(count)
    Mope().unit_scores(groups, probe(model))
    assert calls == {"vision": 2 * (2 + 9), "text": 2 * 2}  # the whole loss, the embeddings, and nine heads; two batches


def test_weights_come_back_when_an_evaluation_fails() -> None:
    net, group = two_units()
    where = toy(net, [{"x": torch.tensor([[1.0]])}])
    calls = []

    def failing(outputs: torch.Tensor, batch: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("stop")
        return outputs.sum()

    where.task.loss = failing  # type: ignore[union-attr,method-assign]
    with pytest.raises(RuntimeError, match="stop"):
        Mope().unit_scores([group], where)
    assert [p.tolist() for p in net.parameters()] == [[[2.0], [3.0]], [[5.0, -7.0]]]


def test_a_weight_that_is_cut_along_both_dimensions_comes_back() -> None:
    net = linear([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    three = torch.arange(3)
    slices = tuple(Slice("weight", net.weight, dim, three, three) for dim in (0, 1))
    group = CoupledGroup(UnitGroup("t", "width", "net", net, 3), slices, ())
    with _without_units(group, torch.tensor([1])):
        assert net.weight.tolist() == [[1, 0, 3], [0, 0, 0], [7, 0, 9]]
    assert net.weight.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
