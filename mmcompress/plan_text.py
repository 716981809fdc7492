"""The plan of a recipe as text."""

from __future__ import annotations

import shutil
from pathlib import Path

from tabulate import tabulate

from mmcompress.data.leaks import find_leaks, refuse
from mmcompress.data.sources import is_local, load_source
from mmcompress.plan import plan
from mmcompress.recipe import Recipe, Source
from mmcompress.robust import robustness_plan
from mmcompress.steps import load_outside

FEW = 50_000
"""Examples up to which a check looks for duplicates, so that it takes seconds."""


def render_plan(recipe: Recipe) -> str:
    """The data that was found, and a line for each step with what it costs, estimated from the config alone.

    Raises:
        UserError: a pass does not fit the model, or local data does not fit the task, or its splits share files byte for byte.
    """
    found = local_data(recipe)
    steps = plan(recipe, found.get("train"))
    lines = [
        [
            s.step,
            f"{s.parameters / 1e6:.2f} M",
            f"{s.disk_bytes / 1e6:.1f} MB",
            f"{s.flops / 1e9:.2f} G",
            f"{s.memory_bytes / 1e6:.0f} MB",
            _time(s.seconds),
            "; ".join(f"{t}: " + " ".join(f"{k} {v}" for k, v in sizes.items()) for t, sizes in s.sizes.items()),
        ]
        for s in steps
    ]
    headers = ["step", "parameters", "disk", "FLOPs", "weights' memory", "training", "sizes"]
    table = tabulate(lines, headers=headers, disable_numparse=True)
    needed = sum(s.disk_bytes for s in steps) + steps[-1].disk_bytes
    free = shutil.disk_usage(Path.cwd()).free
    notes = [f"{recipe.name}: {len(recipe.passes)} passes on {recipe.model}", "", table, ""]
    notes += [f"data.{which}: {count:,} examples" for which, count in found.items()]
    notes.append(f"disk for all steps: about {needed / 1e6:.0f} MB ({free / 1e9:.1f} GB free here)")
    notes.append("estimates: memory without activations; time from the speed of one matrix product, good to a factor of about 3")
    notes += [f"{s.step}: assumed: {s.assumed}" for s in steps if s.assumed]
    for gate in recipe.gates:
        limit = f"at most {gate.max_drop:g} points worse" if gate.max_drop is not None else f"at least {gate.min_value:g}"
        limit = limit if gate.max_value is None else f"at most {gate.max_value:g}"
        notes.append(f"gate: {gate.metric}, {limit} ({gate.on_miss})")
    return "\n".join([*notes, *robustness_plan(recipe)])


def local_data(recipe: Recipe) -> dict[str, int]:
    """Opens the splits that lie on this machine, checks that the task finds its columns, and counts their examples.

    Copies that are stored as other bytes are left to the run: finding them takes decoding.

    Raises:
        DataError: a split cannot be read, or a small one shares files with another and the recipe does not allow it.
    """
    found = {}
    for which in ("train", "calibration", "eval"):
        source: Source | None = getattr(recipe.data, which)
        paths = [source.path] if source is not None and isinstance(source.path, str) else source.path or [] if source else []
        if source is None or not paths or not all(is_local(p) for p in paths):
            continue
        examples = load_source(source, which, recipe.seed)
        examples.narrow(recipe.task.roles, recipe.task.type, recipe.task.optional)
        found[which] = examples
    counts = {which: len(examples) for which, examples in found.items()}
    if not recipe.data.allow_leaks and sum(counts.values()) <= FEW:
        refuse(find_leaks(found, decode=False), {which: examples.name for which, examples in found.items()})
    ood = recipe.data.ood
    if (
        ood is not None
        and ood.path is not None
        and all(is_local(p) for p in ([ood.path] if isinstance(ood.path, str) else ood.path))
    ):
        counts["ood"] = len(load_outside(recipe) or ())
    return counts


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
