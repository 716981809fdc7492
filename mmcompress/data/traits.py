"""What can be seen of pictures and heard of recordings without a model: size, brightness, length, loudness.

They are noted while the media are decoded for a model anyway, since decoding costs more than they do.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
from PIL import Image

from mmcompress.data.audio import Audio
from mmcompress.data.examples import Examples
from mmcompress.errors import DataError

QUIET = -100.0
"""Digital silence has no level in decibels; this stands for it."""

_noted: weakref.WeakKeyDictionary[Examples, dict[int, dict[str, float]]] = weakref.WeakKeyDictionary()


def traits_of(item: Image.Image | Audio) -> dict[str, float]:
    """Of a picture its ``brightness`` (mean luma by ITU-R 601-2, 0 to 1) and ``pixels``; of a recording its ``seconds`` and
    ``loudness`` (root mean square, in decibels of full scale).
    """
    if isinstance(item, Audio):
        power = float(np.square(item.samples, dtype=np.float64).mean())
        return {"seconds": item.seconds, "loudness": max(QUIET, 10 * math.log10(power)) if power > 0 else QUIET}
    luma = item.convert("L")
    return {"brightness": float(np.asarray(luma).mean()) / 255, "pixels": float(item.width * item.height)}


def note(examples: Examples, index: int, item: Any) -> None:
    """Remembers a picture's or recording's traits, for as long as the examples live."""
    known = _noted.setdefault(examples, {})
    if index not in known:
        known[index] = traits_of(item)


def traits(examples: Examples, indices: np.ndarray) -> dict[str, np.ndarray]:
    """By name the traits of some examples, in their order, (len(indices),) each; those not noted yet are decoded once.

    What does not decode has NaN.
    """
    known = _noted.setdefault(examples, {})
    for i in map(int, indices):
        if i not in known:
            try:
                known[i] = traits_of(examples.media(i))
            except DataError:
                known[i] = {}
    names = dict.fromkeys(name for i in map(int, indices) for name in known[i])
    return {name: np.array([known[int(i)].get(name, math.nan) for i in indices]) for name in names}
