"""How far a model answers as the baseline does: flips, agreement of answers and rankings, KL, and answers that were exchanged.

Shapes: M items, L with logits, C classes, Q queries, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import log_softmax

from mmcompress.tasks._observed import Observed

MOST_NAMES = 1_000
"""With more different answers than this there is no looking for pairs that were exchanged."""
FEWEST_SWAPPED = 4
"""Answers that the baseline gave less often are too few to call swapped."""
SURE_SHARE = 0.25
"""An exchange is told if the 95% interval of either direction's share lies above this."""


def log_probabilities(seen: Observed) -> np.ndarray | None:
    """The log-probabilities of the classes, (L, C) in float64; None where there are no logits or their scale is not known."""
    if seen.logits is None or seen.scale is None:
        return None
    found: np.ndarray = log_softmax(seen.logits.astype(np.float64) * seen.scale, axis=1)
    return found


def log_probabilities_of_texts(seen: Observed) -> np.ndarray | None:
    """For each item whose embedding is kept the log-probabilities of the texts whose embeddings are, float64; None without them.

    What retrieval ranks by, as the model was trained to see it (Radford et al. 2021, figure 3): cosines times its scale.
    """
    media = next((rows for tower, rows in seen.embeddings.items() if tower != "text"), None)
    text = seen.embeddings.get("text")
    if media is None or text is None or seen.scale is None or not seen.ranked:
        return None
    unit = [rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True) for rows in (media, text)]
    found: np.ndarray = log_softmax(unit[0] @ unit[1].T * seen.scale, axis=1)
    return found


def kl(baseline: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Each item's Kullback-Leibler divergence of the new model's answers from the baseline's, in nats, (L,); both (L, C) logs."""
    found: np.ndarray = (np.exp(baseline) * (baseline - new)).sum(axis=1)
    return found.clip(min=0.0)


def top_k_overlap(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """For each row the share of one's ``k`` most probable classes that are among the other's too, (L,); both (L, C)."""
    return shared(np.argsort(-a, axis=1, kind="stable")[:, :k], np.argsort(-b, axis=1, kind="stable")[:, :k])


def shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For each query the share of one's nearest candidates that are among the other's too, (Q,); both (Q, K)."""
    found: np.ndarray = (a[:, :, None] == b[:, None, :]).any(axis=2).mean(axis=1)
    return found


def in_common_numbers(before: Observed, after: Observed) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    """The answers of two models as numbers into one list of names, (M,) each; None where the task has no answers."""
    if before.said is not None and after.said is not None:
        names = list(dict.fromkeys([*before.said, *after.said]))
        place = {text: i for i, text in enumerate(names)}
        return np.array([place[t] for t in before.said]), np.array([place[t] for t in after.said]), names
    if before.answers is None or after.answers is None or after.names is None:
        return None
    return before.answers, after.answers, after.names


@dataclass(frozen=True)
class Exchange:
    """Two answers that one model gives where the other gave the other.

    Attributes:
        one, two: the answers.
        one_as_two: how many items the baseline called ``one`` and this model calls ``two``.
        n_one: how many the baseline called ``one``.
        two_as_one, n_two: the other way round.
        swapped: whether both directions are most of their answers, by interval: the two look swapped.
    """

    one: str
    two: str
    one_as_two: int
    n_one: int
    two_as_one: int
    n_two: int
    swapped: bool


def exchanges(before: np.ndarray, after: np.ndarray, names: Sequence[str], most: int = 5) -> list[Exchange]:
    """The pairs of answers that are exchanged most in both directions, the ones that look swapped first.

    Two answers look swapped where the model gives the one for most items that the baseline gave the other for, and the other
    way round, with Wilson's 95% intervals of both shares above one quarter, and at least four items each. What the true answer
    is does not matter.

    Args:
        before: (M,), the baseline's answers as numbers into ``names``.
        after: (M,), this model's.
    """
    many = len(names)
    if many > MOST_NAMES:
        return []
    table = np.bincount(before * many + after, minlength=many * many).reshape(many, many)
    both = np.triu(np.minimum(table, table.T), 1)
    found = []
    for flat in np.argsort(-both, axis=None, kind="stable")[: max(most, 20)]:
        a, b = divmod(int(flat), many)
        if not both[a, b]:
            break
        sides = [(int(table[x, y]), int(table[x].sum()), int(table[x, x])) for x, y in ((a, b), (b, a))]
        sure = [n >= FEWEST_SWAPPED and moved > stayed and _at_least(moved, n) > SURE_SHARE for moved, n, stayed in sides]
        found.append(Exchange(names[a], names[b], sides[0][0], sides[0][1], sides[1][0], sides[1][1], all(sure)))
    return sorted(found, key=lambda e: not e.swapped)[:most]


def _at_least(count: int, n: int) -> float:
    return float(stats.binomtest(count, n).proportion_ci(0.95, method="wilson").low)
