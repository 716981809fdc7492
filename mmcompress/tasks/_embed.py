"""Unit-length embeddings of pictures, recordings and texts through ``Predict``.

A component's first output is its embedding.

Shapes: N pictures or recordings, M groups of texts, D embedding width.
"""

from __future__ import annotations

import numpy as np

from mmcompress.data.examples import Examples
from mmcompress.data.prepare import prepared
from mmcompress.errors import ModelError
from mmcompress.processor import Processor
from mmcompress.progress import Reporter
from mmcompress.runtimes.base import Predict

TEXTS_AT_ONCE = 256


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows at length 1, in float64.

    Raises:
        ModelError: a row holds NaN or infinity, or only zeros: the model is broken, and any score would be invented.
    """
    rows = rows.astype(np.float64)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not np.isfinite(length).all() or (length == 0).any():
        bad = int((~np.isfinite(length) | (length == 0)).sum())
        raise ModelError(f"the model gives embeddings that are zero or not finite ({bad} of {len(rows)}); it cannot be scored")
    found: np.ndarray = rows / length
    return found


COMPONENTS = {"image": "vision_model", "audio": "audio_model"}


def embed_media(predict: Predict, processor: Processor, examples: Examples, reporter: Reporter) -> tuple[np.ndarray, np.ndarray]:
    """All pictures or recordings that decode.

    Returns:
        Their indices (N,), and their embeddings (N, D) at length 1.
    """
    kept, found = [], []
    component = COMPONENTS[examples.kind]
    for indices, media in reporter.track(prepared(examples, processor), f"scoring ({predict.runtime})", prepared.total(examples)):
        if len(indices):
            kept.append(indices)
            found.append(_first(predict(component, media)))
    return np.concatenate(kept), unit(np.concatenate(found))


def unit_mean_texts(predict: Predict, processor: Processor, groups: list[list[str]]) -> np.ndarray:
    """For each group the mean of its texts' unit embeddings, at length 1 again: (M, D)."""
    texts = [text for group in groups for text in group]
    found = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        tokens = processor.tokens(texts[start : start + TEXTS_AT_ONCE])
        inputs = {name: values.numpy() for name, values in tokens.items()}
        found.append(_first(predict("text_model", inputs)))
    embeds = unit(np.concatenate(found))
    ends = np.cumsum([len(group) for group in groups])
    return unit(np.stack([part.mean(axis=0) for part in np.split(embeds, ends[:-1])]))


def _first(outputs: dict[str, np.ndarray]) -> np.ndarray:
    return next(iter(outputs.values()))
