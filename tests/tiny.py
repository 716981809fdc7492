"""Tiny models and data, made offline in a moment: stock architectures with random weights, and pictures of plain colours."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmcompress.families.clip import FAMILY
from mmcompress.model import CompressedModel
from mmcompress.processor import Processor

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (40, 40, 230),
    "yellow": (230, 220, 30),
    "purple": (150, 30, 200),
    "white": (245, 245, 245),
}
WORDS = ["<pad>", "<bos>", "<unk>", "a", "photo", "of", "square", "picture", ".", *COLOURS, "<eos>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; the end of text has the highest id, where CLIP pools."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", len(WORDS) - 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", model_max_length=16
    )


def processor() -> Processor:
    """Whole words, and pictures of 16 x 16."""
    size = {"height": 16, "width": 16}
    return Processor(
        tokenizer(), CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size), family=FAMILY, config=clip_config()
    )


def clip_config(**vision: Any) -> CLIPConfig:
    """Two layers and two heads of 16 in each tower; the vision tower has 3 layers."""
    end = len(WORDS) - 1
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(WORDS),
    }
    seen = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 16,
        "patch_size": 8,
    }
    return CLIPConfig(
        text_config={**text, "max_position_embeddings": 16, "eos_token_id": end, "bos_token_id": 1, "pad_token_id": 0},
        vision_config={**seen, **vision},
        projection_dim=24,
    )


def clip(seed: int = 0, **vision: Any) -> CompressedModel:
    """A tiny CLIP with random weights and a processor that fits it."""
    torch.manual_seed(seed)
    config = clip_config(**vision)
    return CompressedModel(CLIPModel(config).eval(), processor(), FAMILY, "tiny")


def clip_folder(folder: Path, seed: int = 0) -> Path:
    """The same as a stock folder, as a user would bring it."""
    model = clip(seed)
    model.module.save_pretrained(folder)
    model.processor.save(folder)
    return folder


def png(colour: tuple[int, int, int], seed: int) -> bytes:
    """A 20 x 20 picture of about one colour."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-25, 26, (20, 20, 3), generator=generator)
    pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Pillow.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def rows(count: int, seed: int = 0) -> dict[str, list[Any]]:
    """``count`` examples as columns: image bytes, label, caption."""
    names = list(COLOURS)
    labels = [(i * 5 + seed) % len(names) for i in range(count)]
    return {
        "image": [{"bytes": png(COLOURS[names[label]], seed * 10_000 + i), "path": None} for i, label in enumerate(labels)],
        "label": labels,
        "caption": [f"a {names[label]} square" for label in labels],
    }


def dataset(count: int, seed: int = 0) -> Dataset:
    """The same as a data set with declared features."""
    features = Features({"image": Image(), "label": ClassLabel(names=list(COLOURS)), "caption": Value("string")})
    return Dataset.from_dict(rows(count, seed), features=features)


def parquet(path: Path, count: int, seed: int = 0) -> Path:
    """The same as a Parquet file."""
    dataset(count, seed).to_parquet(str(path))
    return path


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe as plain data over a tiny model and Parquet files made in ``folder``; ``changes`` replace top-level keys."""
    if not (folder / "model").exists():
        clip_folder(folder / "model")
        parquet(folder / "train.parquet", 48, 0)
        parquet(folder / "test.parquet", 40, 1)
    base: dict[str, Any] = {
        "name": "tiny",
        "model": str(folder / "model"),
        "task": {"type": "zero-shot-image-classification"},
        "data": {"train": {"path": str(folder / "train.parquet")}, "eval": {"path": str(folder / "test.parquet")}},
        "passes": [{"pass": "prune", "axis": "ffn", "ratio": 0.5}],
        "report": {"batch_sizes": [1], "threads": 1, "seconds": 0.01, "runtimes": ["torch"], "side_by_side": False},
    }
    return {**base, **changes}
