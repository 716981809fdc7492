"""Criteria on a plain module against Torch-Pruning's importances of the same name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

from mmcompress.families.base import UnitGroup
from mmcompress.pruning import cut
from mmcompress.pruning.criteria.base import Criterion
from mmcompress.pruning.criteria.hessian import Hessian
from mmcompress.pruning.criteria.magnitude import Magnitude
from mmcompress.pruning.criteria.magnitude_l1 import MagnitudeL1
from mmcompress.pruning.criteria.taylor import Taylor
from tests.pruning.helpers import toy

RAW: dict[str, Any] = {"group_reduction": "sum", "normalizer": None}


def plain(activation: type[nn.Module], bias: bool) -> nn.Sequential:
    """Five numbers to six units to three numbers."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6, bias=bias), activation(), nn.Linear(6, 3, bias=bias))


def convolutions() -> nn.Sequential:
    """A convolution with a BatchNorm, and another that reads it."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3, bias=False)).eval()
    nn.init.uniform_(net[1].weight, 0.5, 2)
    nn.init.uniform_(net[1].bias, -1, 1)
    return net


def both(net: nn.Sequential, given: torch.Tensor) -> tuple[Any, Any]:
    """Our group of the first layer's outputs, and Torch-Pruning's."""
    graph = tp.DependencyGraph().build_dependency(net, given, verbose=False)
    size = net[0].weight.shape[0]
    ours = cut.couple(graph, net, UnitGroup("t", "ffn", "0", net[0], size))  # type: ignore[arg-type]
    prune = tp.prune_conv_out_channels if isinstance(net[0], nn.Conv2d) else tp.prune_linear_out_channels
    return ours, graph.get_pruning_group(net[0], prune, list(range(size)))


@pytest.mark.parametrize(("criterion", "p"), [(Magnitude, 2), (MagnitudeL1, 1)])
@pytest.mark.parametrize("kind", ["linear", "convolutions"])
def test_magnitude(kind: str, criterion: type[Criterion], p: int) -> None:
    net = plain(nn.ReLU, True) if kind == "linear" else convolutions()
    ours, theirs = both(net, torch.randn(2, 5) if kind == "linear" else torch.randn(2, 3, 8, 8))
    expected = tp.importance.GroupMagnitudeImportance(p=p, bias=True, **RAW)(theirs)
    (scores,) = criterion().unit_scores([ours], toy(net, []))
    torch.testing.assert_close(scores, expected.double(), rtol=1e-5, atol=1e-6)


def graded(net: nn.Sequential, x: torch.Tensor) -> None:
    """Leaves the gradient of the sum of the outputs in the parameters, for Torch-Pruning to find."""
    net.zero_grad()
    net(x).sum().backward()


def test_taylor_where_the_definitions_coincide() -> None:
    # Torch-Pruning takes the absolute value for each layer of a group and then sums; we sum over the whole group first, as
    # Molchanov's eq. 8 does for the weights of a filter. Behind a ReLU without biases both layers' sums of w * g are the
    # same number (activation times its gradient), so that its sum of two absolute values is the absolute value of our sum.
    net, x = plain(nn.ReLU, False), torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs = both(net, x)
    (scores,) = Taylor().unit_scores([ours], toy(net, [{"x": x}]))
    graded(net, x)
    expected = tp.importance.GroupTaylorImportance(multivariable=True, **RAW)(theirs)
    torch.testing.assert_close(scores, expected.double(), rtol=1e-5, atol=1e-6)
    assert scores.min() > 0


def test_taylor_lets_layers_make_up_for_each_other() -> None:
    # Behind a GELU the two sums differ, and left of its minimum (-0.75) have different signs: there ours is below
    # Torch-Pruning's, and it is never above.
    net, x = plain(nn.GELU, False), torch.full((1, 5), 1.0)
    net[0].weight.data[2] = -0.3
    ours, theirs = both(net, x)
    (scores,) = Taylor().unit_scores([ours], toy(net, [{"x": x}]))
    graded(net, x)
    bound = tp.importance.GroupTaylorImportance(multivariable=True, **RAW)(theirs).double()
    assert bool((scores <= bound + 1e-6).all())
    assert float(scores[2]) < 0.9 * float(bound[2])


@pytest.mark.parametrize("kind", ["linear", "convolutions"])
def test_hessian(kind: str) -> None:
    # Version 1.6.1 of Torch-Pruning looks its sums up by name and stores them by parameter, so that each call of
    # accumulate_grad replaces the one before: it is asked about one sample at a time. It leaves out the factor 1/2, and the
    # bias of a BatchNorm.
    net = plain(nn.GELU, True) if kind == "linear" else convolutions()
    samples = torch.randn(4, 1, 5) if kind == "linear" else torch.randn(4, 1, 3, 8, 8)
    ours, theirs = both(net, samples[0])
    expected = torch.zeros(6, dtype=torch.float64)
    for sample in samples:
        graded(net, sample)
        importance = tp.importance.GroupHessianImportance(bias=kind == "linear", **RAW)
        importance.accumulate_grad(net)
        expected += importance(theirs).double() / len(samples) / 2
    if kind == "convolutions":
        for sample in samples:
            graded(net, sample)
            expected += (net[1].bias * net[1].bias.grad).detach().double().square() / len(samples) / 2
    (scores,) = Hessian().unit_scores([ours], toy(net, [{"x": sample} for sample in samples]))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-8)
    assert scores.min() > 0
