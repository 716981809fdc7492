"""What a paired difference shows, in words: better, worse, within the margin, or too few examples to say."""

from __future__ import annotations

import math
from statistics import NormalDist

LEVEL, POWER = 0.95, 0.8
MARGIN = 1.0
"""Non-inferiority margin in points, where neither a gate nor the recipe's report names one."""


def conclusion(
    difference: float, low: float, high: float, n: int, margin: float, *, lower_is_better: bool = False, identical: bool = False
) -> tuple[str, int | None]:
    """The words for a difference, and how many examples would be needed where there are too few to say.

    "No worse than the margin" is non-inferiority (Piaggio et al., JAMA 308, 2012): the whole 95% interval lies above minus the
    margin. A loss can be certain and smaller than the margin; the words then say both.

    Args:
        difference: compressed model minus baseline, in the metric's unit (a share).
        low: lower end of its 95% interval.
        high: upper end.
        n: how many examples it was taken over.
        margin: in points (hundredths of the metric's unit).
        lower_is_better: the metric counts mistakes.
        identical: every answer is the same.
    """
    if lower_is_better:
        difference, low, high = -difference, -high, -low
    said = f"the margin of {points(margin)}"
    if identical:
        return "identical", None
    if low > 0:
        return "better", None
    if high < 0:
        if 100 * low >= -margin:
            return f"worse, but by less than {said}", None
        return f"worse by more than {said}" if 100 * high < -margin else "worse", None
    if 100 * low >= -margin:
        return f"no worse than {said}", None
    needed = examples_needed(difference, low, high, n, margin)
    return "not enough examples to say" + (f" (about {rounded(needed)} would be needed)" if needed else ""), needed


def examples_needed(difference: float, low: float, high: float, n: int, margin: float) -> int | None:
    """How many examples would settle an undecided difference with 80% power, if it stays as it is observed.

    The interval's half width h at n examples gives the spread of what one example contributes, sd = h sqrt(n) / z(97.5%), with
    clusters and all. To tell the difference from a limit at distance d takes n = ((z(97.5%) + z(80%)) sd / d)^2 examples (as for
    matched pairs: Miettinen, Biometrics 24, 1968). Of the limits that would settle it (0, and minus the margin) it is the farther
    one.

    Args:
        difference: more is better here, in the metric's unit; so are ``low`` and ``high``.
        margin: in points.

    Returns:
        None where the difference lies on the only limit, so that no number of examples would do.
    """
    normal = NormalDist()
    sure, strong = normal.inv_cdf((1 + LEVEL) / 2), normal.inv_cdf(POWER)
    distance = max(abs(difference), difference + margin / 100)
    if distance <= 0:
        return None
    half = (high - low) / 2
    return math.ceil(n * ((sure + strong) / sure * half / distance) ** 2)


def points(count: float) -> str:
    """``"1 point"``, ``"0.5 points"``."""
    return f"{count:g} point{'' if count == 1 else 's'}"


def rounded(count: int) -> str:
    """Up to two digits that count: ``"4,300"`` for 4,217."""
    step = 10 ** max(0, len(str(count)) - 2)
    return f"{-(-count // step) * step:,}"
