"""What the suffix of a component's file says about its numbers. The suffixes are those of transformers.js."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

PRECISIONS: Mapping[str, str] = {
    "_quantized": "int8",
    "_int8": "int8 weights",
    "_q4": "int4 weights",
    "_fp16": "float16",
    "_bf16": "bfloat16 weights",
    "": "float32",
}
"""How the report calls what such a file holds; where a component has several files, the first in this order is run."""


def split(stem: str) -> tuple[str, str]:
    """A file's name without ending as component and suffix."""
    suffix = next((s for s in PRECISIONS if s and stem.endswith(s)), "")
    return stem.removesuffix(suffix), suffix


def precision_of(files: Iterable[Path]) -> str:
    """What a report calls files that are run together; float32 parts beside others are not mentioned."""
    found = {split(path.stem)[1] for path in files}
    return " + ".join(name for suffix, name in PRECISIONS.items() if suffix in found and (suffix or found == {""}))
