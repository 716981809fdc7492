"""The parts of BLIP's three models that run by themselves.

Shapes: B examples, C x H x W a picture, S its states (patches and one more), W the width of a tower, T tokens of a text,
P of them in the cache, R states that are read in cross-attention, Q of them in the cache, N heads of size D, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn

from mmcompress.families.base import Component
from mmcompress.runtimes.decoding import PAST, PRESENT

DECODER = "decoder_model_merged"
STATES = "encoder_hidden_states"


class VisionComponent(nn.Module):
    """Pictures to the states that the text towers look at."""

    def __init__(self, vision_model: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        """(B, C, H, W) -> (B, S, W)."""
        return (self.vision_model(pixel_values=pixel_values).last_hidden_state,)


class TextComponent(nn.Module):
    """A text, read in the light of a picture: the question encoder."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """(B, T), (B, T), (B, S, W) -> (B, T, W of the text)."""
        read = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=encoder_hidden_states)
        return (read.last_hidden_state,)


class MatchingComponent(TextComponent):
    """The same with the head that says whether text and picture fit."""

    def __init__(self, text_encoder: nn.Module, itm_head: nn.Module) -> None:
        super().__init__(text_encoder)
        self.itm_head = itm_head

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """(B, T), (B, T), (B, S, W) -> (B, 2), the second for a text that fits."""
        (states,) = super().forward(input_ids, attention_mask, encoder_hidden_states)
        return (self.itm_head(states[:, 0]),)


class _Decoder(nn.Module):
    """The text decoder with a cache, one graph for the first call and all later ones, without a branch.

    Keys and values of cross-attention are made from the states beyond those already in the cache: all of them in the first
    call, none (a tensor without rows) in every later one.
    """

    def __init__(self, text_decoder: nn.Module) -> None:
        super().__init__()
        self.text_decoder = text_decoder

    def decode(
        self, input_ids: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None, past: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """New tokens (B, T) after those in the cache, in the light of states (B, R, W).

        Args:
            mask: what is added to the scores of cross-attention, (B, 1, 1, R).
            past: for each layer its own keys and values (B, N, P, D), then those of cross-attention (B, N, Q, D).

        Returns:
            Logits (B, T, V), and the cache with P + T and R in the place of P and Q.
        """
        decoder = cast(Any, self.text_decoder)
        before, more = past[0].shape[2], input_ids.shape[1]
        places = torch.arange(before, before + more, device=input_ids.device)
        embeddings = decoder.bert.embeddings
        hidden = embeddings.word_embeddings(input_ids) + embeddings.position_embeddings(places)
        hidden = embeddings.dropout(embeddings.LayerNorm(hidden))
        later = torch.arange(before + more, device=input_ids.device)[None, :] > places[:, None]
        causal = torch.zeros(later.shape, dtype=hidden.dtype, device=hidden.device)
        causal = causal.masked_fill(later, torch.finfo(hidden.dtype).min)
        fresh = states[:, past[2].shape[2] :]
        present: list[torch.Tensor] = []
        for i, layer in enumerate(decoder.bert.encoder.layer):
            own, crossed = past[4 * i : 4 * i + 2], past[4 * i + 2 : 4 * i + 4]
            hidden, own = _attend(layer.attention, hidden, hidden, own, causal)
            hidden, crossed = _attend(layer.crossattention, hidden, fresh, crossed, mask)
            hidden = layer.feed_forward_chunk(hidden)
            present += [*own, *crossed]
        return (decoder.cls(hidden), *present)


class CaptionDecoder(_Decoder):
    """The decoder over a picture's states."""

    def forward(
        self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """(B, T), (B, R, W) and the cache; see ``decode``."""
        return self.decode(input_ids, encoder_hidden_states, None, past)


class AnswerDecoder(_Decoder):
    """The decoder over a question's states, of which some are padding."""

    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """(B, T), (B, R) of 1 for states to look at and 0 for padding, (B, R, W) and the cache; see ``decode``."""
        dtype = encoder_hidden_states.dtype
        hide = (1 - encoder_attention_mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min
        return self.decode(input_ids, encoder_hidden_states, hide, past)


def _attend(
    block: Any, hidden: torch.Tensor, read: torch.Tensor, past: tuple[torch.Tensor, ...], mask: torch.Tensor | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """One attention block of stock BLIP over cached and new keys and values; also returns all of them."""
    at = block.self
    heads = at.num_attention_heads
    keys = torch.cat([past[0], _heads(at.key(read), heads)], dim=2)
    values = torch.cat([past[1], _heads(at.value(read), heads)], dim=2)
    scores = _heads(at.query(hidden), heads) @ keys.transpose(-1, -2) / math.sqrt(at.attention_head_size)
    if mask is not None:
        scores = scores + mask
    seen = (at.dropout(scores.softmax(dim=-1)) @ values).transpose(1, 2)
    return block.output(seen.reshape(*seen.shape[:2], at.all_head_size), hidden), (keys, values)


def _heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, N * D) -> (B, N, T, D)."""
    return states.reshape(states.shape[0], states.shape[1], heads, states.shape[2] // heads).transpose(1, 2)


def text_component(name: str, tower: str, module: nn.Module, output: str) -> Component:
    """A text tower that reads all tokens at once, as a component."""
    tokens = {0: "batch_size", 1: "sequence_length"}
    gives = tokens if output == "last_hidden_state" else {0: "batch_size"}
    axes = {"input_ids": tokens, "attention_mask": tokens, STATES: {0: "batch_size"}, output: gives}
    return Component(name, tower, module, ("input_ids", "attention_mask", STATES), (output,), axes)


def decoder_component(module: Any, part: nn.Module, reads: tuple[str, ...]) -> Component:
    """The decoder as a component; ``reads`` are its inputs but for the cache."""
    names = [
        f"{i}.{kind}.{what}"
        for i in range(len(module.text_decoder.bert.encoder.layer))
        for kind in ("decoder", "encoder")
        for what in ("key", "value")
    ]
    axes: dict[str, dict[int, str]] = {
        "input_ids": {0: "batch_size", 1: "decoder_sequence_length"},
        "logits": {0: "batch_size", 1: "decoder_sequence_length"},
        STATES: {0: "batch_size", 1: "encoder_sequence_length"},
        "encoder_attention_mask": {0: "batch_size", 1: "encoder_sequence_length"},
    }
    for name in names:
        kind = name.split(".")[1]
        axes[PAST + name] = {0: "batch_size", 2: f"past_{kind}_sequence_length"}
        axes[PRESENT + name] = {0: "batch_size", 2: f"total_{kind}_sequence_length"}
    inputs, outputs = (*reads, *(PAST + n for n in names)), ("logits", *(PRESENT + n for n in names))
    at = module.text_decoder.bert.encoder.layer[0].attention.self
    cache = {PAST + name: (at.num_attention_heads, at.attention_head_size) for name in names}
    used = {name: axes[name] for name in (*inputs, *outputs)}
    return Component(DECODER, "text", part, inputs, outputs, used, decoder=True, cache=cache)
