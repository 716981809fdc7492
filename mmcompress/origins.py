"""Licence and origin of what a run is made from: as the recipe says, else as the cards beside model and data say.

Nothing is guessed. What nobody says is ``unknown``, and so is what could only be found with a network that is not there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.repocard import metadata_load

from mmcompress.config import resolve
from mmcompress.data.examples import Examples
from mmcompress.errors import ModelError
from mmcompress.recipe import Recipe, Source
from mmcompress.report.licences import hub_id_of
from mmcompress.report.schema_data import UNKNOWN, Origin

LONGEST = 100
"""Characters; a data set's own information may hold a licence's whole text, whose first line names it."""
MADE_HERE = "made by mmcompress"

log = logging.getLogger(__name__)


def origins(recipe: Recipe, data: Mapping[str, Examples]) -> list[Origin]:
    """The model, the models that passes add, and every split of the data.

    Args:
        data: the splits as they were loaded: their number of examples, and what the data sets say of themselves.
    """
    found = [_model("model", recipe.model, recipe.model_license, recipe.model_origin)]
    for step in recipe.passes:
        student, teacher = step.replacement(), getattr(step, "teacher", None)
        if student is not None:
            found.append(_model("student", student))
        if isinstance(teacher, str) and teacher not in ("baseline", recipe.model):
            found.append(_model("teacher", teacher))
    for which in ("train", "calibration", "eval", "ood"):
        source: Source | None = getattr(recipe.data, which, None)
        if source is not None:
            found.append(_data(recipe, which, source, data))
    return found


def _model(
    role: Literal["model", "student", "teacher"], name: str, licence: str | None = None, origin: str | None = None
) -> Origin:
    found = Origin(role=role, name=name)
    try:
        where = resolve(name)
    except ModelError:
        where = Path()  # loading it says what is wrong
    if isinstance(where, str):
        found.hub_id, found.source = where, f"https://huggingface.co/{where}"
    elif name.startswith("bundled:"):
        found.source = MADE_HERE
    _from_card(found, _card(where, "model"))
    _from_recipe(found, licence, origin)
    return found


def _data(recipe: Recipe, which: Any, source: Source, data: Mapping[str, Examples]) -> Origin:
    examples = data.get(which)
    root = source
    if source.from_ is not None:
        root = getattr(recipe.data, source.from_) or source
    paths = [root.path] if isinstance(root.path, str) else list(root.path or [])
    name = ", ".join(paths)
    found = Origin(role=which, name=name, examples=len(examples) if examples is not None else None)
    if name.startswith("bundled:"):
        found.license, found.license_from, found.source = "apache-2.0", "mmcompress", MADE_HERE
    elif paths and not Path(paths[0]).exists():
        found.hub_id, found.source = paths[0], f"https://huggingface.co/datasets/{paths[0]}"
        _from_card(found, _card(paths[0], "dataset"))
    elif paths:
        first = Path(paths[0])
        _from_card(found, _card(first if first.is_dir() else first.parent, "dataset"))
    if examples is not None and isinstance(examples.rows, datasets.Dataset):
        info = examples.rows.info
        if found.license == UNKNOWN and info.license:
            found.license, found.license_from = _short(info.license), "data set"
        if found.source == UNKNOWN and info.homepage:
            found.source = _short(info.homepage)
    _from_recipe(found, source.license or root.license, source.origin or root.origin)
    return found


def _from_recipe(found: Origin, licence: str | None, origin: str | None) -> None:
    """The recipe has the last word."""
    if licence is not None:
        found.license, found.license_from, found.license_link = licence, "recipe", None
    if origin is not None:
        found.source = origin
        found.hub_id = found.hub_id or hub_id_of(origin, "model" if found.role in ("model", "student", "teacher") else "dataset")


def _from_card(found: Origin, card: Mapping[str, Any]) -> None:
    licence = card.get("license")
    names = [str(one) for one in licence if one] if isinstance(licence, list) else [str(licence)] if licence else []
    if names == ["other"]:
        names = [str(card.get("license_name") or "other")]
    if names and names != [UNKNOWN]:
        found.license, found.license_from = _short(", ".join(names)), "card"
        link = card.get("license_link")
        found.license_link = _short(str(link)) if link else None
    base = card.get("base_model")
    if found.source == UNKNOWN and isinstance(base, str) and base:
        found.source = f"made from https://huggingface.co/{base}"


def _card(where: str | Path, kind: Literal["model", "dataset"]) -> Mapping[str, Any]:
    """The front matter of a README.md; of the hub's only where it is stored here or the network answers at once."""
    try:
        if isinstance(where, str):
            path = Path(hf_hub_download(where, "README.md", repo_type=kind, etag_timeout=5))
        else:
            path = where / "README.md"
        found = metadata_load(path) if path.is_file() else None
    except (OSError, ValueError, yaml.YAMLError) as e:
        log.info("no card of %s: %s", where, " ".join(str(e).split())[:200])
        return {}
    return found or {}


def _short(text: str) -> str:
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return lines[0][:LONGEST] if lines else UNKNOWN
