"""How much what a unit gives fluctuates, times the weights that read it (FLAP); the mean of what goes is put into their biases.

FLAP's WIFV metric (An et al. 2023, arXiv 2312.11983): Var(x_j) * sum_i W_ij^2 for each channel j that the reader (the Linear
behind the FFN's activation, or the attention's output projection) takes from the unit, summed over the unit's channels. The
variance (with n - 1) and the mean are over all real tokens of all samples. A unit that always gives the same loses nothing:
W[:, cut] @ mean(x_cut) is added to the reader's bias, so that on average the reader gives what it gave. Where units are ranked
over a tower, scores are divided by their group's mean as everywhere here; the paper standardises them.

Readers without a bias (those of decoders like Llama's) stay as they are, with a warning: no stock config gives them one. For ffn
and heads: what reads a residual width sits behind normalisations, where no constant makes up for a channel.

Shapes: B examples, T tokens, N real tokens of a batch, C channels that a reader takes, O channels that it gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from mmcompress.pruning.criteria.base import Criterion, Cut, Probe, Watch, linear_reader
from mmcompress.pruning.units import CoupledGroup


@dataclass
class _Moments:
    """Count, mean and sum of squared deviations of each channel, each (C,) but the count; batches are merged as they come
    (Chan et al. 1979), so that nothing cancels where a channel hardly varies."""

    count: float
    mean: torch.Tensor
    squares: torch.Tensor

    def add(self, other: _Moments) -> _Moments:
        count = self.count + other.count
        step = other.mean - self.mean
        squares = self.squares + other.squares + step.square() * self.count * other.count / max(count, 1)
        return _Moments(count, self.mean + step * other.count / max(count, 1), squares)


class Flap(Criterion):
    """Forward passes only; padding is left out."""

    needs_data = True
    axes = ("ffn", "heads")

    def __init__(self) -> None:
        self._means: dict[int, torch.Tensor] = {}

    def unit_scores(self, groups: Sequence[CoupledGroup], probe: Probe) -> list[torch.Tensor]:
        if groups and groups[0].group.axis not in self.axes:
            raise self.refuse(groups[0].group.axis)
        taps = [(number, tap) for number, group in enumerate(groups) for tap in group.taps]
        readers = [linear_reader(groups[number], tap, "flap") for number, tap in taps]
        watched = [Watch(groups[number].group.tower, tap.module, _moments) for number, tap in taps]
        totals: list[_Moments] = []
        for found in probe.observe(watched):
            seen = [_read(f) for f in found]
            totals = [a.add(b) for a, b in zip(totals, seen, strict=True)] if totals else seen
        scores = [torch.zeros(group.units, dtype=torch.float64) for group in groups]
        for (number, tap), total, reader in zip(taps, totals, readers, strict=True):
            self._means[id(reader)] = total.mean
            channels = total.squares / max(total.count - 1, 1) * reader.weight.detach().cpu().double().square().sum(0)
            scores[number].index_add_(0, tap.unit, channels[tap.index])
        return scores

    def layer_scores(self, stacks: Mapping[str, Sequence[nn.Module]], probe: Probe) -> dict[str, torch.Tensor]:
        raise self.refuse("depth")

    def compensate(self, cuts: Sequence[Cut], probe: Probe) -> dict[str, Any]:
        """Adds W[:, cut] @ mean(x_cut) to the readers' biases; warns where there is none."""
        done, bare = 0, []
        for cut in cuts:
            gone = torch.tensor(cut.drop, dtype=torch.long)
            for tap in cut.group.taps if len(gone) else ():
                reader = linear_reader(cut.group, tap, "flap")
                bias = cast("torch.Tensor | None", reader.bias)
                if bias is None:
                    bare.append(cut.group.group.name)
                    continue
                channels = tap.index[torch.isin(tap.unit, gone)]
                lost = reader.weight.detach()[:, channels].double() @ self._means[id(reader)][channels]
                with torch.no_grad():
                    bias.add_(lost.to(bias.dtype))
                done += 1
        if bare:
            probe.warnings.append(
                f"prune: flap: the readers of {len(bare)} of {len(bare) + done} groups ({bare[0]}, ...) have no bias, so nothing "
                "makes up for the mean of what is cut there; no stock config gives them one"
            )
        return {"compensated_biases": done, "readers_without_bias": len(bare)}


def _moments(given: torch.Tensor, made: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The count, mean, and sums of deviations from that mean and of their squares, of the tokens that are real; (4, C)."""
    tokens = (given.flatten(0, 1) if mask is None else given[mask]).float()
    if len(tokens) == 0:
        return tokens.new_zeros(4, given.shape[-1])
    mean = tokens.mean(0)
    away = tokens - mean
    return torch.stack([torch.full_like(mean, len(tokens)), mean, away.sum(0), away.square().sum(0)])


def _read(found: torch.Tensor) -> _Moments:
    """What `_moments` gave, in double precision, with the mean's rounding made good."""
    count, mean, rest, squares = found.cpu().double()
    n = float(count[0])
    return _Moments(n, mean + rest / max(n, 1), squares - rest.square() / max(n, 1))


CRITERION = Flap
