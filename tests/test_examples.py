"""The scripts in examples/ run as a user would run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import (
    BlipForConditionalGeneration,
    CLIPModel,
    PreTrainedModel,
    ViltForQuestionAnswering,
    WhisperForConditionalGeneration,
)

import mmcompress as mm

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = ("prune_from_python.py", "run_a_recipe.py", "onnx_inference.py", "custom_loss.py")


def run(name: str, *arguments: str | Path) -> str:
    """What a script prints; it must end well."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", SHORT)
def test_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 60


def test_prune_from_python(tmp_path: Path) -> None:
    said = run("prune_from_python.py", "--out", tmp_path / "pruned")
    assert "transformers gives the same embedding: True" in said
    assert CLIPModel.from_pretrained(tmp_path / "pruned").config.text_config.intermediate_size == 256


def test_custom_loss(tmp_path: Path) -> None:
    said = run("custom_loss.py", "--out", tmp_path / "distilled")
    first, last = (float(part.split()[0]) for part in said.split("loss: ")[1].split(", ")[:2])
    assert last < first
    assert (tmp_path / "distilled" / "model.safetensors").exists()


def test_a_recipe_and_its_onnx_files(tmp_path: Path) -> None:
    said = run("run_a_recipe.py", "--out", tmp_path / "run")
    assert "gates met: " in said
    steps = [row["step"] for row in json.loads((tmp_path / "run" / "report.json").read_text())["rows"]]
    assert steps[-1] == "4-export"
    said = run("onnx_inference.py", "--run", tmp_path / "run", "--out", tmp_path / "answer.json")
    right = said.split("the picture shows: a ")[1].splitlines()[0]
    assert next(iter(json.loads((tmp_path / "answer.json").read_text()))) == right


@pytest.mark.slow
def test_pretraining_in_small(tmp_path: Path) -> None:
    run("pretrain_shapes_clip.py", "--out", tmp_path / "clip", "--rows", "64", "--epochs", "1", "--batch", "32", "--threads", "1")
    model = CLIPModel.from_pretrained(tmp_path / "clip")
    assert 3e6 <= model.num_parameters() <= 6e6
    assert (tmp_path / "clip" / "model.safetensors").stat().st_size <= 8_000_000
    assert "synthetic" in (tmp_path / "clip" / "README.md").read_text()


@pytest.mark.parametrize(("script", "cls"), [("vqa", ViltForQuestionAnswering), ("captioner", BlipForConditionalGeneration)])
def test_pretraining_of_models_that_answer_in_small(script: str, cls: type[PreTrainedModel], tmp_path: Path) -> None:
    small = ("--rows", "32", "--steps", "2", "--batch", "16", "--test-rows", "20")
    said = run(f"pretrain_shapes_{script}.py", "--out", tmp_path / "model", *small)
    assert cls.from_pretrained(tmp_path / "model").num_parameters() < 4e6
    assert (tmp_path / "model" / "README.md").read_text() in said
    assert "synthetic" in said
    assert mm.load(tmp_path / "model").stored_dtype == "float16"


def test_pretraining_of_a_speech_model_in_small(tmp_path: Path) -> None:
    small = ("--rows", "64", "--epochs", "1", "--short-epochs", "1", "--test-rows", "10", "--threads", "1")
    said = run("pretrain_tones_whisper.py", "--out", tmp_path / "model", *small)
    assert WhisperForConditionalGeneration.from_pretrained(tmp_path / "model").num_parameters() < 1e6
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 2_000_000
    assert (tmp_path / "model" / "README.md").read_text() in said
    assert "synthetic" in said
    assert mm.load(tmp_path / "model").family.name == "whisper"
