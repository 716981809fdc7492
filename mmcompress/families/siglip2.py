"""SigLIP 2 with pictures of any shape, NaFlex (Tschannen et al. 2025); its checkpoints of a fixed resolution are ``siglip``.

A picture is a list of patches with their mask and its height and width in patches. The learned positions are a square grid,
which is resized to each picture's shape. Stock transformers does that picture by picture in Python, which no export can
follow; here it is a product with weights computed from the shape, exact but for rounding.

Shapes: B pictures, N patches with padding, P the side of the grid of positions, H hidden width.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Siglip2Model

from mmcompress.families._encoders import Encoder
from mmcompress.families._siglip_parts import SiglipVision
from mmcompress.families.base import Component
from mmcompress.families.siglip import TEXT, Siglip

INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


class FlexEmbeddings(nn.Module):
    """Patch embeddings with resized positions, in place of the stock module; the same state dict, in shared memory."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.side = embeddings.position_embedding_size
        self.patch_embedding = embeddings.patch_embedding
        # A Linear over the P * P places of the grid, so that the positions can be cut as the layers are.
        table = embeddings.position_embedding.weight.detach()
        self.positions = nn.Linear(table.shape[0], table.shape[1], bias=False, device="meta")
        self.positions.weight = nn.Parameter(table.T)
        self.register_state_dict_post_hook(_stock_names)

    def forward(self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor) -> torch.Tensor:
        """(B, N, patch), (B, 2) -> (B, N, H)."""
        height, width = spatial_shapes[:, :1], spatial_shapes[:, 1:]
        place = torch.arange(pixel_values.shape[1], device=pixel_values.device).unsqueeze(0)
        # Padding gets the first patch's position, as in the stock module.
        place = torch.where(place < height * width, place, torch.zeros_like(place))
        rows = resize_weights(torch.div(place, width, rounding_mode="floor"), height, self.side)
        columns = resize_weights(torch.remainder(place, width), width, self.side)
        grid = (rows.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(-2)
        found: torch.Tensor = self.patch_embedding(pixel_values) + self.positions(grid)
        return found


def resize_weights(index: torch.Tensor, target: torch.Tensor, source: int) -> torch.Tensor:
    """How much each of ``source`` points gives to point ``index`` of ``target``: torch's antialiased bilinear interpolation.

    The weight falls off linearly from the point's centre, over one point of the coarser of both grids.

    Args:
        index: (B, N), 0 to target - 1.
        target: (B, 1).

    Returns:
        (B, N, source), rows that sum to 1.
    """
    scale = source / target.to(torch.float32)
    centre = (scale * (index + 0.5)).unsqueeze(-1)
    points = torch.arange(source, device=index.device, dtype=torch.float32) + 0.5
    weights = (1 - (points - centre).abs() / scale.clamp(min=1).unsqueeze(-1)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


def _stock_names(embeddings: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[f"{prefix}position_embedding.weight"] = state.pop(f"{prefix}positions.weight").T.contiguous()


class Siglip2Vision(SiglipVision):
    """SigLIP 2's vision tower."""

    inputs = INPUTS

    def make_ready(self, encoder: nn.Module) -> None:
        super().make_ready(encoder)
        vision = cast(Any, encoder)
        if not isinstance(vision.embeddings, FlexEmbeddings):
            vision.embeddings = FlexEmbeddings(vision.embeddings)

    def example(self, config: PretrainedConfig, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Pictures of the full number of patches, every other one of half as many, padded."""
        sizes = cast(Any, config)
        side = int(sizes.num_patches**0.5)
        shape = (batch_size, sizes.num_patches, sizes.num_channels * sizes.patch_size**2)
        shapes = torch.tensor([(side, side) if i % 2 == 0 else (max(1, side // 2), side) for i in range(batch_size)])
        real = torch.arange(sizes.num_patches).unsqueeze(0) < shapes.prod(1, keepdim=True)
        pixels = torch.randn(shape, generator=generator) * real.unsqueeze(-1)
        return {"pixel_values": pixels, "pixel_attention_mask": real.to(torch.int32), "spatial_shapes": shapes}


VISION = Siglip2Vision()


class Siglip2(Siglip):
    """Siglip2Model of stock transformers."""

    name = "siglip2"
    model_types = ("siglip2",)
    media = MappingProxyType({"image": INPUTS})
    media_shapes_vary = True

    def model_class(self) -> type[PreTrainedModel]:
        return cast(type[PreTrainedModel], Siglip2Model)

    def description(self, tower: str) -> Encoder:
        return VISION if tower == "vision" else TEXT

    def components(self, module: PreTrainedModel) -> dict[str, Component]:
        found = super().components(module)
        for name in INPUTS[:2]:
            cast(Any, found["vision_model"].dynamic_axes)[name][1] = "patches"
        return found


FAMILY = Siglip2()
