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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from mmcompress.config import DAMAGE, LARGEST, check_config, family_of, first_line, load_config, one_line, resolve
from mmcompress.errors import ModelError
from mmcompress.files import writing_folder
from mmcompress.processor import Processor, check_processor, load_processor

if TYPE_CHECKING:
    from mmcompress.families.base import Family

HISTORY_FILE = "mmcompress.json"
WEIGHTS_FILE = "model.safetensors"
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""The dtypes that weights may be stored in, as safetensors and as torch call them."""
ALIGNMENT = 64
"""Where torch's own tensors begin on a CPU: at multiples of so many bytes."""

log = logging.getLogger(__name__)


@dataclass
class CompressedModel:
    """A stock module with what belongs to it.

    Attributes:
        module: the transformers module, in eval mode, float32.
        processor: its tokenizer and what prepares its pictures or recordings.
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
            raise ModelError(f"model {self.source}: its config or processor cannot be saved: {one_line(e)}") from e
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
    config = model.module.config
    device = next(model.module.parameters()).device
    again = again.to(device)
    align(model.module)
    for name, part in model.family.components(model.module).items():
        twin = model.family.components(again)[name]
        batch = model.family.example_inputs(config, part, 2)
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
        raise ModelError(f"{path}: is not JSON ({first_line(e)})") from e
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
        raise ModelError(f"model {source}: cannot be loaded: {one_line(e)}") from e
    bad = {k: sorted(map(str, info[k])) for k in ("missing_keys", "mismatched_keys") if info.get(k)}
    # Old checkpoints carry buffers that today's classes make themselves; any other weight without a place is a wrong config.
    extra = sorted(k for k in map(str, info.get("unexpected_keys") or ()) if not k.endswith("position_ids"))
    bad |= {"unexpected_keys": extra} if extra else {}
    if bad:
        said = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:3])} ({len(v)} in all)" for k, v in bad.items())
        raise ModelError(f"model {source}: the weights do not fit the config: {said}")
    align(module)
    return module.eval(), dtype or str(module.config.dtype).removeprefix("torch.")


def align(module: nn.Module) -> None:
    """Moves weights to where torch puts its own, at multiples of 64 bytes, in place.

    Those that are read out of a file lie where the file has them, and on some processors (x86 with AVX2 and no more) matrix
    products differ in the last place by that: the same weights would give other outputs after they were saved.
    """
    for values in (*module.parameters(), *module.buffers()):
        if values.device.type == "cpu" and values.data_ptr() % ALIGNMENT:
            values.data = values.data.clone()


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
            raise ModelError(f"{path}: damaged or cut short: {first_line(e)}") from e
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
        held = load_file(folder / WEIGHTS_FILE)
        by_id = {id(p): held[name] for name, p in module.named_parameters(remove_duplicate=False) if name in held}
        # Of weights that are tied the file holds one.
        tied = {n: by_id[id(p)] for n, p in module.named_parameters(remove_duplicate=False) if id(p) in by_id}
        module.load_state_dict({**tied, **held})
    except (RuntimeError, SafetensorError, OSError) as e:
        raise ModelError(f"model {folder}: the weights do not fit the recorded shapes: {first_line(e)}") from e
    return module


def reshape_like(module: nn.Module, shapes: Mapping[str, list[int]]) -> None:
    """Gives every parameter the shape recorded for its name, and keeps the sizes that modules remember right."""
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
        query, head_dim = getattr(part, "q_proj", None), getattr(part, "head_dim", None)
        if isinstance(query, nn.Linear) and isinstance(head_dim, int) and hasattr(part, "num_heads"):
            # Whisper's attention splits its outputs by it. What the history does not record is as it was.
            part.num_heads = shapes.get(f"{name}.q_proj.weight", list(query.weight.shape))[0] // head_dim
        if isinstance(getattr(part, "value", None), nn.Linear) and hasattr(part, "all_head_size"):
            # Attention as BERT writes it (ViLT, and others after it) shapes its outputs by what it remembers.
            part.all_head_size = shapes.get(f"{name}.value.weight", list(part.value.weight.shape))[0]
            part.num_attention_heads = part.all_head_size // part.attention_head_size
