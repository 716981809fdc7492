"""The cache of a decoder with cross-attention, as flat tensors: names, axes, and one graph for the first call and for the rest.

The names are those of Optimum and transformers.js; a layer's four tensors come in the order that Optimum reads them by.

With an empty cache a decoder projects ``encoder_hidden_states`` to the keys and values of its cross-attention; with a filled one
it takes those of the cache and projects nothing. Both are one graph without a branch: what is projected is
``encoder_hidden_states[:, R:]``, R being the length of the cache, which are all rows at first and none later.

Shapes: B sequences, S encoder positions, R of them in the cache, T tokens, P tokens of the past, H heads, D their size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from mmcompress.runtimes.decoding import PAST, PRESENT

SIDES = ("decoder", "encoder")
BATCH = "batch_size"
"""transformers.js makes its first cache from the graph's axes: one of this name becomes the batch, any other name becomes 0."""


def cache_names(layers: int) -> tuple[str, ...]:
    """The inputs that hold the cache of so many layers: ``past_key_values.0.decoder.key``, ..."""
    return tuple(f"{PAST}{i}.{side}.{part}" for i in range(layers) for side in SIDES for part in ("key", "value"))


def present_names(layers: int) -> tuple[str, ...]:
    """The outputs that hold it after the call: ``present.0.decoder.key``, ..."""
    return tuple(PRESENT + name.removeprefix(PAST) for name in cache_names(layers))


def cache_axes(layers: int) -> dict[str, dict[int, str]]:
    """The dynamic axes of both."""
    axes: dict[str, dict[int, str]] = {}
    for past, present in zip(cache_names(layers), present_names(layers), strict=True):
        cross = ".encoder." in past
        axes[past] = {0: BATCH, 2: "past_encoder_sequence_length" if cross else "past_decoder_sequence_length"}
        axes[present] = {0: BATCH, 2: "encoder_sequence_length" if cross else "total_sequence_length"}
    return axes


def filled_cache(
    past: Sequence[torch.Tensor], hidden: torch.Tensor, projections: Sequence[tuple[nn.Module, nn.Module]]
) -> EncoderDecoderCache:
    """A stock cache of the past, with the cross-attention's keys and values made from ``hidden`` where the past has none.

    Args:
        past: for each layer (B, H, P, D) twice and (B, H, R, D) twice, as `cache_names` orders them.
        hidden: (B, S, width), the encoder's last hidden states.
        projections: for each layer the cross-attention's key and value projection.
    """
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    rest = hidden[:, past[2].shape[2] :]
    for i, layer in enumerate(projections):
        keys, values, *cross = past[4 * i : 4 * i + 4]
        cache.self_attention_cache.update(keys, values, i)
        made = [torch.cat([old, _heads(project(rest), old)], dim=2) for old, project in zip(cross, layer, strict=True)]
        cache.cross_attention_cache.update(*made, i)
        cache.is_updated[i] = True  # so that stock attention takes them as they are
    return cache


def _heads(projected: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B, n, H * D) -> (B, H, n, D); n may be 0, so that no axis can be left to be worked out."""
    return projected.view(*projected.shape[:2], like.shape[1], like.shape[3]).transpose(1, 2)


def flat_cache(cache: EncoderDecoderCache, layers: int) -> tuple[torch.Tensor, ...]:
    """A stock cache's tensors in the order of `present_names`."""
    found: list[torch.Tensor] = []
    for i in range(layers):
        for side in (cache.self_attention_cache, cache.cross_attention_cache):
            found += [side.layers[i].keys, side.layers[i].values]
    return tuple(found)
