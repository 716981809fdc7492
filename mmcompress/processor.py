"""What turns a user's pictures and texts into tensors: a stock tokenizer and a stock image processor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, PretrainedConfig

from mmcompress.config import DAMAGE, LARGEST, load_config, one_line, raise_unless_damage
from mmcompress.errors import ModelError


@dataclass
class Processor:
    """What turns a user's pictures and texts into tensors.

    Attributes:
        tokenizer: a stock tokenizer.
        image_processor: a stock image processor (the PIL one where torchvision is missing).
        max_length: how many tokens the model has positions for; None leaves it to the tokenizer.
    """

    tokenizer: Any
    image_processor: Any
    max_length: int | None = None

    def pixels(self, images: list[Any]) -> torch.Tensor:
        """RGB pictures (PIL) to ``pixel_values``, shape (B, C, H, W)."""
        values: torch.Tensor = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return values

    def tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Texts to ``input_ids`` and ``attention_mask``, each (B, S), padded to the longest and cut at the model's limit."""
        # Some tokenizers are saved without their limit, and say 10^30.
        limit = min(self.tokenizer.model_max_length, self.max_length or self.tokenizer.model_max_length)
        found = self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's and the image processor's files."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def load_processor(where: str | Path, trust_remote_code: bool = False) -> Processor:
    """The tokenizer and image processor of a folder or hub id.

    Raises:
        ModelError: one of them is missing or damaged.
    """
    names = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    if Path(where).is_dir() and not any((Path(where) / name).is_file() for name in names):
        # transformers would make up an empty tokenizer, and every text would read the same.
        raise ModelError(f"model {where}: its tokenizer or image processor cannot be read: none of {', '.join(names)} is there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        images = AutoImageProcessor.from_pretrained(where, trust_remote_code=trust_remote_code)
    except BaseException as e:
        raise_unless_damage(e)
        raise ModelError(f"model {where}: its tokenizer or image processor cannot be read: {one_line(e)}") from e
    text = load_config(where, trust_remote_code=trust_remote_code).get_text_config()
    return Processor(tokenizer, images, getattr(text, "max_position_embeddings", None))


def check_processor(processor: Processor, config: PretrainedConfig, source: str) -> None:
    """Tries the tokenizer and the image processor, and compares what they give with what the model takes.

    Raises:
        ModelError: one of them fails, token ids lie outside the vocabulary, or pictures come out in another size.
    """
    text, vision = config.get_text_config(), getattr(config, "vision_config", config)
    try:
        largest = max(processor.tokenizer.get_vocab().values(), default=-1)
        ids = processor.tokens(["a photo", "a photo of a thing that is called so " * 50])["input_ids"]
    except BaseException as e:
        raise_unless_damage(e)
        raise ModelError(f"model {source}: its tokenizer does not work: {one_line(e)}") from e
    largest = max(largest, int(ids.max()) if ids.numel() else -1)
    if largest >= text.vocab_size:
        raise ModelError(
            f"model {source}: its tokenizer gives ids up to {largest}, but the config's vocab_size is {text.vocab_size}; "
            f"they belong to different models"
        )
    if not 0 < ids.shape[1] <= text.max_position_embeddings:
        raise ModelError(
            f"model {source}: its tokenizer gives texts of {ids.shape[1]} tokens; the model takes 1 to "
            f"{text.max_position_embeddings} (model_max_length in tokenizer_config.json, max_position_embeddings in config.json)"
        )
    for key in ("size", "crop_size"):
        sizes = getattr(processor.image_processor, key, None)
        for side in dict(sizes).values() if isinstance(sizes, Mapping) else []:
            if side is not None and (type(side) is not int or not 1 <= side <= LARGEST["image_size"]):
                raise ModelError(
                    f"model {source}: preprocessor_config.json: {key}: found {sizes}; allowed: 1 to {LARGEST['image_size']}"
                )
    try:
        pixels = processor.pixels([Image.new("RGB", (160, 120), (120, 130, 140))])
    except DAMAGE as e:
        raise ModelError(f"model {source}: its image processor does not work: {one_line(e)}") from e
    wanted = (1, vision.num_channels, vision.image_size, vision.image_size)
    if tuple(pixels.shape) != wanted:
        raise ModelError(
            f"model {source}: its image processor gives pictures of {_times(pixels.shape[1:])} (channels x height x width); "
            f"the config says {_times(wanted[1:])}; preprocessor_config.json and config.json must agree"
        )
    if not torch.isfinite(pixels).all():
        raise ModelError(f"model {source}: its image processor gives pixels that are not finite; see image_mean and image_std")


def _times(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))
