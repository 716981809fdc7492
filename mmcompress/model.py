"""A model on its way through the passes: module, processor, family and history; loading and saving.

A saved folder is a stock Hugging Face folder (``config.json``, ``model.safetensors``, tokenizer and image processor files)
plus ``mmcompress.json``, the history as data. It loads with ``transformers`` alone unless the history says ``custom``.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PretrainedConfig, PreTrainedModel

from mmcompress import registry
from mmcompress.errors import ModelError, one_of
from mmcompress.files import writing_folder

if TYPE_CHECKING:
    from mmcompress.families.base import Family

HISTORY_FILE = "mmcompress.json"
WEIGHTS_FILE = "model.safetensors"
BUNDLED = Path(__file__).parent / "bundled"
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""The dtypes that weights may be stored in, as safetensors and as torch call them."""
DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers and the libraries under it raise over damaged files; the last two derive from Exception alone."""
LARGEST = {
    "num_hidden_layers": 4096,
    "num_attention_heads": 65_536,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "projection_dim": 2**20,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**24,
    "num_channels": 4096,
    "image_size": 2**15,
    "patch_size": 2**15,
}
"""Config keys that count something, and numbers far above every real model: a damaged one would build for hours."""

log = logging.getLogger(__name__)


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


@dataclass
class CompressedModel:
    """A stock module with what belongs to it.

    Attributes:
        module: the transformers module, in eval mode, float32.
        processor: its tokenizer and image processor.
        family: what knows its towers and axes.
        source: what the user called it (hub id, folder or ``bundled:<name>``).
        history: for each pass applied, ``{"pass": name, "settings": {...}, "result": {...}}``; plain JSON data.
        custom: True when no stock config can express the shapes, so that only mmcompress (or ONNX) loads it.
        stored_dtype: the dtype of the weights in the source's own file, such as ``float16``.
        onnx: folder with exported or quantized ONNX components that belong to these weights, if a pass made any.
    """

    module: PreTrainedModel
    processor: Processor
    family: Family
    source: str
    history: list[dict[str, Any]] = field(default_factory=list)
    custom: bool = False
    stored_dtype: str = "float32"
    onnx: Path | None = None

    def parameters(self) -> int:
        """How many numbers the module holds."""
        return sum(p.numel() for p in self.module.parameters())

    def clone(self) -> CompressedModel:
        """An independent copy: passes work on copies, so that the model they were given stays as it was."""
        return CompressedModel(
            copy.deepcopy(self.module),
            self.processor,
            self.family,
            self.source,
            copy.deepcopy(self.history),
            self.custom,
            self.stored_dtype,
            self.onnx,
        )

    def save(self, folder: str | Path) -> Path:
        """Writes the model's folder beside and renames it into place, after checking that it reloads bit-equal.

        Args:
            folder: where to; must not exist or be an earlier model folder, which is then replaced.

        Raises:
            ModelError: the folder would not give back the model in memory, or holds something else.
        """
        target = Path(folder)
        if target.exists() and any(target.iterdir()) and not (target / HISTORY_FILE).exists():
            raise ModelError(f"{target}: is not empty and no model folder of mmcompress; choose another folder")
        with writing_folder(target) as beside:
            self.write(beside)
        return target

    def write(self, folder: Path) -> None:
        """Writes the model's files into a folder of the caller's and checks that they reload bit-equal."""
        try:
            self.module.save_pretrained(folder, max_shard_size="100GB")
            self.processor.save(folder)
        except (ValueError, TypeError, StrictDataclassError) as e:
            raise ModelError(f"model {self.source}: its config or processor cannot be saved: {_one_line(e)}") from e
        if self.onnx is not None:
            shutil.copytree(self.onnx, folder / "onnx")
        shapes = {n: list(p.shape) for n, p in self.module.state_dict().items()} if self.custom else None
        facts = {"format_version": 1, "family": self.family.name, "source": self.source, "custom": self.custom}
        (folder / HISTORY_FILE).write_text(json.dumps({**facts, "history": self.history, "shapes": shapes}, indent=1) + "\n")
        check_reload(self, folder)


def check_reload(model: CompressedModel, folder: Path) -> None:
    """Loads a saved folder (with stock transformers unless the model is custom) and compares outputs bit by bit.

    Raises:
        ModelError: the folder does not load, or its outputs differ from the model's in memory.
    """
    again = load(folder).module if model.custom else _load_stock(folder, model.family.model_class(), str(folder))[0]
    batch = model.family.example_batch(model.module.config, 2)
    device = next(model.module.parameters()).device
    again = again.to(device)
    for name, part in model.family.components(model.module).items():
        twin = model.family.components(again)[name]
        inputs = [batch[i].to(device) for i in part.inputs]
        with torch.no_grad():
            ours, theirs = part.module(*inputs), twin.module(*inputs)
        for output, a, b in zip(part.outputs, ours, theirs, strict=True):
            if not torch.isfinite(a).all():
                raise ModelError(
                    f"model {model.source}: {name}.{output} is not finite: weights are NaN or far too large; not saved"
                )
            if not torch.equal(a, b):
                gap = (a - b).abs().max().item()
                raise ModelError(f"{folder}: reloads with other outputs: {name}.{output} differs by {gap:.3g}; not saved")


def load(source: str | Path, *, trust_remote_code: bool = False, device: str = "cpu") -> CompressedModel:
    """Loads a pretrained or compressed model.

    Args:
        source: a hub id, a local folder, or ``bundled:<name>``.
        trust_remote_code: passed to transformers; off unless the caller says so.
        device: where the weights go.

    Raises:
        ModelError: no such model, a damaged file, an unsupported family, or weights that do not fit the config.
    """
    where = str(resolve(source))
    history = read_history(where)
    config = load_config(source, trust_remote_code=trust_remote_code)
    family = family_of(config, where)
    check_config(config, family, str(source))
    custom = bool(history.get("custom"))
    if custom:
        module = _load_custom(Path(where), family, config, history["shapes"])
        dtype = "float32"
    else:
        module, dtype = _load_stock(where, family.model_class(), str(source), trust_remote_code)
    processor = load_processor(where, trust_remote_code)
    check_processor(processor, config, str(source))
    onnx = Path(where) / "onnx"
    return CompressedModel(
        module.to(device).eval(),
        processor,
        family,
        str(history.get("source") or source),
        list(history.get("history", [])),
        custom,
        dtype,
        onnx if onnx.is_dir() else None,
    )


def resolve(source: str | Path) -> str | Path:
    """A bundled name or an existing folder as a path, anything else as it is (a hub id).

    Raises:
        ModelError: an unknown bundled model, or a path that does not exist.
    """
    text = str(source)
    if text.startswith("bundled:"):
        folder = BUNDLED / text.removeprefix("bundled:")
        if not (folder / "config.json").exists():
            have = sorted(p.name for p in BUNDLED.iterdir() if (p / "config.json").exists())
            raise ModelError(one_of("bundled model", text.removeprefix("bundled:"), have))
        return folder
    path = Path(text)
    # Unlike Path's own, these take a name that is too long for a file as absent.
    if os.path.isdir(text):
        return path
    if os.path.lexists(text):
        raise ModelError(f"model {text}: is no folder; allowed: a hub id, a folder, or bundled:<name>")
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ModelError(f"model {text}: no such folder; allowed: a hub id (owner/name), a folder, or bundled:<name>")
    return text


def read_history(where: str | Path) -> dict[str, Any]:
    """The content of ``mmcompress.json`` in a folder, or an empty dict where there is none."""
    path = Path(where) / HISTORY_FILE
    if not os.path.lexists(path):
        return {}
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as e:
        raise ModelError(f"{path}: cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path}: is not JSON ({_first_line(e)})") from e
    history = facts.get("history", []) if isinstance(facts, dict) else None
    if not isinstance(history, list) or not all(_is_step(step) for step in history):
        raise ModelError(f"{path}: is not a history written by mmcompress")
    if not isinstance(facts.get("custom", False), bool) or not isinstance(facts.get("source", ""), str):
        raise ModelError(f"{path}: custom and source are not a truth value and a text")
    if facts.get("custom"):
        _check_shapes(facts.get("shapes"), path)
    return facts


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _is_step(step: Any) -> bool:
    kinds = {"pass": str, "settings": dict, "result": dict}
    return isinstance(step, dict) and all(isinstance(step.get(key), kind) for key, kind in kinds.items())


def _check_shapes(shapes: Any, path: Path) -> None:
    if not isinstance(shapes, dict):
        raise ModelError(f"{path}: says custom, but holds no shapes")
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= LARGEST["vocab_size"] for n in shape):
            raise ModelError(f"{path}: shapes.{name}: found {str(shape)[:60]}; allowed: a list of sizes")


def load_config(source: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's stock config, without its weights.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    where = resolve(source)
    if isinstance(where, Path) and not (where / "config.json").is_file():
        raise ModelError(f"model {source}: has no config.json; a Hugging Face model folder is needed")
    try:
        if isinstance(where, Path):
            labels = _num_labels((where / "config.json").read_text(encoding="utf-8"))
            if labels > LARGEST["vocab_size"]:  # transformers makes up a name for each, until the memory is full
                raise ModelError(
                    f"model {source}: config.json: num_labels: found {labels}; allowed: 0 to {LARGEST['vocab_size']}"
                )
        return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except DAMAGE as e:
        raise ModelError(f"model {source}: its config cannot be read: {_one_line(e)}") from e


def _num_labels(text: str) -> int:
    """The largest ``num_labels`` that a config or a part of it names."""
    raw = json.loads(text)
    parts = [raw, *raw.values()] if isinstance(raw, dict) else []
    found = [part.get("num_labels") for part in parts if isinstance(part, dict)]
    return max((n for n in found if isinstance(n, int)), default=0)


def check_config(config: PretrainedConfig, family: Family, source: str) -> None:
    """Checks the sizes that a config names, before anything is built from them.

    Raises:
        ModelError: a size is no number, or not one that a model can have; heads do not divide the width.
    """
    subs = {name: getattr(config, name) for name in config.sub_configs}
    for name, part in {"": config, **subs}.items():
        at = f"model {source}: config.json: {name + '.' if name else ''}"
        for key, most in LARGEST.items():
            found = getattr(part, key, 1)
            for size in found if isinstance(found, (list, tuple)) else [found]:
                if type(size) is not int or not 1 <= size <= most:
                    raise ModelError(f"{at}{key}: found {str(found)[:60]}; allowed: 1 to {most}")
        width, heads = getattr(part, "hidden_size", 1), getattr(part, "num_attention_heads", 1)
        if width % heads:
            raise ModelError(f"{at}num_attention_heads: {heads} heads do not divide hidden_size {width}")
        vocabulary, end = getattr(part, "vocab_size", None), getattr(part, "eos_token_id", None)
        ends = end if isinstance(end, list) else [] if end is None else [end]
        if vocabulary is not None and not all(type(i) is int and 0 <= i < vocabulary for i in ends):
            raise ModelError(f"{at}eos_token_id: found {str(end)[:60]}; allowed: 0 to {vocabulary - 1} (vocab_size {vocabulary})")
        picture, patch = getattr(part, "image_size", None), getattr(part, "patch_size", None)
        if isinstance(picture, int) and isinstance(patch, int) and patch > picture:
            raise ModelError(f"{at}patch_size: found {patch}; allowed: 1 to {picture} (image_size)")
    try:
        family.example_batch(config, 1)
    except DAMAGE as e:
        raise ModelError(f"model {source}: config.json: no input can be made from it: {_one_line(e)}") from e


def family_of(config: PretrainedConfig, where: str) -> Family:
    """The family that handles a config.

    Raises:
        ModelError: none does.
    """
    families: list[Family] = [registry.find("families", name).FAMILY for name in registry.names("families")]
    for family in families:
        if config.model_type in family.model_types:
            return family
    types = sorted(t for f in families for t in f.model_types)
    raise ModelError(f"model {where}: " + one_of("model_type", str(config.model_type), types))


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
    except Exception as e:
        _raise_unless_damage(e)
        raise ModelError(f"model {where}: its tokenizer or image processor cannot be read: {_one_line(e)}") from e
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
    except Exception as e:
        _raise_unless_damage(e)
        raise ModelError(f"model {source}: its tokenizer does not work: {_one_line(e)}") from e
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
        raise ModelError(f"model {source}: its image processor does not work: {_one_line(e)}") from e
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


def _raise_unless_damage(e: Exception) -> None:
    """The Rust side of tokenizers raises Exception itself, which no except clause can tell from others."""
    if type(e) is not Exception and not isinstance(e, DAMAGE):
        raise e


def _load_stock(
    where: str | Path, cls: type[PreTrainedModel], source: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, str]:
    """Loads with stock transformers, in float32, strictly; returns the module and the dtype that the file holds."""
    dtype = _check_weights(Path(where)) if Path(where).is_dir() else ""
    try:
        module, info = cls.from_pretrained(
            where,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except DAMAGE as e:
        raise ModelError(f"model {source}: cannot be loaded: {_one_line(e)}") from e
    bad = {k: sorted(map(str, info[k])) for k in ("missing_keys", "mismatched_keys") if info.get(k)}
    # Old checkpoints carry buffers that today's classes make themselves; any other weight without a place is a wrong config.
    extra = sorted(k for k in map(str, info.get("unexpected_keys") or ()) if not k.endswith("position_ids"))
    bad |= {"unexpected_keys": extra} if extra else {}
    if bad:
        said = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:3])} ({len(v)} in all)" for k, v in bad.items())
        raise ModelError(f"model {source}: the weights do not fit the config: {said}")
    return module.eval(), dtype or str(module.config.dtype).removeprefix("torch.")


def _check_weights(folder: Path) -> str:
    """Opens every safetensors file of a folder; returns the dtype that most of the weights are stored in."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = [p.name for p in folder.glob("*.bin")]
        why = f"only {others[0]}, a pickle, which is not read" if others else "no model.safetensors"
        raise ModelError(f"model {folder}: {why}; allowed: safetensors")
    sizes: dict[str, int] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as held:
                for key in held.keys():  # noqa: SIM118  (safe_open is no dict)
                    part = held.get_slice(key)
                    dtype = part.get_dtype()
                    if dtype not in FLOATS and key.endswith(("weight", "bias")):
                        raise ModelError(f"{path}: {key} is stored as {dtype}; allowed: {', '.join(FLOATS)}")
                    sizes[dtype] = sizes.get(dtype, 0) + math.prod(part.get_shape())
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{path}: damaged or cut short: {_first_line(e)}") from e
    if not sizes:
        raise ModelError(f"model {folder}: its safetensors file holds no weights")
    most = max(sizes, key=lambda k: sizes[k])
    return FLOATS.get(most, most)


def _load_custom(folder: Path, family: Family, config: PretrainedConfig, shapes: Mapping[str, list[int]]) -> PreTrainedModel:
    """Replays the shapes that a history records, then loads the weights strictly."""
    _check_weights(folder)
    module = family.model_class()(config).eval()
    reshape_like(module, shapes)
    try:
        module.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (RuntimeError, SafetensorError, OSError) as e:
        raise ModelError(f"model {folder}: the weights do not fit the recorded shapes: {_first_line(e)}") from e
    return module


def reshape_like(module: nn.Module, shapes: Mapping[str, list[int]]) -> None:
    """Gives every parameter the shape recorded for its name, and keeps the size attributes of Linear and LayerNorm right."""
    for name, part in module.named_modules():
        own = dict(part.named_parameters(recurse=False))
        for short, parameter in own.items():
            shape = shapes.get(f"{name}.{short}" if name else short)
            if shape is not None and list(parameter.shape) != list(shape):
                setattr(part, short, nn.Parameter(torch.zeros(shape)))
        weight = own and getattr(part, "weight", None)
        if isinstance(part, nn.Linear) and isinstance(weight, torch.Tensor):
            part.out_features, part.in_features = weight.shape
        elif isinstance(part, nn.LayerNorm) and isinstance(weight, torch.Tensor):
            part.normalized_shape = tuple(weight.shape)


def _one_line(e: BaseException) -> str:
    """The error's text on one line: strict dataclasses say on the second line what was wrong."""
    text = " ".join(str(e).split())
    if "ignore_mismatched_sizes" in text:
        text = "weights in its safetensors file have other shapes than config.json gives them"
    if isinstance(e, KeyError):
        text = f"{text} is missing or unknown"
    return text[:300] or type(e).__name__


def _first_line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(e).__name__
