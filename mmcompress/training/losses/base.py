"""What a distillation loss is.

Shapes: B pictures, U distinct texts, D_s and D_t the widths of the student's and the teacher's embeddings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import nn

from mmcompress.families.base import Batch, Outputs


@dataclass(frozen=True)
class Shapes:
    """What a model gives, tower by tower, for the losses that must know it before the first step.

    Attributes:
        name: whose it is, for messages: ``student`` or ``teacher``.
        embeds: the width D of the embeddings; empty for models that give none.
        hidden: for each state before, between and after the layers its length S and width H; empty unless asked for.
        attentions: for each layer its heads and the length of a row; empty unless asked for.
        towers: all of the family's; empty unless a loss looks inside.
    """

    name: str
    embeds: Mapping[str, int]
    hidden: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    attentions: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    towers: tuple[str, ...] = ()


class Loss(nn.Module, ABC):
    """A loss of the student's outputs against the teacher's.

    Its parameters, such as a projection between widths, are trained along with the student and thrown away afterwards.
    """

    needs_teacher: ClassVar[bool] = True
    """False for a loss of the student's outputs alone, whose ``teacher`` then has none."""
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})
    """What outputs must hold: ``embeddings``, ``hidden`` states, ``attentions``, ``masked`` embeddings, or nothing for a loss
    that takes what there is."""

    @classmethod
    def build(cls, student: Shapes, teacher: Shapes) -> Self:
        """The loss for a pair of models.

        Raises:
            RecipeError: one of them lacks what the loss compares.
        """
        return cls(student.embeds, teacher.embeds)

    def __init__(self, student_sizes: Mapping[str, int], teacher_sizes: Mapping[str, int]) -> None:
        """Takes for each tower the width D of the student's and of the teacher's embeddings."""
        super().__init__()

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch, shape (); outputs are (B, D) for ``vision`` or ``audio`` and (U, D) for ``text``."""


class TowerLoss(Loss):
    """A loss that is a sum over towers, so that each may have a weight of its own."""

    @abstractmethod
    def shares(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
        """Each tower's part, shape ()."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        """The sum of all parts."""
        return torch.stack(list(self.shares(student, teacher, batch).values())).sum()


class Projections(nn.Module):
    """For each tower a learned linear map from the student's to the teacher's width, and nothing where they are equal.

    CLIP-KD (arXiv 2307.12732, `src/open_clip/loss.py`) does the same. The maps start orthogonal, which keeps the angles
    that the student has, as far as the widths allow it.
    """

    def __init__(self, student_sizes: Mapping[str, int], teacher_sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.maps = nn.ModuleDict()
        for tower, size in student_sizes.items():
            if size != teacher_sizes[tower]:
                layer = nn.Linear(size, teacher_sizes[tower], bias=False)
                nn.init.orthogonal_(layer.weight)
                self.maps[tower] = layer

    def forward(self, tower: str, embeds: torch.Tensor) -> torch.Tensor:
        """(N, D_s) -> (N, D_t), in float32."""
        embeds = embeds.float()
        if tower not in self.maps:
            return embeds
        mapped: torch.Tensor = self.maps[tower](embeds)
        return mapped
