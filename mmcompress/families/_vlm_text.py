"""Prompts of vision-language models: chat templates, image tokens, answers to learn from. As stock processors write them.

Shapes: B examples, S tokens of the longest text, K tokens of the longest answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmcompress.errors import ModelError
from mmcompress.processor import Processor

IGNORED = -100
"""The label of positions where no loss falls."""


def chat_template(processor: Processor) -> str | None:
    """The model's chat template: the tokenizer's, or the one kept in a file beside it, which only stock processors read."""
    own = getattr(processor.tokenizer, "chat_template", None)
    if isinstance(own, str):
        return own
    if "chat_template.jinja" in processor.files:
        return processor.files["chat_template.jinja"]
    if "chat_template.json" in processor.files:
        found = json.loads(processor.files["chat_template.json"])
        return str(found["chat_template"])
    return None


def chat(processor: Processor, prompt: str, answer: str | None, plain: str) -> tuple[str, str]:
    """A picture and a prompt as the model is used to read them, and the answer as it is used to write it.

    Args:
        prompt: what is asked about the picture.
        answer: the right answer, or None.
        plain: how models without a chat template are asked, with ``{}`` for the prompt.

    Returns:
        The text up to the answer, with the image token in it once; and the answer with the token that ends it, or "".
    """
    end, template = str(processor.tokenizer.eos_token or ""), chat_template(processor)
    if template is None:
        return plain.replace("{}", prompt), "" if answer is None else f" {answer}{end}"
    turns: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    head = _render(processor, turns, template, True)
    if answer is None:
        return head, ""
    turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    whole = _render(processor, turns, template, False)
    tail = whole.removeprefix(head) if whole.startswith(head) else f" {answer}"
    # Behind the end of the turn some templates write a line break, which is for the next turn to read, not for this one to say.
    tail = tail[: tail.rindex(end)] if end and end in tail else tail.rstrip()
    return head, tail + end


def _render(processor: Processor, turns: list[dict[str, Any]], template: str, ask: bool) -> str:
    text: str = processor.tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=ask)
    return text


def insert_image(text: str, token: str, tokens: str, prompt: str) -> str:
    """Puts a picture's tokens where its one image token stands.

    Raises:
        ModelError: the prompt itself holds the image token, or the chat template leaves no place for a picture.
    """
    if token in prompt:
        raise ModelError(f"the prompt {prompt[:60]!r} holds {token}, which stands for the picture; write it otherwise")
    if text.count(token) != 1:
        raise ModelError(f"the model's chat template leaves {text.count(token)} places for a picture ({token}); 1 is needed")
    return text.replace(token, tokens)


def token_ids(processor: Processor, text: str) -> list[int]:
    """A text's tokens; a start that the chat template has written is not written again."""
    tokenizer = processor.tokenizer
    start = tokenizer.bos_token
    ids: list[int] = tokenizer(text, add_special_tokens=not (start and text.startswith(start)))["input_ids"]
    return ids


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts of unequal lengths with padding in front, and where they are real: (B, S) each."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return ids, mask


def learning_batch(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int, longest: int | None
) -> dict[str, torch.Tensor]:
    """Prompts with their answers behind them, padded at the end.

    Image tokens make texts of a thousand tokens and more, and a vocabulary has 50,000: only the logits that predict an answer's
    tokens are ever computed. Hence labels for the answer alone, and where in the text their logits are found.

    Args:
        longest: how many tokens the model has positions for; answers are cut there.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, S), ``labels`` (B, K) with -100 behind shorter answers, ``label_positions``
        (B, K): the position before each answer token, whose logits predict it.

    Raises:
        ModelError: a prompt alone fills all positions.
    """
    most = longest or max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    if any(len(prompt) >= most for prompt in prompts):
        raise ModelError(f"a prompt of {max(map(len, prompts))} tokens leaves no room for an answer: the model takes {most}")
    kept = [list(a)[: most - len(p)] for p, a in zip(prompts, answers, strict=True)]
    size, width = len(prompts), max(map(len, kept))
    ids = torch.full((size, max(len(p) + len(a) for p, a in zip(prompts, kept, strict=True))), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full((size, width), IGNORED)
    places = torch.zeros((size, width), dtype=torch.int64)
    for i, (prompt, answer) in enumerate(zip(prompts, kept, strict=True)):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor([*prompt, *answer])
        mask[i, :end] = 1
        labels[i, : len(answer)] = torch.tensor(answer)
        places[i, : len(answer)] = torch.arange(len(prompt) - 1, end - 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "label_positions": places}


def best_answer(answer: str | Mapping[str, float]) -> str:
    """The one answer to learn of several with their weights; of equal weights the first."""
    return answer if isinstance(answer, str) else max(answer, key=lambda text: answer[text])


def merge_images(embeds: np.ndarray, ids: np.ndarray, features: np.ndarray, image_token: int) -> np.ndarray:
    """Puts the pictures' vectors in the places of image tokens, in order.

    Args:
        embeds: (B, S, W) of the text.
        ids: (B, S), its tokens.
        features: (..., W), the pictures' vectors.

    Raises:
        ModelError: there are more places than vectors, or fewer.
    """
    places, flat = ids == image_token, features.reshape(-1, features.shape[-1])
    if int(places.sum()) != len(flat):
        raise ModelError(f"the texts have {int(places.sum())} image tokens for {len(flat)} vectors of pictures")
    merged = embeds.copy()
    merged[places] = flat
    return merged
