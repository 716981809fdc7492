"""Texts to the token numbers that BLIP's decoder starts from, is trained on and gives.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from mmcompress.errors import ModelError
from mmcompress.families._blip_parts import DECODER
from mmcompress.runtimes.decoding import decode

if TYPE_CHECKING:
    from mmcompress.processor import Processor
    from mmcompress.runtimes.base import Predict

IGNORED = -100
"""The label of positions where no loss falls."""


def texts_of(answers: Sequence[str] | Sequence[Mapping[str, float]]) -> list[str]:
    """One text an example: of several with weights the first of most weight."""
    return [answer if isinstance(answer, str) else max(answer, key=lambda text: answer[text]) for answer in answers]


def questions_of(prompts: Sequence[str] | None) -> list[str]:
    """The questions.

    Raises:
        ValueError: there are none.
    """
    if prompts is None:
        raise ValueError("blip: a model that answers questions needs one for each example")
    return list(prompts)


def prompt_ids(processor: Processor, prompts: Sequence[str] | None, count: int) -> list[list[int]]:
    """What the decoder reads before its first own token, as in stock ``generate``.

    That is the tokenizer's sequence with the begin token in the place of its first and without its last ([CLS] and [SEP] of a
    BERT tokenizer), or the begin token alone.

    Raises:
        ModelError: a prompt leaves no room for an answer.
    """
    text = _text_config(processor)
    begin = int(text.bos_token_id)
    if prompts is None:
        return [[begin]] * count
    found = [[begin, *processor.tokenizer(prompt)["input_ids"][1:-1]] for prompt in prompts]
    longest = max(map(len, found), default=0)
    if longest >= text.max_position_embeddings:
        raise ModelError(
            f"blip: a prompt has {longest} tokens; the model has room for {text.max_position_embeddings}, its answer included"
        )
    return found


def teacher_forced(
    processor: Processor, prompts: Sequence[str] | None, answers: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the decoder reads and should say in training, each (B, T), padded on the right: ids, mask, labels.

    Labels are those of stock BLIP shifted by one, so that they stand where their logits do; no loss falls on the prompt.
    """
    text = _text_config(processor)
    starts = prompt_ids(processor, prompts, len(answers))
    spoken = processor.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    most = min(text.max_position_embeddings, processor.tokenizer.model_max_length)
    rows = [[*start, *said, text.sep_token_id][:most] for start, said in zip(starts, spoken, strict=True)]
    longest = max(map(len, rows)) - 1
    ids = torch.full((len(rows), longest), int(text.pad_token_id))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (start, row) in enumerate(zip(starts, rows, strict=True)):
        ids[i, : len(row) - 1] = torch.tensor(row[:-1])
        mask[i, : len(row) - 1] = 1
        labels[i, len(start) - 1 : len(row) - 1] = torch.tensor(row[len(start) :])
    return ids, mask, labels


def decoded(
    predict: Predict, processor: Processor, prompt: np.ndarray, fixed: Mapping[str, np.ndarray], max_new_tokens: int
) -> list[str]:
    """Greedy texts after prompts of one length (B, T)."""
    text = _text_config(processor)
    limit = min(max_new_tokens, text.max_position_embeddings - prompt.shape[1])
    made = decode(predict, DECODER, prompt, end=(text.sep_token_id,), limit=limit, pad=text.pad_token_id, fixed=fixed)
    found = processor.tokenizer.batch_decode(made, skip_special_tokens=True)
    return [said.strip() for said in found]


def _text_config(processor: Processor) -> Any:
    if processor.config is None:
        raise ValueError("blip: the processor belongs to no model yet, so that begin and end of a text are unknown")
    return cast(Any, processor.config).text_config
