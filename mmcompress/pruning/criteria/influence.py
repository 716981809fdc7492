"""Block influence (ShortGPT): how much a layer changes its input, for `depth` only.

1 - E cos(x_l, x_l+1) over all real tokens of all samples, x_l being what layer l reads and x_l+1 what it gives (Men et al. 2024,
ShortGPT, arXiv 2403.03853, eq. 1). Forward passes only.

Shapes: L layers of a tower, B examples, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmcompress.pruning.criteria.base import Criterion, Probe, Watch
from mmcompress.pruning.units import CoupledGroup


class Influence(Criterion):
    """A layer whose output points where its input pointed has an influence near 0 and goes first; padding is left out."""

    needs_data = True
    axes = ("depth",)

    def unit_scores(self, groups: Sequence[CoupledGroup], probe: Probe) -> list[torch.Tensor]:
        raise self.refuse(groups[0].group.axis if groups else "ffn")

    def layer_scores(self, stacks: Mapping[str, Sequence[nn.Module]], probe: Probe) -> dict[str, torch.Tensor]:
        return block_influence(stacks, probe)


def block_influence(stacks: Mapping[str, Sequence[nn.Module]], probe: Probe) -> dict[str, torch.Tensor]:
    """For each tower the influence of each of its layers, shape (L,); all towers in one pass over the data."""
    watched = [Watch(tower, layer, cosine_sum) for tower, layers in stacks.items() for layer in layers]
    total = torch.zeros(len(watched), 2, dtype=torch.float64)
    for found in probe.observe(watched):
        total += torch.stack([f.cpu().double() for f in found])
    influence = iter(1 - total[:, 0] / total[:, 1])
    return {tower: torch.stack([next(influence) for _ in layers]) for tower, layers in stacks.items()}


def cosine_sum(given: torch.Tensor, made: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The sum over real tokens of the cosine between a layer's input and output, and the tokens' count, shape (2,)."""
    cosines = nn.functional.cosine_similarity(given, made, dim=-1)
    if mask is not None:
        cosines = cosines[mask]
    return torch.stack([cosines.sum(), cosines.new_tensor(float(cosines.numel()))])


CRITERION = Influence
