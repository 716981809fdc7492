"""Two processes train as one does at the same global batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import tiny
from tests.training import together

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes that found each other by gloo left of some cases."""
    return by_two(tmp_path_factory.mktemp("two"), together.QUICK)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the other cases."""
    return by_two(tmp_path_factory.mktemp("two"), OTHERS)


OTHERS = [name for name in together.CASES if name not in together.QUICK]


def by_two(folder: Path, names: Sequence[str]) -> Path:
    command = [sys.executable, "-m", "tests.training.together", str(folder), *names]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=300)
    return folder


def test_layers_remember_what_all_processes_saw(quick: Path) -> None:
    for rank in range(2):
        found = json.loads((quick / f"seen-{rank}.json").read_text())
        # The means of the rows are 0.5 and -1, of which BatchNorm takes a tenth.
        assert found == pytest.approx({"minimum": -3.0, "maximum": 2.0, "mean": (0.05 - 0.1) / 2})


@pytest.mark.parametrize("name", together.QUICK)
def test_two_processes_give_the_weights_of_one(name: str, quick: Path) -> None:
    gives_the_weights_of_one(name, quick)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_two_processes_give_the_weights_of_one_in_every_kind(name: str, others: Path) -> None:
    gives_the_weights_of_one(name, others)


def gives_the_weights_of_one(name: str, folder: Path) -> None:
    model = together.train(name)
    first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(value, second[n]) for n, value in first.items()), "the processes drifted apart"
    start = dict(together.CASES[name][0]().module.named_parameters())
    for n, value in model.module.named_parameters():
        if without_gradient(n):
            continue
        moved = (value - start[n]).norm()
        assert (first[n] - value).norm() <= 1e-4 * value.norm() + 0.02 * moved, n
    assert any(not torch.equal(value, start[n]) for n, value in first.items())
    alone = model.history[0]["result"]
    for rank in range(2):
        facts = json.loads((folder / f"{name}-{rank}.json").read_text())
        assert facts.keys() == alone.keys()
        assert facts["final_losses"] == pytest.approx(alone["final_losses"], rel=1e-4)
        assert (facts["steps"], facts["examples"]) == (alone["steps"], alone["examples"])
        if "holdout_loss" in alone:
            assert [loss for _, loss in facts["holdout_loss"]] == pytest.approx(
                [loss for _, loss in alone["holdout_loss"]], rel=1e-4
            )


def without_gradient(name: str) -> bool:
    """Biases of keys have none but for rounding (softmax), of which Adam makes steps all the same."""
    return "k_proj.bias" in name or "key.bias" in name


PASSES: list[dict[str, Any]] = [
    {"pass": "prune", "axis": "ffn", "ratio": 0.5},
    {"pass": "finetune", "batch_size": 16, "precision": "fp32", "epochs": 2, "learning_rate": 1e-3, "checkpoint_minutes": 1e-9},
]


def launch(folder: Path, name: str, processes: int, **passes: Any) -> subprocess.Popen[str]:
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(tiny.recipe(folder, passes=[PASSES[0], {**PASSES[1], **passes}])))
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    command = [*start, "mmcompress", "run", str(recipe), "-o", str(folder / name)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **pipes, env={**os.environ, "OMP_NUM_THREADS": "1"})


def ended(started: subprocess.Popen[str]) -> str:
    said, _ = started.communicate(timeout=300)
    assert started.returncode == 0, said
    return said


@pytest.mark.slow
def test_torchrun_runs_the_same_recipe(tmp_path: Path) -> None:
    said = ended(launch(tmp_path, "two", 2))
    assert said.count("report:") == 1, "one process speaks"
    ended(launch(tmp_path, "one", 1))
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for n, value in one.items():
        assert without_gradient(n) or (two[n] - value).norm() <= 1e-3 * value.norm() + 1e-6, n
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert runs[0] == runs[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_that_is_killed_ends_all_and_the_run_goes_on(victim: int, tmp_path: Path) -> None:
    started = launch(tmp_path, "two", 2, epochs=60)
    state = tmp_path / "two" / ".training" / "02-finetune" / "00" / "state.json"
    for _ in range(6000):
        if state.exists():
            break
        time.sleep(0.02)
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and f"RANK={victim}\0".encode() in b"\0" + _environment(place) and _parent(place) == started.pid:
            os.kill(int(place.name), signal.SIGKILL)
    started.communicate(timeout=120)
    assert started.returncode != 0
    ended(launch(tmp_path, "two", 2, epochs=60))
    step = json.loads((tmp_path / "two" / "steps" / "02-finetune" / "step.json").read_text())
    assert step["facts"]["resumed_seconds"] > 0


def _environment(place: Path) -> bytes:
    try:
        return (place / "environ").read_bytes()
    except OSError:
        return b""


def _parent(place: Path) -> int:
    try:
        return int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return -1
