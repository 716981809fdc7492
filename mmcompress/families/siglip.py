"""SigLIP (Zhai et al. 2023), and the checkpoints of SigLIP 2 with a fixed resolution, which are the same architecture.

The pictures' embedding is the output of a pooling head: one learned query (the probe) attends to all patches, and an MLP
follows. It has no projection, so that the embedding is as wide as the vision tower, and the last layer of the text tower
projects to that width (``projection_size``). Pairs are judged one by one: a bias joins the scale, and the loss is a sigmoid.

Shapes: B examples, S tokens or patches, H hidden width of the vision tower, which is also that of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, SiglipModel

from mmcompress.errors import ModelError
from mmcompress.families._dual import DualEncoder
from mmcompress.families._encoders import SIGLIP_LAYOUT, Encoder, TextTransformer
from mmcompress.families._siglip_parts import SiglipVision
from mmcompress.families.base import Batch


class SiglipText(TextTransformer):
    """SigLIP's text tower: no attention mask, as it was trained on texts padded to their full length."""

    inputs = ("input_ids",)

    def __init__(self) -> None:
        super().__init__(SIGLIP_LAYOUT)

    def example(self, config: PretrainedConfig, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        # At full length: the last token is pooled, so that shorter texts are other inputs than those of real use.
        text = cast(Any, config)
        shape = (batch_size, text.max_position_embeddings)
        return {"input_ids": torch.randint(0, text.vocab_size, shape, generator=generator)}


class _Pair(nn.Module):
    """Both towers, for tracing: the product couples the width of the pictures' embeddings with that of the texts'."""

    def __init__(self, vision: nn.Module, text: nn.Module, description: Encoder) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        self._description = description

    def forward(self, input_ids: torch.Tensor, *picture: torch.Tensor) -> torch.Tensor:
        """(B, S), and what the vision tower reads -> (B, H)."""
        product: torch.Tensor = self._description.run(self.vision, *picture)[0] * self.text(input_ids=input_ids).pooler_output
        return product


VISION, TEXT = SiglipVision(), SiglipText()


class Siglip(DualEncoder):
    """SiglipModel of stock transformers."""

    name = "siglip"
    model_types = ("siglip",)
    towers = ("vision", "text")
    abilities = frozenset({"image", "embeddings"})
    media = MappingProxyType({"image": ("pixel_values",)})
    padding = "max_length"
    # Its config says 49407 of a vocabulary of 32000, after CLIP's.
    reads_end = False
    # Optimum's and transformers.js's name for it.
    output_names = MappingProxyType({"vision": "pooler_output", "text": "pooler_output"})

    def of(self, config: PretrainedConfig) -> Self:
        sizes = cast(Any, config)
        if not sizes.vision_config.vision_use_head:
            raise ModelError(
                f"{self.name}: vision_use_head is false: the vision tower has no pooled output to compare with texts"
            )
        if sizes.text_config.projection_size != sizes.vision_config.hidden_size:
            raise ModelError(
                f"{self.name}: the text tower projects to {sizes.text_config.projection_size} numbers "
                f"(text_config.projection_size), but pictures have {sizes.vision_config.hidden_size} (vision_config.hidden_size)"
            )
        return self

    def model_class(self) -> type[PreTrainedModel]:
        return cast(type[PreTrainedModel], SiglipModel)

    def description(self, tower: str) -> Encoder:
        return VISION if tower == "vision" else TEXT

    def projection(self, module: PreTrainedModel, tower: str) -> nn.Module:
        return nn.Identity()

    def scale(self, module: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
        return module.logit_scale.exp().squeeze(0), module.logit_bias.squeeze(0)

    def tracing(self, module: PreTrainedModel, tower: str, batch: Batch) -> tuple[nn.Module, Any, list[nn.Parameter]]:
        vision = self.description("vision")
        vision.make_ready(module.vision_model)
        inputs = (batch["input_ids"], *[batch[name] for name in vision.inputs])
        return _Pair(module.vision_model, module.text_model, vision), inputs, []

    def shrunk_config(self, module: PreTrainedModel) -> PretrainedConfig | None:
        config: Any = super().shrunk_config(module)
        if config is not None:
            config.text_config.projection_size = module.text_model.head.out_features
        return cast(PretrainedConfig | None, config)

    def resized_config(self, config: PretrainedConfig, sizes: Mapping[str, Mapping[str, int]]) -> PretrainedConfig:
        new: Any = super().resized_config(config, sizes)
        new.text_config.projection_size = new.vision_config.hidden_size
        return cast(PretrainedConfig, new)


FAMILY = Siglip()
