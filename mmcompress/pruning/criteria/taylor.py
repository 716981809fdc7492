"""How much the loss would change to first order without the unit: mean over batches of abs(sum of weight * gradient).

Molchanov et al. 2019 (arXiv 1906.10771), eq. 8, with the absolute value for the square, over all weights that go with a
unit; a batch takes the place of their example, as in ViT pruning with Torch-Pruning's GroupTaylorImportance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmcompress.pruning.criteria.base import Criterion, Probe
from mmcompress.pruning.units import CoupledGroup


class Taylor(Criterion):
    """First-order Taylor expansion of the task's loss; all groups and layers are scored in one pass over the data."""

    needs_data = True

    def unit_scores(self, groups: Sequence[CoupledGroup], probe: Probe) -> list[torch.Tensor]:
        totals = [torch.zeros(g.units, dtype=torch.float64) for g in groups]
        batches = 0
        for _ in probe.gradients():
            batches += 1
            for total, group in zip(totals, groups, strict=True):
                total += unit_change(group).abs()
        return [total / batches for total in totals]

    def layer_scores(self, stacks: Mapping[str, Sequence[nn.Module]], probe: Probe) -> dict[str, torch.Tensor]:
        totals = {tower: torch.zeros(len(layers), dtype=torch.float64) for tower, layers in stacks.items()}
        batches = 0
        for _ in probe.gradients():
            batches += 1
            for tower, layers in stacks.items():
                totals[tower] += torch.stack([layer_change(layer) for layer in layers]).abs()
        return {tower: total / batches for tower, total in totals.items()}


def unit_change(group: CoupledGroup) -> torch.Tensor:
    """For each unit the signed sum of weight * gradient over all weights that go with it, shape (U,)."""
    change = torch.zeros(group.units, dtype=torch.float64)
    for part in group.slices:
        if part.parameter.grad is not None:
            change += part.per_unit(part.parameter.detach() * part.parameter.grad, group.units)
    return change


def layer_change(layer: nn.Module) -> torch.Tensor:
    """The signed sum of weight * gradient over all parameters of a layer, shape ()."""
    products = [float((p.detach() * p.grad).sum().cpu()) for p in layer.parameters() if p.grad is not None]
    return torch.tensor(sum(products), dtype=torch.float64)


CRITERION = Taylor
