"""SmolVLM and Idefics3: a SigLIP-like vision tower over sub-images, a pixel shuffle with one projection, a Llama decoder.

A large picture is split into sub-images of one size, with the whole picture, made small, as the last (Laurencon et al. 2024,
arXiv 2408.12637; Marafioti et al. 2025, arXiv 2504.05299).

Shapes: B examples, N sub-images of the example that has most, C x H x W a sub-image, R x L its patches in rows and columns,
F sub-images that are no padding, T image tokens of one, W width of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import (
    Idefics3ForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    SmolVLMForConditionalGeneration,
)
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from mmcompress.errors import ModelError
from mmcompress.families._vlm import VISION, VisionLanguage
from mmcompress.families._vlm_parts import additive
from mmcompress.families.base import Batch, Component
from mmcompress.processor import Processor

INPUTS = ("pixel_values", "pixel_attention_mask")


class VisionComponent(nn.Module):
    """Sub-images to vectors in the decoder's width: what transformers.js calls ``vision_encoder``.

    The same as stock ``get_image_features``, which finds positions with ``bucketize`` and drops sub-images that are padding
    before it encodes them. Here positions are counted, and padding is dropped at the end, so that the graph holds for all.
    """

    def __init__(self, vision_model: nn.Module, connector: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model
        self.connector = connector

    def forward(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """(B, N, C, H, W), (B, N, H, W) bool -> (F, T, W)."""
        vision = cast(Any, self.vision_model)
        embeddings = vision.embeddings
        pixels = pixel_values.flatten(0, 1)
        patches = _real_patches(pixel_attention_mask.flatten(0, 1), embeddings.patch_size)
        states = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        states = states + embeddings.position_embedding(_positions(patches, embeddings.num_patches_per_side))
        seen = patches.flatten(1)[:, None, None, :]
        states = vision.encoder(inputs_embeds=states, attention_mask=additive(seen, states.dtype)).last_hidden_state
        features = self.connector(vision.post_layernorm(states))
        if features.is_meta:  # shapes alone, for estimates: there is nothing to tell padding by
            return (features,)
        return (features[(pixels != 0).flatten(1).any(dim=1).nonzero()[:, 0]],)


def _real_patches(mask: torch.Tensor, size: int) -> torch.Tensor:
    """Which patches hold a real pixel: (F, H, W) bool -> (F, R, L) bool. A rest smaller than a patch is left out."""
    rows, columns = mask.shape[1] // size, mask.shape[2] // size
    cut = mask[:, : rows * size, : columns * size].reshape(-1, rows, size, columns, size)
    return cut.to(torch.float32).sum((2, 4)) > 0


def _positions(patches: torch.Tensor, side: int) -> torch.Tensor:
    """The number of each patch's learned position, for pictures of any shape on a grid of ``side`` x ``side``.

    Returns:
        (F, R * L), 0 for padding.
    """
    places = [_buckets(patches[:, :, 0], side), _buckets(patches[:, 0, :], side)]
    grid = places[0][:, :, None] * side + places[1][:, None, :]
    return torch.where(patches, grid, 0).flatten(1)


def _buckets(real: torch.Tensor, side: int) -> torch.Tensor:
    """Where each row (or column) of patches falls on the grid: how many of its inner borders are at or before it, (F, R)."""
    device = real.device
    borders = torch.arange(1 / side, 1.0, 1 / side, device=device)
    step = 1.0 / real.sum(dim=1).clamp(min=1)
    places = torch.arange(real.shape[1], dtype=torch.float32, device=device)[None, :] * step[:, None]
    return (places.clamp(max=1.0 - 1e-6)[:, :, None] >= borders).sum(dim=-1)


class SmolVlm(VisionLanguage):
    """SmolVLMForConditionalGeneration and Idefics3ForConditionalGeneration of stock transformers."""

    name = "smolvlm"
    model_types = ("smolvlm", "idefics3")
    media = MappingProxyType({"image": (*INPUTS, "image_grid")})
    media_shapes_vary = True
    plain_prompt = "<image>{}"
    vision_inputs = INPUTS

    def __init__(self, stock: type[PreTrainedModel] = SmolVLMForConditionalGeneration) -> None:
        self.stock = stock

    def of(self, config: PretrainedConfig) -> Self:
        super().of(config)
        size = cast(Any, config).vision_config.image_size
        if not isinstance(size, int):
            raise ModelError(f"vision_config.image_size: found {size}; allowed: one number, for square sub-images")
        return cast(Self, IDEFICS3 if config.model_type == "idefics3" else FAMILY)

    def model_class(self) -> type[PreTrainedModel]:
        return self.stock

    def parts(self, module: PreTrainedModel) -> tuple[Any, nn.Module, Any]:
        inner = cast(Any, module).model
        return inner.vision_model, inner.connector, inner.text_model

    def vision_component(self, module: PreTrainedModel) -> Component:
        vision, connector, _ = self.parts(module)
        images = {0: "batch_size", 1: "num_images"}
        axes: Mapping[str, Mapping[int, str]] = {**dict.fromkeys(INPUTS, images), "image_features": {0: "num_real_images"}}
        return Component(VISION, "vision", VisionComponent(vision, connector), INPUTS, ("image_features",), axes)

    def vision_example(self, config: PretrainedConfig, batch_size: int, generator: torch.Generator, images: int) -> Batch:
        vision = cast(Any, config).vision_config
        size = vision.image_size
        pixels = torch.randn((batch_size, images, vision.num_channels, size, size), generator=generator)
        mask = torch.ones((batch_size, images, size, size), dtype=torch.bool)
        if batch_size > 1 and images > 1:  # as where pictures are split into unequal numbers of sub-images
            pixels[-1, -1], mask[-1, -1] = 0, False
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": mask,
            "image_grid": torch.zeros((batch_size, 2), dtype=torch.int64),
        }

    def image_tokens(self, config: PretrainedConfig, media: Mapping[str, Any]) -> list[int]:
        real = (media["pixel_values"] != 0).reshape(*media["pixel_values"].shape[:2], -1).any(-1).sum(-1)
        return [int(count) * sequence_length(config) for count in real]

    def image_text(self, processor: Processor, media: Mapping[str, Any]) -> str:
        rows, columns = (int(n) for n in media["image_grid"])
        tokenizer, config = processor.tokenizer, cast(PretrainedConfig, processor.config)
        text: str = get_image_prompt_string(
            rows,
            columns,
            sequence_length(config),
            fake_token_around_image=getattr(tokenizer, "fake_image_token", "<fake_token_around_image>"),
            image_token=tokenizer.convert_ids_to_tokens(cast(Any, config).image_token_id),
            global_image_token=getattr(tokenizer, "global_image_token", "<global-img>"),
        )
        return text

    def prepare_media(self, processor: Processor, kind: str, items: list[Any]) -> list[dict[str, torch.Tensor]]:
        """Each picture by itself, as the number of its sub-images is its own.

        Returns:
            ``pixel_values`` (N, C, H, W), ``pixel_attention_mask`` (N, H, W) bool, ``image_grid`` (2,): rows and columns of the
            split, 0 where the picture is whole.

        Raises:
            ModelError: sub-images come out in another size than the config's.
        """
        size, found = cast(Any, processor.config).vision_config.image_size, []
        for item in items:
            one = processor.image_processor(images=[[item]], return_row_col_info=True, return_tensors="pt")
            pixels = one["pixel_values"][0]
            if tuple(pixels.shape[-2:]) != (size, size):
                raise ModelError(
                    f"sub-images come out at {' x '.join(map(str, pixels.shape[-2:]))}; config.json says {size} x {size} "
                    "(vision_config.image_size), and max_image_size in preprocessor_config.json must agree"
                )
            mask = one["pixel_attention_mask"][0].bool()
            grid = torch.tensor([one["rows"][0][0], one["cols"][0][0]])
            found.append({"pixel_values": pixels, "pixel_attention_mask": mask, "image_grid": grid})
        return found


def sequence_length(config: PretrainedConfig) -> int:
    """T: the image tokens of one sub-image, after the pixel shuffle."""
    vision = cast(Any, config).vision_config
    return int((vision.image_size // vision.patch_size) ** 2 / cast(Any, config).scale_factor ** 2)


FAMILY = SmolVlm()
IDEFICS3 = SmolVlm(Idefics3ForConditionalGeneration)
