"""How much the loss would rise to second order without the unit: the sum of 1/2 * H_ii * weight^2 over all weights that go.

Optimal Brain Damage (LeCun et al. 1989, NeurIPS) over coupled groups, as in Torch-Pruning's GroupHessianImportance: the
diagonal of the Hessian is estimated by the empirical Fisher information, the mean of squared gradients of single samples. What
Torch-Pruning leaves out, the factor 1/2, is the same for all units.

A sample is one example where the task's loss is a mean over examples (captions, transcripts, answers). A contrastive loss
compares the examples of a batch and has no gradient of one alone: there it is a batch of at most 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmcompress.pruning.criteria.base import Criterion, Probe
from mmcompress.pruning.units import CoupledGroup

CONTRASTIVE_BATCH = 16
"""How many examples make one sample at most where a loss compares them: fewer give more squared gradients to average."""


class Hessian(Criterion):
    """One backward pass for each sample; all groups and layers are scored in one pass over the data."""

    needs_data = True

    def unit_scores(self, groups: Sequence[CoupledGroup], probe: Probe) -> list[torch.Tensor]:
        totals = [torch.zeros(g.units, dtype=torch.float64) for g in groups]
        samples = 0
        for _ in probe.gradients(sample_size(probe)):
            samples += 1
            for total, group in zip(totals, groups, strict=True):
                for part in group.slices:
                    if part.parameter.grad is not None:
                        total += part.per_unit((part.parameter.detach() * part.parameter.grad).square() / 2, group.units)
        return [total / samples for total in totals]

    def layer_scores(self, stacks: Mapping[str, Sequence[nn.Module]], probe: Probe) -> dict[str, torch.Tensor]:
        totals = {tower: torch.zeros(len(layers), dtype=torch.float64) for tower, layers in stacks.items()}
        samples = 0
        for _ in probe.gradients(sample_size(probe)):
            samples += 1
            for tower, layers in stacks.items():
                totals[tower] += torch.tensor([_layer(layer) for layer in layers], dtype=torch.float64)
        return {tower: total / samples for tower, total in totals.items()}


def sample_size(probe: Probe) -> int:
    """How many examples make one sample at most: see the top of this file."""
    contrastive = probe.task is not None and "embeddings" in probe.task.needs
    return min(probe.batch_size, CONTRASTIVE_BATCH) if contrastive else 1


def _layer(layer: nn.Module) -> float:
    return sum(float((p.detach() * p.grad).square().sum().cpu()) / 2 for p in layer.parameters() if p.grad is not None)


CRITERION = Hessian
