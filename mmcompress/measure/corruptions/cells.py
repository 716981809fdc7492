"""Which conditions of robustness a task is measured under, and the examples under each.

Everything random comes from the seed, the condition's name and the content itself: the baseline and the compressed model see
the very same pictures, and equal texts stay equal. Importable without torch.

Shapes: N examples.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from mmcompress.data.altered import Altered
from mmcompress.data.audio import Audio
from mmcompress.data.examples import KINDS, Examples
from mmcompress.errors import DataError
from mmcompress.measure.corruptions.pictures import DEGREES, corrupt_picture, fitted
from mmcompress.measure.corruptions.sounds import RT60_SECONDS, SNR_DB, SPEED_SHARE, corrupt_sound
from mmcompress.measure.corruptions.texts import TYPO_RATES, corrupt_text
from mmcompress.robustness_settings import BY_KIND, TEXTS, UNGRADED, Robustness
from mmcompress.tasks.base import Task

GREY = (128, 128, 128)


@dataclass(frozen=True)
class Cell:
    """One condition.

    Attributes:
        severity: 1 to 5, or 0 where there are no degrees.
    """

    group: Literal["clean", "media", "text", "modality"]
    name: str
    severity: int = 0

    @property
    def key(self) -> str:
        """A name for files."""
        return f"{self.name}-{self.severity}"


CLEAN = Cell("clean", "clean")


def kind_of(task: Task) -> str:
    """``image`` or ``audio``: what a task's models see or hear."""
    return next(kind for kind in KINDS if kind in task.roles)


def planned(settings: Robustness, task: Task) -> list[Cell]:
    """All conditions but the clean one that a task is measured under."""
    names = settings.corruptions if settings.corruptions is not None else list(BY_KIND[kind_of(task)])
    severities = sorted(settings.severities)
    found = [Cell("media", name, severity) for name in names for severity in severities]
    if settings.text and task.text_role is not None:
        for name in TEXTS:
            found += [Cell("text", name, severity) for severity in ([0] if name in UNGRADED else severities)]
    if settings.modality:
        asks = task.text_role == "question"
        # Where embeddings are only compared, grey pictures are all one, as are empty texts: nothing could be told from it.
        found += [Cell("modality", "missing-media")] if asks or "matching" in task.needs else []
        found += [Cell("modality", "shuffled-media")]
        found += [Cell("modality", name) for name in ("missing-text", "shuffled-text") if asks]
    return found


def strength(cell: Cell) -> str:
    """What a severity means in numbers, where it does not depend on the picture's size; else nothing."""
    at = cell.severity - 1
    if cell.name in ("white-noise", "pink-noise"):
        return f"{SNR_DB[at]:g} dB"
    if cell.name == "reverberation":
        return f"{RT60_SECONDS[at]:g} s"
    if cell.name in ("faster", "slower"):
        return f"{1 + SPEED_SHARE[at] * (1 if cell.name == 'faster' else -1):.2f}x"
    if cell.name == "typos":
        return f"{100 * TYPO_RATES[at]:g}%"
    return f"{DEGREES[at]:g}°" if cell.name == "rotation" else ""


def altered(examples: Examples, cell: Cell, task: Task, seed: int, side: int) -> Examples:
    """The examples under one condition.

    Pictures are brought to the size that models see before they are damaged, and in the clean condition as well, so that the
    damage alone makes the difference.

    Args:
        side: the shorter side of larger pictures, in pixels.

    Raises:
        DataError: pictures cannot be shuffled because there is only one example.
    """
    kind = examples.kind
    fit: Callable[[Any], Any] = (lambda item: fitted(item, side)) if kind == "image" else (lambda item: item)
    if cell.group == "media":
        return Altered(examples, {kind: lambda item: damaged(fit(item), cell, seed)})
    if cell.group == "text":
        change = _text_change(cell, seed)
        if task.text_role == "classes":
            return Altered(examples, {kind: fit}, classes=[change(name) for name in examples.classes or []])
        return Altered(examples, {kind: fit, str(task.text_role): change})
    if cell.name == "missing-media":
        return Altered(examples, {kind: lambda item: blank(fit(item))})
    if cell.name == "missing-text":
        return Altered(examples, {kind: fit, "question": lambda text: ""})
    if cell.name in ("shuffled-media", "shuffled-text"):
        role = kind if cell.name == "shuffled-media" else "question"
        return Altered(examples, {kind: fit}, {role: others(len(examples), seed, examples.name)})
    return Altered(examples, {kind: fit})


def damaged(item: Image.Image | Audio, cell: Cell, seed: int) -> Image.Image | Audio:
    """A picture or recording under a corruption: the same for the same content, seed and name."""
    if isinstance(item, Image.Image):
        return corrupt_picture(item, cell.name, cell.severity, generator(seed, cell.name, item.tobytes()))
    return corrupt_sound(item, cell.name, cell.severity, generator(seed, cell.name, item.samples.tobytes()))


def blank(item: Image.Image | Audio) -> Image.Image | Audio:
    """A grey picture, or silence, of the same size."""
    if isinstance(item, Image.Image):
        return Image.new("RGB", item.size, GREY)
    return Audio(np.zeros_like(item.samples), item.rate)


def others(count: int, seed: int, name: str) -> list[int]:
    """For each of N examples another one, each once: a random circle through all of them (Sattolo 1986).

    Raises:
        DataError: there is only one.
    """
    if count < 2:
        raise DataError(f"{name}: has {count} example; shuffling needs at least 2")
    circle = np.random.default_rng([seed, zlib.crc32(b"shuffled")]).permutation(count)
    found = np.empty(count, dtype=np.int64)
    found[circle] = np.roll(circle, -1)
    return [int(i) for i in found]


def generator(seed: int, name: str, content: bytes) -> np.random.Generator:
    """Random numbers for one content under one condition; severities share them, so that they differ in strength alone."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), zlib.crc32(content)])


def _text_change(cell: Cell, seed: int) -> Callable[[str], str]:
    def change(text: str) -> str:
        return corrupt_text(text, cell.name, cell.severity, generator(seed, cell.name, text.encode()))

    return change
