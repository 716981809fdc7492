"""Chance, by the seed: what any other criterion has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmcompress.pruning.criteria.base import Criterion, Probe
from mmcompress.pruning.units import CoupledGroup


class Random(Criterion):
    """Uniform scores from a generator with the probe's seed, so that the global state of torch is neither read nor moved."""

    def unit_scores(self, groups: Sequence[CoupledGroup], probe: Probe) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(probe.seed)
        return [torch.rand(group.units, generator=generator, dtype=torch.float64) for group in groups]

    def layer_scores(self, stacks: Mapping[str, Sequence[nn.Module]], probe: Probe) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(probe.seed)
        return {tower: torch.rand(len(layers), generator=generator, dtype=torch.float64) for tower, layers in stacks.items()}


CRITERION = Random
