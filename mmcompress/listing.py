"""What there is, by name: for ``mmcompress list``. Torch-free."""

from __future__ import annotations

import inspect as _inspect
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mmcompress import registry
from mmcompress.errors import RecipeError, one_of

KINDS = (*registry.ROOMS, "recipes")


def list_kind(kind: str) -> str:
    """A line for each name of a kind."""
    if kind not in KINDS:
        raise RecipeError(one_of("kind", kind, KINDS))
    found = recipes() if kind == "recipes" else {n: registry.describe(kind, n) for n in registry.names(kind)}
    if not found:
        return f"no {kind} here"
    width = max(map(len, found))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in found.items())


def explain_one(kind: str, name: str) -> str:
    """One pass's or task's fields with default, description, unit and range; one criterion's or loss's docstring."""
    if kind not in KINDS:
        raise RecipeError(one_of("kind", kind, KINDS))
    if kind == "recipes":
        return Path(name).read_text() if Path(name).is_file() else list_kind(kind)
    if name not in registry.names(kind):
        raise RecipeError(one_of(registry.SINGULAR[kind], name, registry.names(kind)))
    module = registry.find(kind, name)
    model = getattr(module, "PASS", None) or getattr(module, "TASK", None)
    if model is None:
        thing = next((getattr(module, word) for word in ("CRITERION", "LOSS", "FAMILY") if hasattr(module, word)), None)
        more = _inspect.getdoc(thing) if thing is not None else None
        return f"{name}: {_inspect.cleandoc(module.__doc__ or '')}" + (f"\n\n{more}" if more else "")
    lines = [f"{name}: {registry.describe(kind, name)}", ""]
    lines += [f"  {field_line(key, info)}" for key, info in fields_of(model)]
    if hasattr(module, "TASK"):
        lines += ["", "metrics:", *(f"  {k}: {v}" for k, v in model.metrics.items())]
        lines += ["data columns:", *(f"  {k}: {v}" for k, v in model.roles.items())]
    return "\n".join(lines)


def fields_of(model: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """A model's YAML keys in order."""
    return [(info.alias or key, info) for key, info in model.model_fields.items()]


def field_line(key: str, info: FieldInfo) -> str:
    """``key (type, default ...): description``, with the range where there is one."""
    default = "required" if info.is_required() else f"default {shown_default(info)}"
    limits = [shown for m in info.metadata for shown in _limits(m)]
    inside = ", ".join([type_name(info.annotation), default, *limits])
    return f"{key} ({inside}): {info.description or ''}"


def shown_default(info: FieldInfo) -> str:
    """A default as YAML would write it."""
    value: Any = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "its own defaults"
    return "none" if value is None else yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()


_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "none"}


def type_name(annotation: Any) -> str:
    """A type as a reader of YAML would call it."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(inside[0])
    if origin in (Union, UnionType):
        return " or ".join(type_name(a) for a in inside if a is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(map(str, inside)) if len(inside) > 1 else str(inside[0])
    if origin is list:
        return f"list of {type_name(inside[0])}"
    if origin is dict:
        return f"mapping of {type_name(inside[0])} to {type_name(inside[1])}"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _limits(metadata: Any) -> list[str]:
    words = {
        "ge": "at least",
        "gt": "above",
        "le": "at most",
        "lt": "below",
        "min_length": "at least this many:",
        "max_length": "at most this many:",
    }
    return [f"{word} {getattr(metadata, key)}" for key, word in words.items() if getattr(metadata, key, None) is not None]


def recipes() -> dict[str, str]:
    """The recipes in ``recipes/`` below the working directory, each with the first line of its header."""
    found = {}
    for path in sorted(Path("recipes").rglob("*.yaml")):
        first = path.read_text().splitlines()[0] if path.stat().st_size else ""
        found[str(path)] = first.removeprefix("#").strip() if first.startswith("#") else ""
    return found
