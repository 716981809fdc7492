"""Turns pydantic's errors about a recipe into lines that say file, line, key, what was found and what is allowed."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mmcompress import registry
from mmcompress.errors import did_you_mean, one_of

Path_ = tuple[str | int, ...]
MOST_LINES = 25
LONGEST = 400


@dataclass
class LineMap:
    """Where the keys of a recipe stand.

    Attributes:
        file: the recipe's file name, for messages.
        lines: line number by key path.
        overridden: the ``--set`` argument by key path, where a value came from the command line.
    """

    file: str
    lines: Mapping[Path_, int]
    overridden: dict[Path_, str] = field(default_factory=dict)

    def where(self, path: Path_) -> str:
        """``"recipe.yaml, line 7"``, for the nearest key above that has a line, or the ``--set`` that put the value there."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.overridden:
                return f"--set {self.overridden[path[:end]]}"
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.file}, line {self.lines[path[:end]]}"
        return self.file


def explain(error: ValidationError, model: type[BaseModel], lines: LineMap) -> str:
    """All mistakes, a line each, in the order of the file."""
    found = []
    located = [(*_locate(_without_forms(detail["loc"]), model), detail) for detail in error.errors(include_url=False)]
    telling = {path for path, _, detail in located if not _other_branch(detail)}
    for path, owner, detail in located:
        if path in telling and _other_branch(detail):
            continue  # another branch of a union (a number, or a mapping) says what is really wrong
        text = _sentence(detail, path, owner)
        if detail["type"] == "union_tag_invalid":
            path = (*path, "type" if path[:1] == ("task",) else "pass")
        if detail["type"] == "value_error" and not path:
            # Checks across keys name their own path at the start of the message.
            head, _, _ = str(detail["ctx"]["error"]).partition(":")
            keys = tuple(int(k) if k.isdigit() else k for k in head.split("."))
            found.append((lines.lines.get(keys, 0), f"{lines.where(keys)}: {cut_middle(str(detail['ctx']['error']))}"))
            continue
        shown = ".".join(map(_plain, path))
        found.append((lines.lines.get(path, 10**6), f"{lines.where(path)}: {shown + ': ' if shown else ''}{cut_middle(text)}"))
    unique = list(dict.fromkeys(text for _, text in sorted(found, key=lambda pair: pair[0])))
    if len(unique) > MOST_LINES:
        unique = [*unique[:MOST_LINES], f"{lines.file}: and {len(unique) - MOST_LINES} more mistakes"]
    return "\n".join(unique)


def _without_forms(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A path without the tags, such as ``:shape``, that tell which of several forms a value was taken for."""
    return tuple(key for key in loc if not (isinstance(key, str) and key.startswith(":")))


def _other_branch(detail: ErrorDetails) -> bool:
    """Whether a mistake is only that a value is of another branch of a union, such as a number where a word may stand too."""
    return detail["type"].endswith("_type") or (detail["type"] == "literal_error" and not isinstance(detail["input"], str))


def _locate(loc: tuple[int | str, ...], model: type[BaseModel]) -> tuple[Path_, type[BaseModel] | None]:
    """The key path without pydantic's union tags, and the class whose keys are allowed there."""
    path: list[str | int] = []
    owner: Any = model
    keys = list(loc)
    i = 0
    while i < len(keys):
        key = keys[i]
        path.append(key)
        owner = _field_type(owner, key) if isinstance(key, str) and _is_model(owner) else None
        if key in ("passes", "task"):
            if key == "passes" and i + 1 < len(keys):
                i += 1
                path.append(keys[i])
            if i + 1 < len(keys):
                i += 1
                owner = _tagged("passes" if key == "passes" else "tasks", str(keys[i]))
        elif i + 1 < len(keys) and _is_union_tag(keys[i + 1]):
            break
        elif i + 1 < len(keys) and isinstance(keys[i + 1], int) and owner is not None:
            i += 1
            path.append(keys[i])
        i += 1
    parent: Any = model
    walk = list(loc[:-1])
    if loc and loc[0] in ("passes", "task"):
        tag = loc[2] if loc[0] == "passes" and len(loc) > 2 else loc[1] if len(loc) > 1 else None
        kind = "passes" if loc[0] == "passes" else "tasks"
        parent = _tagged(kind, str(tag)) if tag is not None else None
        walk = list(loc[3:-1] if kind == "passes" else loc[2:-1])
    for key in walk:
        parent = _field_type(parent, key) if isinstance(key, str) and _is_model(parent) else parent
    return tuple(path), parent if _is_model(parent) else None


def _is_union_tag(key: str | int) -> bool:
    """Pydantic puts the branch of a plain union (``float``, ``dict[str,float]``) into the path; no recipe key looks so."""
    if not isinstance(key, str):
        return False
    return key in ("float", "int", "str", "bool") or "[" in key or key.startswith(("constrained-", "function-", "literal"))


def _is_model(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, BaseModel)


def _tagged(kind: str, tag: str) -> type[BaseModel] | None:
    if tag not in registry.names(kind):
        return None
    module = registry.find(kind, tag)
    found: type[BaseModel] = module.PASS if kind == "passes" else module.TASK
    return found


def _field_type(model: type[BaseModel], key: str) -> Any:
    for name, info in model.model_fields.items():
        if key in (name, info.alias):
            options = [info.annotation]
            while options:
                option = options.pop()
                if _is_model(option):
                    return option
                if get_origin(option) in (Union, types.UnionType, list):
                    options += get_args(option)
                elif get_origin(option) is Annotated:
                    options.append(get_args(option)[0])
    return None


def _sentence(detail: ErrorDetails, path: Path_, owner: type[BaseModel] | None) -> str:
    kind, given, ctx = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = [info.alias or name for name, info in owner.model_fields.items()] if owner else []
        return one_of("key", str(path[-1]), allowed)
    if kind == "missing":
        return "this key is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        what = "task type" if path[:1] == ("task",) else "pass"
        allowed = [t.strip().strip("'") for t in str(ctx.get("expected_tags", "")).split(",") if t.strip()]
        if kind == "union_tag_not_found":
            key = "type" if what == "task type" else "pass"
            names = registry.names("tasks" if key == "type" else "passes")
            found = f"; found {_short(given)}" if not isinstance(given, dict) else ""
            return f"needs the key {key!r} that names the {what}{found}; allowed: {', '.join(names)}"
        return one_of(what, str(ctx["tag"]), allowed)
    if kind == "literal_error":
        text = str(ctx["expected"]).replace("'", "")
        names = [n for part in text.split(" or ") for n in part.split(", ")]
        return f"found {_short(given)}; allowed: {', '.join(names)}{did_you_mean(str(given), names)}"
    if kind == "value_error":
        return f"{ctx['error']}"
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return f"found {_short(given)}; it should be a mapping of keys to values"
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    return f"found {_short(given)}; {message.replace('input should', 'it should')}"


def cut_middle(text: str) -> str:
    """Keeps the beginning, which says what was found, and the end, which says what is allowed, of a text that is very long."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def _plain(key: str | int) -> str:
    """A key as it stands, unless it would break the line or flood it."""
    text = str(key)
    return text if text.isprintable() and len(text) <= 60 else _short(text)


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
