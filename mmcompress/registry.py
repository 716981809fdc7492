"""Things that are found by name: passes, families, tasks, criteria, losses.

A name is the file's name with dashes for underscores, and the file is imported on first use. Another package adds its own by
an entry point in the group ``mmcompress.<kind>`` whose value is ``package.module``. Names and one-line descriptions are
read without importing anything, so that listing and validation need no torch.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from mmcompress.errors import UserError, one_of

ROOMS = {
    "passes": "mmcompress.passes",
    "families": "mmcompress.families",
    "tasks": "mmcompress.tasks",
    "criteria": "mmcompress.pruning.criteria",
    "losses": "mmcompress.training.losses",
}
SINGULAR = {"passes": "pass", "families": "family", "tasks": "task", "criteria": "criterion", "losses": "loss"}
_NOT_ENTRIES = ("__init__", "base")


def _added(kind: str) -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group=f"mmcompress.{kind}")}


@cache
def _files(kind: str) -> dict[str, Path]:
    folder = Path(__file__).parent.joinpath(*ROOMS[kind].split(".")[1:])
    found = (p for p in sorted(folder.glob("*.py")) if p.stem not in _NOT_ENTRIES and not p.stem.startswith("_"))
    return {p.stem.replace("_", "-"): p for p in found}


def names(kind: str) -> list[str]:
    """All names of a kind (``passes``, ``families``, ``tasks``, ``criteria``, ``losses``), sorted, without importing them."""
    return sorted({*_files(kind), *_added(kind)})


def describe(kind: str, name: str) -> str:
    """The first line of the docstring of the file behind a name, read without importing it."""
    path = _path(kind, name)
    text = ast.get_docstring(_parsed(path)) if path is not None else None
    return text.splitlines()[0] if text else ""


def stated(kind: str, name: str, attribute: str, default: Any) -> Any:
    """What a class in the file behind a name sets a class variable to, read without importing it.

    Args:
        attribute: the class variable; it must be set to a literal in the class's own body, as it is not looked for in bases.
        default: what is returned where no class of the file sets it.
    """
    path = _path(kind, name)
    for thing in _parsed(path).body if path is not None else []:
        for node in thing.body if isinstance(thing, ast.ClassDef) else []:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
            if value is not None and any(isinstance(t, ast.Name) and t.id == attribute for t in targets):
                return ast.literal_eval(value)
    return default


def _path(kind: str, name: str) -> Path | None:
    """The file behind a name, where it can be found without importing it."""
    path = _files(kind).get(name)
    if path is None and name in _added(kind):
        spec = importlib.util.find_spec(_added(kind)[name].module)
        path = Path(spec.origin) if spec is not None and spec.origin is not None else None
    return path


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def find(kind: str, name: str) -> ModuleType:
    """Imports and returns the module behind a name.

    Raises:
        UserError: there is no such name; the message lists what there is.
    """
    if name in _files(kind):
        return importlib.import_module(f"{ROOMS[kind]}.{_files(kind)[name].stem}")
    added = _added(kind)
    if name in added:
        return importlib.import_module(added[name].module)
    raise UserError(one_of(SINGULAR[kind], name, names(kind)))
