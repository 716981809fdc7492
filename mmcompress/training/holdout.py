"""Early stop: training examples that are held out, and the loss on them as the judge of when to end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from mmcompress.data.examples import Examples
from mmcompress.data.leaks import same_media
from mmcompress.errors import DataError, TrainingError
from mmcompress.training import parallel
from mmcompress.training.feed import Feed
from mmcompress.training.settings import EarlyStop
from mmcompress.training.step import Runner


def hold_out(examples: Examples, share: float, seed: int, what: str) -> tuple[list[int], list[int]]:
    """The indices of the examples to train on, and of those held out; those with the same picture are on the same side.

    Args:
        share: of the examples that is held out; as whole groups are, it can be a few more.

    Raises:
        DataError: there are too few examples to hold out two and train on two.
    """
    groups: dict[Any, list[int]] = {}
    for i, group in enumerate(same_media(examples)):
        groups.setdefault(group, []).append(i)
    blocks = list(groups.values())
    wanted, held = max(2, round(share * len(examples))), list[int]()
    for k in torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(held) >= wanted:
            break
        held += blocks[k]
    if len(held) < 2 or len(examples) - len(held) < 2:
        raise DataError(
            f"{what}: early_stop: {len(examples)} training examples are too few to hold out {share:g} of them; leave it out"
        )
    out = set(held)
    return [i for i in range(len(examples)) if i not in out], sorted(held)


class Watch:
    """Looks at the loss on held-out examples now and then, and keeps the weights of the best look.

    The weights are those that the training would end with: the moving average where there is one.

    Attributes:
        curve: for each look the number of steps before it, and the loss.
        best: parameters and buffers of the best look.
    """

    def __init__(self, settings: EarlyStop, runner: Runner, feed: Feed, steps_per_epoch: int) -> None:
        self.settings, self.runner, self.feed = settings, runner, feed
        self.every = max(1, round(settings.every * steps_per_epoch))
        self.curve: list[tuple[int, float]] = []
        self.best: list[torch.Tensor] = []

    @property
    def best_look(self) -> int:
        """The number of the best look."""
        losses = [loss for _, loss in self.curve]
        return losses.index(min(losses))

    def done(self) -> bool:
        """Looks if it is time to; whether the training should end here."""
        step = len(self.runner.losses)
        if step % self.every and step != self.runner.plan.steps:
            return False
        average = self.runner.average
        with average.in_place() if average is not None else nullcontext(), _evaluating(self.runner.model.module):
            buffers = [buffer.clone() for buffer in self.runner.model.module.buffers()]
            loss = parallel.of_main(self._loss(), self.runner.plan.device)
            if not math.isfinite(loss):
                raise TrainingError(f"{self.runner.plan.what}: step {step}: the loss on the held-out examples is {loss}")
            # Ranges that quantization-aware training observes are of what is trained on.
            for buffer, before in zip(self.runner.model.module.buffers(), buffers, strict=True):
                buffer.copy_(before)
            self.curve.append((step, loss))
            if self.best_look == len(self.curve) - 1:
                self.best = [value.detach().clone() for value in self.state()]
        return len(self.curve) - 1 - self.best_look >= self.settings.patience

    def _loss(self) -> float:
        """The mean over the held-out batches, always the same ones."""
        total = torch.zeros(())
        batches = 0
        for batch in self.feed.batches(self.feed.steps_per_epoch):
            parts = self.runner.pieces(batch, self.runner.plan.seed, backward=False)
            total = total + torch.stack(list(parts.values())).sum()
            batches += 1
        return float(total) / batches

    def state(self) -> list[torch.Tensor]:
        """What the best look keeps."""
        module = self.runner.model.module
        return [*module.parameters(), *module.buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights of the best look into the model."""
        for value, best in zip(self.state(), self.best, strict=True):
            value.copy_(best)

    def facts(self) -> dict[str, Any]:
        """The step of the best look, and the curve."""
        return {"best_step": self.curve[self.best_look][0], "holdout_loss": [[step, round(loss, 6)] for step, loss in self.curve]}


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Every part in eval mode in the block, and in its own mode after it."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
