"""ViLT: one transformer over the words of a question and the patches of a picture, with a classifier over answers (Kim et al.
2021, arXiv 2102.03334).

Stock ViLT picks patches by code that looks at the data (``nonzero``, ``multinomial``, a loop over pictures), which no exporter
follows. Here every patch of the padded canvas stays, those of the padding are masked, and each picture's position embeddings
are interpolated by two small matrices that are made from its mask. Attention does not care for the order of patches, so the
logits are those of stock ViLT where it keeps all patches (``max_image_length`` of -1, as in the published models). Training uses
the same form: it is deterministic, takes the path that is exported, and spends no time in that loop.

Shapes: B examples, S words, H x W patches of the canvas, P x P position embeddings, D hidden width, C answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Self, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, ViltConfig, ViltForQuestionAnswering

from mmcompress.data.answers import normalise
from mmcompress.errors import ModelError, one_of
from mmcompress.families.base import Arrays, Batch, Component, Family, Outputs, UnitGroup
from mmcompress.processor import Processor
from mmcompress.runtimes.base import Predict

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "pixel_mask")
MEDIA = ("pixel_values", "pixel_mask")


def interpolation(count: torch.Tensor, size: int, places: int) -> torch.Tensor:
    """Matrices that stretch a row of embeddings over the first ``count`` of ``size`` places: linear, corners aligned.

    Row i of example b holds what each embedding contributes to place i, as ``F.interpolate(..., align_corners=True)`` does to
    ``count[b]`` places; places behind them get nothing.

    Args:
        count: (B,), how many places a picture has along this axis.
        size: how many the canvas has.
        places: how many embeddings there are.

    Returns:
        (B, size, places).
    """
    step = (places - 1) / (count - 1).clamp(min=1).to(torch.float32)
    i = torch.arange(size, device=count.device)
    at = (i * step[:, None]).clamp(max=places - 1)
    share = (1 - (at[:, :, None] - torch.arange(places, device=count.device)).abs()).clamp(min=0)
    return share * (i < count[:, None])[:, :, None]


class FullImage(nn.Module):
    """The whole model with every patch kept; see the file's head."""

    def __init__(self, model: ViltForQuestionAnswering) -> None:
        super().__init__()
        self.vilt = model.vilt
        self.classifier = model.classifier
        self.places = model.config.image_size // model.config.patch_size

    def encode(self, *inputs: torch.Tensor, hidden: bool = False) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The five ``INPUTS`` to logits (B, C), and if asked for the hidden states between layers, each (B, S + 1 + HW, D)."""
        input_ids, attention_mask, token_type_ids, pixel_values, pixel_mask = inputs
        embeddings = self.vilt.embeddings
        kinds = embeddings.token_type_embeddings.weight
        words = embeddings.text_embeddings(input_ids=input_ids, token_type_ids=token_type_ids) + kinds[0]
        patches, patch_mask = self._look(pixel_values, pixel_mask)
        states = torch.cat([words, patches + kinds[1]], dim=1)
        mask = torch.cat([attention_mask, patch_mask], dim=1)
        bias = (1 - mask[:, None, None, :].to(states.dtype)) * torch.finfo(states.dtype).min
        seen = self.vilt.encoder(states, attention_mask=bias, output_hidden_states=hidden)
        pooled = self.vilt.pooler(self.vilt.layernorm(seen.last_hidden_state))
        return self.classifier(pooled), tuple(seen.hidden_states or ())

    def _look(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches with their positions behind the class token, (B, 1 + HW, D), and their mask, (B, 1 + HW)."""
        embeddings = self.vilt.embeddings
        grid = embeddings.patch_embeddings(pixel_values)
        height, width = grid.shape[2:]
        # As stock: a patch belongs to the picture if its first pixel does.
        mask = F.interpolate(pixel_mask[:, None].float(), size=(height, width))[:, 0].long()
        rows = interpolation(mask[:, :, 0].sum(1), height, self.places)
        columns = interpolation(mask[:, 0, :].sum(1), width, self.places)
        both = (rows[:, :, None, :, None] * columns[:, None, :, None, :]).flatten(3).flatten(1, 2)  # (B, HW, PP)
        positions = embeddings.position_embeddings[0]
        patches = grid.flatten(2).transpose(1, 2) + both.to(positions.dtype) @ positions[1:]
        first = (embeddings.cls_token + positions[:1]).expand(grid.shape[0], -1, -1)
        seen = embeddings.dropout(torch.cat([first, patches], dim=1))
        return seen, torch.cat([torch.ones_like(mask[:, 0, :1]), mask.flatten(1)], dim=1)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor,
    ) -> tuple[torch.Tensor]:
        """(B, S) three times, (B, channels, height, width) and (B, height, width) in pixels -> (B, C)."""
        return (self.encode(input_ids, attention_mask, token_type_ids, pixel_values, pixel_mask)[0],)


class Coupling(nn.Module):
    """What adds to what in ViLT, for Torch-Pruning's graph, which loses its way where words and patches are joined.

    Words and patches are added instead: their channels hang together in the same way.
    """

    def __init__(self, model: ViltForQuestionAnswering) -> None:
        super().__init__()
        self.vilt = model.vilt
        self.classifier = model.classifier

    def forward(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, S) twice, (B, channels, height, width) -> (B, C)."""
        embeddings = self.vilt.embeddings
        words = embeddings.text_embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        patches = embeddings.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)[:, :1]
        states = words + embeddings.token_type_embeddings(token_type_ids) + patches + embeddings.cls_token
        states = self.vilt.encoder(states + embeddings.position_embeddings[:, :1]).last_hidden_state
        return cast(torch.Tensor, self.classifier(self.vilt.pooler(self.vilt.layernorm(states))))


class Vilt(Family):
    """ViltForQuestionAnswering of stock transformers."""

    name = "vilt"
    model_types = ("vilt",)
    towers = ("fused",)
    axes = MappingProxyType(
        {
            "ffn": "hidden units of the feed-forward layers; sets intermediate_size",
            "depth": "whole layers; sets num_hidden_layers",
            "width": "residual width with whole heads, or channels of every head (heads: narrower); sets hidden_size and heads",
            "heads": "attention heads alone; no config key of ViLT says so, needs allow_custom",
        }
    )
    stock_axes = ("ffn", "depth", "width")
    abilities = frozenset({"image", "answers"})
    media = MappingProxyType({"image": MEDIA})
    media_shapes_vary = True

    def of(self, config: PretrainedConfig) -> Self:
        kinds = getattr(config, "architectures", None) or ["ViltForQuestionAnswering"]
        if "ViltForQuestionAnswering" not in kinds:
            raise ModelError("vilt: architectures: " + one_of("kind of ViLT", kinds[0], ["ViltForQuestionAnswering"]))
        for key in ("image_size", "patch_size"):
            if not isinstance(getattr(config, key), int):
                raise ModelError(f"vilt: {key}: found {getattr(config, key)}; stock ViLT takes one number")
        return self

    def model_class(self) -> type[PreTrainedModel]:
        return cast(type[PreTrainedModel], ViltForQuestionAnswering)

    def tower_modules(self, module: PreTrainedModel) -> dict[str, list[nn.Module]]:
        return {"fused": [module]}

    def layers(self, module: PreTrainedModel, tower: str) -> nn.ModuleList:
        return cast(nn.ModuleList, module.vilt.encoder.layer)

    def _layers(self, module: PreTrainedModel) -> Any:
        """Untyped: nn.Module's attributes are all ``Tensor | Module`` to a type checker."""
        return self.layers(module, "fused")

    def unit_groups(self, module: PreTrainedModel, tower: str, axis: str) -> list[UnitGroup]:
        if axis == "width":
            return self._width_groups(module, tower)
        groups = []
        for i, layer in enumerate(self._layers(module)):
            name = f"vilt.encoder.layer.{i}"
            if axis == "ffn":
                fc1 = layer.intermediate.dense
                groups.append(UnitGroup(tower, axis, f"{name}.intermediate.dense", fc1, fc1.out_features))
            elif axis == "heads":
                at = layer.attention.attention
                size, also = at.value.out_features, (at.query, at.key)
                root = f"{name}.attention.attention.value"
                remembers = (at, "attention_head_size")
                groups.append(UnitGroup(tower, axis, root, at.value, size, at.attention_head_size, also, head_size=remembers))
        return groups

    def _width_groups(self, module: Any, tower: str) -> list[UnitGroup]:
        """The residual stream, and what has its width, or twice that, by the config: the pooler and the classifier's middle."""
        pooled, middle = module.vilt.pooler.dense, module.classifier[0]
        # Any module that writes to the residual stream will do as the root: the graph finds all others.
        stream = self._layers(module)[0].output.dense
        return [
            UnitGroup(tower, "width", "vilt.pooler.dense", pooled, pooled.out_features),
            UnitGroup(tower, "width", "classifier.0", middle, middle.out_features, 2),
            UnitGroup(tower, "width", "vilt.encoder.layer.0.output.dense", stream, stream.out_features),
        ]

    def tracing(self, module: PreTrainedModel, tower: str, batch: Batch) -> tuple[nn.Module, Any, list[nn.Parameter]]:
        embeddings = cast(Any, module).vilt.embeddings
        inputs = tuple(batch[i] for i in ("input_ids", "token_type_ids", "pixel_values"))
        return Coupling(cast(Any, module)), inputs, [embeddings.cls_token, embeddings.position_embeddings]

    def shrunk_config(self, module: PreTrainedModel) -> PretrainedConfig | None:
        config = cast(Any, type(module.config)).from_dict(module.config.to_dict())
        layers = self._layers(module)
        ffn = {layer.intermediate.dense.out_features for layer in layers}
        width = {layer.attention.attention.query.in_features for layer in layers}
        width |= {cast(Any, module).vilt.pooler.dense.out_features}
        inner = {layer.attention.attention.value.out_features for layer in layers}
        head_size = {layer.attention.attention.attention_head_size for layer in layers}
        if len(ffn) > 1 or len(width) > 1 or inner != width or len(head_size) > 1:
            return None
        hidden, head = width.pop(), head_size.pop()
        if hidden % head or cast(Any, module).classifier[0].out_features != 2 * hidden:
            return None
        config.intermediate_size, config.num_hidden_layers = ffn.pop(), len(layers)
        config.hidden_size, config.num_attention_heads = hidden, hidden // head
        return cast(PretrainedConfig, config)

    def components(self, module: PreTrainedModel) -> dict[str, Component]:
        text = {0: "batch_size", 1: "sequence_length"}
        axes: dict[str, Mapping[int, str]] = {
            **dict.fromkeys(INPUTS[:3], text),
            "pixel_values": {0: "batch_size", 2: "height", 3: "width"},
            "pixel_mask": {0: "batch_size", 1: "height", 2: "width"},
            "logits": {0: "batch_size"},
        }
        return {"model": Component("model", "fused", FullImage(cast(Any, module)), INPUTS, ("logits",), axes)}

    def example_batch(self, config: PretrainedConfig, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        known = cast(ViltConfig, config)
        generator = torch.Generator().manual_seed(seed)
        length, side = min(16, known.max_position_embeddings), cast(int, known.image_size)
        ids = torch.randint(0, known.vocab_size, (batch_size, length), generator=generator)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
            "pixel_values": torch.randn((batch_size, known.num_channels, side, side), generator=generator),
            "pixel_mask": torch.ones((batch_size, side, side), dtype=torch.int64),
        }

    def forward(self, module: PreTrainedModel, batch: Batch, *, hidden: bool = False) -> Outputs:
        logits, states = FullImage(cast(Any, module)).encode(*(batch[i] for i in INPUTS), hidden=hidden)
        return Outputs(logits=logits, hidden={"fused": states} if hidden else {})

    def config_sizes(self, config: PretrainedConfig) -> dict[str, dict[str, int]]:
        c = cast(Any, config)
        sizes = {"ffn": c.intermediate_size, "depth": c.num_hidden_layers, "width": c.hidden_size}
        return {"fused": {**sizes, "heads": c.num_attention_heads}}

    def resized_config(self, config: PretrainedConfig, sizes: Mapping[str, Mapping[str, int]]) -> PretrainedConfig:
        new = cast(Any, type(config)).from_dict(config.to_dict())
        for axes in sizes.values():
            new.intermediate_size, new.num_hidden_layers = axes["ffn"], axes["depth"]
            new.hidden_size, new.num_attention_heads = axes["width"], axes["heads"]
        return cast(PretrainedConfig, new)

    def prepare_media(self, processor: Processor, kind: str, items: list[Any]) -> list[dict[str, torch.Tensor]]:
        """One by one: together, the stock processor pads them to one size, and `Processor.stack` does that later anyway."""
        return [self._picture(processor.image_processor, item) for item in items]

    def _picture(self, images: Any, item: Any) -> dict[str, torch.Tensor]:
        pixels = images(images=[item], return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "pixel_mask": torch.ones(pixels.shape[1:], dtype=torch.int64)}

    def text_batch(
        self,
        processor: Processor,
        media: Sequence[Mapping[str, torch.Tensor]],
        prompts: Sequence[str] | None,
        answers: Sequence[str] | Sequence[Mapping[str, float]],
    ) -> dict[str, torch.Tensor]:
        """The questions, and soft targets (B, C). Answers that are no label of the model have no target."""
        numbers = _numbers(processor)
        labels = torch.zeros(len(answers), len(_names(processor)))
        for i, answer in enumerate(answers):
            for text, weight in cast(Mapping[str, float], {answer: 1.0} if isinstance(answer, str) else answer).items():
                number = numbers.get(normalise(text))
                if number is not None:
                    labels[i, number] = max(float(labels[i, number]), weight)
        return {**_questions(processor, prompts), "labels": labels}

    def fixed_answers(self, processor: Processor) -> frozenset[str]:
        return frozenset(_numbers(processor))

    def respond(
        self, predict: Predict, processor: Processor, media: Arrays, prompts: Sequence[str] | None, max_new_tokens: int
    ) -> list[str]:
        """The label of the highest logit; ``max_new_tokens`` has no meaning here."""
        texts = {name: values.numpy() for name, values in _questions(processor, prompts).items()}
        logits = predict("model", {**texts, **{name: media[name] for name in MEDIA}})["logits"]
        names = _names(processor)
        return [names[int(i)] for i in np.argmax(logits, axis=1)]


def _questions(processor: Processor, prompts: Sequence[str] | None) -> dict[str, torch.Tensor]:
    if prompts is None:
        raise ValueError("vilt: answers questions; none were given")
    tokens = processor.tokens(list(prompts))
    return {**tokens, "token_type_ids": torch.zeros_like(tokens["input_ids"])}


def _names(processor: Processor) -> dict[int, str]:
    """The answers that the classifier chooses among, by number."""
    return dict(cast(Any, processor.config).id2label)


def _numbers(processor: Processor) -> dict[str, int]:
    """For each answer, as the metric reads it, its number; the first one where two read alike."""
    return _numbered(tuple(sorted(_names(processor).items())))


@lru_cache(maxsize=4)
def _numbered(names: tuple[tuple[int, str], ...]) -> dict[str, int]:
    return {normalise(name): number for number, name in reversed(names)}


FAMILY = Vilt()
