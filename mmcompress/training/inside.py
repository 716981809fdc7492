"""What some losses see besides a model's outputs: attention maps, and the embeddings of pictures of which most is masked.

Shapes: B examples, S tokens of a sequence, A heads, P patches, H hidden width, C x Y x X a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mmcompress.families.base import Batch, Family, Outputs
from mmcompress.model import CompressedModel
from mmcompress.quantization.onnx_export import eager_attention
from mmcompress.training.losses.base import Shapes

MASK_RATIO = 0.75
"""Share of the patches that are masked: that of MAE (He et al. 2022, arXiv 2111.06377), which CLIP-KD takes."""
INSIDE = frozenset({"hidden", "attentions"})
SQUARE = 16
"""The side of a masked square where the family does not say where its patches are."""
CLASS_TOKENS = ("class_embedding", "cls_token", "distillation_token")


def look(family: Family, module: PreTrainedModel, batch: Batch, needs: frozenset[str]) -> Outputs:
    """One forward pass with what losses need besides: ``hidden`` states, ``attentions``, ``masked`` embeddings.

    Attention maps are there only inside of `eager_attention`: fused kernels never make them. Which patches are masked is drawn
    from torch's random numbers.
    """
    empty: AbstractContextManager[dict[str, list[torch.Tensor]]] = nullcontext({})
    with attention_maps(family, module) if "attentions" in needs else empty as maps:
        outputs = family.forward(module, batch, hidden="hidden" in needs)
    outputs.attentions = {tower: tuple(found) for tower, found in maps.items()}
    if "masked" in needs:
        outputs.masked = masked(family, module, batch)
    return outputs


@contextmanager
def attention_maps(family: Family, module: PreTrainedModel) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collects each layer's first attention map (B, A, S, S) in the block's one forward pass, tower by tower.

    A layer's first attention is the one over its own tower; that over another's states comes after it.
    """
    found: dict[str, dict[int, torch.Tensor]] = {tower: {} for tower in family.towers}
    maps: dict[str, list[torch.Tensor]] = {}
    handles = []
    for tower in family.towers:
        for number, layer in enumerate(family.layers(module, tower)):
            handles += [part.register_forward_hook(_keeper(found[tower], number)) for part in layer.modules()]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
        maps |= {tower: [own[i] for i in sorted(own)] for tower, own in found.items() if own}


def _keeper(found: dict[int, torch.Tensor], number: int) -> Any:
    def keep(part: nn.Module, given: Any, made: Any) -> None:
        weights = made[1] if isinstance(made, tuple) and len(made) > 1 else None
        if isinstance(weights, torch.Tensor) and weights.dim() == 4 and number not in found:
            found[number] = weights

    return keep


def masked(family: Family, module: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """The embeddings of the batch's pictures or recordings with `MASK_RATIO` of each masked.

    Vision transformers with a plain grid read the other patches alone, as MAE does; elsewhere masked squares are zero, which is
    about the mean colour of normalised pictures.
    """
    media = {name: batch[name] for names in family.media.values() for name in names if name in batch}
    place = patch_embeddings(family, module) if set(media) == {"pixel_values"} else None
    if place is not None:
        handle = place.register_forward_hook(_drop_patches)
        try:
            return family.forward(module, media).embeds
        finally:
            handle.remove()
    name = next(name for name in media if media[name].is_floating_point())
    return family.forward(module, {**media, name: _blank(media[name])}).embeds


def patch_embeddings(family: Family, module: PreTrainedModel) -> nn.Module | None:
    """What makes patches of pictures, (B, class tokens + P, H), where the vision tower is a vision transformer."""
    if "vision" not in family.towers:
        return None
    for tower in family.tower_modules(module)["vision"]:
        part = getattr(tower, "embeddings", None)
        if isinstance(part, nn.Module) and any(hasattr(part, name) for name in ("patch_embedding", "patch_embeddings")):
            return part
    return None


def _drop_patches(part: nn.Module, given: Any, made: torch.Tensor) -> torch.Tensor:
    first = sum(getattr(part, name, None) is not None for name in CLASS_TOKENS)
    patches = made[:, first:]
    keep = max(1, int(patches.shape[1] * (1 - MASK_RATIO)))
    chosen = torch.rand(patches.shape[:2], device=made.device).argsort(1)[:, :keep].sort(1).values
    left = patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[-1]))
    return torch.cat([made[:, :first], left], dim=1)


def _blank(values: torch.Tensor) -> torch.Tensor:
    """Zeroes `MASK_RATIO` of the rows of (B, P, H), or of the squares of (B, C, Y, X)."""
    if values.dim() == 3:
        return values * _grid(values.shape[0], values.shape[1], values.device)
    height, width = (-(-size // SQUARE) for size in values.shape[-2:])
    grid = _grid(values.shape[0], height * width, values.device).view(-1, 1, height, width)
    whole = grid.repeat_interleave(SQUARE, 2).repeat_interleave(SQUARE, 3)
    return values * whole[..., : values.shape[-2], : values.shape[-1]]


def _grid(examples: int, cells: int, device: torch.device) -> torch.Tensor:
    """(B, cells, 1): 1 for the cells that stay, at least one, and 0 for the others."""
    keep = max(1, int(cells * (1 - MASK_RATIO)))
    order = torch.rand((examples, cells), device=device).argsort(1).argsort(1)
    return (order < keep)[..., None].float()


def shapes_of(model: CompressedModel, name: str, embeds: dict[str, int], needs: frozenset[str]) -> Shapes:
    """What a model gives of what losses need, from one forward pass over random inputs where they look inside."""
    inside = needs & INSIDE
    if not inside:
        return Shapes(name, embeds)
    device = next(model.module.parameters()).device
    batch = {k: v.to(device) for k, v in model.family.example_batch(model.module.config, 1).items()}
    with torch.no_grad(), eager_attention(model.module):
        found = look(model.family, model.module, batch, inside)
    hidden = {tower: [(s.shape[1], s.shape[-1]) for s in states] for tower, states in found.hidden.items() if states}
    maps = {tower: [(m.shape[1], m.shape[-1]) for m in own] for tower, own in found.attentions.items()}
    return Shapes(f"{name} ({model.family.name})", embeds, hidden, maps, model.family.towers)
