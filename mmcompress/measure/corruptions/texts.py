"""Typos at five rates, and casing."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

TYPO_RATES = (0.02, 0.05, 0.10, 0.15, 0.20)
"""The share of letters that are mistyped."""
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_SHIFTS = (0.0, 0.25, 0.75)
"""How far each row of an English keyboard stands to the right, in keys."""


def _neighbours() -> dict[str, str]:
    places = {key: (x + _SHIFTS[y], y) for y, row in enumerate(_ROWS) for x, key in enumerate(row)}
    return {
        key: "".join(k for k, (x, y) in places.items() if k != key and abs(x - at[0]) <= 1 and abs(y - at[1]) <= 1)
        for key, at in places.items()
    }


NEIGHBOURS = MappingProxyType(_neighbours())
"""For each key of an English keyboard those that touch it."""


def corrupt_text(text: str, name: str, severity: int, rng: np.random.Generator) -> str:
    """One corruption of a text; of one that would leave no letter, the text as it is.

    Args:
        name: one of `robustness_settings.TEXTS`.
        severity: 1 to 5; without meaning for casing.
        rng: where typos come from.
    """
    if name == "upper-case":
        return text.upper()
    if name == "lower-case":
        return text.lower()
    found = with_typos(text, TYPO_RATES[severity - 1], rng)
    return found if found.strip() else text


def with_typos(text: str, rate: float, rng: np.random.Generator) -> str:
    """Mistypes each letter with a probability of ``rate``: one third each is dropped, swapped with the next character, or
    replaced by a neighbour on the keyboard (a letter of no English key is dropped instead).

    The letters that are mistyped at a lower rate are so at a higher one as well.
    """
    draws = rng.random((len(text), 3))
    letters = list(text)
    found: list[str] = []
    skip = False
    for i, letter in enumerate(letters):
        if skip:
            skip = False
            continue
        if not letter.isalpha() or draws[i, 0] >= rate:
            found.append(letter)
            continue
        near = NEIGHBOURS.get(letter.lower(), "")
        if draws[i, 1] < 1 / 3 and i + 1 < len(letters):
            found += [letters[i + 1], letter]
            skip = True
        elif draws[i, 1] < 2 / 3 and near:
            other = near[int(draws[i, 2] * len(near))]
            found.append(other.upper() if letter.isupper() else other)
    return "".join(found)
