"""What a model said of each example, beyond whether it was right: for what a compressed model changes underneath.

Shapes: M items that were judged (pictures, recordings or pairs), L of them with logits, C classes, D embedding width, E items
whose embeddings are kept, Q queries, K candidates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

MOST_EMBEDDINGS = 2_048
"""Of how many items embeddings are kept: drift is a mean, which more of them would not move."""
MOST_LOGITS = 16_000_000
"""How many logits are kept (64 MB); with more, those of items drawn by a fixed seed."""
TOP = 10
"""How many of a query's nearest candidates are kept."""
PREFIX = "seen."


@dataclass
class Observed:
    """What a model said, item by item. Everything but the first three may be missing.

    Attributes:
        index: shape (M,), the example that each item is of.
        right: shape (M,), whether the answer is right.
        right_means: what counts as right, in words: "its best class is the true one".
        answers: shape (M,), the answer as a number into ``names``.
        names: what can be answered, where the task knows; the classes' names.
        said: the answers as texts, M of them, where the model writes them.
        truth: shape (M,), the right answer as a number into ``names``.
        asked: what was asked about each item where the data's rows do not say, such as a text that was drawn for a picture.
        logits: shape (L, C), without the model's scale: cosines of a dual encoder. float32.
        logit_rows: shape (L,), the items that ``logits`` are of.
        scale: what logits are multiplied with before the softmax over classes. A bias that all classes share falls out of it.
        ranked: for each direction of retrieval the nearest candidates of each query, nearest first, (Q, K).
        embeddings: for each tower the embeddings of some items or texts, (E, D), float32, the same ones for every model.
        matched: shape (M,), how similar each item is to what belongs to it (the mean where several texts do).
        unmatched: shape (M,), how similar it is to what does not, on average.
    """

    index: np.ndarray
    right: np.ndarray
    right_means: str
    answers: np.ndarray | None = None
    names: list[str] | None = None
    said: list[str] | None = None
    truth: np.ndarray | None = None
    asked: list[str] | None = None
    logits: np.ndarray | None = None
    logit_rows: np.ndarray | None = None
    scale: float | None = None
    ranked: dict[str, np.ndarray] = field(default_factory=dict)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)
    matched: np.ndarray | None = None
    unmatched: np.ndarray | None = None


def some(count: int, most: int) -> np.ndarray:
    """At most so many of ``count`` rows, drawn by a fixed seed, in rising order: the same ones for every model."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def kept_embeddings(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """For each tower the rows that are kept, as float32."""
    return {tower: rows[some(len(rows), MOST_EMBEDDINGS)].astype(np.float32) for tower, rows in found.items()}


def kept_logits(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The logits that are kept, (L, C) as float32, and of which items, (L,)."""
    rows = some(len(logits), max(1, MOST_LOGITS // logits.shape[1]))
    return logits[rows].astype(np.float32), rows


def alignment(similarity: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How similar each item is on average to the texts that belong to it, and to those that do not, (M,) each.

    Args:
        similarity: (M, C) cosines.
        relevant: (M, C), which texts belong to which item. Where all do, or none does, there is nothing to average: NaN.
    """
    positive, total = relevant.sum(axis=1), relevant.shape[1]
    hits = (similarity * relevant).sum(axis=1)
    matched = np.where(positive > 0, hits / np.maximum(positive, 1), np.nan)
    others = total - positive
    unmatched = np.where(others > 0, (similarity.sum(axis=1) - hits) / np.maximum(others, 1), np.nan)
    return matched, unmatched


def nearest(similarity: np.ndarray, most: int = TOP) -> np.ndarray:
    """The nearest candidates of each query, (Q, K), nearest first; of equal ones the first in the data."""
    return np.argsort(-similarity, axis=1, kind="stable")[:, :most].astype(np.int32)


_ARRAYS = ("index", "right", "answers", "truth", "logits", "logit_rows", "matched", "unmatched")
_TEXTS = ("names", "said", "asked")


def to_arrays(seen: Observed) -> dict[str, np.ndarray]:
    """As arrays for a safetensors file; the texts as one array of the bytes of JSON."""
    found = {f"{PREFIX}{name}": np.asarray(values) for name in _ARRAYS if (values := getattr(seen, name)) is not None}
    found |= {f"{PREFIX}ranked.{name}": values for name, values in seen.ranked.items()}
    found |= {f"{PREFIX}embeddings.{name}": values for name, values in seen.embeddings.items()}
    words = {"right_means": seen.right_means, "scale": seen.scale, **{name: getattr(seen, name) for name in _TEXTS}}
    found[f"{PREFIX}json"] = np.frombuffer(json.dumps(words).encode(), dtype=np.uint8)
    return found


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Observed | None:
    """What ``to_arrays`` made; None where there is nothing of it, as in files of earlier versions."""
    if f"{PREFIX}json" not in arrays:
        return None
    words = json.loads(arrays[f"{PREFIX}json"].tobytes())

    def named(kind: str) -> dict[str, np.ndarray]:
        start = f"{PREFIX}{kind}."
        return {name.removeprefix(start): values for name, values in arrays.items() if name.startswith(start)}

    return Observed(
        **{name: arrays.get(f"{PREFIX}{name}") for name in _ARRAYS},  # type: ignore[arg-type]  # the first two are always there
        **words,
        ranked=named("ranked"),
        embeddings=named("embeddings"),
    )


def of_answers(index: np.ndarray, said: Sequence[str], right: np.ndarray, means: str) -> Observed:
    """Of a model that writes: its answers as they are compared, which are numbered in the order of their first occurrence."""
    place = {text: i for i, text in enumerate(dict.fromkeys(said))}
    answers = np.array([place[text] for text in said], dtype=np.int64)
    return Observed(np.asarray(index), np.asarray(right, dtype=bool), means, answers=answers, said=list(said))
