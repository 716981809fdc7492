"""An exponential moving average of the weights, which is steadier than the last step's (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class Average:
    """``a <- d a + (1 - d) w`` after every step, with a decay d that rises to its value: ``min(decay, (1 + t) / (10 + t))``.

    The rise is TensorFlow's ``ExponentialMovingAverage(num_updates=t)``, t the number of steps before: without it a short
    training would end near the weights that it began with.

    Attributes:
        values: the averages, one for each parameter.
        steps: t.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.steps = list(parameters), decay, 0
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of one more step in."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)
        self.steps += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages are the model's weights while the block runs."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Averages and weights change places."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(held)
