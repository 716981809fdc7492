"""Scores of yes-or-no decisions that come with a probability: accuracy and the area under the ROC curve.

Every score is an array of one value an example, whose mean over the examples is the metric.

Shapes: N examples.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def accuracy(probability: np.ndarray, fits: np.ndarray) -> np.ndarray:
    """1 where the side of one half that the probability (N,) is on is the label's (N,), else 0: (N,)."""
    right: np.ndarray = (probability >= 0.5) == fits.astype(bool)
    return right.astype(np.float64)


def auroc(probability: np.ndarray, fits: np.ndarray) -> np.ndarray:
    """The area under the ROC curve, split over the examples after DeLong et al. (Biometrics 44, 1988).

    The area is the share of pairs (one that fits, one that does not) in which the one that fits has the higher
    probability, ties counting half. An example's *placement* is that share among its own pairs. Its value here is the area
    plus N / (examples with its label) times how far its placement lies from the area: the mean of all values is the area,
    and the variance of that mean is DeLong's. A single value means nothing by itself and may lie outside 0 to 1.

    Args:
        probability: (N,).
        fits: (N,), 1 or 0.

    Raises:
        ValueError: all examples have the same label, so that there are no pairs.
    """
    good = fits.astype(bool)
    n, positives, negatives = len(good), int(good.sum()), int((~good).sum())
    if not positives or not negatives:
        raise ValueError("the area under the ROC curve needs examples that fit and examples that do not")
    ranks = rankdata(probability)
    placement = np.empty(n)
    # A rank among all, less the rank among one's own kind, counts those of the other kind below (ties half).
    placement[good] = (ranks[good] - rankdata(probability[good])) / negatives
    placement[~good] = 1 - (ranks[~good] - rankdata(probability[~good])) / positives
    area = placement[good].mean()
    shares = np.where(good, positives, negatives)
    values: np.ndarray = area + n / shares * (placement - area)
    return values
