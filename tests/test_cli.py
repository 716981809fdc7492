"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmcompress.report.schema import Report
from tests import tiny


def call(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmcompress.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny recipe, made by the command."""
    folder = tmp_path_factory.mktemp("cli")
    passes = [{"pass": "prune", "axis": "ffn", "ratio": 0.5}, {"pass": "quantize", "scheme": "int8-dynamic"}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(folder, passes=passes)))
    done = call("run", folder / "recipe.yaml", "-o", folder / "run")
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    (folder / "progress.txt").write_text(done.stderr)
    return folder


def test_run_says_only_our_words(place: Path) -> None:
    said, progress = (place / "said.txt").read_text(), (place / "progress.txt").read_text()
    assert "report.html" in said
    assert "baseline" in said
    for line in progress.splitlines():
        assert line.startswith(("baseline:", "1-prune:", "2-quantize:", "  torch ", "  onnxruntime ")), line
    assert "Warning" not in said + progress


def test_report_in_every_form(place: Path) -> None:
    assert "<!doctype html>" in call("report", place / "run", "--format", "html").stdout.lower()
    assert "|" in call("report", place / "run", "--format", "md").stdout
    found = Report.model_validate_json(call("report", place / "run", "--format", "json").stdout)
    assert found.rows[0].step == "baseline"
    assert "baseline" in call("report", place / "run").stdout
    wrong = call("report", place / "run", "--format", "pdf")
    assert (wrong.returncode, "allowed: html, md, json, text" in wrong.stderr) == (2, True)


def test_eval_of_a_folder_and_of_its_onnx_twin(place: Path) -> None:
    torch = json.loads(call("eval", place / "recipe.yaml", place / "run" / "steps" / "01-prune", "--json").stdout)
    onnx = json.loads(call("eval", place / "recipe.yaml", place / "run" / "onnx", "--json").stdout)
    assert (torch["runtime"], onnx["runtime"]) == ("torch", "onnxruntime")
    report = Report.model_validate_json((place / "run" / "report.json").read_text())
    assert torch["quality"]["accuracy"] == report.rows[1].quality["accuracy"].model_dump()
    assert onnx["quality"]["accuracy"] == report.rows[2].quality["accuracy"].model_dump()


def test_inspect(place: Path) -> None:
    found = json.loads(call("inspect", place / "run" / "model", "--json").stdout)
    assert found["towers"]["vision"]["axes"]["ffn"]["size"] == 48
    assert found["towers"]["text"]["axes"]["heads"]["stock"] is False
    assert sum(t["parameters"] for t in found["towers"].values()) == found["parameters"]
    assert "vision_model" in call("inspect", place / "run" / "model").stdout


def test_bench_side_by_side(place: Path) -> None:
    done = call(
        "bench", place / "model", place / "run" / "onnx", "--batch-size", "2", "--seconds", "0.05", "--threads", "1", "--json"
    )
    found = json.loads(done.stdout)["models"]
    assert [m["runtime"] for m in found] == ["torch", "onnxruntime"]
    assert all(m["latency_ms"]["2"]["n"] >= 20 and m["peak_memory_bytes"] > 2e7 for m in found)
    both = json.loads(done.stdout)
    ratio, noise = found[1]["ratio"]["2"], both["noise"]["2"]
    assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    assert noise["low"] <= noise["ratio"] <= noise["high"]
    assert noise["rounds"] == both["rounds"]["2"] >= 24
    # Torch is never loaded where ONNX Runtime is timed, and its memory is not counted there.
    assert found[1]["peak_memory_bytes"] < 0.7 * found[0]["peak_memory_bytes"]


def test_check_and_dry_run_print_a_plan_and_write_nothing(place: Path) -> None:
    before = set(place.rglob("*"))
    for command in (["check"], ["run", "--dry-run"]):
        done = call(*command, place / "recipe.yaml")
        assert done.returncode == 0, done.stderr
        assert "1-prune" in done.stdout
        assert "vision: ffn 48" in done.stdout
    assert set(place.rglob("*")) == before


def test_check_finds_what_does_not_fit_the_model(place: Path) -> None:
    done = call("check", place / "recipe.yaml", "--set", "passes.0.ratio={audio: 0.5}")
    assert done.returncode == 2
    assert "audio" in done.stderr
    assert "vision, text" in done.stderr


def test_compare(place: Path, tmp_path: Path) -> None:
    done = call("compare", place / "run", place / "run", "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert str(place / "run") in done.stdout
    assert "<html" in (tmp_path / "page.html").read_text()


def test_schemas_are_json() -> None:
    assert "passes" in json.loads(call("schema").stdout)["properties"]
    assert "rows" in json.loads(call("schema", "--report").stdout)["properties"]


@pytest.mark.parametrize("kind", ["passes", "families", "tasks", "criteria", "losses", "recipes"])
def test_list(kind: str) -> None:
    done = call("list", kind, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0
    assert all(len(line.split("  ", 1)[1].strip()) > 10 for line in done.stdout.splitlines())


def test_list_explains_a_pass() -> None:
    text = call("list", "passes", "prune").stdout
    assert "ratio (number or mapping of text to number or auto, required)" in text
    assert "samples (integer, default 512, at least 8, at most 100000)" in text


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "nowhere.yaml"], 2, "no such recipe"),
        (["list", "pases"], 2, "did you mean 'passes'"),
        (["list", "passes", "prun"], 2, "did you mean 'prune'"),
        (["inspect", "./nowhere"], 1, "no such folder"),
        (["report", "nowhere"], 1, "holds no report.json"),
        (["frobnicate"], 2, "frobnicate"),
        (["run"], 2, "Missing argument 'recipe'"),
        (["bench", "--threads", "0", "x"], 2, "greater than or equal to 1"),
    ],
)
def test_mistakes_exit_with_one_message(arguments: list[str], code: int, said: str) -> None:
    done = call(*arguments)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")


def test_a_missed_gate_exits_with_3(tmp_path: Path) -> None:
    gates = [{"metric": "accuracy", "min_value": 100}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(tmp_path, passes=[], gates=gates)))
    done = call("run", tmp_path / "recipe.yaml", "-o", tmp_path / "run")
    assert done.returncode == 3
    assert "missed" in done.stdout


def test_doctor_finds_nothing_wrong_here() -> None:
    done = call("doctor")
    assert done.returncode == 0, done.stdout
    assert "torch" in done.stdout


def test_help_and_import_load_nothing_heavy() -> None:
    code = (
        "import sys, mmcompress, mmcompress.cli\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'onnxruntime', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "run" in call("--help").stdout


def test_only_the_code_of_the_model_at_hand_is_loaded() -> None:
    code = (
        "import sys; from transformers import CLIPConfig; from mmcompress.config import family_of\n"
        "family = family_of(CLIPConfig(), 'here')\n"
        "print(family.name, *(f'transformers.models.{m}.modeling_{m}' in sys.modules for m in ('clip', 'blip')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["clip", "True", "False"]
