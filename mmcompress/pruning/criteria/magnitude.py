"""The sum of squares of the weights that would go; needs no data.

For units as in Torch-Pruning's group magnitude (DepGraph, Fang et al. 2023, arXiv 2301.12900, p = 2, no normalisation),
with biases, embeddings and unwrapped parameters counted as well: all that goes counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmcompress.pruning.criteria.base import Criterion, Probe
from mmcompress.pruning.units import CoupledGroup


class Magnitude(Criterion):
    """Squares of weights."""

    def unit_scores(self, groups: Sequence[CoupledGroup], probe: Probe) -> list[torch.Tensor]:
        return [sum_squares(group) for group in groups]

    def layer_scores(self, stacks: Mapping[str, Sequence[nn.Module]], probe: Probe) -> dict[str, torch.Tensor]:
        return {tower: torch.stack([mean_square(layer) for layer in layers]) for tower, layers in stacks.items()}


def sum_squares(group: CoupledGroup) -> torch.Tensor:
    """For each unit the sum of squares of all weights that go with it, shape (U,)."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for part in group.slices:
        total += part.per_unit(part.parameter.detach().square(), group.units)
    return total


def mean_square(layer: nn.Module) -> torch.Tensor:
    """The mean square of a layer's matrices, shape ().

    LayerNorm scales and biases are left out: scales lie near one in every layer and would drown the small weights.
    """
    matrices = [p.detach() for p in layer.parameters() if p.dim() > 1]
    squares = sum(float(p.square().sum().cpu()) for p in matrices)
    return torch.tensor(squares / max(1, sum(p.numel() for p in matrices)), dtype=torch.float64)


CRITERION = Magnitude
