"""What `ratio: auto` and rounds of pruning decided and did, as tables that Markdown and HTML share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmcompress.report.format import MISSING, bytes_scale, count_scale, flops_scale, ms_scale
from mmcompress.report.schema import Report, Row
from mmcompress.report.tables import Cell, Table

KEYS = ("auto", "rounds")
"""What a pass says it did that has a table here."""


def auto_table(report: Report) -> Table | None:
    """For each tower whose ratio was decided by measuring what it was, and what the nearest cut that was measured cost."""
    body, notes = [], []
    for row in _torch_rows(report, "auto"):
        auto = row.result["auto"]
        for name, points in auto["curves"].items():
            ratio = auto["ratios"].get(name.split("+")[0], 0.0)
            near = [p for p in points if p["share"] <= ratio + 1e-9]
            costs = _points(near[-1]) if near else MISSING
            at = f"at {near[-1]['share']:.2f}" if near else ""
            most = points[-1]
            body.append(
                (
                    Cell(row.step),
                    Cell(name),
                    Cell(f"{100 * ratio:.0f}%"),
                    Cell(costs, (at,) if at else ()),
                    Cell(_points(most), (f"at {most['share']:.2f}",)),
                )
            )
        notes.append(f"{row.step}: {auto_words(auto)}")
    if not body:
        return None
    columns = (
        ("", "Step"),
        ("", "Tower"),
        ("", "Cut"),
        ("Measured loss", "nearest gentler cut"),
        ("Measured loss", "deepest cut"),
    )
    return Table("decided", "How the ratios were decided", columns, tuple(body), heads=1, words=(0, 1), note=" ".join(notes))


def auto_words(auto: Mapping[str, Any]) -> str:
    """Target, prediction and what came of it, in a sentence or two."""
    target, measured = auto["target"], auto["measured"]
    kind = target["kind"]
    scale = {"parameters": count_scale, "flops": flops_scale, "disk_bytes": bytes_scale, "latency_ms": ms_scale}[kind]
    shown = scale([target["before"], target["limit"], target["reached"]])
    ends = f"{100 * measured['difference_low']:+.1f} to {100 * measured['difference_high']:+.1f}"
    return (
        f"the target was at most {shown(target['limit'])} ({kind}) of {shown(target['before'])}; {shown(target['predicted'])} "
        f"was predicted and {shown(target['reached'])} reached. {auto['metric']} was predicted to change by "
        f"{100 * auto['predicted_difference']:+.1f} points right after the cut, and changed by "
        f"{100 * measured['difference']:+.1f} (95% interval {ends}, {auto['examples']} training examples)."
    )


def rounds_table(report: Report) -> Table | None:
    """For each round of pruning with recovery its sizes and losses."""
    body = []
    for row in _torch_rows(report, "rounds"):
        for k, one in enumerate(row.result["rounds"], 1):
            parameters = count_scale(r["parameters"] for r in row.result["rounds"])
            towers = "; ".join(f"{t}: {_size(one, t, row.settings.get('axis', 'ffn'))}" for t in one["sizes"])
            losses = (Cell(f"{one['first_loss']:.3f}"), Cell(f"{one['final_loss']:.3f}"))
            body.append(
                (
                    Cell(row.step),
                    Cell(str(k)),
                    Cell(parameters(one["parameters"])),
                    Cell(towers),
                    *losses,
                    Cell(f"{one['steps']:,}"),
                )
            )
    if not body:
        return None
    columns = (("", "Step"), ("", "Round"), ("", "Parameters"), ("", "Kept"), ("Loss", "first"), ("Loss", "last"), ("", "Steps"))
    note = "Each round cuts, then trains; one learning rate schedule spans all of them."
    return Table("rounds", "Cut in rounds", columns, tuple(body), heads=1, words=(0, 3), note=note)


def _size(one: Mapping[str, Any], tower: str, axis: str) -> str:
    size = one["sizes"][tower].get(axis)
    return MISSING if size is None else f"{min(size)} to {max(size)}" if isinstance(size, list) else str(size)


def _points(point: Mapping[str, Any]) -> str:
    return f"{100 * point['difference']:+.1f} points"


def _torch_rows(report: Report, key: str) -> list[Row]:
    """The rows whose pass says something under a key, one for each step."""
    found: dict[str, Row] = {}
    for row in report.rows:
        if row.result.get(key) and row.settings.get("pass") == "prune":
            found.setdefault(row.step, row)
    return list(found.values())
