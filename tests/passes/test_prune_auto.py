"""`ratio: auto`: the target is met, stock transformers reloads, and what cannot be reached is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import WhisperForConditionalGeneration

from mmcompress.context import Context
from mmcompress.errors import RecipeError
from mmcompress.families.clip import FAMILY
from mmcompress.measure import sensitivity
from mmcompress.measure.sensitivity import Sensitivity
from mmcompress.measure.size import flops_by_component
from mmcompress.model import CompressedModel
from mmcompress.passes.prune import Prune
from mmcompress.plan import plan
from mmcompress.plan_text import render_plan
from mmcompress.pruning.cutting import Cutting, hold_out
from mmcompress.recipe import make_recipe
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.automatic_speech_recognition import AutomaticSpeechRecognition
from tests import tiny, tiny_data
from tests.families import tiny_whisper
from tests.pruning.helpers import context, full, stock_reload_is_equal

FEW: dict[str, Any] = {"ratios": [0.75], "samples": 16}


def auto(model: CompressedModel, given: Context, target: dict[str, Any], **settings: Any) -> CompressedModel:
    return Prune(ratio="auto", target={**FEW, **target}, **settings).apply(model, context=given)


@pytest.fixture
def ready() -> CompressedModel:
    return full(tiny.clip())


@pytest.mark.parametrize("kind", [pytest.param("parameters", marks=pytest.mark.slow), "flops", "disk_bytes"])
def test_the_target_is_met_by_the_least_that_rounding_allows(kind: str, ready: CompressedModel, tmp_path: Path) -> None:
    def amount(model: CompressedModel) -> int:
        if kind == "flops":
            return sum(flops_by_component(model).values())
        return model.parameters() * (4 if kind == "disk_bytes" else 1)

    new = auto(ready, context(40), {kind: 0.85})
    result = new.history[-1]["result"]
    assert json.loads(json.dumps(result)) == result
    assert result["auto"]["target"]["before"] == amount(ready)
    assert result["auto"]["target"]["reached"] == result["auto"]["target"]["predicted"] == amount(new)
    assert amount(new) <= 0.85 * amount(ready)
    # A vision tower of 3 layers gets 8 units more of 2 * 48 + 1 weights each, a text tower of 2 layers of 2 * 32 + 1.
    largest_step = 8 * 3 * (2 * 48 + 1) * {"parameters": 1, "disk_bytes": 4, "flops": 10}[kind]
    assert amount(new) > 0.85 * amount(ready) - largest_step
    assert not new.custom
    stock_reload_is_equal(new, tmp_path)
    assert all(len(points) == 1 for points in result["auto"]["curves"].values())


def test_the_tower_that_does_not_matter_is_cut(ready: CompressedModel) -> None:
    with torch.no_grad():
        for layer in ready.module.text_model.encoder.layers:
            layer.mlp.fc2.weight.zero_()  # the text tower's feed-forward units do nothing
    new = auto(ready, context(40), {"parameters": ready.parameters() - 5000})
    ratios = new.history[-1]["result"]["auto"]["ratios"]
    assert ratios["text"] >= 0.5
    curves = new.history[-1]["result"]["auto"]["curves"]
    assert all(point["difference"] == 0 for point in curves["text"])


def test_an_absolute_number_and_named_towers(ready: CompressedModel) -> None:
    new = auto(ready, context(40), {"parameters": 80_000, "towers": ["vision"]})
    assert new.parameters() <= 80_000
    assert new.history[-1]["result"]["sizes"]["text"]["after"]["ffn"] == 64
    assert set(new.history[-1]["result"]["auto"]["curves"]) == {"vision"}


def speech() -> Context:
    task = AutomaticSpeechRecognition(type="automatic-speech-recognition", max_new_tokens=4)
    examples = tiny_data.examples(12)
    examples.narrow(task.roles, task.type, task.optional)
    return Context(task=task, train=examples, device="cpu")


def test_whisper_towers_by_name(tmp_path: Path) -> None:
    model = tiny_whisper.whisper()
    new = auto(model, speech(), {"parameters": 0.85, "ratios": [0.5]})
    assert set(new.history[-1]["result"]["auto"]["curves"]) == {"encoder", "decoder"}
    assert new.parameters() <= 0.85 * model.parameters()
    new.module.save_pretrained(tmp_path)
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert sum(p.numel() for p in again.parameters()) == new.parameters()


@pytest.mark.slow
def test_towers_that_share_a_size_have_one_curve_and_one_ratio() -> None:
    model, given = tiny_whisper.whisper(), speech()
    narrow = auto(model, given, {"parameters": 0.7, "ratios": [0.5]}, axis="width").history[-1]["result"]["auto"]
    assert narrow["ratios"] == {"encoder": 0.5, "decoder": 0.5}
    assert set(narrow["curves"]) == {"encoder+decoder"}


def test_per_layer_where_custom_shapes_are_allowed(ready: CompressedModel) -> None:
    new = auto(ready, context(40), {"parameters": 0.85}, allow_custom=True, round_to=1)
    assert new.custom
    widths = new.history[-1]["result"]["sizes"]["vision"]["after"]["ffn"]
    assert isinstance(widths, list)
    assert new.parameters() <= 0.85 * ready.parameters()


def test_what_cannot_be_reached_is_said_with_what_can(ready: CompressedModel) -> None:
    with pytest.raises(RecipeError, match=r"target\.parameters.*0\.75 of ffn.*leaves 59,481 \(0\.686 of it\).*least"):
        auto(ready, context(40), {"parameters": 0.5})
    with pytest.raises(RecipeError, match="nothing would be cut"):
        auto(ready, context(40), {"parameters": 10_000_000})
    with pytest.raises(RecipeError, match=r"target\.towers: unknown tower 'visoin'.*did you mean 'vision'"):
        auto(ready, context(40), {"parameters": 0.8, "towers": ["visoin"]})


def test_latency_is_timed_and_interpolated(ready: CompressedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if a millisecond went by for each 10000 parameters.
    monkeypatch.setattr(sensitivity, "time_calls", lambda model: model.parameters() / 10_000)
    monkeypatch.setattr("mmcompress.pruning.auto.time_calls", lambda model: model.parameters() / 10_000)
    given = context(40)
    new = auto(ready, given, {"latency_ms": 7.5})
    target = new.history[-1]["result"]["auto"]["target"]
    assert target["before"] == pytest.approx(8.6673)
    assert target["reached"] == pytest.approx(target["predicted"]) == pytest.approx(new.parameters() / 10_000)
    assert new.parameters() <= 75_000
    assert given.facts["latency_cut_ms"] == target["reached"]
    with pytest.raises(RecipeError, match=r"leaves 5\.95 ms"):
        auto(ready, context(40), {"latency_ms": 0.5})


def test_a_target_that_the_timing_misses_is_warned_of(ready: CompressedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "time_calls", lambda model: model.parameters() / 10_000)
    monkeypatch.setattr("mmcompress.pruning.auto.time_calls", lambda model: 99.0)
    given = context(40)
    auto(ready, given, {"latency_ms": 7.5})
    assert "it came to 99 ms" in given.warnings[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratio": "auto"}, "ratio: auto needs a target"),
        ({"ratio": 0.5, "target": {"parameters": 0.5}}, "target: is for ratio: auto"),
        ({"ratio": "auto", "target": {}}, "exactly one of parameters, flops, latency_ms, disk_bytes; found none"),
        ({"ratio": "auto", "target": {"parameters": 0.5, "flops": 0.5}}, "found parameters, flops"),
        ({"ratio": "auto", "target": {"parameters": 0}}, "greater than 0"),
    ],
)
def test_bad_settings_say_why(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Prune(**settings)


def test_a_word_that_is_not_auto_and_a_number_that_is_too_large(tmp_path: Path) -> None:
    for ratio, said in (("autp", "allowed: auto"), ({"vision": 1.5}, "less than 1")):
        with pytest.raises(RecipeError, match=said) as caught:
            make_recipe(tiny.recipe(tmp_path, passes=[{"pass": "prune", "ratio": ratio}]))
        assert ("allowed: auto" in str(caught.value)) == (ratio == "autp")


def test_axes_that_no_config_says_cannot_be_decided() -> None:
    sizes = {t: {"ffn": 64, "heads": 2, "depth": 2, "width": 32} for t in ("vision", "text")}
    step = Prune(ratio="auto", axis="heads", target={"parameters": 0.8}, allow_custom=True)
    assert any("none says heads alone" in text for text in step.check_against(FAMILY, sizes))
    assert Prune(ratio="auto", target={"parameters": 0.8}).check_against(FAMILY, sizes) == []
    assert Prune(ratio="auto", target={"parameters": 0.8}).uses == ("train",)


def test_check_assumes_one_ratio_and_says_so(tmp_path: Path) -> None:
    step = {"pass": "prune", "axis": "ffn", "ratio": "auto", "target": {"flops": 0.8}}
    recipe = make_recipe(tiny.recipe(tmp_path, passes=[step]))
    baseline, planned = plan(recipe)
    assert planned.flops <= 0.8 * baseline.flops
    assert "one ratio for all towers" in planned.assumed
    # The next gentler ratio that cuts 8 units less somewhere would miss it.
    assert planned.sizes["vision"]["ffn"] / 96 == pytest.approx(planned.sizes["text"]["ffn"] / 64, abs=8 / 64)
    assert planned.flops > 0.8 * baseline.flops - 16 * 3 * 4 * 48 * 10
    assert "1-prune: assumed: one ratio" in render_plan(recipe)
    wrong = make_recipe(tiny.recipe(tmp_path, passes=[{**step, "target": {"parameters": 0.1}}]))
    with pytest.raises(RecipeError, match=r"passes\.0 \(prune\): target.*least that can be reached"):
        plan(wrong)


def test_check_cannot_know_milliseconds() -> None:
    step = Prune(ratio="auto", target={"latency_ms": 5})
    settled, assumed = step.settled(FAMILY, tiny.clip_config())
    assert (settled.ratio, settled.target) == ({}, None)
    assert "only once they are measured" in assumed


def test_held_out_examples_are_not_those_that_are_scored_by() -> None:
    examples = tiny_data.examples(20)
    scoring, held = hold_out(examples, 64, seed=3)
    assert (len(scoring), len(held)) == (10, 10)
    named = [{row["image"]["path"] or row["image"]["bytes"] for row in part.rows} for part in (scoring, held)]
    assert not named[0] & named[1]
    assert hold_out(examples, 64, seed=3)[1].rows.indices == held.rows.indices  # type: ignore[attr-defined]
    assert hold_out(examples, 64, seed=4)[1].rows.indices != held.rows.indices  # type: ignore[attr-defined]


def test_reused_embeddings_change_nothing(ready: CompressedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given = context(40)
    scoring, held = hold_out(given.need_train("here"), 20, 0)
    cutting, asked = Cutting("ffn"), []
    plainly = TorchPredict.__call__
    monkeypatch.setattr(TorchPredict, "__call__", lambda self, name, inputs: asked.append(name) or plainly(self, name, inputs))
    measured = Sensitivity(ready, given, scoring, held)
    assert {"vision_model", "text_model"} == set(asked)
    asked.clear()
    model, quality, change = measured.cut(cutting, {"text": 0.75})
    assert set(asked) == {"text_model"}
    again = given.need_task("here").evaluate(TorchPredict(model, "cpu"), model.processor, held, given.reporter)
    assert quality.value == again.per_example["accuracy"].mean()
    assert change.difference == pytest.approx(quality.value - measured.quality.value)
