"""A model on its way through the passes: module, processor, family and history; loading and saving.

A saved folder is a stock Hugging Face folder (``config.json``, ``model.safetensors``, tokenizer and image processor files)
plus ``mmcompress.json``, the history as data. It loads with ``transformers`` alone unless the history says ``custom``.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
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

log = logging.getLogger(__name__)


@dataclass
class Processor:
    """What turns a user's pictures and texts into tensors.

    Attributes:
        tokenizer: a stock tokenizer.
        image_processor: a stock image processor (the PIL one where torchvision is missing).
    """

    tokenizer: Any
    image_processor: Any

    def pixels(self, images: list[Any]) -> torch.Tensor:
        """RGB pictures (PIL) to ``pixel_values``, shape (B, C, H, W)."""
        values: torch.Tensor = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return values

    def tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Texts to ``input_ids`` and ``attention_mask``, each (B, S), padded to the longest and cut at the model's limit."""
        found = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
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
        self.module.save_pretrained(folder, max_shard_size="100GB")
        self.processor.save(folder)
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
    custom = bool(history.get("custom"))
    if custom:
        module = _load_custom(Path(where), family, config, history["shapes"])
        dtype = "float32"
    else:
        module, dtype = _load_stock(where, family.model_class(), str(source), trust_remote_code)
    onnx = Path(where) / "onnx"
    return CompressedModel(
        module.to(device).eval(),
        load_processor(where, trust_remote_code),
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
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"model {text}: is a file; allowed: a hub id, a folder, or bundled:<name>")
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ModelError(f"model {text}: no such folder; allowed: a hub id (owner/name), a folder, or bundled:<name>")
    return text


def read_history(where: str | Path) -> dict[str, Any]:
    """The content of ``mmcompress.json`` in a folder, or an empty dict where there is none."""
    path = Path(where) / HISTORY_FILE
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ModelError(f"{path}: is not JSON ({e})") from e
    if not isinstance(facts, dict) or not isinstance(facts.get("history", []), list):
        raise ModelError(f"{path}: is not a history written by mmcompress")
    if facts.get("custom") and not isinstance(facts.get("shapes"), dict):
        raise ModelError(f"{path}: says custom, but holds no shapes")
    return facts


def load_config(source: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's stock config, without its weights.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    where = resolve(source)
    if isinstance(where, Path) and not (where / "config.json").is_file():
        raise ModelError(f"model {source}: has no config.json; a Hugging Face model folder is needed")
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"model {source}: its config cannot be read: {_first_line(e)}") from e
    except Exception as e:  # huggingface_hub's StrictDataclass errors derive from Exception alone
        if type(e).__module__.startswith("huggingface_hub"):
            raise ModelError(f"model {source}: its config cannot be read: {_first_line(e)}") from e
        raise


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"model {where}: its tokenizer or image processor cannot be read: {_first_line(e)}") from e
    return Processor(tokenizer, images)


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
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as e:
        raise ModelError(f"model {source}: cannot be loaded: {_first_line(e)}") from e
    bad = {k: sorted(map(str, info[k])) for k in ("missing_keys", "mismatched_keys", "unexpected_keys") if info.get(k)}
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
                    sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + torch.Size(part.get_shape()).numel()
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{path}: damaged or cut short: {_first_line(e)}") from e
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    if not sizes:
        raise ModelError(f"model {folder}: its safetensors file holds no weights")
    most = max(sizes, key=lambda k: sizes[k])
    return names.get(most, most)


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


def _first_line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(e).__name__
