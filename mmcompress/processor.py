"""What turns a user's pictures, recordings and texts into tensors: stock tokenizers, image processors, feature extractors.

Shapes: B examples, C x H x W a picture, S tokens of a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.utils import cached_file

from mmcompress.config import DAMAGE, LARGEST, family_of, load_config, one_line, raise_unless_damage
from mmcompress.data.audio import Audio, resample
from mmcompress.errors import ModelError

if TYPE_CHECKING:
    from mmcompress.families.base import Family


Tensors = dict[str, torch.Tensor]

KEPT_FILES = ("processor_config.json", "chat_template.jinja", "chat_template.json", "normalizer.json", "added_tokens.json")
"""Files of a model's folder that say how inputs are made, beside the tokenizer's and the image processor's own."""
NO_SETTINGS = ("image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "_name_or_path")
"""What a stock processor says of itself that its tensors do not depend on."""


@dataclass
class Processor:
    """What turns a user's pictures, recordings and texts into tensors.

    Attributes:
        tokenizer: a stock tokenizer.
        image_processor: a stock image processor (the PIL one where torchvision is missing), or None.
        feature_extractor: a stock feature extractor for recordings, or None.
        max_length: how many tokens the model has positions for; None leaves it to the tokenizer.
        family: the family of the model it belongs to.
        config: the model's config.
        generation: the model's stock generation settings, or None.
        files: further files of the model's folder by name, as text.
    """

    tokenizer: Any
    image_processor: Any = None
    max_length: int | None = None
    feature_extractor: Any = None
    family: Family | None = None
    config: PretrainedConfig | None = None
    generation: GenerationConfig | None = None
    files: dict[str, str] = field(default_factory=dict)

    def media(self, kind: str, items: list[Any]) -> list[Tensors]:
        """Pictures (PIL, RGB) or recordings (`Audio`) to tensors, for each one a dict without batch axis.

        Raises:
            ValueError: the stock processor refuses one of them.
        """
        if self.family is not None:
            return self.family.prepare_media(self, kind, items)
        return self.stock_media(kind, items)

    def stock_media(self, kind: str, items: list[Any]) -> list[Tensors]:
        """The same by the stock image processor or feature extractor alone; recordings are resampled to its rate."""
        if kind == "audio":
            rate = int(self.feature_extractor.sampling_rate)
            samples = [resample(item, rate).samples for item in items]
            found = self.feature_extractor(samples, sampling_rate=rate, return_tensors="pt")
        else:
            found = self.image_processor(images=items, return_tensors="pt")
        names = self.family.media[kind] if self.family is not None else ("pixel_values",)
        return [{name: found[name][i] for name in names} for i in range(len(items))]

    def media_key(self, kind: str) -> str:
        """Equal for processors that make the same tensors of the same pictures or recordings: their settings, and the shapes that
        the model takes. Pruning a model changes neither.
        """
        tool = self.feature_extractor if kind == "audio" else self.image_processor
        settings = {k: v for k, v in tool.to_dict().items() if k not in NO_SETTINGS} if tool is not None else {}
        shapes: dict[str, list[int]] = {}
        if self.family is not None and self.config is not None:
            example = self.family.example_batch(self.config, 1)
            shapes = {name: list(example[name].shape) for name in self.family.media.get(kind, ()) if name in example}
        name = self.family.name if self.family is not None else ""
        return json.dumps([name, settings, shapes], sort_keys=True, default=str)

    def stack(self, inputs: Sequence[Tensors]) -> Tensors:
        """One dict of tensors with a batch axis; tensors of unequal shapes get zeros at the end of each axis."""
        found = {}
        for name in inputs[0]:
            values = [one[name] for one in inputs]
            if len({v.shape for v in values}) > 1:
                most = [max(sizes) for sizes in zip(*(v.shape for v in values), strict=True)]
                values = [_padded(v, most) for v in values]
            found[name] = torch.stack(values)
        return found

    def pixels(self, images: list[Any]) -> torch.Tensor:
        """RGB pictures (PIL) to ``pixel_values``, shape (B, C, H, W)."""
        return self.stack(self.media("image", images))["pixel_values"]

    def tokens(self, texts: list[str]) -> Tensors:
        """Texts to ``input_ids`` and ``attention_mask``, each (B, S), padded as the family wants and cut at the model's limit."""
        # Some tokenizers are saved without their limit, and say 10^30.
        limit = min(self.tokenizer.model_max_length, self.max_length or self.tokenizer.model_max_length)
        padding = self.family.padding if self.family is not None else "longest"
        found = self.tokenizer(
            texts, padding=padding, truncation=True, max_length=limit, return_attention_mask=True, return_tensors="pt"
        )
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's, image processor's and feature extractor's files, and what else says how inputs are made."""
        self.tokenizer.save_pretrained(folder)
        _readable_by_transformers_4(folder / "tokenizer_config.json")
        for part in (self.image_processor, self.feature_extractor):
            if part is not None:
                part.save_pretrained(folder)
        for name, text in self.files.items():
            if not (folder / name).exists():
                (folder / name).write_text(text, encoding="utf-8")
        _name_processor(folder)


def _readable_by_transformers_4(path: Path) -> None:
    """Writes two keys of a tokenizer's config in the old way, which transformers 5 reads just as well: 4, which Optimum's ONNX
    Runtime classes need, refuses the new one.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _name_processor(folder: Path) -> None:
    """Repeats in preprocessor_config.json which class puts texts and pictures together: transformers.js looks for it there."""
    both, own = folder / "processor_config.json", folder / "preprocessor_config.json"
    if both.exists() and own.exists():
        name = json.loads(both.read_text(encoding="utf-8")).get("processor_class")
        config = json.loads(own.read_text(encoding="utf-8"))
        if name is not None and "processor_class" not in config:
            config["processor_class"] = name
            own.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _padded(values: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    whole = values.new_zeros(tuple(sizes))
    whole[tuple(slice(0, n) for n in values.shape)] = values
    return whole


def load_processor(where: str | Path, trust_remote_code: bool = False) -> Processor:
    """What belongs to the model of a folder or hub id: a tokenizer, and what its family's media need.

    Raises:
        ModelError: one of them is missing or damaged.
    """
    config = load_config(where, trust_remote_code=trust_remote_code)
    family = family_of(config, str(where))
    names = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    if Path(where).is_dir() and not any((Path(where) / name).is_file() for name in names):
        # transformers would make up an empty tokenizer, and every text would read the same.
        raise ModelError(f"model {where}: its {_said(family)} cannot be read: none of {', '.join(names)} is there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        images = _stock(AutoImageProcessor, where, trust_remote_code) if "image" in family.media else None
        sounds = _stock(AutoFeatureExtractor, where, trust_remote_code) if "audio" in family.media else None
        generation = _generation(where)
        files = {name: text for name in KEPT_FILES if (text := _text_file(where, name)) is not None}
    except BaseException as e:
        raise_unless_damage(e)
        raise ModelError(f"model {where}: its {_said(family)} cannot be read: {one_line(e)}") from e
    most = family.text_limit(config)
    return Processor(tokenizer, images, most, sounds, family, config, generation, files)


def _said(family: Family) -> str:
    second = {"image": "image processor", "audio": "feature extractor"}
    return " or ".join(["tokenizer", *(second[kind] for kind in family.media)])


def _stock(loader: Any, where: str | Path, trust_remote_code: bool) -> Any:
    return loader.from_pretrained(where, trust_remote_code=trust_remote_code)


def _text_file(where: str | Path, name: str) -> str | None:
    found = cached_file(where, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    return None if found is None else Path(found).read_text(encoding="utf-8")


def _generation(where: str | Path) -> GenerationConfig | None:
    """The model's generation settings where it has some of its own."""
    if _text_file(where, "generation_config.json") is None:
        return None
    return GenerationConfig.from_pretrained(where)


def check_processor(processor: Processor, config: PretrainedConfig, source: str) -> None:
    """Tries the tokenizer and the media's processors, and compares what they give with what the model takes.

    Raises:
        ModelError: one of them fails, token ids lie outside the vocabulary, or media come out in another size.
    """
    text = config.get_text_config()
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
    most = (processor.family.text_limit(config) if processor.family is not None else None) or ids.shape[1]
    if not 0 < ids.shape[1] <= most:
        raise ModelError(
            f"model {source}: its tokenizer gives texts of {ids.shape[1]} tokens; the model takes 1 to "
            f"{most} (model_max_length in tokenizer_config.json, max_position_embeddings in config.json)"
        )
    for kind in processor.family.media if processor.family is not None else ():
        _check_media(processor, config, kind, source)


def _check_media(processor: Processor, config: PretrainedConfig, kind: str, source: str) -> None:
    """Tries one picture or recording; its tensors must have the shapes of the family's own example."""
    for key in ("size", "crop_size"):
        sizes = getattr(processor.image_processor, key, None) if kind == "image" else None
        for side in dict(sizes).values() if isinstance(sizes, Mapping) else []:
            if side is not None and (type(side) is not int or not 1 <= side <= LARGEST["image_size"]):
                raise ModelError(
                    f"model {source}: preprocessor_config.json: {key}: found {sizes}; allowed: 1 to {LARGEST['image_size']}"
                )
    tool, things = ("image processor", "pictures") if kind == "image" else ("feature extractor", "recordings")
    probe: Any = Image.new("RGB", (160, 120), (120, 130, 140))
    if kind == "audio":
        probe = Audio(np.sin(np.arange(16_000) / 20).astype(np.float32), 16_000)
    try:
        found = processor.media(kind, [probe])[0]
    except DAMAGE as e:
        raise ModelError(f"model {source}: its {tool} does not work: {one_line(e)}") from e
    family = processor.family
    if family is not None and not family.media_shapes_vary:
        example = family.example_batch(config, 1)
        for name, values in found.items():
            wanted = tuple(example[name].shape[1:])
            if tuple(values.shape) != wanted:
                axes = " (channels x height x width)" if name == "pixel_values" and len(wanted) == 3 else f" ({name})"
                raise ModelError(
                    f"model {source}: its {tool} gives {things} of {_times(values.shape)}{axes}; "
                    f"the config says {_times(wanted)}; preprocessor_config.json and config.json must agree"
                )
    bad = [name for name, values in found.items() if not torch.isfinite(values.float()).all()]
    if bad:
        values_ = "pixels" if kind == "image" else "features"
        raise ModelError(f"model {source}: its {tool} gives {values_} that are not finite; see image_mean and image_std")


def _times(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))
