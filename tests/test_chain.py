"""The chain on tiny models: what it leaves, resuming, gates, and what goes wrong."""

from __future__ import annotations

import io
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
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from transformers import CLIPModel

import mmcompress as mm
from mmcompress import files
from mmcompress.environment import affinity
from mmcompress.errors import DataError, ModelError, RecipeError, TrainingError, UserError
from mmcompress.measure import side_by_side, turns
from mmcompress.model import align, load
from mmcompress.report.read import open_run
from mmcompress.report.text import bad_news
from tests import tiny
from tests.conftest import TimedHere

FULL = [
    {"pass": "prune", "axis": "ffn", "ratio": {"vision": 0.5}},
    {"pass": "finetune", "epochs": 1, "batch_size": 16, "learning_rate": 1e-3},
    {"pass": "quantize", "scheme": "int8-dynamic"},
    {"pass": "export"},
]
TRAINING = [
    {"pass": "prune", "axis": "ffn", "ratio": 0.5},
    {"pass": "finetune", "epochs": 1, "batch_size": 16, "learning_rate": 1e-3},
    {"pass": "distill", "epochs": 1, "batch_size": 16, "learning_rate": 1e-3},
]


@pytest.fixture(autouse=True)
def _fast(timed_here: None) -> None:
    """See ``conftest``; the tests that start a process of their own measure as users do."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole chain with both runtimes, run once for all tests that only look at it."""
    folder = tmp_path_factory.mktemp("finished")
    patch = pytest.MonkeyPatch()
    patch.setattr(turns, "start", TimedHere)
    patch.setattr(side_by_side, "FEWEST_ROUNDS", 2)
    report = {"batch_sizes": [1, 2], "threads": 1, "seconds": 0.01, "runtimes": ["torch", "onnxruntime"]}
    mm.run(tiny.recipe(folder, passes=FULL, report=report), folder / "run")
    patch.undo()
    return folder / "run"


def test_without_side_by_side_no_ratio_claims_an_interval(tmp_path: Path) -> None:
    report = mm.run(tiny.recipe(tmp_path), tmp_path / "run").report
    assert (report.noise, report.timing) == ({}, None)
    assert report.rows[-1].latency_ms["1"].n >= 20
    assert all(not gain.intervals for gain in report.totals.speedup.values())
    assert not (tmp_path / "run" / "measurements" / "side-by-side.json").exists()


def test_a_run_leaves_what_the_design_says(finished: Path) -> None:
    have = {p.name for p in finished.iterdir()}
    assert {"recipe.yaml", "report.html", "report.md", "report.json", "README.md", "steps", "model", "onnx", "log.txt"} <= have
    assert sorted(p.name for p in (finished / "steps").iterdir()) == [
        "00-baseline",
        "01-prune",
        "02-finetune",
        "03-quantize",
        "04-export",
    ]
    assert {p.suffix for p in (finished / "onnx").glob("*.onnx")} == {".onnx"}
    assert {"config.json", "tokenizer.json", "preprocessor_config.json"} <= {p.name for p in (finished / "onnx").iterdir()}
    assert not list(finished.rglob("*.partial"))
    assert not [p for p in finished.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pth")]


def test_every_steps_folder_loads_with_stock_transformers_bit_equal(finished: Path) -> None:
    batch = tiny.FAMILY.example_batch(tiny.clip_config(), 2)
    for step in [*(finished / "steps").iterdir(), finished / "model"]:
        stock, ours = CLIPModel.from_pretrained(step), load(step).module
        align(stock)
        with torch.no_grad():
            assert torch.equal(stock(**batch).logits_per_image, ours(**batch).logits_per_image)
    assert CLIPModel.from_pretrained(finished / "model").config.vision_config.intermediate_size == 48


def test_the_report_has_a_row_for_each_model_in_each_runtime(finished: Path) -> None:
    report = open_run(finished)
    assert [(r.step, r.runtime, r.precision) for r in report.rows] == [
        ("baseline", "torch", "float32"),
        ("baseline", "onnxruntime", "float32"),
        ("1-prune", "torch", "float32"),
        ("1-prune", "onnxruntime", "float32"),
        ("2-finetune", "torch", "float32"),
        ("2-finetune", "onnxruntime", "float32"),
        ("3-quantize", "onnxruntime", "int8"),
        ("4-export", "onnxruntime", "int8"),
    ]
    for row in report.rows:
        assert set(row.latency_ms) == {"1", "2"}
        assert row.quality["accuracy"].n == 40
        assert {"vision", "text"} <= set(row.components)
        assert row.peak_memory_bytes is not None
        assert row.peak_memory_bytes > 10_000_000
    baseline, pruned = report.rows[0], report.rows[2]
    assert baseline.parameters - pruned.parameters == 3 * (48 * 48 * 2 + 48)
    assert pruned.flops is not None
    assert baseline.flops is not None
    assert pruned.flops < baseline.flops
    assert report.rows[1].change["accuracy"].verdict == "identical"
    assert report.totals.finished
    assert report.totals.speedup["1"].runtime is not None
    assert report.totals.final_step == "4-export"
    *others, quantized, final = report.rows
    assert [row.same_files_as for row in others] == [None] * 6
    assert final.same_files_as == "3-quantize"
    assert final.latency_ms == quantized.latency_ms
    frame = report.to_frame()
    assert len(frame) == 8
    assert frame["quality.accuracy"].between(0, 1).all()


def test_the_resolved_recipe_runs_again_to_the_same_weights(finished: Path, tmp_path: Path) -> None:
    plain = yaml.safe_load((finished / "recipe.yaml").read_text())
    plain["passes"] = plain["passes"][:2]
    plain["report"]["runtimes"] = ["torch"]
    mm.run(plain, tmp_path / "again")
    assert contents(tmp_path / "again" / "model") == {
        k: v for k, v in contents(finished / "steps" / "02-finetune").items() if k != "step.json"
    }


def test_running_again_does_no_work_twice(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "steps").rglob("*") if p.is_file()}
    result = mm.run(yaml.safe_load((finished / "recipe.yaml").read_text()), tmp_path / "run")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "steps").rglob("*") if p.is_file()}
    assert result.report.model_dump() == open_run(finished).model_dump()


@pytest.mark.parametrize(
    "after",
    [
        pytest.param("steps/00-baseline", marks=pytest.mark.slow),
        pytest.param("measurements/00-baseline", marks=pytest.mark.slow),
        pytest.param("steps/01-prune", marks=pytest.mark.slow),
        "steps/02-finetune",
    ],
)
def test_kill_9_then_the_same_command_ends_with_the_same_bytes(tmp_path: Path, after: str) -> None:
    recipe = tiny.recipe(tmp_path, passes=TRAINING[:2])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "mmcompress.cli", "run", str(tmp_path / "recipe.yaml"), "-o"]
    whole = tmp_path / "whole"
    done = subprocess.run([*command, str(whole)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (killed / after).exists() and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (killed / after).exists()
    assert not (killed / "model").exists()
    done = subprocess.run([*command, str(killed)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(killed / "model") == contents(whole / "model")
    assert not list(killed.rglob("*.partial"))


def test_a_pass_that_cannot_work_is_told_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of training may lie before it; a run that is finished only reads, whatever is installed by then."""
    passes: list[dict[str, Any]] = [
        {"pass": "prune", "axis": "ffn", "ratio": 0.5},
        {"pass": "prune", "axis": "ffn", "ratio": {"tail": 0.5}},
        {"pass": "quantize", "placement": "measure", "runtime": "openvino"},
    ]
    monkeypatch.setattr("mmcompress.passes.quantize.openvino_installed", lambda: False)
    with pytest.raises(RecipeError) as caught:
        mm.run(tiny.recipe(tmp_path, passes=passes), tmp_path / "run")
    first, second = str(caught.value).splitlines()
    assert first.startswith("passes.1 (prune): ")
    assert "tail" in first
    assert second.startswith("passes.2 (quantize): runtime: ")
    assert not (tmp_path / "run").exists()
    recipe = tiny.recipe(tmp_path, passes=passes[:1])
    mm.run(recipe, tmp_path / "run")
    monkeypatch.setattr(mm.passes.Prune, "check_against", lambda *given: ["no longer"])
    assert mm.run(recipe, tmp_path / "run").report.totals.finished


def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    from mmcompress.run_folder import exclusive

    with exclusive(tmp_path / "run"), pytest.raises(UserError, match="another run is at work"):
        mm.run(recipe, tmp_path / "run")


def test_every_row_says_what_changed_and_the_media_are_those_of_the_final_one(finished: Path) -> None:
    report = open_run(finished)
    rows = {(row.step, row.runtime): row.behaviour for row in report.rows}
    assert all(found is not None and found.calibration is not None for found in rows.values())
    assert [key for key, found in rows.items() if found is not None and found.flips is None] == [("baseline", "torch")]
    final = rows[report.totals.final_step, report.totals.final_runtime]
    assert final is not None
    media = finished / "measurements" / "media"
    kept = {p.relative_to(finished).as_posix() for p in media.iterdir()} if media.exists() else set()
    assert kept == {entry.media for entry in final.gallery}
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(kept)


def test_another_recipe_in_the_same_folder_is_refused_and_fresh_begins_again(tmp_path: Path) -> None:
    mm.run(tiny.recipe(tmp_path), tmp_path / "run")
    other = tiny.recipe(tmp_path, seed=3)
    with pytest.raises(UserError, match="differs in seed; choose another folder with -o"):
        mm.run(other, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    mm.run(other, tmp_path / "run", fresh=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_changed_data_is_never_mixed_with_old_results(tmp_path: Path) -> None:
    mm.run(tiny.recipe(tmp_path), tmp_path / "run")
    tiny.parquet(tmp_path / "test.parquet", 30, 2)
    with pytest.raises(UserError, match="differs in inputs"):
        mm.run(tiny.recipe(tmp_path), tmp_path / "run")


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds thesis.tex, which no run"):
        mm.run(tiny.recipe(tmp_path), tmp_path / "home", fresh=True)
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.tex"]


BREAK = [{"pass": "prune", "axis": "ffn", "ratio": 0.5}, {"pass": "prune", "axis": "depth", "ratio": 0.5}]


@pytest.mark.parametrize(
    ("gate", "verdicts", "kept", "met"),
    [
        ({"metric": "accuracy", "max_drop": 100}, ["met"], 2, True),
        ({"metric": "accuracy", "min_value": 100}, ["missed"], 2, False),
        ({"metric": "accuracy", "min_value": 100, "on_miss": "rollback"}, ["missed", "missed"], 0, False),
        ({"metric": "accuracy", "min_value": 100, "on_miss": "stop"}, ["missed"], 0, False),
        ({"metric": "accuracy_top5", "max_drop": 0.001}, ["not shown"], 2, False),
    ],
)
def test_gates(tmp_path: Path, gate: dict[str, Any], verdicts: list[str], kept: int, met: bool) -> None:
    passes = (
        BREAK if gate["metric"] == "accuracy" else [{"pass": "finetune", "max_steps": 1, "batch_size": 8, "learning_rate": 1e-9}]
    )
    result = mm.run(tiny.recipe(tmp_path, passes=passes, gates=[gate]), tmp_path / "run")
    found = [g.verdict for g in result.report.gates]
    assert found == verdicts
    assert result.met is met
    assert len(result.model.history) == min(kept, len(passes))
    assert all(row.rolled_back == (gate.get("on_miss", "report") != "report") for row in result.report.rows[1:])
    page = (tmp_path / "run" / "report.html").read_text()
    assert verdicts[0] in page


def test_a_rolled_back_step_is_not_what_the_next_one_builds_on(tmp_path: Path) -> None:
    gate = {"metric": "accuracy", "max_drop": 0.001, "on_miss": "rollback"}
    result = mm.run(tiny.recipe(tmp_path, passes=BREAK, gates=[gate]), tmp_path / "run")
    assert [h["pass"] for h in load(tmp_path / "run" / "steps" / "02-prune").history] == ["prune"]
    assert result.model.history == []


def edit(folder: Path, what: str) -> dict[str, Any]:
    """A recipe over something broken."""
    recipe = tiny.recipe(folder)
    if what == "label":
        rows = tiny.rows(40)
        rows["label"][7] = 99
        features = Features({"image": Image(), "label": Value("int64"), "caption": Value("string")})
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / "test.parquet"))
        recipe["data"]["eval"]["classes"] = list(tiny.COLOURS)
        del recipe["data"]["train"]
    elif what == "column":
        recipe["data"]["eval"]["columns"] = {"label": "lable"}
    elif what == "weights":
        path = folder / "model" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    elif what == "picture":
        rows = tiny.rows(40, 1)
        rows["image"][7] = {"bytes": b"junk", "path": None}
        Dataset.from_dict(rows, features=tiny.dataset(1).features).to_parquet(str(folder / "test.parquet"))
    elif what == "empty":
        tiny.dataset(6).select([]).to_parquet(str(folder / "test.parquet"))
    elif what == "nan":
        recipe["passes"] = [
            {"pass": "finetune", "learning_rate": 1.0, "precision": "fp32", "epochs": 200, "batch_size": 16, "grad_clip": 0}
        ]
        model = tiny.clip()
        with torch.no_grad():
            model.module.logit_scale.fill_(float("nan"))
        model.module.save_pretrained(folder / "model")
    elif what == "tower":
        recipe["passes"] = [{"pass": "prune", "ratio": {"audio": 0.5}}]
    return recipe


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        ("label", DataError, "row 7, column 'label': label 99 is outside the classes 0 to 5"),
        ("column", DataError, "unknown column 'lable'"),
        ("weights", ModelError, "damaged or cut short"),
        ("picture", DataError, "row 7, column 'image': the picture does not decode"),
        ("empty", DataError, "is empty"),
        ("nan", TrainingError, "the loss 'task' is nan"),
        ("tower", RecipeError, "audio"),
    ],
)
def test_what_is_broken_is_one_clear_error(tmp_path: Path, what: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        mm.run(edit(tmp_path, what), tmp_path / "run")
    run = tmp_path / "run"
    assert not list(run.rglob("*.partial"))
    if what == "nan":
        assert load(run / "steps" / "00-baseline").history == []
    elif run.exists():
        assert not (run / "model").exists()


def test_a_damaged_picture_may_be_skipped_and_is_counted(tmp_path: Path) -> None:
    recipe = edit(tmp_path, "picture")
    recipe["data"]["eval"]["skip_damaged"] = True
    report = mm.run(recipe, tmp_path / "run").report
    assert report.rows[0].quality["accuracy"].n == 39
    assert any("1 of 40 examples were skipped" in note for note in report.rows[0].notes)
    assert "skipped" in (tmp_path / "run" / "report.html").read_text()


def test_a_full_disk_is_one_clear_error_and_what_was_finished_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(tmp_path)

    def full(path: Path) -> None:
        if "01-prune" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_flush", full)
    with pytest.raises(UserError, match="the disk is full"):
        mm.run(recipe, tmp_path / "run")
    assert load(tmp_path / "run" / "steps" / "00-baseline").parameters() > 0
    assert not list((tmp_path / "run").rglob("*.partial"))
    monkeypatch.undo()
    assert mm.run(recipe, tmp_path / "run").report.totals.finished


@pytest.mark.skipif(os.geteuid() == 0 or sys.platform != "linux", reason="root writes to read-only folders")
def test_a_read_only_place(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written"):
        mm.run(recipe, tmp_path / "locked" / "run")


def test_leaked_pictures_stop_a_run_or_are_the_first_that_its_report_says(tmp_path: Path) -> None:
    """30 training pictures are in the test data, as other bytes of the same pixels."""
    passes = [{"pass": "prune", "axis": "ffn", "ratio": {"vision": 0.5}}]
    recipe = tiny.recipe(tmp_path, passes=passes)
    train, test = tiny.rows(48, 0), tiny.rows(48, 1)
    for i in range(30):
        picture = Pillow.open(io.BytesIO(train["image"][i]["bytes"]))
        again = io.BytesIO()
        picture.save(again, format="BMP" if i % 2 else "PNG", compress_level=1)
        test["image"][i + 5] = {"bytes": again.getvalue(), "path": None}
        test["label"][i + 5], test["caption"][i + 5] = train["label"][i], train["caption"][i]
    assert not {i["bytes"] for i in train["image"]} & {i["bytes"] for i in test["image"]}
    features = tiny.dataset(1).features
    Dataset.from_dict(train, features=features).to_parquet(str(tmp_path / "train.parquet"))
    Dataset.from_dict(test, features=features).to_parquet(str(tmp_path / "test.parquet"))
    said = (
        r"^30 of 48 pictures of data.eval \(test.parquet\) are also in data.train \(train.parquet\) \(30 of them as other bytes, "
        r"with the same content\): rows 5, 6, 7, 8, 9, ... are rows 0, 1, 2, 3, 4, ... there.*data.allow_leaks: true"
    )
    with pytest.raises(DataError, match=said):
        mm.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    recipe["data"]["allow_leaks"] = True
    report = mm.run(recipe, tmp_path / "run").report
    words = "30 of 48 evaluation pictures are also in data.train"
    assert words in report.totals.headline
    assert words in bad_news(report)[0].text
    assert report.leaks is not None
    assert (report.leaks.allowed, report.leaks.found[0].examples, report.leaks.found[0].reencoded) == (True, 30, 30)
    for name in ("report.md", "report.html", "README.md"):
        assert words in (tmp_path / "run" / name).read_text()
    # A second call reads what was found.
    again = mm.run(recipe, tmp_path / "run").report
    assert again.leaks == report.leaks


def test_classes_that_are_only_numbers_are_said(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, passes=[])
    del recipe["data"]["train"]
    plain = tiny.dataset(40, 1).cast_column("label", Value("int64"))
    plain.to_parquet(str(tmp_path / "test.parquet"))
    report = mm.run(recipe, tmp_path / "run").report
    assert any("Name them with classes" in w.text for w in report.warnings)


def test_custom_shapes_are_said_in_the_report(tmp_path: Path) -> None:
    passes = [{"pass": "prune", "axis": "heads", "ratio": {"vision": 0.34}, "allow_custom": True}]
    result = mm.run(tiny.recipe(tmp_path, passes=passes), tmp_path / "run")
    assert result.report.rows[-1].loads_with == "mmcompress"
    assert result.model.custom
    assert "mmcompress" in (tmp_path / "run" / "README.md").read_text()


def test_a_float16_source_is_said(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    model = tiny.clip()
    model.module.half().save_pretrained(tmp_path / "model")
    report = mm.run(recipe, tmp_path / "run").report
    assert any("float16" in w.text for w in report.warnings)


def test_a_run_without_passes_measures_the_baseline(tmp_path: Path) -> None:
    result = mm.run(tiny.recipe(tmp_path, passes=[]), tmp_path / "run")
    assert result.report.environment["affinity"] == affinity()
    assert len(affinity()) >= 1 or not hasattr(os, "sched_getaffinity")
    assert result.met
    assert [r.step for r in result.report.rows] == ["baseline"]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["totals"]["headline"]


def test_from_python_each_pass_by_itself(model: mm.CompressedModel, tmp_path: Path) -> None:
    data = tiny.dataset(32)
    smaller = mm.passes.Prune(axis="ffn", ratio={"vision": 0.5}, criterion="taylor", samples=16).apply(model, data=data)
    tuned = mm.passes.Finetune(max_steps=2, batch_size=8).apply(smaller, data=data)
    assert [h["pass"] for h in tuned.history] == ["prune", "finetune"]
    assert model.history == []
    tuned.save(tmp_path / "out")
    assert CLIPModel.from_pretrained(tmp_path / "out").config.vision_config.intermediate_size == 48
