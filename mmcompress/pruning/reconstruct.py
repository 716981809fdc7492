"""Least squares: what reads the units that stay gives, as nearly as it can, what it gave with all of them.

He et al. 2017 (arXiv 1707.06168, section 3.1, the step after channels were chosen). For a reader y = W x + b, kept channels K and
cut channels G, over all real tokens of all samples::

    min over D, d of  mean |W_G (x_G) - D x_K - d|^2 + lambda |D|^2        lambda = DAMPING * mean variance of x_K

and then W_K + D and b + d: D = W_G Cov(x_G, x_K) (Cov(x_K, x_K) + lambda I)^-1, and d = W_G mean(x_G) - D mean(x_K). The penalty
draws to the weights as they were, where the paper has none. A reader without a bias has no d, and moments in the place of
covariances. All layers are fitted to what the uncut model shows them, in one pass over the samples.

Shapes: T real tokens, C channels that a reader takes, K of them kept, G cut, O channels that it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from mmcompress.pruning.criteria.base import Cut, Probe, Watch, linear_reader

DAMPING = 1e-4
"""Share of the kept channels' mean variance: enough for channels that repeat each other or stand still."""


def reconstruct(cuts: Sequence[Cut], probe: Probe) -> dict[str, Any]:
    """Fits the weights and biases of readers in place; called between the choice of units and the cut.

    Returns:
        Facts for the report: how many readers were fitted, how many of them have no bias, and which share of what the cut units
        gave to the readers' outputs (mean square over all of them) nothing makes up for.

    Raises:
        DataError: there are no examples.
        ModelError: a reader is not a Linear layer.
    """
    gone: dict[int, tuple[nn.Linear, str, set[int]]] = {}
    for cut in cuts:
        drop = torch.tensor(cut.drop, dtype=torch.long)
        for tap in cut.group.taps if len(drop) else ():
            reader = linear_reader(cut.group, tap, "reconstruct")
            _, _, channels = gone.setdefault(id(reader), (reader, cut.group.group.tower, set()))
            channels.update(tap.index[torch.isin(tap.unit, drop)].tolist())
    sums = [_Moments(reader.in_features) for reader, _, _ in gone.values()]
    watched = [Watch(tower, reader, own.add) for (reader, tower, _), own in zip(gone.values(), sums, strict=True)]
    probe.model.module.to(probe.device)
    for _ in probe.observe(watched) if watched else ():
        pass
    probe.model.module.to("cpu")
    given = left = 0.0
    bare = 0
    for (reader, _, channels), own in zip(gone.values(), sums, strict=True):
        before, after = _fit(reader, sorted(channels), own.total)
        given, left, bare = given + before, left + after, bare + (reader.bias is None)
    share = left / given if given > 0 else 0.0
    return {"reconstructed": len(gone), "readers_without_bias": bare, "not_made_up_for": share}


class _Moments:
    """The sum over real tokens of [1, x] [1, x]^T, (1 + C, 1 + C), in double precision on the CPU; held once."""

    def __init__(self, channels: int) -> None:
        self.total = torch.zeros(1 + channels, 1 + channels, dtype=torch.float64)

    def add(self, given: torch.Tensor, made: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Adds what a reader was given in one batch; what is returned says nothing."""
        tokens = (given.flatten(0, 1) if mask is None else given[mask]).cpu().double()
        rows = torch.cat([tokens.new_ones(len(tokens), 1), tokens], 1)
        self.total.addmm_(rows.T, rows)
        return tokens.new_zeros(())


def _fit(reader: nn.Linear, gone: Sequence[int], total: torch.Tensor) -> tuple[float, float]:
    """Fits one reader; the mean square of what the cut channels gave to its outputs, and of what nothing makes up for.

    Args:
        gone: the cut channels.
        total: as `_Moments` has it.
    """
    drop = set(gone)
    keep = [channel for channel in range(reader.in_features) if channel not in drop]
    moments = total / total[0, 0].clamp(min=1)
    mean, square = moments[0, 1:], moments[1:, 1:]
    bias = cast("torch.Tensor | None", reader.bias)
    spread = square if bias is None else square - torch.outer(mean, mean)
    weight = reader.weight.detach().double()[:, list(gone)]  # (O, G)
    own = spread[keep][:, keep]
    damped = own + (DAMPING * own.diagonal().mean().clamp(min=1e-12)) * torch.eye(len(keep), dtype=own.dtype)
    cross = spread[keep][:, list(gone)]  # (K, G)
    change = torch.linalg.solve(damped, cross @ weight.T).T  # (O, K)
    with torch.no_grad():
        reader.weight[:, keep] += change.to(reader.weight.dtype)
        if bias is not None:
            bias += (weight @ mean[list(gone)] - change @ mean[keep]).to(bias.dtype)
    before = float(((weight @ square[list(gone)][:, list(gone)]) * weight).sum())
    rest = (weight @ spread[list(gone)][:, list(gone)]) * weight
    crossed = (change @ cross) * weight
    after = float(rest.sum() - 2 * crossed.sum() + ((change @ own) * change).sum())
    return before, max(after, 0.0)
