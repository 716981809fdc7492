"""Writes docs/reference.md from the code: ``python docs/reference.py`` (``--check`` only says whether it is up to date)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from mmcompress import registry
from mmcompress.listing import fields_of, shown_default, type_name
from mmcompress.recipe import Data, Gate, ReportSettings, Source, recipe_model
from mmcompress.report import schema

TARGET = Path(__file__).with_name("reference.md")
HEAD = """# Reference

Made by `python docs/reference.py` from the same descriptions that `mmcompress list` and `mmcompress schema` show. Every key
that is not named here is an error.
"""
SHOWN_TYPES = {"task": "one of the tasks below", "passes": "list of the passes below"}
REPORT_MODELS = ("Report", "Row", "Latency", "Quality", "Change", "ClassScore", "ComponentRow", "Parity", "GateResult")


def simple_type(annotation: Any) -> str:
    """A type as a reader of YAML would call it; unions and annotated types by their parts."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if (origin is not None and str(origin) == "typing.Annotated") or hasattr(annotation, "__metadata__"):
        return simple_type(parts[0])
    if origin is None or str(origin) == "typing.Literal":
        return "anything" if annotation is Any else type_name(annotation)
    shown = [simple_type(p) for p in parts if p is not type(None)]
    if origin is list:
        return f"list of {shown[0]}"
    if origin is dict:
        return f"mapping of {shown[0]} to {shown[1]}"
    return " or ".join(dict.fromkeys(shown))


def limits(metadata: list[Any]) -> str:
    """The range of a field in symbols."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "items ≥"}
    found = [f"{sign} {getattr(m, k)}" for m in metadata for k, sign in signs.items() if getattr(m, k, None) is not None]
    return ", ".join(found)


def table(model: type[BaseModel], skip: tuple[str, ...] = ()) -> list[str]:
    """A Markdown table of a model's keys."""
    lines = ["| key | type | default | what |", "|---|---|---|---|"]
    for key, info in fields_of(model):
        if key not in skip:
            kind = ", ".join(filter(None, [SHOWN_TYPES.get(key) or simple_type(info.annotation), limits(info.metadata)]))
            default = "required" if info.is_required() else f"`{shown_default(info)}`"
            lines.append(f"| `{key}` | {cell(kind)} | {cell(default)} | {cell(info.description or '')} |")
    return [*lines, ""]


def cell(text: str) -> str:
    """Text that may stand in a table."""
    parts = " ".join(text.replace("|", "\\|").split()).replace("``", "`").split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


def named(kind: str, title: str) -> list[str]:
    """Names with a line each."""
    lines = [f"## {title}", "", "| name | what |", "|---|---|"]
    return [*lines, *(f"| `{n}` | {cell(registry.describe(kind, n))} |" for n in registry.names(kind)), ""]


def recipe_part() -> list[str]:
    """The recipe and what it holds."""
    lines = ["## Recipe", "", *table(recipe_model())]
    for title, model in (("data", Data), ("data.train, data.calibration, data.eval", Source), ("gates", Gate)):
        lines += [f"### {title}", "", *table(model)]
    return [*lines, "### report", "", *table(ReportSettings)]


def passes_part() -> list[str]:
    """Each pass and its keys."""
    lines = ["## Passes", ""]
    for name in registry.names("passes"):
        lines += [f"### {name}", "", registry.describe("passes", name), "", *table(registry.find("passes", name).PASS, ("pass",))]
    return lines


def tasks_part() -> list[str]:
    """Each task with keys, metrics and columns."""
    lines = ["## Tasks", ""]
    for name in registry.names("tasks"):
        task = registry.find("tasks", name).TASK
        lines += [f"### {name}", "", registry.describe("tasks", name), "", *table(task, ("type",))]
        lines += ["| metric | what |", "|---|---|", *(f"| `{k}` | {cell(v)} |" for k, v in task.metrics.items()), ""]
        lines += ["| data column | what |", "|---|---|", *(f"| `{k}` | {cell(v)} |" for k, v in task.roles.items()), ""]
    return lines


def report_part() -> list[str]:
    """The keys of report.json."""
    lines = ["## report.json", "", " ".join((schema.__doc__ or "").split()).replace("``", "`"), ""]
    for name in (*REPORT_MODELS, "Warning_", "Totals", "Gain"):
        model = getattr(schema, name)
        lines += [f"### {name.strip('_')}", "", " ".join((model.__doc__ or "").split()).replace("``", "`"), "", *table(model)]
    return lines


def reference() -> str:
    """The whole document."""
    names = [*named("families", "Families"), *named("criteria", "Pruning criteria"), *named("losses", "Distillation losses")]
    return "\n".join([HEAD, *recipe_part(), *passes_part(), *tasks_part(), *names, *report_part()]).rstrip() + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        TARGET.write_text(reference(), encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != reference():
        sys.exit("docs/reference.md is out of date: python docs/reference.py")
