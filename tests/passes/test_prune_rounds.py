"""Cutting in rounds: sizes after each, one learning rate schedule, and results that reload and resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mmcompress as mm
from mmcompress.model import CompressedModel
from mmcompress.passes.prune import Prune
from mmcompress.plan import plan
from mmcompress.recipe import make_recipe
from mmcompress.report.html import render_html
from mmcompress.report.markdown import render_markdown
from mmcompress.training import step as steps
from tests import tiny
from tests.pruning.helpers import context, full, stock_reload_is_equal

SHORT: dict[str, Any] = {"batch_size": 12, "epochs": 3}


@pytest.fixture
def ready() -> CompressedModel:
    return full(tiny.clip())


def told(model: CompressedModel) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = model.history[-1]["result"]["rounds"]
    return found


def test_sizes_after_each_round_and_stock_reload(ready: CompressedModel, tmp_path: Path) -> None:
    new = Prune(ratio={"vision": 0.75, "text": 0.5}, rounds=3, recovery=SHORT).apply(ready, context=context(24))
    assert [r["sizes"]["vision"]["ffn"] for r in told(new)] == [64, 40, 24]
    assert [r["sizes"]["text"]["ffn"] for r in told(new)] == [48, 40, 32]
    # 24 examples in batches of 12, three epochs over all rounds together: one a round.
    assert [r["steps"] for r in told(new)] == [2, 2, 2]
    assert told(new)[-1]["parameters"] == new.parameters()
    result = new.history[-1]["result"]
    assert json.loads(json.dumps(result)) == result
    stock_reload_is_equal(new, tmp_path)


def test_layers_go_one_by_one_and_keep_their_old_numbers(ready: CompressedModel) -> None:
    new = Prune(axis="depth", ratio={"vision": 0.67}, rounds=3, recovery=SHORT).apply(ready, context=context(24))
    assert [r["sizes"]["vision"]["depth"] for r in told(new)] == [2, 1]  # 2.08, 1.44, 1: the third has nothing left to cut
    first, last = (r["kept_layers"]["vision"] for r in told(new))
    assert set(last) < set(first) < {0, 1, 2}
    assert new.history[-1]["result"]["kept_layers"] == {"vision": last}


@pytest.mark.parametrize(
    "settings",
    [
        {"axis": "width", "ratio": {"vision": 0.67}},
        {"axis": "width", "ratio": {"vision": 0.75}, "heads": "narrower", "round_to": 2},
        {"ratio": 0.75, "scope": "tower", "allow_custom": True, "criterion": "random"},
    ],
)
def test_other_axes_end_at_the_size_that_one_cut_gives(settings: dict[str, Any], ready: CompressedModel) -> None:
    once = Prune(**settings).apply(ready)
    new = Prune(**settings, rounds=2, recovery={"batch_size": 12}).apply(ready, context=context(24))
    assert len(told(new)) == 2
    assert new.parameters() == once.parameters()


def test_all_rounds_share_one_learning_rate_schedule(ready: CompressedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    plainly = steps.rate_share

    def record(*args: Any) -> float:
        rates.append(plainly(*args))
        return rates[-1]

    monkeypatch.setattr(steps, "rate_share", record)
    recovery = {"batch_size": 12, "epochs": 6, "warmup": 0.25}
    Prune(ratio=0.75, rounds=3, recovery=recovery).apply(ready, context=context(24))
    whole = [plainly(step, 12, 0.25) for step in range(12)]
    assert rates[::2] == pytest.approx(whole)  # asked for once for each of two groups of parameters
    assert rates[0] == pytest.approx(1 / 3)
    assert max(rates) == 1 > rates[-1]


def test_the_teacher_is_the_baseline_and_is_loaded_once(ready: CompressedModel) -> None:
    loads: list[CompressedModel] = []

    def baseline() -> CompressedModel:
        loads.append(ready.clone())
        return loads[-1]

    Prune(ratio=0.75, rounds=3, recovery=SHORT).apply(ready, context=replace(context(24), baseline=baseline))
    assert len(loads) == 1


def test_what_the_trainings_took_is_added_up(ready: CompressedModel) -> None:
    given = context(24)
    Prune(ratio=0.75, rounds=3, recovery=SHORT).apply(ready, context=given)
    assert (given.facts["steps"], given.facts["examples_seen"]) == (6, 72)
    # Each example is asked for once: the teacher stays the same from round to round.
    assert given.facts["teacher_examples"] <= 3 * 24


def test_rounds_see_other_examples_first_and_are_the_same_again(ready: CompressedModel) -> None:
    step = Prune(ratio=0.75, rounds=2, recovery={"batch_size": 12, "max_steps": 2})
    one, two = (step.apply(ready, context=context(48)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True))


def test_recovery_with_one_round_and_rounds_without_recovery(ready: CompressedModel) -> None:
    assert Prune(ratio=0.5).training is None
    assert Prune(ratio=0.5, rounds=2).training is not None
    assert Prune(ratio=0.5, rounds=2).uses == Prune(ratio=0.5, recovery={}).uses == ("train",)
    new = Prune(ratio=0.5, recovery=SHORT).apply(ready, context=context(24))
    cut = Prune(ratio=0.5).apply(ready)
    assert new.parameters() == cut.parameters()
    assert not torch.equal(new.module.visual_projection.weight, cut.module.visual_projection.weight)


def test_bad_settings_say_why() -> None:
    with pytest.raises(ValueError, match=r"recovery\.max_steps: 2 steps are too few for 3 rounds"):
        Prune(ratio=0.5, rounds=3, recovery={"max_steps": 2})
    with pytest.raises(ValueError, match="Extra inputs"):
        Prune(ratio=0.5, recovery={"epoch": 2})
    sizes = {t: {"ffn": 64} for t in ("vision", "text")}
    from mmcompress.families.clip import FAMILY

    step = Prune(ratio=0.5, recovery={"freeze": ["txt"]})
    assert any(text.startswith("recovery.freeze: unknown tower 'txt'") for text in step.check_against(FAMILY, sizes))


def test_a_run_with_auto_and_rounds_resumes_and_reports(tmp_path: Path, timed_here: None) -> None:
    step = {"pass": "prune", "ratio": "auto", "rounds": 2, "recovery": {"batch_size": 16, "max_steps": 2}}
    target = {"parameters": 0.8, "ratios": [0.75], "samples": 16}
    raw = tiny.recipe(tmp_path, passes=[{**step, "target": target}])
    planned = plan(make_recipe(raw))[1]
    assert planned.seconds is not None
    first = mm.run(raw, tmp_path / "run")
    step_file = tmp_path / "run" / "steps" / "01-prune" / "step.json"
    made = step_file.stat().st_mtime_ns
    again = mm.run(raw, tmp_path / "run")
    assert step_file.stat().st_mtime_ns == made
    assert again.report == first.report
    for page in (render_markdown(again.report), render_html(again.report)):
        assert "How the ratios were decided" in page
        assert "Cut in rounds" in page
        assert "was predicted" in page
    auto = again.report.rows[-1].result["auto"]
    assert again.report.rows[-1].parameters == auto["target"]["reached"]
