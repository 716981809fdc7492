"""Every recipe that ships is loaded, and run from end to end with the model and the data swapped for tiny ones."""

from __future__ import annotations

from pathlib import Path

import pytest

import mmcompress as mm
from mmcompress.recipe import load_recipe
from tests import tiny

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=[str(p.relative_to(ROOT / "recipes")) for p in RECIPES])
def test_every_recipe_runs(path: Path, tmp_path: Path, timed_here: None) -> None:
    tiny.clip_folder(tmp_path / "model")
    tiny.parquet(tmp_path / "train.parquet", 48, 0)
    tiny.parquet(tmp_path / "test.parquet", 40, 1)
    header = path.read_text().splitlines()
    assert header[0].startswith("# ")
    assert header[1].startswith("# Run:    mmcompress run recipes/")
    columns = "{image: image, label: label, text: caption}"
    sets = [
        f"model={tmp_path / 'model'}",
        f"data.train={{path: {tmp_path / 'train.parquet'}, columns: {columns}}}",
        f"data.eval={{path: {tmp_path / 'test.parquet'}, columns: {columns}}}",
        "report={batch_sizes: [1], threads: 1, seconds: 0.01, runtimes: [torch]}",
    ]
    recipe = load_recipe(path, sets)
    for i, step in enumerate(recipe.passes):
        if hasattr(step, "epochs"):
            sets += [f"passes.{i}.max_steps=2", f"passes.{i}.batch_size=16"]
        if step.name == "prune":
            sets.append(f"passes.{i}.ratio={{vision: 0.5, text: 0.5}}")
    result = mm.run(load_recipe(path, sets), tmp_path / "run")
    assert result.report.totals.finished
    assert [h["pass"] for h in result.model.history] == [step.name for step in recipe.passes]
    assert result.report.rows[-1].parameters < result.report.rows[0].parameters
