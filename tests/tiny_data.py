"""Tiny examples with every role that tasks read: pictures of plain colours, tones, captions, questions and answers."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from datasets import ClassLabel, Dataset, Features, Image, Value

from mmcompress.data.examples import Examples
from tests import tiny

RATE = 16_000
CLASSES = list(tiny.COLOURS)
COLUMNS = {
    "image": "image",
    "audio": "audio",
    "text": "caption",
    "label": "label",
    "question": "question",
    "answers": "answers",
}


def wav(label: int, seed: int, seconds: float = 0.5) -> bytes:
    """A tone whose pitch says the label, with some noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(RATE * seconds)) / RATE
    samples = 0.5 * np.sin(2 * np.pi * (300 + 200 * label) * time) + 0.01 * rng.standard_normal(len(time))
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.astype(np.float32), RATE, format="WAV")
    return buffer.getvalue()


@cache
def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with the columns of `COLUMNS`; media as bytes."""
    columns = tiny.rows(count, seed)
    found = []
    for i in range(count):
        label = columns["label"][i]
        found.append(
            {
                "image": columns["image"][i],
                "audio": {"bytes": wav(label, seed * 10_000 + i), "path": None},
                "caption": columns["caption"][i],
                "label": label,
                "question": "a photo of a square ." if i % 2 else "a square",
                "answers": CLASSES[label],
            }
        )
    return found


def examples(count: int, seed: int = 0, name: str = "tiny") -> Examples:
    """The same as Examples."""
    return Examples(rows(count, seed), name, COLUMNS, CLASSES)


def parquet(path: Path, count: int, seed: int = 0) -> Path:
    """The same as a Parquet file with declared features."""
    media = {"bytes": Value("binary"), "path": Value("string")}
    texts = {name: Value("string") for name in ("caption", "question", "answers")}
    features = Features({"image": Image(), "audio": media, "label": ClassLabel(names=CLASSES), **texts})
    Dataset.from_list(rows(count, seed), features=features).to_parquet(str(path))
    return path
