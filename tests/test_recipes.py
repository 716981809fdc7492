"""Every recipe that ships is loaded, and run from end to end with the model and the data swapped for tiny ones."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

import mmcompress as mm
from mmcompress.model import CompressedModel
from mmcompress.recipe import load_recipe
from tests import tiny_data

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def tiny_model(path: Path) -> CompressedModel:
    """A tiny model that can do a recipe's task, of the family that its folder is called after where there is one."""
    task = load_recipe(path).task
    files = sorted((ROOT / "tests" / "families").glob("tiny_*.py"), key=lambda file: file.stem != f"tiny_{path.parent.name}")
    for file in files:
        for make in importlib.import_module(f"tests.families.{file.stem}").MODELS.values():
            model: CompressedModel = make()
            if task.needs <= model.family.abilities:
                return model
    raise AssertionError(f"no tiny model for {task.type}")


def _param(path: Path) -> Any:
    """Quick starts and two that use what they do not are in the default suite, the others in the slow one: each takes seconds."""
    name = str(path.relative_to(ROOT / "recipes"))
    fast = "/" not in name or name in ("clip/narrow-qat.yaml", "whisper/spoken-digits.yaml")
    return pytest.param(path, id=name, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize("path", [_param(path) for path in RECIPES])
def test_every_recipe_runs(path: Path, tmp_path: Path, timed_here: None) -> None:
    model = tiny_model(path)
    model.module.save_pretrained(tmp_path / "model")
    model.processor.save(tmp_path / "model")
    tiny_data.parquet(tmp_path / "train.parquet", 48, 0)
    tiny_data.parquet(tmp_path / "test.parquet", 40, 1)
    header = path.read_text().splitlines()
    assert header[0].startswith("# ")
    assert header[1].startswith("# Run:    mmcompress run recipes/")
    columns = "{" + ", ".join(f"{role}: {column}" for role, column in tiny_data.COLUMNS.items()) + "}"
    sets = [
        f"model={tmp_path / 'model'}",
        f"data.train={{path: {tmp_path / 'train.parquet'}, columns: {columns}}}",
        f"data.eval={{path: {tmp_path / 'test.parquet'}, columns: {columns}}}",
        "report={batch_sizes: [1], threads: 1, seconds: 0.01, runtimes: [torch], side_by_side: false}",
    ]
    recipe = load_recipe(path, sets)
    for i, step in enumerate(recipe.passes):
        if hasattr(step, "epochs"):
            sets += [f"passes.{i}.max_steps=2", f"passes.{i}.batch_size=16"]
        if getattr(step, "pseudo_labels", None) is not None:
            sets.append(f"passes.{i}.pseudo_labels.max_wer=100000")  # a random teacher gets every word wrong
        if getattr(step, "recovery", None) is not None:
            sets += [f"passes.{i}.recovery.max_steps=4", f"passes.{i}.recovery.batch_size=16"]
        if step.name == "prune" and step.ratio == "auto":
            sets += [f"passes.{i}.target.ratios=[0.75]", f"passes.{i}.target.samples=16"]
        elif step.name == "prune":
            towers = [tower for tower in model.family.towers if step.axis in model.family.tower_axes(tower)]
            sets.append(f"passes.{i}.ratio={{{', '.join(f'{tower}: 0.5' for tower in towers)}}}")
    result = mm.run(load_recipe(path, sets), tmp_path / "run")
    assert result.report.totals.finished
    assert [h["pass"] for h in result.model.history] == [step.name for step in recipe.passes]
    assert result.report.rows[-1].parameters < result.report.rows[0].parameters
