"""What SmolVLM, Idefics3 and LLaVA have in common: a vision tower, a connector, and a Llama-like decoder that reads both.

Shapes: B examples, S text length with image tokens, P past tokens, K tokens of an answer, W width, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self, cast

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from mmcompress.errors import ModelError
from mmcompress.families._vlm_parts import DECODER, EMBED, attention_sizes, text_components
from mmcompress.families._vlm_text import (
    best_answer,
    chat,
    insert_image,
    learning_batch,
    left_padded,
    merge_images,
    token_ids,
)
from mmcompress.families.base import NEW_TOKENS, Arrays, Batch, Call, Component, Coupled, Family, Outputs, UnitGroup
from mmcompress.processor import Processor
from mmcompress.runtimes.base import Predict
from mmcompress.runtimes.decoding import decode, empty_cache, next_cache

DEFAULT_PROMPT = "Describe the image."
TEXT_TYPES = ("llama", "mistral", "qwen2")
"""Decoders whose layers and config keys are Llama's."""
VISION = "vision_encoder"
TEXT_TOKENS, ANSWER_TOKENS = 8, 4
"""Tokens of random examples beside those of the picture."""


class VisionLanguage(Family):
    """A family of three towers. Subclasses say where they lie, how pictures are read and how many tokens one becomes."""

    towers = ("vision", "connector", "text")
    axes = MappingProxyType(
        {
            "ffn": "hidden units of the feed-forward layers (gate and up together in the decoder); sets intermediate_size",
            "depth": "whole layers; sets num_hidden_layers",
            "heads": "key/value heads of the decoder with the queries that share them, at constant head size; sets "
            "num_key_value_heads, num_attention_heads and head_dim",
        }
    )
    stock_axes = ("ffn", "depth", "heads")
    abilities = frozenset({"image", "captions", "answers"})
    plain_prompt: str
    """How a model without a chat template is asked; ``<image>`` is the picture, ``{}`` the prompt."""
    vision_inputs: tuple[str, ...]
    """The inputs of ``vision_encoder``."""

    @abstractmethod
    def parts(self, module: PreTrainedModel) -> tuple[Any, nn.Module, Any]:
        """Vision tower, connector, text model without its head."""

    @abstractmethod
    def vision_component(self, module: PreTrainedModel) -> Component:
        """``vision_encoder``: pictures to ``image_features`` in the decoder's width."""

    @abstractmethod
    def vision_example(self, config: PretrainedConfig, batch_size: int, generator: torch.Generator, images: int) -> Batch:
        """Random pictures; ``images`` for each example where the family takes several."""

    @abstractmethod
    def image_tokens(self, config: PretrainedConfig, media: Mapping[str, Any]) -> list[int]:
        """How many image tokens each example's picture takes, (B,); ``media`` have a batch axis."""

    @abstractmethod
    def image_text(self, processor: Processor, media: Mapping[str, Any]) -> str:
        """What stands for one picture in a prompt, as the stock processor writes it."""

    def of(self, config: PretrainedConfig) -> Self:
        text = cast(Any, config).text_config
        rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
        window, most = getattr(text, "sliding_window", None), getattr(text, "max_position_embeddings", None)
        if text.model_type not in TEXT_TYPES:
            raise ModelError(
                f"text_config.model_type: found {text.model_type!r}; {self.name} models are handled with a decoder of: "
                f"{', '.join(TEXT_TYPES)}"
            )
        if window is not None and (most is None or window < most):
            raise ModelError(f"text_config.sliding_window: found {window}; decoders that forget tokens are not handled")
        if rope in ("dynamic", "longrope"):
            raise ModelError(f"text_config: the rope_type {rope!r} changes with the text's length, which no ONNX graph can say")
        return self

    def tower_axes(self, tower: str) -> tuple[str, ...]:
        return {"vision": ("ffn", "depth"), "connector": (), "text": ("ffn", "depth", "heads")}[tower]

    def tower_modules(self, module: PreTrainedModel) -> dict[str, list[nn.Module]]:
        vision, connector, text = self.parts(module)
        tied = module.lm_head.weight is text.embed_tokens.weight
        return {"vision": [vision], "connector": [connector], "text": [text] if tied else [text, module.lm_head]}

    def _layers(self, module: PreTrainedModel, tower: str) -> Any:
        vision, _, text = self.parts(module)
        return {"vision": vision.encoder.layers, "text": text.layers}[tower]

    def layers(self, module: PreTrainedModel, tower: str) -> nn.ModuleList:
        return cast(nn.ModuleList, self._layers(module, tower))

    def drop_layers(self, module: PreTrainedModel, tower: str, keep: Sequence[int]) -> None:
        config = cast(Any, module.config)
        sub = config.vision_config if tower == "vision" else config.text_config
        super().drop_layers(module, tower, keep)
        kinds = getattr(sub, "layer_types", None)
        if kinds:  # one entry for each layer
            sub.layer_types = [kinds[i] for i in keep]
        sub.num_hidden_layers = len(keep)

    def _mlps(self, module: PreTrainedModel, tower: str) -> list[tuple[str, Any]]:
        """The feed-forward layers that share one ``intermediate_size``, by name."""
        names = {id(part): name for name, part in module.named_modules()}
        found = [layer.mlp for layer in self._layers(module, tower)]
        head = getattr(self.parts(module)[0], "head", None)
        if tower == "vision" and head is not None:  # SigLIP's pooling head, which no vision-language model reads
            found.append(head.mlp)
        return [(names[id(mlp)], mlp) for mlp in found]

    def unit_groups(self, module: PreTrainedModel, tower: str, axis: str) -> list[UnitGroup]:
        # All is spelled out: grouped queries and layers that no output depends on (LLaVA's last) are not in autograd's graph.
        groups = []
        if axis == "ffn":
            for name, mlp in self._mlps(module, tower):
                ins, out = ((mlp.fc1,), mlp.fc2) if tower == "vision" else ((mlp.gate_proj, mlp.up_proj), mlp.down_proj)
                root = "fc1" if tower == "vision" else "gate_proj"
                coupled = (*(Coupled(m, 0, 1) for m in ins), Coupled(out, 1, 1))
                groups.append(UnitGroup(tower, axis, f"{name}.{root}", ins[0], ins[0].out_features, explicit=coupled))
        elif axis == "heads" and tower == "text":
            names = {id(part): name for name, part in module.named_modules()}
            for layer in self._layers(module, tower):
                at, (heads, size) = layer.self_attn, attention_sizes(layer)
                block = size * at.num_key_value_groups
                coupled = (Coupled(at.k_proj, 0, size), Coupled(at.v_proj, 0, size))
                coupled += (Coupled(at.q_proj, 0, block), Coupled(at.o_proj, 1, block))
                name = f"{names[id(at)]}.k_proj"
                groups.append(UnitGroup(tower, axis, name, at.k_proj, heads * size, size, explicit=coupled))
        return groups

    def shrunk_config(self, module: PreTrainedModel) -> PretrainedConfig | None:
        config = cast(Any, type(module.config)).from_dict(module.config.to_dict())
        for tower, sub in (("vision", config.vision_config), ("text", config.text_config)):
            ffn = {group.size for group in self.unit_groups(module, tower, "ffn")}
            if len(ffn) > 1:
                return None
            sub.intermediate_size, sub.num_hidden_layers = ffn.pop(), len(self._layers(module, tower))
        layers, text = self._layers(module, "text"), config.text_config
        if len({attention_sizes(layer) for layer in layers}) > 1:
            return None
        heads, size = attention_sizes(layers[0])
        queries = heads * layers[0].self_attn.num_key_value_groups
        if text.hidden_size % queries:  # stock Llama configs refuse it, though with a head_dim nothing depends on it
            return None
        text.num_key_value_heads, text.num_attention_heads, text.head_dim = heads, queries, size
        return cast(PretrainedConfig, config)

    def config_sizes(self, config: PretrainedConfig) -> dict[str, dict[str, int]]:
        vision, text = cast(Any, config).vision_config, cast(Any, config).text_config
        return {
            "vision": {"ffn": vision.intermediate_size, "depth": vision.num_hidden_layers},
            "connector": {},
            "text": {"ffn": text.intermediate_size, "depth": text.num_hidden_layers, "heads": text.num_key_value_heads},
        }

    def resized_config(self, config: PretrainedConfig, sizes: Mapping[str, Mapping[str, int]]) -> PretrainedConfig:
        new = cast(Any, type(config)).from_dict(config.to_dict())
        for tower, sub in (("vision", new.vision_config), ("text", new.text_config)):
            own = sizes[tower]
            sub.intermediate_size, sub.num_hidden_layers = own["ffn"], own["depth"]
            if getattr(sub, "layer_types", None):
                sub.layer_types = sub.layer_types[: own["depth"]]
        text = new.text_config
        groups = text.num_attention_heads // text.num_key_value_heads
        text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        text.num_key_value_heads, text.num_attention_heads = sizes["text"]["heads"], sizes["text"]["heads"] * groups
        return cast(PretrainedConfig, new)

    def components(self, module: PreTrainedModel) -> dict[str, Component]:
        _, _, text = self.parts(module)
        return {VISION: self.vision_component(module), **text_components(text, module.lm_head)}

    def example_batch(self, config: PretrainedConfig, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        media = self.vision_example(config, batch_size, generator, 2)
        prompts, answers = [], []
        for count in self.image_tokens(config, media):
            words = self._words(config, TEXT_TOKENS, generator)
            prompts.append([words[0], *[cast(Any, config).image_token_id] * count, *words[1:]])
            answers.append(self._words(config, ANSWER_TOKENS, generator))
        return {**media, **learning_batch(prompts, answers, _filler(config), None)}

    def _words(self, config: PretrainedConfig, count: int, generator: torch.Generator) -> list[int]:
        """Random tokens, the image token never among them."""
        image, vocabulary = cast(Any, config).image_token_id, cast(Any, config).text_config.vocab_size
        ids: list[int] = torch.randint(0, vocabulary - 1, (count,), generator=generator).tolist()
        return [i + (i >= image) for i in ids] if image < vocabulary else ids

    def example_inputs(
        self, config: PretrainedConfig, component: Component, batch_size: int, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if component.name == VISION:
            media = self.vision_example(config, batch_size, generator, 3)
            return {name: media[name] for name in component.inputs}
        return _text_inputs(config, component, batch_size, 3, 4, generator)

    def calls(self, module: PreTrainedModel, batch_size: int) -> list[Call]:
        generator = torch.Generator().manual_seed(0)
        config, parts = module.config, self.components(module)
        media = self.vision_example(config, batch_size, generator, 1)
        found = [Call(VISION, {name: media[name] for name in self.vision_inputs})]
        prompt = max(self.image_tokens(config, media)) + TEXT_TOKENS
        for new, past, times in ((prompt, 0, 1), (1, prompt, NEW_TOKENS - 1)):
            found += [
                Call(name, _text_inputs(config, parts[name], batch_size, new, past, generator), times)
                for name in (EMBED, DECODER)
            ]
        return found

    def forward(self, module: PreTrainedModel, batch: Batch, *, hidden: bool = False) -> Outputs:
        """The logits are those of ``label_positions`` where the batch holds them, else of all positions."""
        _, _, text = self.parts(module)
        inputs = {name: batch[name] for name in self.vision_inputs}
        wanted = {"output_hidden_states": True} if hidden else {}
        seen = module.get_image_features(**inputs, **wanted, return_dict=True)
        states = {"vision": tuple(seen.hidden_states)} if hidden else {}
        if "input_ids" not in batch:
            return Outputs(hidden=states)
        ids = batch["input_ids"]
        embeds = text.embed_tokens(ids)
        places = (ids == module.config.image_token_id)[..., None].expand_as(embeds)
        features = torch.cat([f.reshape(-1, f.shape[-1]) for f in seen.pooler_output])
        if int(places.sum()) != features.numel():
            raise ModelError(f"the texts have {int(places[..., 0].sum())} image tokens for {len(features)} vectors of pictures")
        read = text(
            inputs_embeds=embeds.masked_scatter(places, features.to(embeds.dtype)),
            attention_mask=batch["attention_mask"],
            use_cache=False,
            output_hidden_states=hidden,
        )
        last = read.last_hidden_state
        if "label_positions" in batch:
            last = last.gather(1, batch["label_positions"][..., None].expand(-1, -1, last.shape[-1]))
        if hidden:
            states["text"] = tuple(read.hidden_states)
        return Outputs(hidden=states, logits=module.lm_head(last))

    def walk(self, predict: Predict, batch: Arrays, module: PreTrainedModel) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """The texts are padded in front, as they are when the model answers: a token of each text comes last."""
        seen = {name: batch[name] for name in self.vision_inputs}
        yield VISION, seen
        if "input_ids" not in batch:
            return
        features = predict(VISION, seen)["image_features"]
        rows = [row[kept.astype(bool)].tolist() for row, kept in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        ids, mask = left_padded(rows, _filler(module.config))
        yield EMBED, {"input_ids": ids}
        embeds = merge_images(predict(EMBED, {"input_ids": ids})["inputs_embeds"], ids, features, module.config.image_token_id)
        cache, positions = empty_cache(predict, DECODER, len(ids)), np.maximum(mask.cumsum(axis=1) - 1, 0)
        for part in (slice(None, -1), slice(-1, None)):
            end = part.stop if part.stop is not None else mask.shape[1]
            given = {
                "inputs_embeds": embeds[:, part],
                "attention_mask": mask[:, :end],
                "position_ids": positions[:, part],
                **cache,
            }
            yield DECODER, given
            if part.stop is not None:
                cache = next_cache(predict(DECODER, given))

    def text_batch(
        self,
        processor: Processor,
        media: Sequence[Mapping[str, torch.Tensor]],
        prompts: Sequence[str] | None,
        answers: Sequence[str] | Sequence[Mapping[str, float]],
    ) -> dict[str, torch.Tensor]:
        asked, said = [], []
        for i, one in enumerate(media):
            prompt = DEFAULT_PROMPT if prompts is None else prompts[i]
            head, tail = self._texts(processor, one, prompt, best_answer(answers[i]))
            asked.append(token_ids(processor, head))
            said.append(processor.tokenizer(tail, add_special_tokens=False)["input_ids"])
        return learning_batch(asked, said, _pad(processor), processor.max_length)

    def _texts(self, processor: Processor, media: Mapping[str, Any], prompt: str, answer: str | None) -> tuple[str, str]:
        token = processor.tokenizer.convert_ids_to_tokens(cast(Any, processor.config).image_token_id)
        head, tail = chat(processor, prompt, answer, self.plain_prompt.replace("<image>", token))
        return insert_image(head, token, self.image_text(processor, media), prompt), tail

    def respond(
        self, predict: Predict, processor: Processor, media: Arrays, prompts: Sequence[str] | None, max_new_tokens: int
    ) -> list[str]:
        count = len(media[self.vision_inputs[0]])
        asked = prompts if prompts is not None else [DEFAULT_PROMPT] * count
        rows = []
        for i, prompt in enumerate(asked):
            head, _ = self._texts(processor, {name: values[i] for name, values in media.items()}, prompt, None)
            rows.append(token_ids(processor, head))
        ids, mask = left_padded(rows, _pad(processor))
        features = predict(VISION, {name: media[name] for name in self.vision_inputs})["image_features"]

        def embed(tokens: np.ndarray) -> np.ndarray:
            return predict(EMBED, {"input_ids": tokens})["inputs_embeds"]

        first = merge_images(embed(ids), ids, features, cast(Any, processor.config).image_token_id)
        made = decode(
            predict,
            DECODER,
            ids,
            end=_ends(processor),
            limit=max_new_tokens,
            pad=_pad(processor),
            mask=mask,
            embed=embed,
            first=first,
        )
        found: list[str] = processor.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [text.strip() for text in found]


def _text_inputs(
    config: PretrainedConfig, component: Component, batch_size: int, new: int, past: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Random inputs of ``embed_tokens`` or the decoder: ``new`` tokens after ``past`` ones."""
    text = cast(Any, config).text_config
    if component.name == EMBED:
        return {"input_ids": torch.randint(0, text.vocab_size, (batch_size, new), generator=generator)}
    cache = {
        name: torch.randn((batch_size, heads, past, size), generator=generator) for name, (heads, size) in component.cache.items()
    }
    return {
        "inputs_embeds": torch.randn((batch_size, new, text.hidden_size), generator=generator),
        "attention_mask": torch.ones((batch_size, past + new), dtype=torch.int64),
        "position_ids": torch.arange(past, past + new).repeat(batch_size, 1),
        **cache,
    }


def _filler(config: PretrainedConfig) -> int:
    """A token to pad with where there is no tokenizer to ask: any but the image token."""
    return int(cast(Any, config).image_token_id == 0)


def _pad(processor: Processor) -> int:
    pad = processor.tokenizer.pad_token_id
    return int(pad if pad is not None else processor.tokenizer.eos_token_id or 0)


def _ends(processor: Processor) -> list[int]:
    """The tokens that end an answer: as the model's generation settings say, else its config, else its tokenizer."""
    text = cast(Any, processor.config).text_config
    for found in (getattr(processor.generation, "eos_token_id", None), text.eos_token_id, processor.tokenizer.eos_token_id):
        if found is not None:
            return list(found) if isinstance(found, list) else [int(found)]
    return []
