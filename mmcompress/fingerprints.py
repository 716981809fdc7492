"""What a run was made from, so that a resumed run never mixes results of different recipes, models or data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmcompress.config import resolve
from mmcompress.files import folder_bytes
from mmcompress.recipe import Recipe


def fingerprints(recipe: Recipe) -> dict[str, Any]:
    """Size and time of change of every local input, so that a resumed run never mixes results of different data."""
    found: dict[str, Any] = {}
    where = resolve(recipe.model)
    if isinstance(where, Path):
        # os.path.isfile, unlike stat, takes links that lead nowhere as no file; loading says what is wrong with them.
        weights = sorted(p for p in where.glob("*.safetensors") if os.path.isfile(p))
        found[f"model {recipe.model}"] = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in weights]
    for which in ("train", "calibration", "eval", "ood"):
        source = getattr(recipe.data, which)
        if source is None or source.path is None:
            continue
        for name in [source.path] if isinstance(source.path, str) else source.path:
            path = Path(name)
            if path.is_file():
                found[f"data.{which} {name}"] = [path.stat().st_size, path.stat().st_mtime_ns]
            elif path.is_dir():
                found[f"data.{which} {name}"] = [folder_bytes(path), max(p.lstat().st_mtime_ns for p in [path, *path.rglob("*")])]
    return found


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """The key paths at which two plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in {**old, **new}:
            found += differences(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{at}.{i}")]
    return [] if old == new else [at.removeprefix("recipe.")]
