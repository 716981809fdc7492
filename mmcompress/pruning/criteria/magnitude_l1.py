"""The sum of absolute values of the weights that would go; needs no data. A few large weights count for less than in `magnitude`.

The group L1 norm, Torch-Pruning's group magnitude (DepGraph, Fang et al. 2023, arXiv 2301.12900) with p = 1, after the filter
norm of Li et al. 2017 (arXiv 1608.08710).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmcompress.pruning.criteria.base import Criterion, Probe
from mmcompress.pruning.criteria.magnitude import mean_power, sum_powers
from mmcompress.pruning.units import CoupledGroup


class MagnitudeL1(Criterion):
    """Absolute values of weights; for layers their mean over the matrices."""

    def unit_scores(self, groups: Sequence[CoupledGroup], probe: Probe) -> list[torch.Tensor]:
        return [sum_powers(group, 1) for group in groups]

    def layer_scores(self, stacks: Mapping[str, Sequence[nn.Module]], probe: Probe) -> dict[str, torch.Tensor]:
        return {tower: torch.stack([mean_power(layer, 1) for layer in layers]) for tower, layers in stacks.items()}


CRITERION = MagnitudeL1
