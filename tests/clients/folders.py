"""Folders as a user's run leaves them, and what clients are shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import mmcompress as mm
from mmcompress.context import Context
from mmcompress.data.audio import Audio
from tests.families import tiny_whisper

TEXTS = ["a photo of a red square", "a blue", "a picture of a green square ."]
COLOURS = [(220, 30, 30), (40, 40, 230)]


def finished(model: mm.CompressedModel, folder: Path) -> Path:
    """A folder as a user's run leaves it: pruned, quantized, exported in both precisions."""
    model = mm.passes.Prune(axis="ffn", ratio=0.5).apply(model)
    model = mm.passes.Quantize(scheme="int8-dynamic").apply(model, context=Context(workdir=folder / "quantize"))
    model = mm.passes.Export(keep_float=True).apply(model, context=Context(workdir=folder / "export"))
    return model.save(folder / "model")


def pictures(side: int) -> list[Image.Image]:
    """Noisy pictures of a colour each, in the model's own size: resizing is a matter of the client's picture library."""
    made = []
    for i, colour in enumerate(COLOURS):
        noise = np.random.default_rng(i).integers(-25, 26, (side, side, 3))
        made.append(Image.fromarray((np.asarray(colour) + noise).clip(0, 255).astype(np.uint8)))
    return made


def sound(seed: int, seconds: float = 1.0, rate: int = 16_000) -> NDArray[Any]:
    """A tone that rises, over noise; float32 mono."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time))
    tone = np.sin(2 * np.pi * (200 * (seed + 1) + 300 * time) * time)
    return (0.5 * tone + 0.05 * noise).astype(np.float32)


SOUNDS = [Audio(sound(seed), 16_000) for seed in range(4)]
WHISPERS: dict[str, Callable[[], mm.CompressedModel]] = {
    "whisper": lambda: tiny_whisper.whisper(2),
    "whisper-two-languages": lambda: tiny_whisper.whisper_of_two_languages(5),
}
"""With seeds whose models say different things of different sounds, some of which come to an end."""


def before_end(tokens: NDArray[Any], end: int) -> list[int]:
    """The tokens before the first end."""
    row = tokens.ravel().tolist()
    return row[: row.index(end)] if end in row else row
