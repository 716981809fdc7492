"""CLIP: a vision and a text transformer with a projection each, compared by cosine similarity (Radford et al. 2021).

Shapes: B examples, D projection width, S text length, C x H x W a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, PretrainedConfig, PreTrainedModel

from mmcompress.families.base import Batch, Component, Family, Outputs, UnitGroup

TEXT_INPUTS = ("input_ids", "attention_mask")


class VisionComponent(nn.Module):
    """Pictures to projected embeddings, not normalised: what transformers.js and Optimum call ``vision_model``."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.vision_model = model.vision_model
        self.visual_projection = model.visual_projection

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        """(B, C, H, W) -> (B, D)."""
        return (self.visual_projection(self.vision_model(pixel_values=pixel_values).pooler_output),)


class TextComponent(nn.Module):
    """Tokens to projected embeddings, not normalised: what transformers.js and Optimum call ``text_model``."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.text_model = model.text_model
        self.text_projection = model.text_projection

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """(B, S), (B, S) -> (B, D)."""
        pooled = self.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return (self.text_projection(pooled),)


class Clip(Family):
    """CLIPModel of stock transformers."""

    name = "clip"
    model_types = ("clip",)
    towers = ("vision", "text")
    axes = MappingProxyType(
        {
            "ffn": "hidden units of the feed-forward layers; sets intermediate_size",
            "depth": "whole layers; sets num_hidden_layers",
            "width": "residual width with whole heads, or channels of every head (heads: narrower); sets hidden_size and heads",
            "heads": "attention heads alone; no config key of CLIP says so, needs allow_custom",
        }
    )
    stock_axes = ("ffn", "depth", "width")
    abilities = frozenset({"image", "embeddings"})
    media = MappingProxyType({"image": ("pixel_values",)})

    def model_class(self) -> type[PreTrainedModel]:
        return cast(type[PreTrainedModel], CLIPModel)

    def _encoder(self, module: PreTrainedModel, tower: str) -> Any:
        return module.vision_model if tower == "vision" else module.text_model

    def _layers(self, module: PreTrainedModel, tower: str) -> Any:
        """Untyped: nn.Module's attributes are all ``Tensor | Module`` to a type checker."""
        return self._encoder(module, tower).encoder.layers

    def tower_modules(self, module: PreTrainedModel) -> dict[str, list[nn.Module]]:
        return {
            "vision": [module.vision_model, module.visual_projection],
            "text": [module.text_model, module.text_projection],
        }

    def layers(self, module: PreTrainedModel, tower: str) -> nn.ModuleList:
        return cast(nn.ModuleList, self._encoder(module, tower).encoder.layers)

    def unit_groups(self, module: PreTrainedModel, tower: str, axis: str) -> list[UnitGroup]:
        prefix = f"{tower}_model"
        if axis == "width":
            # Any module that writes to the residual stream will do as the root: the graph finds all others.
            root = self._layers(module, tower)[0].mlp.fc2
            return [UnitGroup(tower, axis, f"{prefix}.encoder.layers.0.mlp.fc2", root, root.out_features)]
        groups = []
        for i, layer in enumerate(self._layers(module, tower)):
            name = f"{prefix}.encoder.layers.{i}"
            if axis == "ffn":
                fc1 = layer.mlp.fc1
                groups.append(UnitGroup(tower, axis, f"{name}.mlp.fc1", fc1, fc1.out_features))
            elif axis == "heads":
                at = layer.self_attn
                size = at.v_proj.out_features
                also = (at.q_proj, at.k_proj)
                label = f"{name}.self_attn.v_proj"
                groups.append(UnitGroup(tower, axis, label, at.v_proj, size, at.head_dim, also, head_size=(at, "head_dim")))
        return groups

    def tracing(self, module: PreTrainedModel, tower: str, batch: Batch) -> tuple[nn.Module, Any, list[nn.Parameter]]:
        # The towers are traced one by one, which keeps logit_scale (a parameter outside both) out of the graph.
        part = self.components(module)[f"{tower}_model"]
        unwrapped = [module.vision_model.embeddings.class_embedding] if tower == "vision" else []
        return part.module, tuple(batch[i] for i in part.inputs), unwrapped

    def shrunk_config(self, module: PreTrainedModel) -> PretrainedConfig | None:
        config = cast(Any, type(module.config)).from_dict(module.config.to_dict())
        for tower in self.towers:
            sub = config.vision_config if tower == "vision" else config.text_config
            layers = self._layers(module, tower)
            ffn = {layer.mlp.fc1.out_features for layer in layers}
            width = {layer.self_attn.q_proj.in_features for layer in layers}
            inner = {layer.self_attn.v_proj.out_features for layer in layers}
            head_dim = {layer.self_attn.head_dim for layer in layers}
            if len(ffn) > 1 or len(width) > 1 or inner != width or len(head_dim) > 1:
                return None
            hidden, head = width.pop(), head_dim.pop()
            if hidden % head:
                return None
            sub.intermediate_size, sub.num_hidden_layers = ffn.pop(), len(layers)
            sub.hidden_size, sub.num_attention_heads = hidden, hidden // head
        return cast(PretrainedConfig, config)

    def components(self, module: PreTrainedModel) -> dict[str, Component]:
        model = cast(CLIPModel, module)
        vision_axes = {"pixel_values": {0: "image_batch_size"}, "image_embeds": {0: "image_batch_size"}}
        text_axes: Mapping[str, Mapping[int, str]] = {
            "input_ids": {0: "text_batch_size", 1: "sequence_length"},
            "attention_mask": {0: "text_batch_size", 1: "sequence_length"},
            "text_embeds": {0: "text_batch_size"},
        }
        return {
            "vision_model": Component(
                "vision_model", "vision", VisionComponent(model), ("pixel_values",), ("image_embeds",), vision_axes
            ),
            "text_model": Component("text_model", "text", TextComponent(model), TEXT_INPUTS, ("text_embeds",), text_axes),
        }

    def example_batch(self, config: PretrainedConfig, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        vision, text = cast(CLIPConfig, config).vision_config, cast(CLIPConfig, config).text_config
        generator = torch.Generator().manual_seed(seed)
        size = (batch_size, vision.num_channels, vision.image_size, vision.image_size)
        length = min(16, text.max_position_embeddings)
        ids = torch.randint(0, text.vocab_size, (batch_size, length), generator=generator)
        # Pooling looks for the end of text: the highest id in old configs (eos_token_id 2), eos_token_id in new ones.
        ids[:, -1] = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
        return {
            "pixel_values": torch.randn(size, generator=generator),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }

    def forward(self, module: PreTrainedModel, batch: Batch, *, hidden: bool = False) -> Outputs:
        embeds: dict[str, torch.Tensor] = {}
        states: dict[str, tuple[torch.Tensor, ...]] = {}
        if "pixel_values" in batch:
            seen = module.vision_model(pixel_values=batch["pixel_values"], output_hidden_states=hidden)
            embeds["vision"] = module.visual_projection(seen.pooler_output)
            states["vision"] = tuple(seen.hidden_states or ())
        if "input_ids" in batch:
            read = module.text_model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=hidden
            )
            embeds["text"] = module.text_projection(read.pooler_output)
            states["text"] = tuple(read.hidden_states or ())
        return Outputs(embeds, module.logit_scale.exp(), states if hidden else {})

    def config_sizes(self, config: PretrainedConfig) -> dict[str, dict[str, int]]:
        subs = {"vision": cast(Any, config).vision_config, "text": cast(Any, config).text_config}
        return {
            tower: {
                "ffn": c.intermediate_size,
                "depth": c.num_hidden_layers,
                "width": c.hidden_size,
                "heads": c.num_attention_heads,
            }
            for tower, c in subs.items()
        }

    def resized_config(self, config: PretrainedConfig, sizes: Mapping[str, Mapping[str, int]]) -> PretrainedConfig:
        new = cast(Any, type(config)).from_dict(config.to_dict())
        for tower, axes in sizes.items():
            sub = new.vision_config if tower == "vision" else new.text_config
            sub.intermediate_size, sub.num_hidden_layers = axes["ffn"], axes["depth"]
            sub.hidden_size, sub.num_attention_heads = axes["width"], axes["heads"]
        return cast(PretrainedConfig, new)


FAMILY = Clip()
