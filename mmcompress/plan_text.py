"""The plan of a recipe as text."""

from __future__ import annotations

import shutil
from pathlib import Path

from tabulate import tabulate

from mmcompress.data.sources import is_local, load_source
from mmcompress.plan import plan
from mmcompress.recipe import Recipe, Source
from mmcompress.robust import robustness_plan
from mmcompress.steps import load_outside


def render_plan(recipe: Recipe) -> str:
    """The data that was found, and a line for each step with what it costs, estimated from the config alone.

    Raises:
        UserError: a pass does not fit the model, or local data does not fit the task.
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
    """Opens the splits that lie on this machine, checks that the task finds its columns, and counts their examples."""
    found = {}
    for which in ("train", "calibration", "eval"):
        source: Source | None = getattr(recipe.data, which)
        paths = [source.path] if source is not None and isinstance(source.path, str) else source.path or [] if source else []
        if source is None or not paths or not all(is_local(p) for p in paths):
            continue
        examples = load_source(source, which, recipe.seed)
        examples.need(recipe.task.roles, recipe.task.type)
        found[which] = len(examples)
    ood = recipe.data.ood
    if (
        ood is not None
        and ood.path is not None
        and all(is_local(p) for p in ([ood.path] if isinstance(ood.path, str) else ood.path))
    ):
        found["ood"] = len(load_outside(recipe) or ())
    return found


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
