"""What dual encoders have in common: two encoders side by side, each with a projection, compared by cosine similarity.

Shapes: B examples, H hidden width, D embedding width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from mmcompress.families._encoders import Encoder, positions
from mmcompress.families.base import Batch, Component, Family, Outputs, UnitGroup

AXES = MappingProxyType(
    {
        "ffn": "hidden units of the feed-forward layers; sets intermediate_size",
        "depth": "whole layers; sets num_hidden_layers",
        "width": "residual width with whole heads, or channels of every head (heads: narrower); sets hidden_size and heads",
    }
)
BATCH_AXES = MappingProxyType({"vision": "image_batch_size", "audio": "audio_batch_size", "text": "text_batch_size"})


class TowerComponent(nn.Module):
    """An encoder with its projection: media or tokens to embeddings (B, D), not normalised."""

    def __init__(self, encoder: nn.Module, projection: nn.Module, description: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection
        self._description = description

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        """The inputs in the order of the component's; -> (B, D)."""
        pooled, _ = self._description.run(self.encoder, *inputs)
        return (self.projection(pooled),)


class DualEncoder(Family):
    """Two towers that see nothing of each other. The text tower is ``text_model``, the other ``<tower>_model``."""

    axes = AXES
    stock_axes = ("ffn", "depth", "width")
    output_names: Mapping[str, str]
    """What ONNX clients call each tower's embeddings."""

    @abstractmethod
    def description(self, tower: str) -> Encoder:
        """What is known about a tower's encoder."""

    @abstractmethod
    def projection(self, module: PreTrainedModel, tower: str) -> nn.Module:
        """What follows a tower's pooled output."""

    def scale(self, module: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The factor on cosine similarities, and what is added to the product, both of shape ()."""
        return module.logit_scale.exp(), None

    def encoder(self, module: PreTrainedModel, tower: str) -> Any:
        """A tower's encoder. Untyped: nn.Module's attributes are all ``Tensor | Module`` to a type checker."""
        return module.get_submodule(f"{tower}_model")

    def text_limit(self, config: PretrainedConfig) -> int | None:
        return positions(sub_config(config, "text"))

    def tower_axes(self, tower: str) -> tuple[str, ...]:
        return self.description(tower).axes

    def tower_modules(self, module: PreTrainedModel) -> dict[str, list[nn.Module]]:
        return {tower: [self.encoder(module, tower), self.projection(module, tower)] for tower in self.towers}

    def layers(self, module: PreTrainedModel, tower: str) -> nn.ModuleList:
        return self.description(tower).layers(self.encoder(module, tower))

    def unit_groups(self, module: PreTrainedModel, tower: str, axis: str) -> list[UnitGroup]:
        return self.description(tower).unit_groups(self.encoder(module, tower), tower, axis, f"{tower}_model")

    def tracing(self, module: PreTrainedModel, tower: str, batch: Batch) -> tuple[nn.Module, Any, list[nn.Parameter]]:
        # The towers are traced one by one, which keeps logit_scale (a parameter outside both) out of the graph.
        self.description(tower).make_ready(self.encoder(module, tower))
        part = self.components(module)[f"{tower}_model"]
        unwrapped = self.description(tower).unwrapped(self.encoder(module, tower))
        return part.module, tuple(batch[i] for i in part.inputs), unwrapped

    def shrunk_config(self, module: PreTrainedModel) -> PretrainedConfig | None:
        config = copy_of(cast(PretrainedConfig, module.config))
        fits = [self.description(t).shrink(self.encoder(module, t), sub_config(config, t)) for t in self.towers]
        return config if all(fits) else None

    def components(self, module: PreTrainedModel) -> dict[str, Component]:
        found = {}
        for tower in self.towers:
            name, description = f"{tower}_model", self.description(tower)
            part = TowerComponent(description.exported(self.encoder(module, tower)), self.projection(module, tower), description)
            axes: dict[str, dict[int, str]] = {i: {0: BATCH_AXES[tower]} for i in description.inputs}
            if tower == "text":
                axes = {i: {0: BATCH_AXES[tower], 1: "sequence_length"} for i in description.inputs}
            output = self.output_names[tower]
            axes[output] = {0: BATCH_AXES[tower]}
            found[name] = Component(name, tower, part, description.inputs, (output,), axes)
        return found

    def example_batch(self, config: PretrainedConfig, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        batch: dict[str, torch.Tensor] = {}
        for tower in self.towers:
            batch |= self.description(tower).example(sub_config(config, tower), batch_size, generator)
        return batch

    def forward(self, module: PreTrainedModel, batch: Batch, *, hidden: bool = False) -> Outputs:
        scale, bias = self.scale(module)
        found = Outputs(logit_scale=scale, logit_bias=bias)
        for tower in self.towers:
            description = self.description(tower)
            if not all(i in batch for i in description.inputs):
                continue
            inputs = [batch[i] for i in description.inputs]
            pooled, states = description.run(self.encoder(module, tower), *inputs, hidden=hidden)
            found.embeds[tower] = self.projection(module, tower)(pooled)
            if hidden:
                found.hidden[tower] = states
        return found

    def config_sizes(self, config: PretrainedConfig) -> dict[str, dict[str, int]]:
        return {tower: self.description(tower).sizes(sub_config(config, tower)) for tower in self.towers}

    def resized_config(self, config: PretrainedConfig, sizes: Mapping[str, Mapping[str, int]]) -> PretrainedConfig:
        new = copy_of(config)
        for tower, own in sizes.items():
            self.description(tower).resize(sub_config(new, tower), own)
        return new


def sub_config(config: PretrainedConfig, tower: str) -> PretrainedConfig:
    """A tower's own config within the model's."""
    return cast(PretrainedConfig, getattr(config, f"{tower}_config"))


def copy_of(config: PretrainedConfig) -> PretrainedConfig:
    """A config of its own, as it would be read back from its file."""
    return cast(PretrainedConfig, cast(Any, type(config)).from_dict(config.to_dict()))
