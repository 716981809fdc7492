"""The parts of vision-language models that run by themselves: token embeddings and a Llama-like decoder with a flat cache.

Shapes: B sequences, T new tokens, P past tokens, K = P + T, W width, V vocabulary, G key/value heads, D their size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from mmcompress.families.base import Component

EMBED, DECODER = "embed_tokens", "decoder_model_merged"


class FlatCache:
    """Keys and values of past tokens as plain tensors: what a Llama-like layer asks of a cache, exported as concatenation.

    transformers' own caches decide by their contents (empty or not), which a graph for any length cannot.
    """

    def __init__(self, flat: tuple[torch.Tensor, ...]) -> None:
        """Args:
        flat: key and value of the first layer, key and value of the second, ..., each (B, G, P, D).
        """
        self.keys, self.values = list(flat[0::2]), list(flat[1::2])

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes in the new tokens' keys and values of one layer, each (B, G, T, D); returns all, each (B, G, K, D)."""
        self.keys[layer] = torch.cat((self.keys[layer], key), dim=2)
        self.values[layer] = torch.cat((self.values[layer], value), dim=2)
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, layer: int = 0) -> int:
        """P, or K once the layer's new tokens are in."""
        return self.keys[layer].shape[2]

    def flat(self) -> tuple[torch.Tensor, ...]:
        """As it was given."""
        return tuple(t for pair in zip(self.keys, self.values, strict=True) for t in pair)


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A truth value for each pair of tokens as what is added to attention scores: 0 where seen, else the lowest number."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


class EmbedComponent(nn.Module):
    """Token numbers to the vectors that the decoder reads: what transformers.js calls ``embed_tokens``."""

    def __init__(self, embed_tokens: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        """(B, T) -> (B, T, W)."""
        return (self.embed_tokens(input_ids),)


class DecoderComponent(nn.Module):
    """A stock Llama-like model with its head, one call for the prompt and one for each further token."""

    def __init__(self, text_model: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.text_model = text_model
        self.lm_head = lm_head

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *cache: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """(B, T, W), (B, K), (B, T), for each layer two of (B, G, P, D) -> (B, T, V), for each layer two of (B, G, K, D)."""
        held = FlatCache(cache)
        device = inputs_embeds.device
        own = torch.arange(inputs_embeds.shape[1], device=device) + cache[0].shape[2]
        there = torch.arange(attention_mask.shape[1], device=device)
        seen = (there[None, :] <= own[:, None])[None, None] & attention_mask[:, None, None, :].bool()
        read = self.text_model(
            inputs_embeds=inputs_embeds,
            # Stock masking takes a mask of four axes as it is.
            attention_mask=additive(seen, inputs_embeds.dtype),
            position_ids=position_ids,
            past_key_values=held,
            use_cache=True,
        )
        return (self.lm_head(read.last_hidden_state), *held.flat())


def attention_sizes(layer: Any) -> tuple[int, int]:
    """Key/value heads of a layer and their size, read from its weights: (G, D)."""
    size = int(layer.self_attn.head_dim)
    return layer.self_attn.k_proj.out_features // size, size


def text_components(text_model: Any, lm_head: nn.Module) -> dict[str, Component]:
    """``embed_tokens`` and ``decoder_model_merged`` as transformers.js reads them: axes named ``batch_size`` are the batch."""
    sequence = {0: "batch_size", 1: "sequence_length"}
    cache = {
        f"past_key_values.{i}.{kind}": attention_sizes(layer)
        for i, layer in enumerate(text_model.layers)
        for kind in ("key", "value")
    }
    present = tuple(name.replace("past_key_values", "present") for name in cache)
    axes: Mapping[str, Mapping[int, str]] = {
        "inputs_embeds": sequence,
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
        "position_ids": sequence,
        **{name: {0: "batch_size", 2: "past_sequence_length"} for name in cache},
        "logits": sequence,
        **{name: {0: "batch_size", 2: "total_sequence_length"} for name in present},
    }
    embed = Component(
        EMBED,
        "text",
        EmbedComponent(cast(nn.Module, text_model.embed_tokens)),
        ("input_ids",),
        ("inputs_embeds",),
        {"input_ids": sequence, "inputs_embeds": sequence},
    )
    decoder = Component(
        DECODER,
        "text",
        DecoderComponent(text_model, lm_head),
        ("inputs_embeds", "attention_mask", "position_ids", *cache),
        ("logits", *present),
        axes,
        decoder=True,
        cache=cache,
    )
    return {EMBED: embed, DECODER: decoder}
