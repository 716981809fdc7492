"""The sum of squares of the weights that would go; needs no data.

For units as in Torch-Pruning's group magnitude (DepGraph, Fang et al. 2023, arXiv 2301.12900, p = 2, no normalisation),
with biases, embeddings and unwrapped parameters counted as well: all that goes counts. The square of the group L2 norm, which
ranks as the norm does; `magnitude-l1` is the L1 norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmcompress.pruning.criteria.base import Criterion, Probe
from mmcompress.pruning.units import CoupledGroup


class Magnitude(Criterion):
    """Squares of weights; for layers their mean over the matrices."""

    def unit_scores(self, groups: Sequence[CoupledGroup], probe: Probe) -> list[torch.Tensor]:
        return [sum_powers(group, 2) for group in groups]

    def layer_scores(self, stacks: Mapping[str, Sequence[nn.Module]], probe: Probe) -> dict[str, torch.Tensor]:
        return {tower: torch.stack([mean_power(layer, 2) for layer in layers]) for tower, layers in stacks.items()}


def sum_powers(group: CoupledGroup, p: int) -> torch.Tensor:
    """For each unit the sum of abs(weight) ** p over all weights that go with it, shape (U,)."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for part in group.slices:
        total += part.per_unit(part.parameter.detach().abs().pow(p), group.units)
    return total


def mean_power(layer: nn.Module, p: int) -> torch.Tensor:
    """The mean of abs(weight) ** p over a layer's matrices, shape ().

    LayerNorm scales and biases are left out: scales lie near one in every layer and would drown the small weights.
    """
    matrices = [m.detach() for m in layer.parameters() if m.dim() > 1]
    powers = sum(float(m.abs().pow(p).sum().cpu()) for m in matrices)
    return torch.tensor(powers / max(1, sum(m.numel() for m in matrices)), dtype=torch.float64)


CRITERION = Magnitude
