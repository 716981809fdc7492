"""Attention maps (MiniLM): in the last layer the student's tokens look where the teacher's look.

Shapes: B examples, A heads, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import nn

from mmcompress.errors import RecipeError
from mmcompress.families.base import Batch, Outputs
from mmcompress.training.losses.base import Shapes, TowerLoss

LEAST = 1e-8


class Attention(TowerLoss):
    """Over towers the sum of ``1/(A S) sum_a sum_t KL(A_t,a,t || A_s,a,t)`` in the last layer of each model.

    MiniLM (Wang et al. 2020, arXiv 2002.10957, equation 2), the mean over real tokens. Where the numbers of heads differ each
    model's are averaged first, our extension. Both models run with transformers' eager attention while they are trained, as fused
    kernels never make the maps; it is slower.
    """

    needs = frozenset({"attentions"})

    def __init__(self, towers: Sequence[str], averaged: Mapping[str, bool]) -> None:
        """Takes the towers, and for which of them the heads are averaged."""
        nn.Module.__init__(self)
        self.towers, self.averaged = tuple(towers), dict(averaged)

    @classmethod
    def build(cls, student: Shapes, teacher: Shapes) -> Self:
        """As `Loss.build`."""
        averaged = {}
        for tower in student.towers:
            own, theirs = student.attentions.get(tower), teacher.attentions.get(tower)
            if not own or not theirs:
                lacks = teacher if own else student
                raise RecipeError(
                    f"losses: attention compares attention maps, and the {lacks.name} gives none of the {tower} tower"
                )
            if own[-1][1] != theirs[-1][1]:
                raise RecipeError(
                    f"losses: attention: the {tower} tower's last map is over {own[-1][1]} tokens in the student and "
                    f"{theirs[-1][1]} in the teacher; they must be the same"
                )
            averaged[tower] = own[-1][0] != theirs[-1][0]
        return cls(list(averaged), averaged)

    def shares(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        """In nats, 0 or more for each tower."""
        found = {}
        for tower in self.towers:
            ours, theirs = student.attentions[tower][-1].float(), teacher.attentions[tower][-1].float()
            if self.averaged[tower]:
                ours, theirs = ours.mean(1, keepdim=True), theirs.mean(1, keepdim=True)
            gap = (torch.xlogy(theirs, theirs) - theirs * ours.clamp_min(LEAST).log()).sum(-1).mean(1)
            mask = student.masks.get(tower)
            found[tower] = gap.mean() if mask is None else gap[mask.bool()].mean()
        return found


LOSS = Attention
