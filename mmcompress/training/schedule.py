"""How many steps a training has, the learning rate of each, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from mmcompress.training.settings import TrainingSettings


def count_steps(settings: TrainingSettings, steps_per_epoch: int) -> int:
    """The number of steps: epochs rounded to whole steps, at least one, at most ``max_steps``."""
    steps = max(1, round(settings.epochs * steps_per_epoch))
    return min(steps, settings.max_steps) if settings.max_steps is not None else steps


def rate_share(step: int, steps: int, warmup: float, span: tuple[float, float] = (0.0, 1.0)) -> float:
    """The learning rate of a step as a share of its peak: a straight rise over ``warmup`` of all steps, then a half cosine.

    The rise ends at 1 in its last step; the cosine starts from 1 and would reach 0 one step after the last one, so that no
    step is wasted (Loshchilov and Hutter 2017, equation 5).

    Args:
        steps: of this training.
        span: where in the whole schedule this training begins and ends, 0 to 1.
    """
    start, end = span
    every = steps / (end - start)
    place = step + start * every
    rise = math.ceil(warmup * every)
    if place < rise:
        return min(1.0, (place + 1) / rise)
    return 0.5 * (1 + math.cos(math.pi * (place - rise) / (every - rise)))


def parameter_groups(module: nn.Module, extra: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of what is trained: matrices and kernels with decay; biases, norms, scales, embeddings, ``extra`` without."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and id(p) not in tables]
    known = {id(p) for p in decayed}
    rest = [p for p in trained if id(p) not in known]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [*rest, *extra], "weight_decay": 0.0},
    ]
