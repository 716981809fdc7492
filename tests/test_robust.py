"""Robustness of whole runs: measured at the end, resumed after a kill, planned by check, and refused where it cannot be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmcompress as mm
from mmcompress.errors import DataError, RecipeError
from mmcompress.evaluate import evaluate_model, render_evaluation
from mmcompress.measure import side_by_side, turns
from mmcompress.recipe import load_recipe, make_recipe
from mmcompress.report.read import open_run
from mmcompress.robust import robustness_plan
from tests import tiny
from tests.conftest import TimedHere

SETTINGS = {"samples": 24, "corruptions": ["darkness", "jpeg"], "severities": [1, 5], "adversarial": {"samples": 8, "eps": [4]}}


def recipe(folder: Path, passes: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    report = {"batch_sizes": [1], "threads": 1, "seconds": 0.01, "runtimes": ["torch"], "robustness": SETTINGS}
    found = tiny.recipe(folder, passes=passes or [{"pass": "prune", "axis": "ffn", "ratio": 0.5}], report=report)
    found["data"]["ood"] = {"path": "bundled:shapes", "samples": 20}
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robust")
    patch = pytest.MonkeyPatch()
    patch.setattr(turns, "start", TimedHere)
    patch.setattr(side_by_side, "FEWEST_ROUNDS", 2)
    mm.run(recipe(folder), folder / "run")
    patch.undo()
    return folder / "run"


def test_a_run_sets_the_shipped_model_beside_the_baseline(finished: Path) -> None:
    found = open_run(finished).robustness
    assert found is not None
    assert (found.baseline, found.final, found.n, found.attack_n) == ("baseline.torch", "1-prune.torch", 24, 8)
    assert [c.name for c in found.conditions] == ["darkness", "jpeg", "typos", "upper-case", "lower-case", "shuffled-media"]
    assert [d.severity for d in found.conditions[0].degrees] == [1, 5]
    assert found.shift is not None
    assert found.notes == []
    cells = {p.parent.name for p in (finished / "measurements" / "robustness" / "baseline.torch").rglob("*.safetensors")}
    assert {"clean-0", "darkness-1", "typos-5", "shuffled-media-0", "attack-pgd-4", "shift-own", "shift-other"} <= cells
    for view in ("report.html", "report.md"):
        assert "Robustness and shift" in (finished / view).read_text()
    assert json.loads((finished / "report.json").read_text())["robustness"]["metric"] == "accuracy"


def test_the_clean_condition_is_the_task_s_own_evaluation(finished: Path) -> None:
    report = open_run(finished)
    assert report.robustness is not None
    for row, clean in (
        (report.rows[0], report.robustness.clean["baseline"]),
        (report.rows[-1], report.robustness.clean["final"]),
    ):
        # 24 of the 40 examples, so only near.
        assert clean.value == pytest.approx(row.quality["accuracy"].value, abs=0.25)


def test_running_again_measures_nothing_twice(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "measurements").rglob("*") if p.is_file()}
    report = open_run(finished)
    mm.run(yaml.safe_load((finished / "recipe.yaml").read_text()), finished)
    assert before == {p: p.stat().st_mtime_ns for p in (finished / "measurements").rglob("*") if p.is_file()}
    assert open_run(finished).robustness == report.robustness


def test_eval_measures_one_model_by_itself(finished: Path) -> None:
    plan = make_recipe(yaml.safe_load((finished / "recipe.yaml").read_text()))
    found = evaluate_model(plan, str(finished / "model"), robustness=True)
    lines = {(line["condition"], line["severity"]): line for line in found["robustness"]}
    assert len(lines) == 1 + 4 + 5 - 3 + 2 + 1
    report = open_run(finished).robustness
    assert report is not None
    dark = report.conditions[0].degrees[1]
    assert lines["darkness", 5]["accuracy"] == dark.final.model_dump()
    assert lines["darkness", 5]["drop"]["value"] == dark.final_drop.value
    assert lines["clean", 0]["accuracy"]["value"] == report.clean["final"].value
    assert lines["clean", 0]["drop"] is None
    assert "24 examples under each condition" in render_evaluation(found)
    assert "robustness" not in evaluate_model(plan, str(finished / "model"))


@pytest.mark.slow
def test_onnx_components_are_what_is_measured_where_they_are_shipped(tmp_path: Path, timed_here: None) -> None:
    passes = [{"pass": "prune", "axis": "ffn", "ratio": 0.5}, {"pass": "quantize", "scheme": "int8-dynamic"}]
    report = mm.run(recipe(tmp_path, passes), tmp_path / "run").report
    assert report.robustness is not None
    assert report.robustness.final == "2-quantize.onnxruntime"
    measured = {p.name for p in (tmp_path / "run" / "measurements" / "robustness").iterdir()}
    assert measured == {"baseline.torch", "2-quantize.onnxruntime"}
    # Attacks are on the torch model that the components were made from.
    assert report.robustness.attack_n == 8


@pytest.mark.slow
def test_kill_9_in_the_middle_then_the_same_command_ends_with_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    place = tmp_path / "run" / "measurements" / "robustness"
    shutil.rmtree(place)
    command = [sys.executable, "-m", "mmcompress", "run", str(finished / "recipe.yaml"), "-o", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(place.rglob("scores.safetensors"))) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # What was being written is left beside its place, and is no cell.
    saved = {p: p.stat().st_mtime_ns for p in place.rglob("scores.safetensors") if not p.parent.name.endswith(".partial")}
    assert len(saved) >= 4
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert saved == {p: p.stat().st_mtime_ns for p in saved}
    assert open_run(tmp_path / "run").robustness == open_run(finished).robustness


def test_a_switch_means_the_defaults(tmp_path: Path) -> None:
    plain = recipe(tmp_path)
    plain["report"]["robustness"] = True
    assert make_recipe(plain).report.robustness is not None
    assert make_recipe(plain).report.robustness.samples == 500  # type: ignore[union-attr]
    plain["report"]["robustness"] = False
    assert make_recipe(plain).report.robustness is None
    plain["report"]["robustness"] = {"adversarial": False}
    assert make_recipe(plain).report.robustness.adversarial is None  # type: ignore[union-attr]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(tmp_path)))
    assert load_recipe(tmp_path / "r.yaml", ["report.robustness.samples=7"]).report.robustness.samples == 7  # type: ignore[union-attr]


def test_the_plan_counts_the_evaluations(tmp_path: Path) -> None:
    lines = robustness_plan(make_recipe(recipe(tmp_path)))
    assert lines[0] == (
        "robustness: 10 evaluations each of the baseline and the final model, on 24 examples: clean, darkness, jpeg, typos, "
        "upper-case, lower-case, shuffled-media"
    )
    assert lines[1].startswith("attacks: FGSM and PGD (10 steps) at 4 255ths on 8 examples")
    assert lines[2].startswith("shift:")
    assert robustness_plan(make_recipe(tiny.recipe(tmp_path))) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corruptions": ["jpg"]}, "unknown corruption 'jpg'; allowed: gaussian-noise"),
        ({"corruptions": ["white-noise"]}, "zero-shot-image-classification has no such: unknown corruption 'white-noise'"),
        ({"corruptions": ["jpeg", "jpeg"]}, "corruptions: jpeg stands twice"),
        ({"severities": [6]}, "severities"),
        ({"severities": []}, "severities"),
        ({"adversarial": {"eps": [0]}}, "eps"),
        ({"noise": True}, "noise"),
    ],
)
def test_mistakes_are_said_with_what_is_allowed(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    plain = recipe(tmp_path)
    plain["report"]["robustness"] = settings
    with pytest.raises(RecipeError) as e:
        make_recipe(plain)
    assert message in str(e.value)
    assert "report.robustness" in str(e.value)


def test_foreign_data_of_the_wrong_kind_stops_the_run_before_anything_is_made(tmp_path: Path) -> None:
    plain = recipe(tmp_path)
    plain["data"]["ood"] = {"path": "bundled:tones", "samples": 4}
    with pytest.raises(DataError, match=r"data.ood \(bundled:tones\): zero-shot-image-classification needs a column for 'image'"):
        mm.run(plain, tmp_path / "run")
    assert not (tmp_path / "run" / "steps").exists()
    plain["data"]["ood"] = {"from": "train"}
    with pytest.raises(RecipeError, match=r"data.ood.from: scoring needs examples of its own"):
        make_recipe(plain)
