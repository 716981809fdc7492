"""Where a model's name leads, and its config: read, checked, and matched with a family, without its weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig

from mmcompress import registry
from mmcompress.errors import ModelError, one_of

if TYPE_CHECKING:
    from mmcompress.families.base import Family

BUNDLED = Path(__file__).parent / "bundled"
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
    "encoder_layers": 4096,
    "decoder_layers": 4096,
    "encoder_attention_heads": 65_536,
    "decoder_attention_heads": 65_536,
    "encoder_ffn_dim": 2**22,
    "decoder_ffn_dim": 2**22,
    "num_mel_bins": 4096,
    "max_source_positions": 2**20,
    "max_target_positions": 2**20,
}
"""Config keys that count something, and numbers far above every real model: a damaged one would build for hours."""


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
        raise ModelError(f"model {source}: its config cannot be read: {one_line(e)}") from e


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
        if isinstance(width, int) and isinstance(heads, int) and width % heads:
            raise ModelError(f"{at}num_attention_heads: {heads} heads do not divide hidden_size {width}")
        vocabulary, end = getattr(part, "vocab_size", None), getattr(part, "eos_token_id", None)
        ends = end if isinstance(end, list) else [] if end is None or not family.reads_end else [end]
        if vocabulary is not None and not all(type(i) is int and 0 <= i < vocabulary for i in ends):
            raise ModelError(f"{at}eos_token_id: found {str(end)[:60]}; allowed: 0 to {vocabulary - 1} (vocab_size {vocabulary})")
        picture, patch = getattr(part, "image_size", None), getattr(part, "patch_size", None)
        if isinstance(picture, int) and isinstance(patch, int) and patch > picture:
            raise ModelError(f"{at}patch_size: found {patch}; allowed: 1 to {picture} (image_size)")
    try:
        family.example_batch(config, 1)
    except DAMAGE as e:
        raise ModelError(f"model {source}: config.json: no input can be made from it: {one_line(e)}") from e


def family_of(config: PretrainedConfig, where: str) -> Family:
    """The family that handles a config.

    Raises:
        ModelError: none does.
    """
    types: list[str] = []
    for name in registry.names("families"):
        own = _model_types(name)
        if config.model_type in own:
            family: Family = registry.find("families", name).FAMILY
            return family.of(config)
        types += own
    made = ", ".join(getattr(config, "architectures", None) or []) or "no architectures named"
    raise ModelError(
        f"model {where}: "
        + one_of("model_type", str(config.model_type), sorted(types))
        + f'; its config.json says {made}. docs/how-to.md, "Add a model family", tells how to write one'
    )


def _model_types(family: str) -> tuple[str, ...]:
    """What a family handles. Where its file says so, it is not imported, nor is the model's code in transformers with it."""
    try:
        stated: tuple[str, ...] = registry.stated("families", family, "model_types", ())
    except ValueError:  # no literal
        stated = ()
    found: tuple[str, ...] = stated or registry.find("families", family).FAMILY.model_types
    return found


def raise_unless_damage(e: BaseException) -> None:
    """The Rust side of tokenizers raises Exception itself, and its panics derive from BaseException alone: no except clause can
    tell either from others.
    """
    if type(e) is not Exception and type(e).__name__ != "PanicException" and not isinstance(e, DAMAGE):
        raise e


def one_line(e: BaseException) -> str:
    """The error's text on one line: strict dataclasses say on the second line what was wrong."""
    text = " ".join(str(e).split())
    if "ignore_mismatched_sizes" in text:
        text = "weights in its safetensors file have other shapes than config.json gives them"
    if isinstance(e, KeyError):
        text = f"{text} is missing or unknown"
    return text[:300] or type(e).__name__


def first_line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(e).__name__
