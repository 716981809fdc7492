"""VisionTextDualEncoder: any vision encoder beside any text encoder, each with a linear projection, as in LiT (Zhai et al. 2022).

The config names the kind of each encoder; what can be cut follows from it.
"""

from __future__ import annotations

from functools import cache
from types import MappingProxyType
from typing import Any, Self, cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, VisionTextDualEncoderModel

from mmcompress.errors import ModelError, one_of
from mmcompress.families._dual import AXES, DualEncoder
from mmcompress.families._encoders import (
    CLIP_TEXT_LAYOUT,
    CLIP_VISION_LAYOUT,
    DEIT_LAYOUT,
    Encoder,
    PooledViT,
    ResNet,
    TextTransformer,
    VisionTransformer,
)
from mmcompress.families._siglip_parts import SiglipVision

BERT_LIKE = TextTransformer()
VISION_ENCODERS: MappingProxyType[str, Encoder] = MappingProxyType(
    {
        "vit": PooledViT(),
        "deit": PooledViT(DEIT_LAYOUT),
        "clip_vision_model": VisionTransformer(CLIP_VISION_LAYOUT),
        "siglip_vision_model": SiglipVision(),
        "resnet": ResNet(),
    }
)
TEXT_ENCODERS: MappingProxyType[str, Encoder] = MappingProxyType(
    {
        "bert": BERT_LIKE,
        "roberta": BERT_LIKE,
        "xlm-roberta": BERT_LIKE,
        "camembert": BERT_LIKE,
        "clip_text_model": TextTransformer(CLIP_TEXT_LAYOUT),
    }
)


class VisionTextDualEncoder(DualEncoder):
    """VisionTextDualEncoderModel of stock transformers, for one kind of vision and one kind of text encoder."""

    name = "vision_text_dual_encoder"
    model_types = ("vision-text-dual-encoder",)
    towers = ("vision", "text")
    axes = MappingProxyType({**AXES, "width": AXES["width"] + "; of a ResNet all channels, sets hidden_sizes and embedding_size"})
    abilities = frozenset({"image", "embeddings"})
    media = MappingProxyType({"image": ("pixel_values",)})
    output_names = MappingProxyType({"vision": "image_embeds", "text": "text_embeds"})

    def __init__(self, vision: str = "vit", text: str = "bert") -> None:
        self.kinds = {"vision": vision, "text": text}

    def of(self, config: PretrainedConfig) -> Self:
        vision, text = (getattr(config, f"{tower}_config") for tower in self.towers)
        check_kinds(vision, text)
        if getattr(vision, "hidden_size", None) is None:
            raise ModelError(
                f"vision_text_dual_encoder: vision_config has no hidden_size, which the stock class asks for; "
                f"of a {vision.model_type} set it to the last of hidden_sizes"
            )
        return cast(Self, _variant(vision.model_type, text.model_type))

    def model_class(self) -> type[PreTrainedModel]:
        return cast(type[PreTrainedModel], VisionTextDualEncoderModel)

    def description(self, tower: str) -> Encoder:
        return (VISION_ENCODERS if tower == "vision" else TEXT_ENCODERS)[self.kinds[tower]]

    def projection(self, module: PreTrainedModel, tower: str) -> nn.Module:
        return cast(nn.Module, module.visual_projection if tower == "vision" else module.text_projection)


@cache
def _variant(vision: str, text: str) -> VisionTextDualEncoder:
    return VisionTextDualEncoder(vision, text)


def check_kinds(vision: Any, text: Any) -> None:
    """Checks that both encoders, given by their configs, are of a known kind and pool their output.

    Raises:
        ModelError: one is not.
    """
    for config, known, what in ((vision, VISION_ENCODERS, "vision"), (text, TEXT_ENCODERS, "text")):
        if config.model_type not in known:
            raise ModelError(f"vision_text_dual_encoder: {what} encoder: " + one_of("model_type", config.model_type, list(known)))
    if not getattr(vision, "vision_use_head", True):
        raise ModelError("vision_text_dual_encoder: vision_use_head is false: the vision encoder has no pooled output")


FAMILY = VisionTextDualEncoder()
