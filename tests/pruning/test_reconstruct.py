"""Readers fitted by least squares: by hand, against numpy, and on a model whose units repeat each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mmcompress.context import Context
from mmcompress.errors import DataError, ModelError
from mmcompress.families.base import UnitGroup
from mmcompress.passes.prune import Prune
from mmcompress.pruning.criteria.base import Cut, inputs_of
from mmcompress.pruning.reconstruct import DAMPING, reconstruct
from mmcompress.pruning.units import CoupledGroup, Tap
from tests import tiny
from tests.pruning.helpers import context, full, probe, stock_reload_is_equal, toy


def group_of(net: nn.Module, channels: int) -> CoupledGroup:
    """A unit for each channel that a module reads."""
    every = torch.arange(channels)
    return CoupledGroup(UnitGroup("t", "ffn", "n", net, channels), (), (Tap(net, "input", every, every),))


def test_a_channel_that_another_one_tells_is_made_up_for() -> None:
    net = nn.Linear(2, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[5.0, 7.0]]))
        net.bias.fill_(0.5)
    first = torch.tensor([[[1.0], [2.0]], [[4.0], [9.0]]])
    x = torch.cat([first, 2 * first + 3], -1)  # the second channel says what the first one does
    wanted = net(x)
    facts = reconstruct([Cut(group_of(net, 2), (0,))], toy(net, [{"x": x}]))
    # 7 * (2 x + 3) = 14 x + 21, but for the damping.
    assert net.weight[0, 0].item() == pytest.approx(19.0, rel=2e-3)
    assert net.bias.item() == pytest.approx(21.5, rel=5e-3)
    torch.testing.assert_close(nn.functional.linear(first, net.weight[:, :1], net.bias), wanted, rtol=2e-3, atol=0.1)
    assert facts["reconstructed"] == 1
    assert facts["readers_without_bias"] == 0
    assert facts["not_made_up_for"] < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_numpys_least_squares_with_a_penalty(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    net, keep, gone = nn.Linear(6, 3, bias=bias), [0, 2, 5], [1, 3, 4]
    mix = torch.randn(6, 6, generator=generator)
    batches = [{"x": torch.randn(size, 4, 6, generator=generator) @ mix + 1.5} for size in (5, 1, 7)]
    x = torch.cat([batch["x"].flatten(0, 1) for batch in batches]).double().numpy()
    old, before = (
        net.weight.detach().double().numpy().copy(),
        None if net.bias is None else net.bias.detach().double().numpy().copy(),
    )
    facts = reconstruct([Cut(group_of(net, 6), tuple(keep))], toy(net, batches))

    lost = x[:, gone] @ old[:, gone].T
    kept = x[:, keep]
    centre = kept.mean(0) if bias else np.zeros(3)
    level = lost.mean(0) if bias else np.zeros(3)
    penalty = DAMPING * ((kept - centre) ** 2).mean()
    a = np.concatenate([kept - centre, np.sqrt(len(x) * penalty) * np.eye(3)])
    b = np.concatenate([lost - level, np.zeros((3, 3))])
    change = np.linalg.lstsq(a, b, rcond=None)[0].T
    np.testing.assert_allclose(net.weight.detach().numpy()[:, keep], old[:, keep] + change, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(net.weight.detach().numpy()[:, gone], old[:, gone].astype(np.float32))
    moved = level - change @ centre
    if before is not None:
        np.testing.assert_allclose(net.bias.detach().numpy(), before + moved, rtol=1e-4, atol=1e-5)
    left = lost - kept @ change.T - moved
    assert facts["not_made_up_for"] == pytest.approx((left**2).sum() / (lost**2).sum(), rel=1e-6)
    assert facts["readers_without_bias"] == (0 if bias else 1)


def test_padding_is_not_fitted_to() -> None:
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(6, 5, 3, generator=generator), torch.rand(6, 5, generator=generator) < 0.6
    nets = [nn.Linear(3, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    spoiled = torch.where(mask[..., None], x, 1e3)
    for net, values in zip(nets, (x, spoiled), strict=True):
        reconstruct([Cut(group_of(net, 3), (0, 1))], toy(net, [{"x": values, "attention_mask": mask.long()}], reads_mask=True))
    assert torch.equal(nets[0].weight, nets[1].weight)
    assert torch.equal(nets[0].bias, nets[1].bias)


def test_what_keeps_all_its_units_is_left_alone() -> None:
    net = nn.Linear(3, 2)
    before = net.weight.detach().clone()
    facts = reconstruct([Cut(group_of(net, 3), (0, 1, 2))], toy(net, [{"x": torch.ones(1, 1, 3)}]))
    assert torch.equal(net.weight, before)
    assert facts == {"reconstructed": 0, "readers_without_bias": 0, "not_made_up_for": 0.0}


def test_only_linear_layers_can_be_fitted() -> None:
    net = nn.Conv1d(3, 2, 1)
    with pytest.raises(ModelError, match="what reads n is a Conv1d; allowed: Linear"):
        reconstruct([Cut(group_of(net, 3), (0,))], toy(net, [{"x": torch.ones(1, 3, 1)}]))


def test_units_that_repeat_others_are_cut_almost_without_a_change(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = full(tiny.clip())
    with torch.no_grad():
        for tower in ("vision", "text"):
            for layer in model.family.layers(model.module, tower):
                fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
                half = fc1.out_features // 2
                fc1.weight[half:], fc1.bias[half:] = fc1.weight[:half], fc1.bias[:half]
                fc2.weight[:, half:] *= 0.1  # so that magnitude cuts the copies, though much hangs on them
    given = probe(model, samples=16)
    batch = inputs_of(next(given.batches()))
    before = model.family.forward(model.module, batch).embeds
    far = {}
    for fitted in (True, False):
        new = Prune(ratio=0.5, reconstruct=fitted, samples=16, batch_size=8).apply(model, context=context(16))
        after = new.family.forward(new.module, batch).embeds
        far[fitted] = max(float((values - before[tower]).abs().max()) for tower, values in after.items())
        if fitted:
            stock_reload_is_equal(new, tmp_path_factory.mktemp("stock"))
            assert new.history[-1]["result"]["not_made_up_for"] < 1e-3
    assert far[True] < 0.05 * far[False]


def test_heads_can_be_fitted_too() -> None:
    model = full(tiny.clip())
    step = Prune(axis="heads", ratio={"vision": 0.34}, reconstruct=True, samples=16, batch_size=8, allow_custom=True)
    result = step.apply(model, context=context(16)).history[-1]["result"]
    assert result["reconstructed"] == 3
    assert 0 < result["not_made_up_for"] < 1


def test_flap_does_not_make_up_for_the_same_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = full(tiny.clip()), []
    monkeypatch.setattr("mmcompress.pruning.criteria.flap.Flap.compensate", lambda *_: seen.append(1))
    result = (
        Prune(ratio=0.5, criterion="flap", reconstruct=True, samples=16).apply(model, context=context(16)).history[-1]["result"]
    )
    assert not seen
    assert result["reconstructed"] == 5


def test_what_cannot_be_fitted_is_refused() -> None:
    for axis in ("depth", "width"):
        with pytest.raises(ValidationError, match=f"reconstruct: fits what reads units of ffn and heads; a cut of {axis}"):
            Prune(axis=axis, ratio=0.5, reconstruct=True)
    assert Prune(ratio=0.5, reconstruct=True).uses == ("train",)
    assert Prune(ratio=0.5).uses == ()
    with pytest.raises(DataError, match="prune: needs a task"):
        Prune(ratio=0.5, reconstruct=True).apply(tiny.clip(), context=Context())
