"""FLAP: the metric by hand, and that what goes is made up for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mmcompress.context import Context
from mmcompress.errors import DataError, ModelError, RecipeError
from mmcompress.families.base import UnitGroup
from mmcompress.model import CompressedModel
from mmcompress.passes.prune import Prune
from mmcompress.pruning.criteria.base import Cut, inputs_of
from mmcompress.pruning.criteria.flap import Flap
from mmcompress.pruning.units import CoupledGroup, Tap
from tests import tiny
from tests.families.test_all_families import EXPORTED, made
from tests.families.test_all_families import context as context_of
from tests.pruning.helpers import context, coupled, embeds, full, probe, toy

X = [torch.tensor([[[1.0, 5.0, 0.0]], [[3.0, 5.0, 2.0]]]), torch.tensor([[[8.0, 5.0, 4.0]]])]


def reader(unit: list[int], bias: bool = True) -> tuple[nn.Linear, CoupledGroup]:
    """Two outputs out of three channels that belong to these units."""
    net = nn.Linear(3, 2, bias=bias)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 3.0, 2.0], [2.0, 1.0, 0.0]]))
        if bias:
            net.bias.fill_(0.5)
    block = 3 // (max(unit) + 1)
    return net, CoupledGroup(
        UnitGroup("t", "ffn", "n", net, 3, block), (), (Tap(net, "input", torch.arange(3), torch.tensor(unit)),)
    )


def test_the_metric_by_hand() -> None:
    # Channel 1: (1, 3, 8), mean 4, variance 26 / 2, weights 1 + 4. Channel 2 stands still. Channel 3: variance 4, weights 4.
    net, group = reader([0, 1, 2])
    (scores,) = Flap().unit_scores([group], toy(net, [{"x": x} for x in X]))
    assert scores.tolist() == pytest.approx([13 * 5, 0, 4 * 4])
    net, group = reader([0, 0, 0])
    (scores,) = Flap().unit_scores([group], toy(net, [{"x": x} for x in X]))
    assert scores.tolist() == pytest.approx([65 + 16])


def test_the_compensation_by_hand() -> None:
    net, group = reader([0, 1, 2])
    criterion, where = Flap(), toy(net, [{"x": x} for x in X])
    criterion.unit_scores([group], where)
    facts = criterion.compensate([Cut(group, (0,))], where)
    # 3 * 5 + 2 * 2 and 1 * 5 + 0 * 2 more than 0.5.
    assert net.bias.tolist() == pytest.approx([19.5, 5.5])
    assert facts == {"compensated_biases": 1, "readers_without_bias": 0}
    assert where.warnings == []


def test_what_keeps_all_its_units_is_left_alone() -> None:
    net, group = reader([0, 1, 2])
    criterion, where = Flap(), toy(net, [{"x": x} for x in X])
    criterion.unit_scores([group], where)
    criterion.compensate([Cut(group, (0, 1, 2))], where)
    assert net.bias.tolist() == [0.5, 0.5]


def test_variance_and_mean_are_numpys_over_real_tokens_of_uneven_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    batches, tokens = [], []
    for size in (1, 4, 2):
        x = torch.randn(size, 5, 3, generator=generator) + 1000
        mask = torch.rand(size, 5, generator=generator) < 0.6
        batches.append({"x": x, "attention_mask": mask.long()})
        tokens.append(x[mask].double())
    net, group = reader([0, 1, 2])
    criterion = Flap()
    (scores,) = criterion.unit_scores([group], toy(net, batches, reads_mask=True))
    seen = torch.cat(tokens).numpy()
    np.testing.assert_allclose(scores.numpy(), seen.var(0, ddof=1) * np.array([5.0, 10.0, 4.0]), rtol=1e-5)
    np.testing.assert_allclose(criterion._means[id(net)].numpy(), seen.mean(0), rtol=1e-9)


def still(model: CompressedModel) -> tuple[dict[str, list[int]], CompressedModel]:
    """Makes half of the FFN units of each layer give the same for every token, far from zero."""
    gone = {"vision": list(range(1, 96, 2)), "text": list(range(0, 64, 2))}
    with torch.no_grad():
        for tower, units in gone.items():
            for layer in model.family.layers(model.module, tower):
                layer.mlp.fc1.weight[units] = 0
                layer.mlp.fc1.bias[units] = torch.linspace(-1, 3, len(units))
    return gone, model


def test_units_that_stand_still_are_cut_without_a_change() -> None:
    gone, model = still(full(tiny.clip()))
    before = embeds(model)
    new = Prune(ratio=0.5, criterion="flap", samples=16, batch_size=8).apply(model, context=context(16))
    layer = new.module.vision_model.encoder.layers[1].mlp
    old = model.module.vision_model.encoder.layers[1].mlp
    left = [u for u in range(96) if u not in gone["vision"]]
    assert torch.equal(layer.fc1.weight, old.fc1.weight[left])
    assert not torch.equal(layer.fc2.bias, old.fc2.bias)
    for tower, values in embeds(new).items():
        torch.testing.assert_close(values, before[tower], rtol=1e-4, atol=1e-4)
    plain = Prune(ratio=0.5, criterion="activation", samples=16, batch_size=8).apply(model, context=context(16))
    assert float((embeds(plain)["vision"] - before["vision"]).abs().max()) > 0.1
    assert new.history[-1]["result"]["compensated_biases"] == 5


def test_heads_that_stand_still_are_cut_without_a_change() -> None:
    model = full(tiny.clip())
    with torch.no_grad():
        for layer in model.module.vision_model.encoder.layers:
            layer.self_attn.v_proj.weight[16:32] = 0  # the second of three heads gives its values' bias, whatever it looks at
    before = embeds(model)
    step = Prune(axis="heads", ratio={"vision": 0.34}, criterion="flap", samples=16, batch_size=8, allow_custom=True)
    new = step.apply(model, context=context(16))
    assert new.module.vision_model.encoder.layers[0].self_attn.v_proj.weight.shape == (32, 48)
    torch.testing.assert_close(embeds(new)["vision"], before["vision"], rtol=1e-4, atol=1e-4)


def test_a_reader_gives_on_average_what_it_gave() -> None:
    model = full(tiny.clip())
    where, group = probe(model), coupled(model, "vision", "ffn")
    given: list[torch.Tensor] = []
    taps = group.taps[0].module.register_forward_hook(lambda _, args, made: given.append(made.detach()))
    criterion = Flap()
    (scores,) = criterion.unit_scores([group], where)
    keep = tuple(sorted(scores.argsort(descending=True)[:24].tolist()))
    before = torch.cat(given)
    criterion.compensate([Cut(group, keep)], where)
    with torch.no_grad():
        group.taps[0].module.weight[:, [u for u in range(group.units) if u not in keep]] = 0  # type: ignore[index]
    given.clear()
    Flap().unit_scores([group], where)
    taps.remove()
    after = torch.cat(given)
    assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(before.mean((0, 1)), after.mean((0, 1)), rtol=1e-4, atol=1e-4)


def test_readers_without_a_bias_are_said() -> None:
    model, given = made("smolvlm"), context_of("smolvlm")
    step = Prune(ratio={"text": 0.5}, criterion="flap", round_to=1, samples=8, batch_size=8)
    new, facts = step.run(model, given)
    assert (facts["compensated_biases"], facts["readers_without_bias"]) == (0, 2)
    (said,) = given.warnings
    assert "flap: the readers of 2 of 2 groups" in said
    assert "no stock config gives them one" in said
    assert not new.custom


@pytest.mark.parametrize("axis", ["width", "depth"])
def test_other_axes_are_refused(axis: Any) -> None:
    with pytest.raises(
        ValidationError, match=f"flap does not say what is lost along the axis {axis}; use it with axis: ffn or heads"
    ):
        Prune(axis=axis, ratio=0.5, criterion="flap")


def test_other_axes_are_refused_when_run_too() -> None:
    model = tiny.clip()
    group = coupled(model, "vision", "width")
    with pytest.raises(RecipeError, match="use it with axis: ffn or heads"):
        Flap().layer_scores({}, probe(model))
    with pytest.raises(RecipeError, match="the axis width; use it with axis: ffn or heads"):
        Flap().unit_scores([group], probe(model))


def test_a_reader_that_is_no_linear_is_refused() -> None:
    net = nn.Conv1d(3, 2, 1)
    group = CoupledGroup(UnitGroup("t", "ffn", "n", net, 3), (), (Tap(net, "input", torch.arange(3), torch.arange(3)),))
    with pytest.raises(ModelError, match="what reads n is a Conv1d; allowed: Linear"):
        Flap().unit_scores([group], toy(net, []))


def test_no_examples_is_an_error() -> None:
    with pytest.raises(DataError, match="training examples"):
        Prune(ratio=0.5, criterion="flap").run(tiny.clip(), Context(task=context().task))


def outputs(model: CompressedModel, where: Context) -> list[torch.Tensor]:
    """What the model gives for four training examples: embeddings, or logits."""
    task, examples = where.need_task("x"), where.need_train("x")
    batch = task.collate([examples[i] for i in range(4)], model.processor, examples, 0)
    with torch.no_grad():
        found = model.family.forward(model.module, inputs_of(batch))
    return list(found.embeds.values()) or [value for value in [found.logits] if value is not None]


@pytest.mark.parametrize("name", EXPORTED)  # one model of each family, all of them in the slow suite
def test_in_every_family_units_that_stand_still_are_cut_without_a_change(name: str) -> None:
    model, where = made(name), context_of(name)
    towers = [tower for tower in model.family.towers if "ffn" in model.family.tower_axes(tower)]
    if not towers:
        pytest.skip(f"{name} has no axis ffn")
    generator = torch.Generator().manual_seed(0)
    for tower in towers:
        for group in model.family.unit_groups(model.module, tower, "ffn"):
            root, half = group.root, group.size // 2
            with torch.no_grad():
                root.weight[half:] = 0
                if root.bias is not None:
                    root.bias[half:] = torch.randn(group.size - half, generator=generator)
    before = outputs(model, where)
    step = Prune(ratio=dict.fromkeys(towers, 0.5), criterion="flap", round_to=1, samples=8, batch_size=8)
    new, facts = step.run(model, where)
    assert not new.custom
    assert facts["compensated_biases"] + facts["readers_without_bias"] > 0
    for ours, theirs in zip(outputs(new, where), before, strict=True):
        assert float(ours.std()) > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
