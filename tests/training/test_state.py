"""A training that is killed goes on to the weights that it would have had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmcompress.context import Context
from mmcompress.data.examples import as_examples
from mmcompress.model import CompressedModel
from mmcompress.passes.base import Pass
from mmcompress.passes.distill import Distill
from mmcompress.passes.finetune import Finetune
from mmcompress.passes.prune import Prune
from mmcompress.passes.qat import Qat
from mmcompress.progress import Reporter
from mmcompress.tasks.image_text_retrieval import ImageTextRetrieval
from mmcompress.training.loop import train
from mmcompress.training.objective import TaskObjective
from mmcompress.training.settings import EarlyStop
from tests import tiny

TASK = ImageTextRetrieval(type="image-text-retrieval")
OFTEN: dict[str, Any] = {"batch_size": 16, "precision": "fp32", "learning_rate": 1e-3, "checkpoint_minutes": 1e-9}


pytestmark = pytest.mark.usefixtures("one_thread")


class Pulled(Exception):
    """The plug."""


class Pulling(Reporter):
    """Pulls it after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def note(self, text: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise Pulled


def context(folder: Path | None = None, seed: int = 0, **more: Any) -> Context:
    examples = as_examples(tiny.dataset(64))
    return Context(task=TASK, train=examples, device="cpu", seed=seed, baseline=lambda: tiny.clip(5), checkpoints=folder, **more)


def model() -> CompressedModel:
    """With dropout, so that random numbers count."""
    return tiny.clip(attention_dropout=0.2)


def same(a: CompressedModel, b: CompressedModel) -> bool:
    theirs = b.module.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.module.state_dict().items())


STOP = EarlyStop(patience=9, every=0.5, holdout=0.2)
PASSES = {
    "finetune": Finetune(**OFTEN, epochs=2),
    "averaged": Finetune(**OFTEN, epochs=2, ema=0.9, early_stop=STOP, micro_batch=8),
}


@pytest.mark.parametrize("name", PASSES)
def test_what_goes_on_in_the_middle_of_an_epoch_ends_bit_equal(name: str, tmp_path: Path) -> None:
    step = PASSES[name]
    whole = step.apply(model(), context=context())
    with pytest.raises(Pulled):
        step.apply(model(), context=context(tmp_path, reporter=Pulling(3)))
    state = json.loads((tmp_path / "00" / "state.json").read_text())
    assert (len(state["losses"]), state["reached"]) == (3, 3)
    assert {p.suffix for p in (tmp_path / "00").iterdir()} == {".safetensors", ".json"}
    where = context(tmp_path)
    again = step.apply(model(), context=where)
    assert where.facts["resumed_seconds"] > 0
    assert same(again, whole)
    assert again.history == whole.history


def forget_the_teacher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said in the whole training must not help the one that is cut off."""
    monkeypatch.setenv("MMCOMPRESS_CACHE", str(folder / "another-cache"))


def test_the_losses_own_parameters_go_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Distill(**OFTEN, epochs=2, losses={"task": 1.0, "interactive": 1.0})
    whole = step.apply(model(), context=context())
    forget_the_teacher(tmp_path, monkeypatch)
    with pytest.raises(Pulled):
        step.apply(model(), context=context(tmp_path, reporter=Pulling(3)))
    assert "objective.losses.interactive.log_scale" in load_file(tmp_path / "00" / "state.safetensors")
    assert same(step.apply(model(), context=context(tmp_path)), whole)


def test_quantization_aware_training_goes_on_with_its_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Qat, "_export", lambda *_: {})
    step: Pass = Qat(**OFTEN, epochs=2)
    whole = step.apply(model(), context=context(workdir=tmp_path))
    forget_the_teacher(tmp_path, monkeypatch)
    with pytest.raises(Pulled):
        step.apply(model(), context=context(tmp_path, reporter=Pulling(3), workdir=tmp_path))
    assert any("maximum" in name for name in load_file(tmp_path / "00" / "state.safetensors"))
    assert same(step.apply(model(), context=context(tmp_path, workdir=tmp_path)), whole)


@pytest.mark.parametrize("change", ["seed", "settings", "weights", "damaged"])
def test_a_state_of_another_training_is_never_used(change: str, tmp_path: Path) -> None:
    step, start, seed = PASSES["finetune"], model(), 0
    with pytest.raises(Pulled):
        step.apply(model(), context=context(tmp_path, reporter=Pulling(3)))
    if change == "seed":
        seed = 1
    elif change == "settings":
        step = Finetune(**{**OFTEN, "learning_rate": 2e-3}, epochs=2)
    elif change == "weights":
        start.module.logit_scale.data += 0.1
    else:
        (tmp_path / "00" / "state.safetensors").write_bytes(b"no tensors")
    where = context(tmp_path, seed)
    found = step.apply(start, context=where)
    assert "resumed_seconds" not in where.facts
    assert same(found, step.apply(start, context=context(seed=seed)))


def test_of_trainings_in_a_row_those_that_ended_are_not_done_again(tmp_path: Path) -> None:
    def both(where: Context) -> CompressedModel:
        new = model()
        for span in ((0.0, 0.5), (0.5, 1.0)):
            train(new, where, PASSES["finetune"], TaskObjective(TASK), span=span)  # type: ignore[arg-type]
        return new

    whole = both(context())
    with pytest.raises(Pulled):
        both(context(tmp_path, reporter=Pulling(10)))  # 8 steps each
    where = context(tmp_path, reporter=(rest := Pulling(100)))
    assert same(both(where), whole)
    assert rest.left == 100 - 6


def test_pruning_goes_on_in_the_round_that_it_was_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Prune.model_validate({"ratio": 0.5, "rounds": 2, "recovery": {**OFTEN, "epochs": 4}})
    whole = step.apply(model(), context=context())
    forget_the_teacher(tmp_path, monkeypatch)
    with pytest.raises(Pulled):
        step.apply(model(), context=context(tmp_path, reporter=Pulling(10)))  # 8 steps each
    where = context(tmp_path, reporter=(rest := Pulling(100)))
    again = step.apply(model(), context=where)
    assert rest.left == 100 - 6
    assert same(again, whole)
    assert again.history == whole.history
    first, second = (json.loads((tmp_path / name / "state.json").read_text())["seconds"] for name in ("00", "01"))
    assert first < where.facts["resumed_seconds"] < first + second


def test_nothing_is_saved_where_nobody_asks(tmp_path: Path) -> None:
    Finetune(**{**OFTEN, "checkpoint_minutes": 0}).apply(model(), context=context(tmp_path))
    Finetune(**{**OFTEN, "checkpoint_minutes": 5}).apply(model(), context=context(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_same_command_goes_on_after_a_kill(how: signal.Signals, tmp_path: Path) -> None:
    passes = [{"pass": "finetune", **OFTEN, "epochs": 40}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(tmp_path, passes=passes)))

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mmcompress", "run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)

    killed = start("killed")
    state = tmp_path / "killed" / ".training" / "01-finetune" / "00" / "state.json"
    for _ in range(6000):
        if state.exists() and killed.poll() is None:
            break
        time.sleep(0.01)
    killed.send_signal(how)
    killed.wait()
    assert not (tmp_path / "killed" / "steps" / "01-finetune").exists()
    again, whole = start("killed"), start("whole")
    assert (again.wait(), whole.wait()) == (0, 0), again.stderr
    step = json.loads((tmp_path / "killed" / "steps" / "01-finetune" / "step.json").read_text())
    assert step["facts"]["resumed_seconds"] > 0
    assert not (tmp_path / "killed" / ".training").exists()
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
