"""How strongly units fire on examples (Minitron); for layers, how much they change their input (block influence).

Units: the mean over tokens of the absolute activation, then the L2 norm over samples (Muralidharan et al. 2024, Minitron,
arXiv 2407.14679, section 2.2). Layers: as the criterion `influence`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmcompress.pruning.criteria.base import Criterion, Probe, Reduce, Watch, token_mean
from mmcompress.pruning.criteria.influence import block_influence
from mmcompress.pruning.units import CoupledGroup, Tap


class Activation(Criterion):
    """Forward passes only. Channels of a unit (a head) and taps (the LayerNorms of a width) add up; padding is left out."""

    needs_data = True

    def unit_scores(self, groups: Sequence[CoupledGroup], probe: Probe) -> list[torch.Tensor]:
        taps = [(number, tap) for number, group in enumerate(groups) for tap in group.taps]
        watched = [Watch(groups[number].group.tower, tap.module, _energy(tap)) for number, tap in taps]
        totals: list[torch.Tensor] = []
        for found in probe.observe(watched):
            seen = [f.cpu().double() for f in found]
            totals = seen if not totals else [a + b for a, b in zip(totals, seen, strict=True)]
        scores = [torch.zeros(group.units, dtype=torch.float64) for group in groups]
        for (number, tap), total in zip(taps, totals, strict=True):
            scores[number].index_add_(0, tap.unit, total.sqrt()[tap.index])
        return scores

    def layer_scores(self, stacks: Mapping[str, Sequence[nn.Module]], probe: Probe) -> dict[str, torch.Tensor]:
        return block_influence(stacks, probe)


def _energy(tap: Tap) -> Reduce:
    def reduce(given: torch.Tensor, made: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        values = given if tap.side == "input" else made
        return token_mean(values.abs(), mask).square().sum(0)

    return reduce


CRITERION = Activation
