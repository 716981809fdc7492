"""Greedy decoding through a decoder component with a cache, the same for every runtime. Torch-free.

Shapes: B sequences, P tokens of the prompt, T tokens made, V vocabulary, H heads, D their size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from mmcompress.runtimes.base import Predict

PAST, PRESENT = "past_key_values.", "present."
Embed = Callable[[np.ndarray], np.ndarray]
Choose = Callable[[np.ndarray, int], np.ndarray]


def empty_cache(predict: Predict, component: str, batch_size: int) -> dict[str, np.ndarray]:
    """A decoder's cache before the first token: (B, H, 0, D) for each of its inputs."""
    sizes = predict.cache(component)
    return {name: np.zeros((batch_size, heads, 0, size), dtype=np.float32) for name, (heads, size) in sizes.items()}


def next_cache(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A decoder's outputs as the cache of its next call."""
    return {PAST + name.removeprefix(PRESENT): values for name, values in outputs.items() if name.startswith(PRESENT)}


def decode(
    predict: Predict,
    component: str,
    prompt: np.ndarray,
    *,
    end: Collection[int],
    limit: int,
    pad: int = 0,
    fixed: Mapping[str, np.ndarray] | None = None,
    mask: np.ndarray | None = None,
    embed: Embed | None = None,
    first: np.ndarray | None = None,
    choose: Choose | None = None,
) -> np.ndarray:
    """The most probable next token, again and again, until every sequence has ended.

    The decoder is called once over the prompt with an empty cache, then once a token. Inputs that it does not read are left out
    by ``predict``, so that ``input_ids``, ``attention_mask`` and ``position_ids`` are offered to all decoders alike.

    Args:
        component: the decoder's name; gives ``logits`` (B, P or 1, V) and ``present.*``.
        prompt: (B, P) token numbers, padded on the left where ``mask`` says so.
        end: tokens that end a sequence.
        limit: the largest number of tokens to make.
        pad: what stands behind the end of a sequence.
        fixed: inputs that stay the same, such as ``encoder_hidden_states``.
        mask: (B, P), 1 for the prompt's real tokens; all are where None.
        embed: token numbers (B, n) to ``inputs_embeds`` (B, n, width), for decoders that read no numbers.
        first: the prompt's ``inputs_embeds`` where it is more than its tokens' (pictures among them).
        choose: logits (B, V) and the number of tokens made so far to the next tokens (B,); argmax where None.

    Returns:
        (B, T) the tokens made, ends included; T is at most ``limit``.
    """
    size = len(prompt)
    seen = np.ones(prompt.shape, dtype=np.int64) if mask is None else mask.astype(np.int64)
    positions = np.maximum(seen.cumsum(axis=1) - 1, 0)
    cache, tokens, embeds = empty_cache(predict, component, size), prompt.astype(np.int64), first
    made: list[np.ndarray] = []
    done = np.zeros(size, dtype=bool)
    while len(made) < limit:
        given: dict[str, np.ndarray] = {
            "input_ids": tokens,
            "attention_mask": seen,
            "position_ids": positions,
            **(fixed or {}),
            **cache,
        }
        if embed is not None:
            given["inputs_embeds"] = embeds if embeds is not None else embed(tokens)
        found = predict(component, given)
        last = found["logits"][:, -1]
        chosen = choose(last, len(made)) if choose is not None else last.argmax(axis=-1)
        chosen = np.where(done, pad, chosen).astype(np.int64)
        made.append(chosen)
        done |= np.isin(chosen, list(end))
        if done.all():
            break
        cache, tokens, embeds = next_cache(found), chosen[:, None], None
        seen = np.concatenate([seen, np.ones((size, 1), dtype=np.int64)], axis=1)
        positions = positions[:, -1:] + 1
    return np.stack(made, axis=1) if made else np.zeros((size, 0), dtype=np.int64)
