"""How much to cut from each tower so that the predicted loss is least and a target is met.

The towers' measured curves are taken to add up, as are their costs: the choice is a multiple-choice knapsack (Sinha and
Zoltners 1979, Operations Research 27). It is solved exactly: towers are joined one by one, and of the joint choices only those
stay that no other one beats in both cost and loss. Torch-free.

Shapes: T towers, C choices of a tower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

EVEN = 1e-6
"""Times s squared, what cutting a share s costs beside its loss: of choices with equal loss, the gentler and more even."""


@dataclass(frozen=True)
class Choice:
    """One size that a tower may be cut to.

    Attributes:
        kept: how many units stay.
        share: of the units that is cut, 0 to under 1.
        cost: of the tower at this size, in the target's unit.
        loss: predicted loss of the metric, 0 or more; a share.
    """

    kept: int
    share: float
    cost: float
    loss: float


def envelope(losses: Sequence[float]) -> list[float]:
    """The least rising curve that lies nowhere below the measured one and not below 0: its running maximum.

    A cut that measures better than a gentler one does so by chance; taking it at its word would cut more for nothing.

    Args:
        losses: at rising shares, each the metric's fall.
    """
    return [float(v) for v in np.maximum.accumulate(np.maximum(np.asarray(losses, dtype=np.float64), 0.0))] if losses else []


def interpolate(share: float, shares: Sequence[float], values: Sequence[float]) -> float:
    """The value at ``share`` on the straight lines through measured points.

    Args:
        shares: rising, the first one 0.
        values: at these shares.

    Raises:
        ValueError: the share lies beyond the last point, where nothing was measured.
    """
    if not shares[0] <= share <= shares[-1] + 1e-9:
        raise ValueError(f"share {share} lies outside of what was measured, {shares[0]} to {shares[-1]}")
    return float(np.interp(share, shares, values))


def allocate(choices: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice] | None:
    """One choice for each tower with the least sum of losses among those whose costs add up to at most ``budget``.

    Args:
        choices: for each tower what it may be cut to, the size that it has among them.
        budget: in the unit of the costs.

    Returns:
        None where even the cheapest choices are above the budget.
    """
    towers = list(choices)
    cost, loss, picks = np.zeros(1), np.zeros(1), np.zeros((1, 0), dtype=np.int64)
    for tower in towers:
        own = choices[tower]
        more = np.array([c.cost for c in own]), np.array([c.loss + EVEN * c.share**2 for c in own])
        cost = (cost[:, None] + more[0]).ravel()
        loss = (loss[:, None] + more[1]).ravel()
        picks = np.concatenate([np.repeat(picks, len(own), axis=0), np.tile(np.arange(len(own)), len(picks))[:, None]], axis=1)
        keep = _unbeaten(cost, loss)
        cost, loss, picks = cost[keep], loss[keep], picks[keep]
    fitting = np.flatnonzero(cost <= budget + 1e-12 * abs(budget))
    if not len(fitting):
        return None
    best = fitting[np.argmin(loss[fitting])]
    return {tower: choices[tower][picks[best, i]] for i, tower in enumerate(towers)}


def _unbeaten(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """The places, by rising cost, of what nothing beats in both; of equal ones the first."""
    order = np.lexsort((np.arange(len(cost)), loss, cost))
    best = np.concatenate([[math.inf], np.minimum.accumulate(loss[order])[:-1]])
    found: np.ndarray = order[loss[order] < best]
    return found


def spread(size: int, final: int, rounds: int, step: int = 1) -> list[int]:
    """How many units stay after each round when a cut is spread over rounds: the same share of what is there in each.

    Sizes are multiples of ``step``, fall towards ``final`` and never rise again; the last one is ``final``.

    Args:
        size: units there are.
        final: units that stay in the end, 1 to ``size``.
    """
    found, last = [], size
    for k in range(1, rounds):
        ideal = size * (final / size) ** (k / rounds)
        last = max(final, min(last, step * int(ideal / step + 0.5)))
        found.append(last)
    return [*found, final]
