"""Hidden states: the student's layers give what the teacher's give at the same depth, token by token.

Shapes: B examples, S tokens, L_s and L_t layers, H_s and H_t hidden widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import nn
from torch.nn import functional as F

from mmcompress.errors import RecipeError
from mmcompress.families.base import Batch, Outputs
from mmcompress.training.losses.base import Shapes, TowerLoss


class Hidden(TowerLoss):
    """Over towers the sum of the mean over layers and real tokens of ``|h_s / |h_s| - h_t / |h_t||^2``, 0 to 4.

    The normalised squared distance is that of Patient Knowledge Distillation (Sun et al. 2019, arXiv 1908.09355, equation 7),
    which takes the class token alone; every token, and a learned projection of h_s where the widths differ, is as in TinyBERT
    (Jiao et al. 2020, arXiv 1909.10351, equation 8). Layer i of the student learns from the layer of the teacher that
    `spacing` would have left there (Distil-Whisper, arXiv 2311.00430, section 3.1): the first from the first, the last from
    the last, an only one from the last.
    """

    needs = frozenset({"hidden"})

    def __init__(self, student: Mapping[str, Sequence[int]], teacher: Mapping[str, Sequence[int]]) -> None:
        """Takes for each tower the width of each layer's output."""
        nn.Module.__init__(self)
        self.pairs = {tower: matched(len(own), len(teacher[tower])) for tower, own in student.items()}
        self.maps = nn.ModuleDict()
        for tower, own in student.items():
            for i, j in enumerate(self.pairs[tower]):
                if own[i] != teacher[tower][j]:
                    layer = nn.Linear(own[i], teacher[tower][j], bias=False)
                    nn.init.orthogonal_(layer.weight)
                    self.maps[f"{tower}_{i}"] = layer

    @classmethod
    def build(cls, student: Shapes, teacher: Shapes) -> Self:
        """As `Loss.build`."""
        widths: list[dict[str, list[int]]] = [{}, {}]
        for tower in student.towers:
            # The first state is what goes into the first layer.
            ours, theirs = student.hidden.get(tower, ())[1:], teacher.hidden.get(tower, ())[1:]
            if not ours or not theirs:
                lacks = teacher if ours else student
                raise RecipeError(f"losses: hidden compares hidden states, and the {lacks.name} gives none of the {tower} tower")
            for i, j in enumerate(matched(len(ours), len(theirs))):
                if ours[i][0] != theirs[j][0]:
                    raise RecipeError(
                        f"losses: hidden: the {tower} tower's states have {ours[i][0]} tokens in the student's layer {i} and "
                        f"{theirs[j][0]} in the teacher's layer {j}; they must be the same"
                    )
            widths[0][tower], widths[1][tower] = [w for _, w in ours], [w for _, w in theirs]
        return cls(*widths)

    def shares(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        """0 to 4 for each tower."""
        found = {}
        for tower, places in self.pairs.items():
            ours, theirs = student.hidden[tower][1:], teacher.hidden[tower][1:]
            mask = student.masks.get(tower)
            gaps = []
            for i, j in enumerate(places):
                own = ours[i].float()
                if f"{tower}_{i}" in self.maps:
                    own = self.maps[f"{tower}_{i}"](own)
                gap = (F.normalize(own, dim=-1) - F.normalize(theirs[j].float(), dim=-1)).square().sum(-1)
                gaps.append(gap.mean() if mask is None else gap[mask.bool()].mean())
            found[tower] = torch.stack(gaps).mean()
        return found


def matched(student: int, teacher: int) -> list[int]:
    """For each of the student's layers the number of the teacher's that it learns from."""
    if student == 1:
        return [teacher - 1]
    return [i * (teacher - 1) // (student - 1) for i in range(student)]


LOSS = Hidden
