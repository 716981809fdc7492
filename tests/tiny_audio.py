"""Recordings for tests, and a stand-in for a speech model that says what it is told to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmcompress.data.audio import Audio
from mmcompress.data.examples import Examples
from mmcompress.processor import Processor

RATE = 16_000


def beep(i: int, seconds: float = 0.3) -> Audio:
    """A tone of its own for each number, whose first sample is the number over 1000."""
    samples = 0.3 * np.sin(2 * np.pi * (300 + 40 * i) * np.arange(round(seconds * RATE)) / RATE)
    samples[0] = i / 1000
    return Audio(samples.astype(np.float32), RATE)


def recordings(texts: Sequence[Any], speakers: Sequence[Any] | None = None, **settings: Any) -> Examples:
    """A recording for each text."""
    rows = [{"audio": beep(i), "text": text} for i, text in enumerate(texts)]
    if speakers is not None:
        rows = [{**row, "speaker": speaker} for row, speaker in zip(rows, speakers, strict=True)]
    return Examples(rows, "recordings", {name: name for name in rows[0]}, **settings)


class Parrot:
    """A family that knows by a recording's first sample what it is to say."""

    name = "parrot"
    media = {"audio": ("input_features",)}  # noqa: RUF012
    padding = "longest"

    def __init__(self, says: Sequence[str]) -> None:
        self.says = list(says)
        self.asked: list[Any] = []

    def prepare_media(self, processor: Processor, kind: str, items: list[Any]) -> list[dict[str, Any]]:
        import torch

        assert kind == "audio"
        return [{"input_features": torch.tensor([item.samples[0] * 1000])} for item in items]

    def respond(
        self, predict: Any, processor: Processor, media: Mapping[str, np.ndarray], prompts: Any, max_new_tokens: int
    ) -> list[str]:
        self.asked.append((prompts, max_new_tokens))
        return [self.says[round(float(number))] for number in media["input_features"][:, 0]]


class Silent:
    """A predictor that no parrot needs."""

    runtime = "torch"


def parrot(says: Sequence[str], **files: str) -> Processor:
    """A processor whose family says these, recording by recording."""
    return Processor(None, family=Parrot(says), files=files)  # type: ignore[arg-type]
