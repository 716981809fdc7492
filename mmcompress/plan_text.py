"""The plan of a recipe as text."""

from __future__ import annotations

import shutil
from pathlib import Path

from tabulate import tabulate

from mmcompress.plan import plan
from mmcompress.recipe import Recipe


def render_plan(recipe: Recipe) -> str:
    """A line for each step: parameters, disk, FLOPs, memory and time, all estimated from the config alone."""
    steps = plan(recipe, _train_examples(recipe))
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
    notes.append(f"disk for all steps: about {needed / 1e6:.0f} MB ({free / 1e9:.1f} GB free here)")
    notes.append("estimates: memory without activations; time from the speed of one matrix product, good to a factor of about 3")
    for gate in recipe.gates:
        limit = f"at most {gate.max_drop:g} points lost" if gate.max_drop is not None else f"at least {gate.min_value:g}"
        notes.append(f"gate: {gate.metric}, {limit} ({gate.on_miss})")
    return "\n".join(notes)


def _train_examples(recipe: Recipe) -> int | None:
    """How many training examples there are, where that is known without reading them."""
    source = recipe.data.train
    if source is None:
        return None
    if source.samples is not None:
        return source.samples
    if source.path == "bundled:shapes":
        from mmcompress.data.sources import BUNDLED_COUNT  # loads `datasets`

        return BUNDLED_COUNT[source.split or "train"]
    paths = [source.path] if isinstance(source.path, str) else source.path or []
    if paths and all(Path(p).suffix == ".parquet" and Path(p).is_file() for p in paths):
        import pyarrow.parquet as pq

        return sum(int(pq.ParquetFile(p).metadata.num_rows) for p in paths)
    return None


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
