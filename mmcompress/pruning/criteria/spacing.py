"""Layers at maximal spacing: the first, the last, and evenly between; for `depth` only, needs no data.

After Distil-Whisper (Gandhi et al. 2023, arXiv 2311.00430, section 3.1) and DistilBART (Shleifer and
Rush 2020, arXiv 2010.13002).

Shapes: L layers of a tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmcompress.pruning.criteria.base import Criterion, Probe
from mmcompress.pruning.units import CoupledGroup


class Spacing(Criterion):
    """One for a layer that stays, zero for the others."""

    axes = ("depth",)

    def unit_scores(self, groups: Sequence[CoupledGroup], probe: Probe) -> list[torch.Tensor]:
        raise self.refuse(groups[0].group.axis if groups else "ffn")

    def layer_scores(self, stacks: Mapping[str, Sequence[nn.Module]], probe: Probe) -> dict[str, torch.Tensor]:
        scores = {}
        for tower, layers in stacks.items():
            scores[tower] = torch.zeros(len(layers), dtype=torch.float64)
            scores[tower][spaced(len(layers), probe.keep[tower])] = 1
        return scores


def spaced(count: int, keep: int) -> list[int]:
    """The places of ``keep`` of ``count`` layers as far apart as can be; the last one where only one stays."""
    if keep == 1:
        return [count - 1]
    return [i * (count - 1) // (keep - 1) for i in range(keep)]


CRITERION = Spacing
