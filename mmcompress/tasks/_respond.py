"""The loss and the evaluation loop of tasks whose models answer: captions, answers to questions, transcripts.

Shapes: B examples, T positions of the answer, V vocabulary, C classes, N examples that decode.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from mmcompress.data.examples import Examples
from mmcompress.data.prepare import prepared
from mmcompress.families.base import Family, Outputs
from mmcompress.processor import Processor
from mmcompress.progress import Reporter
from mmcompress.runtimes.base import Predict
from mmcompress.tasks._contrastive import media_of
from mmcompress.tasks._watch import Watched

IGNORED = -100
"""The label of positions where no loss falls."""

AT_ONCE = 16
"""How many examples are decoded together: the caches of a whole block of prepared media would not fit beside a large model."""


def answer_loss(outputs: Outputs, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The loss of answers, which one is told by the labels' shape and type.

    - int labels (B, T) with logits (B, T, V): the mean cross-entropy over the positions that are not ``IGNORED``. Logits
      and labels are aligned: ``logits[:, t]`` is the prediction of ``labels[:, t]``; families whose stock loss shifts
      shift the labels in ``text_batch`` instead.
    - int labels (B,) with logits (B, C): the mean cross-entropy.
    - float labels (B, C) with logits (B, C): the mean binary cross-entropy times C, as stock ViLT does for VQA
      (``ViltForQuestionAnswering``, after Anderson et al. 2018).

    Returns:
        Shape (); 0 (with a gradient of 0) where every position is ignored.

    Raises:
        ValueError: there are no logits, or their shape does not fit the labels.
    """
    if outputs.logits is None:
        raise ValueError("the family's forward gave no logits; a task that trains on answers needs them")
    logits, labels = outputs.logits.float(), batch["labels"]
    if logits.shape[: labels.dim()] != labels.shape:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}")
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.float()) * labels.shape[1]
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def batch_of(
    rows: list[dict[str, Any]],
    prompts: Sequence[str] | None,
    answers: Sequence[str] | Sequence[Mapping[str, float]],
    processor: Processor,
) -> dict[str, torch.Tensor]:
    """Puts a training batch together: the media, and what the family makes of prompts and answers (see its ``text_batch``)."""
    media = media_of(rows, processor)
    return {**processor.stack(media), **family_of(processor).text_batch(processor, media, prompts, answers)}


def family_of(processor: Processor) -> Family:
    """The family of the model that a processor belongs to.

    Raises:
        ValueError: it belongs to none.
    """
    if processor.family is None:
        raise ValueError("the processor knows no family; load it with its model")
    return processor.family


def answers(
    predict: Predict,
    processor: Processor,
    examples: Examples,
    reporter: Reporter,
    prompts_of_row: Callable[[dict[str, Any]], str] | None,
    max_new_tokens: int,
) -> tuple[np.ndarray, list[str]]:
    """The model's answer to every example whose picture or recording decodes.

    Args:
        predict: what runs the components; a `Watched` is told which examples it sees.
        prompts_of_row: the prompt (a question) of a row; rows come without their media. None where the model takes none.
        max_new_tokens: where an answer without an end is cut off.

    Returns:
        The examples' indices (N,), and their answers.
    """
    family = family_of(processor)
    kept: list[np.ndarray] = []
    found: list[str] = []
    blocks = prepared(examples, processor)
    for indices, media in reporter.track(blocks, f"scoring ({predict.runtime})", prepared.total(examples)):
        kept.append(indices)
        for start in range(0, len(indices), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            rows = indices[part].tolist()
            prompts = None
            if prompts_of_row is not None:
                prompts = [prompts_of_row(examples.without_media(i)) for i in rows]
            inputs = {name: values[part] for name, values in media.items()}
            if isinstance(predict, Watched):
                predict.batch(rows)
            found += family.respond(predict, processor, inputs, prompts, max_new_tokens)
    return np.concatenate(kept), found


def fingerprints(texts: Sequence[str]) -> np.ndarray:
    """A number for each answer, equal where the answers are: what ``Scores.answers`` holds to tell how many changed. (N,)."""
    return np.array([zlib.crc32(text.encode()) for text in texts], dtype=np.int64)
