"""Whisper: an encoder of log-mel spectrograms and a decoder that writes the transcript (Radford et al. 2022).

Shapes: B recordings, M mel bins, F frames, S = F / 2 encoder positions, T tokens, P tokens of the past, V vocabulary, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, WhisperConfig, WhisperForConditionalGeneration

from mmcompress.errors import DataError, ModelError
from mmcompress.families._cached import BATCH, cache_axes, cache_names, filled_cache, flat_cache, present_names
from mmcompress.families._whisper_prompt import ends, forbidden, prompt_of
from mmcompress.families.base import NEW_TOKENS, Arrays, Batch, Call, Component, Family, Outputs, UnitGroup
from mmcompress.runtimes.decoding import decode, empty_cache, next_cache

if TYPE_CHECKING:
    from mmcompress.processor import Processor
    from mmcompress.runtimes.base import Predict

ENCODER, DECODER = "encoder_model", "decoder_model_merged"
IGNORED = -100
"""The label of positions where no loss falls."""


class EncoderComponent(nn.Module):
    """Spectrograms to hidden states: what transformers.js and Optimum call ``encoder_model``."""

    def __init__(self, model: WhisperForConditionalGeneration) -> None:
        super().__init__()
        self.encoder = model.model.encoder

    def forward(self, input_features: torch.Tensor) -> tuple[torch.Tensor]:
        """(B, M, F) -> (B, S, D)."""
        return (self.encoder(input_features).last_hidden_state,)


class DecoderComponent(nn.Module):
    """Tokens to logits with a cache as flat tensors: what transformers.js and Optimum call ``decoder_model_merged``.

    The first token's position is the length of the cache.
    """

    def __init__(self, model: WhisperForConditionalGeneration) -> None:
        super().__init__()
        self.decoder, self.proj_out = model.model.decoder, model.proj_out

    def forward(
        self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """(B, T), (B, S, D), for each layer (B, H, P, D) twice and (B, H, 0 or S, D) twice -> (B, T, V), the cache after it."""
        layers = self.decoder.layers
        projections = [(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in layers]
        cache = filled_cache(past, encoder_hidden_states, projections)
        read = self.decoder(
            input_ids=input_ids, encoder_hidden_states=encoder_hidden_states, past_key_values=cache, use_cache=True
        )
        return (self.proj_out(read.last_hidden_state), *flat_cache(cache, len(layers)))


class _Whole(nn.Module):
    """The whole model with inputs by position, for Torch-Pruning's graph: the decoder reads the encoder's width."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_features: torch.Tensor, decoder_input_ids: torch.Tensor) -> torch.Tensor:
        """(B, M, F), (B, T) -> (B, T, V)."""
        read = self.model(input_features=input_features, decoder_input_ids=decoder_input_ids, use_cache=False)
        return cast(torch.Tensor, read.logits)


class Whisper(Family):
    """WhisperForConditionalGeneration of stock transformers."""

    name = "whisper"
    model_types = ("whisper",)
    towers = ("encoder", "decoder")
    axes = MappingProxyType(
        {
            "ffn": "hidden units of the feed-forward layers; sets encoder_ffn_dim, decoder_ffn_dim",
            "depth": "whole layers; sets encoder_layers, decoder_layers",
            "width": "residual width with whole heads, or channels of every head (heads: narrower), both towers alike; sets "
            "d_model, encoder_attention_heads and decoder_attention_heads",
            "heads": "attention heads alone; no config key of Whisper says so, needs allow_custom",
        }
    )
    stock_axes = ("ffn", "depth", "width")
    abilities = frozenset({"audio", "transcripts"})
    media = MappingProxyType({"audio": ("input_features",)})

    def of(self, config: PretrainedConfig) -> Self:
        made = list(getattr(config, "architectures", None) or [])
        if made and "WhisperForConditionalGeneration" not in made:
            raise ModelError(f"whisper: only WhisperForConditionalGeneration is handled; config.json says {', '.join(made)}")
        c = cast(WhisperConfig, config)
        for side, heads in (("encoder", c.encoder_attention_heads), ("decoder", c.decoder_attention_heads)):
            if type(heads) is not int or heads < 1 or c.d_model % heads:
                raise ModelError(f"config.json: {side}_attention_heads: {heads} heads do not divide d_model {c.d_model}")
        return self

    def cut_together(self, axis: str) -> tuple[str, ...]:
        # d_model is one key of the config, for both.
        return self.towers if axis == "width" else ()

    def model_class(self) -> type[PreTrainedModel]:
        return cast(type[PreTrainedModel], WhisperForConditionalGeneration)

    def _tower(self, module: PreTrainedModel, tower: str) -> Any:
        """Untyped: nn.Module's attributes are all ``Tensor | Module`` to a type checker."""
        return module.model.encoder if tower == "encoder" else module.model.decoder

    def tower_modules(self, module: PreTrainedModel) -> dict[str, list[nn.Module]]:
        decoder = self._tower(module, "decoder")
        tied = module.proj_out.weight is decoder.embed_tokens.weight
        return {"encoder": [self._tower(module, "encoder")], "decoder": [decoder] if tied else [decoder, module.proj_out]}

    def layers(self, module: PreTrainedModel, tower: str) -> nn.ModuleList:
        return cast(nn.ModuleList, self._tower(module, tower).layers)

    def unit_groups(self, module: PreTrainedModel, tower: str, axis: str) -> list[UnitGroup]:
        part, prefix = self._tower(module, tower), f"model.{tower}"
        if axis == "width":
            # Any module that writes to the residual stream will do as the root: the graph finds all others.
            root = part.layers[0].fc2
            groups = [UnitGroup(tower, axis, f"{prefix}.layers.0.fc2", root, root.out_features)]
            if tower == "encoder":  # between the convolutions lies a width of its own, which must be d_model too
                groups.append(UnitGroup(tower, axis, f"{prefix}.conv1", part.conv1, part.conv1.out_channels))
            return groups
        groups = []
        for i, layer in enumerate(part.layers):
            if axis == "ffn":
                groups.append(UnitGroup(tower, axis, f"{prefix}.layers.{i}.fc1", layer.fc1, layer.fc1.out_features))
            elif axis == "heads":
                for name in ("self_attn", "encoder_attn") if tower == "decoder" else ("self_attn",):
                    at = getattr(layer, name)
                    root, also = at.v_proj, (at.q_proj, at.k_proj)
                    label = f"{prefix}.layers.{i}.{name}.v_proj"
                    size, remembers = root.out_features, (at, "head_dim")
                    groups.append(UnitGroup(tower, axis, label, root, size, at.head_dim, also, head_size=remembers))
        return groups

    def tracing(self, module: PreTrainedModel, tower: str, batch: Batch) -> tuple[nn.Module, Any, list[nn.Parameter]]:
        return _Whole(module), (batch["input_features"], batch["decoder_input_ids"]), []

    def shrunk_config(self, module: PreTrainedModel) -> PretrainedConfig | None:
        config = cast(Any, type(module.config)).from_dict(module.config.to_dict())
        residual: set[int] = {module.model.encoder.conv1.out_channels, module.model.encoder.conv2.out_channels}
        for tower in self.towers:
            layers = self._tower(module, tower).layers
            attentions = [layer.self_attn for layer in layers]
            if tower == "decoder":
                attentions += [layer.encoder_attn for layer in layers]
            ffn = {layer.fc1.out_features for layer in layers}
            inner = {at.v_proj.out_features for at in attentions}
            head_dim = {at.head_dim for at in attentions}
            residual |= inner | {width for at in attentions for width in (at.q_proj.in_features, at.out_proj.out_features)}
            if len(ffn) > 1 or len(inner) > 1 or len(head_dim) > 1:
                return None
            hidden, head = inner.pop(), head_dim.pop()
            if hidden % head:
                return None
            setattr(config, f"{tower}_ffn_dim", ffn.pop())
            setattr(config, f"{tower}_layers", len(layers))
            setattr(config, f"{tower}_attention_heads", hidden // head)
        if len(residual) > 1:
            return None
        config.d_model = residual.pop()
        return cast(PretrainedConfig, config)

    def settle(self, before: PreTrainedModel, after: PreTrainedModel) -> None:
        # Word time stamps are read off the attention of heads that are named by their old places.
        layers = self._tower(after, "decoder").layers
        heads = {layer.encoder_attn.k_proj.out_features // layer.encoder_attn.head_dim for layer in layers}
        same = len(layers) == before.config.decoder_layers and heads == {before.config.decoder_attention_heads}
        if not same and getattr(after.generation_config, "alignment_heads", None) is not None:
            after.generation_config = copy.deepcopy(after.generation_config)
            del after.generation_config.alignment_heads

    def components(self, module: PreTrainedModel) -> dict[str, Component]:
        model = cast(WhisperForConditionalGeneration, module)
        decoder = self._tower(module, "decoder")
        past = cache_names(len(decoder.layers))
        cache = {}
        for i, layer in enumerate(decoder.layers):
            for at, names in ((layer.self_attn, past[4 * i : 4 * i + 2]), (layer.encoder_attn, past[4 * i + 2 : 4 * i + 4])):
                cache.update(dict.fromkeys(names, (at.k_proj.out_features // at.head_dim, at.head_dim)))
        encoder_axes = {"input_features": {0: BATCH}, "last_hidden_state": {0: BATCH}}
        decoder_axes: Mapping[str, Mapping[int, str]] = {
            "input_ids": {0: BATCH, 1: "decoder_sequence_length"},
            "encoder_hidden_states": {0: BATCH, 1: "encoder_sequence_length"},
            "logits": {0: BATCH, 1: "decoder_sequence_length"},
            **cache_axes(len(decoder.layers)),
        }
        return {
            ENCODER: Component(
                ENCODER, "encoder", EncoderComponent(model), ("input_features",), ("last_hidden_state",), encoder_axes
            ),
            DECODER: Component(
                DECODER,
                "decoder",
                DecoderComponent(model),
                ("input_ids", "encoder_hidden_states", *past),
                ("logits", *present_names(len(decoder.layers))),
                decoder_axes,
                decoder=True,
                cache=cache,
            ),
        }

    def example_batch(self, config: PretrainedConfig, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        c = cast(WhisperConfig, config)
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn((batch_size, c.num_mel_bins, 2 * c.max_source_positions), generator=generator)
        length = min(8, c.max_target_positions)
        ids = torch.randint(0, c.vocab_size, (batch_size, length), generator=generator)
        return {"input_features": features, "decoder_input_ids": ids}

    def example_inputs(
        self, config: PretrainedConfig, component: Component, batch_size: int, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        c = cast(WhisperConfig, config)
        if component.name == ENCODER:
            return {"input_features": self.example_batch(config, batch_size, seed)["input_features"]}
        # A cache that holds a part of the encoder's positions only: both what it has and what is projected are there.
        return _decoder_inputs(c, component, batch_size, tokens=3, past=4, seen=max(2, c.max_source_positions // 3), seed=seed)

    def calls(self, module: PreTrainedModel, batch_size: int) -> list[Call]:
        c = cast(WhisperConfig, module.config)
        parts = self.components(module)
        prompt = len(prompt_of(module.generation_config, c).tokens)
        most = c.max_target_positions - prompt
        half = prompt + min(NEW_TOKENS, most) // 2
        first = _decoder_inputs(c, parts[DECODER], batch_size, tokens=prompt, past=0, seen=0)
        later = _decoder_inputs(c, parts[DECODER], batch_size, tokens=1, past=half, seen=c.max_source_positions)
        heard = Call(ENCODER, self.example_inputs(c, parts[ENCODER], batch_size))
        return [heard, Call(DECODER, first), Call(DECODER, later, min(NEW_TOKENS, most) - 1)]

    def walk(self, predict: Predict, batch: Arrays, module: PreTrainedModel) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        heard = {"input_features": batch["input_features"]}
        yield ENCODER, heard
        if "decoder_input_ids" not in batch:
            return
        fixed = {"encoder_hidden_states": predict(ENCODER, heard)["last_hidden_state"]}
        ids = batch["decoder_input_ids"]
        split = max(1, ids.shape[1] - 1)
        first = {"input_ids": ids[:, :split], **fixed, **empty_cache(predict, DECODER, len(ids))}
        yield DECODER, first
        if split < ids.shape[1]:
            yield DECODER, {"input_ids": ids[:, split:], **fixed, **next_cache(predict(DECODER, first))}

    def forward(self, module: PreTrainedModel, batch: Batch, *, hidden: bool = False) -> Outputs:
        read = module(
            input_features=batch["input_features"],
            decoder_input_ids=batch["decoder_input_ids"],
            use_cache=False,
            output_hidden_states=hidden,
        )
        states = {"encoder": tuple(read.encoder_hidden_states), "decoder": tuple(read.decoder_hidden_states)} if hidden else {}
        return Outputs(hidden=states, logits=read.logits)

    def config_sizes(self, config: PretrainedConfig) -> dict[str, dict[str, int]]:
        c = cast(Any, config)
        return {
            tower: {
                "ffn": getattr(c, f"{tower}_ffn_dim"),
                "depth": getattr(c, f"{tower}_layers"),
                "width": c.d_model,
                "heads": getattr(c, f"{tower}_attention_heads"),
            }
            for tower in self.towers
        }

    def resized_config(self, config: PretrainedConfig, sizes: Mapping[str, Mapping[str, int]]) -> PretrainedConfig:
        new = cast(Any, type(config)).from_dict(config.to_dict())
        widths = {axes["width"] for axes in sizes.values()}
        if len(widths) > 1:
            raise ModelError(f"whisper: both towers have one width (d_model); found {sorted(widths)}")
        new.d_model = widths.pop()
        for tower, axes in sizes.items():
            setattr(new, f"{tower}_ffn_dim", axes["ffn"])
            setattr(new, f"{tower}_layers", axes["depth"])
            setattr(new, f"{tower}_attention_heads", axes["heads"])
        return cast(PretrainedConfig, new)

    def prepare_media(self, processor: Processor, kind: str, items: list[Any]) -> list[dict[str, torch.Tensor]]:
        extractor = processor.feature_extractor
        window = extractor.n_samples / extractor.sampling_rate
        for audio in items:
            if audio.seconds > window + 1e-3:  # stock would cut it off without a word
                raise DataError(
                    f"a recording lasts {audio.seconds:.2f} s; this Whisper hears {window:g} s at once (chunk_length of "
                    "preprocessor_config.json); split it, with its transcript"
                )
        return processor.stock_media(kind, items)

    def text_batch(
        self,
        processor: Processor,
        media: Sequence[Mapping[str, torch.Tensor]],
        prompts: Sequence[str] | None,
        answers: Sequence[str] | Sequence[Mapping[str, float]],
    ) -> dict[str, torch.Tensor]:
        """As stock fine-tuning does: the loss falls on all tokens behind the first one, and on the end.

        Args:
            prompts: the language spoken in each, such as ``en``; None where the settings or the tokenizer name it.
        """
        generation, config = generation_of(processor), cast(WhisperConfig, processor.config)
        spoken = list(prompts) if prompts is not None else [_tokenizer_language(processor, generation)] * len(answers)
        texts = [answer if isinstance(answer, str) else max(answer, key=lambda a: answer[a]) for answer in answers]
        end, rows = ends(generation)[0], []
        for text, language in zip(texts, spoken, strict=True):
            prompt = prompt_of(generation, config, language)
            if prompt.language_at is not None:
                raise ModelError(
                    "whisper: training needs to know the language spoken; set task.language, or language in the model's "
                    "generation_config.json"
                )
            # A text that is too long for the decoder is cut off, and then no end is taught.
            row = [*prompt.tokens, *processor.tokenizer(text, add_special_tokens=False).input_ids, end]
            rows.append(torch.tensor(row[: config.max_target_positions + 1]))
        padding = nn.utils.rnn.pad_sequence
        labels = padding(rows, batch_first=True, padding_value=IGNORED)[:, 1:]
        return {"decoder_input_ids": padding(rows, batch_first=True, padding_value=end)[:, :-1], "labels": labels}

    def respond(
        self, predict: Predict, processor: Processor, media: Arrays, prompts: Sequence[str] | None, max_new_tokens: int
    ) -> list[str]:
        """Transcripts, as stock `generate` with one beam and without time stamps gives them.

        Args:
            prompts: the language spoken in each, such as ``en``; None leaves it to the settings, or to the model to detect.
        """
        made = transcribe(predict, processor, media["input_features"], prompts, max_new_tokens)
        return [str(text).strip() for text in processor.tokenizer.batch_decode(made, skip_special_tokens=True)]


def transcribe(
    predict: Predict, processor: Processor, features: np.ndarray, languages: Sequence[str] | None, max_new_tokens: int
) -> list[list[int]]:
    """The tokens of a transcript for each recording, start and end left out. Greedy, in one window, without time stamps.

    Args:
        features: (B, M, F).
        languages: the language spoken in each; None leaves it to the settings, or to the model to detect.
        max_new_tokens: where a transcript is cut off; the decoder's own limit is kept too.
    """
    generation, config = generation_of(processor), cast(WhisperConfig, processor.config)
    fixed = {"encoder_hidden_states": predict(ENCODER, {"input_features": features})["last_hidden_state"]}
    spoken: Sequence[str | None] = languages if languages is not None else [None] * len(features)
    prompts = [prompt_of(generation, config, language) for language in spoken]
    ids = np.array([prompt.tokens for prompt in prompts], dtype=np.int64)
    if prompts[0].language_at is not None:
        given = {"input_ids": ids[:, :1], **fixed, **empty_cache(predict, DECODER, len(ids))}
        known = np.array(sorted(generation.lang_to_id.values()))
        ids[:, prompts[0].language_at] = known[predict(DECODER, given)["logits"][:, -1, known].argmax(axis=-1)]
    never, not_first = forbidden(generation, config.vocab_size)

    def choose(logits: np.ndarray, made: int) -> np.ndarray:
        logits = logits.copy()
        logits[:, never] = -np.inf
        if made == 0:
            logits[:, not_first] = -np.inf
        return cast(np.ndarray, logits.argmax(axis=-1))

    end = ends(generation)
    limit = min(max_new_tokens, config.max_target_positions - ids.shape[1])
    made = decode(predict, DECODER, ids, end=end, limit=limit, pad=end[0], fixed=fixed, choose=choose)
    return [[int(token) for token in row[: _length(row, end)]] for row in made]


def _length(row: np.ndarray, end: Sequence[int]) -> int:
    """How many tokens come before the end."""
    places = np.flatnonzero(np.isin(row, end))
    return int(places[0]) if len(places) else len(row)


def generation_of(processor: Processor) -> GenerationConfig:
    """The model's generation settings; made from its config where it has none of its own, as stock does.

    Raises:
        ModelError: they name no start or no end.
    """
    found = processor.generation or GenerationConfig.from_model_config(processor.config)
    if found.decoder_start_token_id is None or not ends(found):
        raise ModelError("generation_config.json: decoder_start_token_id and eos_token_id are needed")
    return found


def _tokenizer_language(processor: Processor, generation: GenerationConfig) -> str | None:
    """The language that a tokenizer was saved with, where the model knows several and its own settings choose none."""
    if getattr(generation, "lang_to_id", None) is None or getattr(generation, "language", None) is not None:
        return None
    return cast(str | None, getattr(processor.tokenizer, "language", None))


def _decoder_inputs(
    config: WhisperConfig, part: Component, batch_size: int, *, tokens: int, past: int, seen: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random inputs of the decoder: ``tokens`` new ones behind ``past`` old ones, ``seen`` encoder positions in the cache."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        "input_ids": torch.randint(0, config.vocab_size, (batch_size, tokens), generator=generator),
        "encoder_hidden_states": torch.randn((batch_size, config.max_source_positions, config.d_model), generator=generator),
    }
    for name, (heads, size) in part.cache.items():
        length = seen if ".encoder." in name else past
        found[name] = torch.randn((batch_size, heads, length, size), generator=generator)
    return found


FAMILY = Whisper()
