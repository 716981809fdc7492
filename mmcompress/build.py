"""Building a dual encoder from a vision and a text encoder that were trained by themselves.

The encoders keep their weights; the projections are new, so that the result has to be fine-tuned before it is of use.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from mmcompress.config import DAMAGE, check_config, family_of, load_config, one_line, raise_unless_damage, resolve
from mmcompress.errors import ModelError
from mmcompress.families.vision_text_dual_encoder import check_kinds
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor, check_processor

log = logging.getLogger(__name__)


def build_dual_encoder(
    vision: str | Path, text: str | Path, folder: str | Path, *, projection_dim: int = 512, seed: int = 0
) -> CompressedModel:
    """Puts two single-modality encoders side by side, and saves them as a stock VisionTextDualEncoder folder.

    Args:
        vision: hub id or folder of a ViT, DeiT or ResNet, or of a vision tower by itself. Safetensors only.
        text: hub id or folder of a BERT, RoBERTa or the like.
        folder: where to write; must not exist or be an earlier model folder, which is then replaced.
        projection_dim: width of the embeddings that both are projected to.
        seed: of the projections' first weights.

    Returns:
        The model that was saved. It knows nothing yet of which text goes with which picture.

    Raises:
        ModelError: an encoder is of no known kind, lacks weights, or has no tokenizer or image processor.
    """
    if not 1 <= projection_dim <= 2**20:
        raise ModelError(f"projection_dim: found {projection_dim}; allowed: 1 to {2**20}")
    check_kinds(load_config(vision), load_config(text))
    seer, reader = _encoder(vision), _encoder(text)
    try:
        images: Any = AutoImageProcessor.from_pretrained(resolve(vision))
        pixels = images(images=Image.new("RGB", (160, 120)), return_tensors="pt")["pixel_values"]
    except BaseException as e:
        raise_unless_damage(e)
        raise ModelError(f"model {vision}: its image processor does not work: {one_line(e)}") from e
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(resolve(text))
    except BaseException as e:
        raise_unless_damage(e)
        raise ModelError(f"model {text}: its tokenizer does not work: {one_line(e)}") from e
    if getattr(seer.config, "hidden_size", None) is None:
        # The stock class asks every vision encoder for it, and a ResNet's config has no image_size either.
        seer.config.hidden_size = seer.config.hidden_sizes[-1]
        seer.config.image_size = int(pixels.shape[-1])
    config = VisionTextDualEncoderConfig.from_vision_text_configs(seer.config, reader.config, projection_dim=projection_dim)
    source = f"{vision} + {text}"
    family = family_of(config, source)
    check_config(config, family, source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = VisionTextDualEncoderModel(config, seer, reader).eval()
    processor = Processor(tokenizer, images, family.text_limit(config), None, family, config)
    check_processor(processor, config, source)
    model = CompressedModel(module, processor, family, source)
    model.save(folder)
    return model


def _encoder(source: str | Path) -> Any:
    """An encoder with its weights, in float32. Its pooling layer may be new: checkpoints for other heads have none."""
    try:
        module, info = AutoModel.from_pretrained(
            resolve(source), dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except DAMAGE as e:
        raise ModelError(f"model {source}: cannot be loaded: {one_line(e)}") from e
    missing = sorted(map(str, info["missing_keys"]))
    lacking = [key for key in missing if not key.startswith("pooler.")] + sorted(map(str, info["mismatched_keys"]))
    if lacking:
        raise ModelError(
            f"model {source}: the weights do not fit the config: missing keys: {', '.join(lacking[:3])} ({len(lacking)} in all)"
        )
    if missing:
        log.warning("model %s: has no pooling layer of its own; that of the dual encoder starts from random weights", source)
    return module
