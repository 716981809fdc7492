"""Encoders that several families are put together from: what can be cut in each, and which keys of its own config follow.

Shapes: B examples, S sequence length, H hidden width, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PretrainedConfig

from mmcompress.families.base import UnitGroup

TRANSFORMER_AXES = ("ffn", "depth", "width")
KEYS = {"ffn": "intermediate_size", "depth": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"}


class Encoder(ABC):
    """What a family of towers needs to know about one kind of encoder. Stateless: every method is given the encoder."""

    axes: ClassVar[tuple[str, ...]]
    """The axes along which it can be cut."""
    inputs: ClassVar[tuple[str, ...]]
    """What it reads, in the order of `run`."""

    @abstractmethod
    def layers(self, encoder: nn.Module) -> nn.ModuleList:
        """Its stack of layers; the module itself where depth is an axis."""

    @abstractmethod
    def unit_groups(self, encoder: nn.Module, tower: str, axis: str, prefix: str) -> list[UnitGroup]:
        """As `Family.unit_groups`; ``prefix`` is the encoder's dotted name."""

    @abstractmethod
    def shrink(self, encoder: nn.Module, config: PretrainedConfig) -> bool:
        """Writes the sizes that the encoder now has into its config; False where no config has them."""

    @abstractmethod
    def sizes(self, config: PretrainedConfig) -> dict[str, int]:
        """Its sizes by axis, read from its config."""

    @abstractmethod
    def resize(self, config: PretrainedConfig, sizes: Mapping[str, int]) -> None:
        """Writes other sizes, as `sizes` gives them, into its config."""

    @abstractmethod
    def example(self, config: PretrainedConfig, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Random ``inputs`` of the right shape."""

    def make_ready(self, encoder: nn.Module) -> None:
        """Puts parts that can be cut in the place of stock ones, in place, with the stock state dict; mostly there are none."""
        return

    def exported(self, encoder: nn.Module) -> nn.Module:
        """The encoder as a component runs it: over the same weights, in a form that exports well."""
        return encoder

    def unwrapped(self, encoder: nn.Module) -> list[nn.Parameter]:
        """Parameters that belong to no layer (a class token): Torch-Pruning has to be told about them."""
        return []

    def run(
        self, encoder: nn.Module, *inputs: torch.Tensor, hidden: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The pooled output (B, H), and the hidden states after each layer where they are asked for."""
        named = dict(zip(self.inputs, map(_shapes_only, self.inputs, inputs), strict=True))
        found = encoder(**named, **({"output_hidden_states": True} if hidden else {}))
        return found.pooler_output, tuple(found.hidden_states or ()) if hidden else ()


def _shapes_only(name: str, values: torch.Tensor) -> torch.Tensor | None:
    """An input as it is, but for a mask without values (for estimates): transformers looks whether a mask masks anything."""
    if not values.is_meta or not name.endswith("attention_mask"):
        return values
    # One of four axes is taken as it is; without any, CLAP would look into the tokens instead.
    return values[:, None, None, :].float() if name == "attention_mask" else None


@dataclass(frozen=True)
class Layout:
    """Where a transformer keeps what is cut, as dotted paths; those of a layer start at the layer.

    Attributes:
        layers: the stack of layers.
        ffn: in a layer, the Linear whose outputs are the FFN's hidden units.
        residual: in a layer, a Linear that writes to the residual stream.
        query, key, value: in a layer, the Linears of the attention.
        head_size: in a layer, the attribute that holds the channels of a head.
        streams: modules outside of the layers whose outputs are of the hidden width too, but no part of the residual stream.
        parameters: parameters outside of the layers that lie on the residual stream.
    """

    layers: str
    ffn: str
    residual: str
    query: str
    key: str
    value: str
    head_size: str
    streams: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


SIGLIP_LAYOUT = Layout(
    "encoder.layers",
    "mlp.fc1",
    "mlp.fc2",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.head_dim",
)
CLIP_TEXT_LAYOUT = SIGLIP_LAYOUT
CLIP_VISION_LAYOUT = replace(SIGLIP_LAYOUT, parameters=("embeddings.class_embedding",))
VIT_LAYOUT = Layout(
    "layers",
    "mlp.fc1",
    "mlp.fc2",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.head_dim",
    streams=("pooler.dense",),
    parameters=("embeddings.cls_token", "embeddings.position_embeddings"),
)
DEIT_LAYOUT = replace(VIT_LAYOUT, parameters=(*VIT_LAYOUT.parameters, "embeddings.distillation_token"))
BERT_LAYOUT = Layout(
    "encoder.layer",
    "intermediate.dense",
    "output.dense",
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.self.attention_head_size",
    streams=("pooler.dense",),
)


class Transformer(Encoder):
    """A transformer with layers of one size, whose config says hidden_size, intermediate_size and so on."""

    axes = TRANSFORMER_AXES

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def layers(self, encoder: nn.Module) -> nn.ModuleList:
        return cast(nn.ModuleList, encoder.get_submodule(self.layout.layers))

    def unit_groups(self, encoder: nn.Module, tower: str, axis: str, prefix: str) -> list[UnitGroup]:
        at, layers = self.layout, self.layers(encoder)
        if axis == "width":
            # Any module that writes to the residual stream will do as its root: the graph finds all others.
            names = [f"{at.layers}.0.{at.residual}", *at.streams]
            roots = [(name, cast(Any, encoder.get_submodule(name))) for name in names]
            return [UnitGroup(tower, axis, f"{prefix}.{name}", root, root.out_features) for name, root in roots]
        groups = []
        for i, layer in enumerate(layers):
            name = f"{prefix}.{at.layers}.{i}"
            if axis == "ffn":
                ffn = cast(nn.Linear, layer.get_submodule(at.ffn))
                groups.append(UnitGroup(tower, axis, f"{name}.{at.ffn}", ffn, ffn.out_features))
            elif axis == "heads":
                value = cast(nn.Linear, layer.get_submodule(at.value))
                also = (layer.get_submodule(at.query), layer.get_submodule(at.key))
                inside, _, attribute = at.head_size.rpartition(".")
                remembers = (layer.get_submodule(inside), attribute)
                size, label = attrgetter(at.head_size)(layer), f"{name}.{at.value}"
                groups.append(UnitGroup(tower, axis, label, value, value.out_features, size, also, head_size=remembers))
        return groups

    def shrink(self, encoder: nn.Module, config: PretrainedConfig) -> bool:
        at, layers = self.layout, self.layers(encoder)
        ffn = {cast(nn.Linear, layer.get_submodule(at.ffn)).out_features for layer in layers}
        width = {cast(nn.Linear, layer.get_submodule(at.query)).in_features for layer in layers}
        inner = {cast(nn.Linear, layer.get_submodule(at.value)).out_features for layer in layers}
        head = {attrgetter(at.head_size)(layer) for layer in layers}
        if max(map(len, (ffn, width, inner, head))) > 1 or inner != width:
            return False
        hidden, size = width.pop(), head.pop()
        if hidden % size:
            return False
        self.resize(config, {"ffn": ffn.pop(), "depth": len(layers), "width": hidden, "heads": hidden // size})
        return True

    def sizes(self, config: PretrainedConfig) -> dict[str, int]:
        return {axis: getattr(config, key) for axis, key in KEYS.items()}

    def resize(self, config: PretrainedConfig, sizes: Mapping[str, int]) -> None:
        for axis, size in sizes.items():
            setattr(config, KEYS[axis], size)

    def unwrapped(self, encoder: nn.Module) -> list[nn.Parameter]:
        return [encoder.get_parameter(name) for name in self.layout.parameters]


class VisionTransformer(Transformer):
    """CLIP's vision tower, ViT."""

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def example(self, config: PretrainedConfig, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        sizes = cast(Any, config)
        return {
            "pixel_values": torch.randn((batch_size, sizes.num_channels, sizes.image_size, sizes.image_size), generator=generator)
        }


class PooledViT(VisionTransformer):
    """ViT and DeiT: the pooling layer may have a width of its own in the config, and gets the hidden one here."""

    def __init__(self, layout: Layout = VIT_LAYOUT) -> None:
        super().__init__(layout)

    def shrink(self, encoder: nn.Module, config: PretrainedConfig) -> bool:
        same = super().shrink(encoder, config)
        return same and cast(Any, encoder).pooler.dense.out_features == cast(Any, config).hidden_size

    def resize(self, config: PretrainedConfig, sizes: Mapping[str, int]) -> None:
        super().resize(config, sizes)
        cast(Any, config).pooler_output_size = sizes["width"]


class TextTransformer(Transformer):
    """BERT, RoBERTa and their like, with a pooling layer over the first token."""

    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    def __init__(self, layout: Layout = BERT_LAYOUT) -> None:
        super().__init__(layout)

    def example(self, config: PretrainedConfig, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        text = cast(Any, config)
        ids = torch.randint(0, text.vocab_size, (batch_size, min(16, positions(config))), generator=generator)
        if text.pad_token_id is not None:
            # RoBERTa counts positions over what is no padding; a random id must not be taken for it.
            ids[ids == text.pad_token_id] = (text.pad_token_id + 1) % text.vocab_size
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def positions(config: PretrainedConfig) -> int:
    """How many tokens a text encoder has positions for; RoBERTa's begin after the padding's number."""
    text = cast(Any, config)
    taken = text.pad_token_id + 1 if text.model_type in ROBERTA_LIKE else 0
    return int(text.max_position_embeddings) - taken


ROBERTA_LIKE = ("roberta", "xlm-roberta", "camembert", "clap_text_model")


class ResNet(Encoder):
    """A convolutional network whose config scales all of its channels together.

    ``hidden_sizes`` are the channels of the stages, ``embedding_size`` those of the stem, and the inner channels of a bottleneck
    are a fourth of its stage's: a cut keeps the same share of each. The stock dual encoder asks for a ``hidden_size``, which a
    ResNet's config does not have by itself; it is the last of ``hidden_sizes``.
    """

    axes = ("width",)
    inputs = ("pixel_values",)

    def layers(self, encoder: nn.Module) -> nn.ModuleList:
        return nn.ModuleList([layer for stage in cast(Any, encoder).encoder.stages for layer in stage.layers])

    def unit_groups(self, encoder: nn.Module, tower: str, axis: str, prefix: str) -> list[UnitGroup]:
        if axis != "width":
            return []
        net = cast(Any, encoder)
        roots = {}
        stem = net.embedder.embedder.convolution
        first = net.encoder.stages[0].layers[0]
        if not isinstance(first.shortcut, nn.Identity):
            roots["embedder.embedder.convolution"] = stem
        for s, stage in enumerate(net.encoder.stages):
            for i, layer in enumerate(stage.layers):
                at = f"encoder.stages.{s}.layers.{i}.layer"
                inner = list(layer.layer)[:-1]
                roots |= {f"{at}.{k}.convolution": part.convolution for k, part in enumerate(inner)}
            # All layers of a stage write to one stream; the first one's last convolution stands for them.
            last = len(stage.layers[0].layer) - 1
            roots[f"encoder.stages.{s}.layers.0.layer.{last}.convolution"] = stage.layers[0].layer[last].convolution
        return [UnitGroup(tower, axis, f"{prefix}.{name}", root, root.out_channels) for name, root in roots.items()]

    def shrink(self, encoder: nn.Module, config: PretrainedConfig) -> bool:
        net, sizes = cast(Any, encoder), cast(Any, config)
        sizes.embedding_size = net.embedder.embedder.convolution.out_channels
        sizes.hidden_sizes = [stage.layers[0].layer[-1].convolution.out_channels for stage in net.encoder.stages]
        sizes.hidden_size = sizes.hidden_sizes[-1]
        inner = {
            (part.convolution.out_channels, sizes.hidden_sizes[s] // (4 if sizes.layer_type == "bottleneck" else 1))
            for s, stage in enumerate(net.encoder.stages)
            for layer in stage.layers
            for part in list(layer.layer)[:-1]
        }
        return all(found == wanted for found, wanted in inner)

    def sizes(self, config: PretrainedConfig) -> dict[str, int]:
        """The channels of the narrowest convolution: what the others are multiples of."""
        return {"width": self._narrowest(config)}

    def resize(self, config: PretrainedConfig, sizes: Mapping[str, int]) -> None:
        net, before = cast(Any, config), self._narrowest(config)
        net.embedding_size = net.embedding_size * sizes["width"] // before
        net.hidden_sizes = [size * sizes["width"] // before for size in net.hidden_sizes]
        net.hidden_size = net.hidden_sizes[-1]

    def _narrowest(self, config: PretrainedConfig) -> int:
        net = cast(Any, config)
        return int(min(net.embedding_size, min(net.hidden_sizes) // (4 if net.layer_type == "bottleneck" else 1)))

    def example(self, config: PretrainedConfig, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        net = cast(Any, config)
        # The config of a ResNet has no image_size of its own; 224 is what they are trained at.
        side = getattr(net, "image_size", 224)
        return {"pixel_values": torch.randn((batch_size, net.num_channels, side, side), generator=generator)}

    def run(
        self, encoder: nn.Module, *inputs: torch.Tensor, hidden: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        pooled, states = super().run(encoder, *inputs, hidden=hidden)
        # (B, C, 1, 1) -> (B, C), and after each stage (B, C, height, width) -> (B, S, C).
        return pooled.flatten(1), tuple(state.flatten(2).transpose(1, 2) for state in states)
