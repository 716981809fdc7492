"""`student:` of distill: cut out of the model, a checkpoint, or a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from mmcompress.context import Context
from mmcompress.data.examples import as_examples
from mmcompress.errors import ModelError, RecipeError
from mmcompress.families.clip import FAMILY
from mmcompress.model import CompressedModel, load
from mmcompress.passes import _student
from mmcompress.passes.distill import Distill
from mmcompress.passes.prune import Prune
from mmcompress.plan import plan
from mmcompress.pruning.cut import sizes
from mmcompress.recipe import load_recipe
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from tests import tiny
from tests.families import tiny_blip, tiny_whisper

SHORT: dict[str, Any] = {"max_steps": 1, "batch_size": 16, "precision": "fp32"}
TASK = ZeroShotImageClassification(type="zero-shot-image-classification")


def context(teacher: CompressedModel) -> Context:
    return Context(task=TASK, train=as_examples(tiny.dataset(32)), baseline=teacher.clone, seed=3)


def test_a_student_inherits_the_best_units_and_spaced_layers(tmp_path: Path) -> None:
    model = tiny.clip(num_hidden_layers=4)
    before = {name: values.clone() for name, values in model.module.state_dict().items()}
    shape = {"vision": {"depth": 2, "ffn": 0.5, "criterion": "magnitude"}, "text": {"depth": 0.5}}
    new = Distill(**SHORT, student=shape, learning_rate=1e-9).apply(model, context=context(model))
    assert all(torch.equal(values, before[name]) for name, values in model.module.state_dict().items())
    expected = {
        "vision": {"ffn": 48, "depth": 2, "width": 48, "heads": 3},
        "text": {"ffn": 64, "depth": 1, "width": 32, "heads": 2},
    }
    assert FAMILY.config_sizes(new.module.config) == expected
    assert Distill(student=shape).plan_for(FAMILY, FAMILY.config_sizes(model.module.config)) == expected
    # The same as pruning by hand, but for one step at a rate that changes next to nothing.
    cut = Prune(axis="ffn", ratio={"vision": 0.5}, criterion="magnitude").apply(model)
    cut = Prune(axis="depth", ratio={"vision": 0.5, "text": 0.5}, criterion="spacing").apply(cut)
    for name, values in cut.module.state_dict().items():
        torch.testing.assert_close(new.module.state_dict()[name], values, atol=1e-6, rtol=0)
    (entry,) = new.history
    assert entry["result"]["student"]["kept_layers"] == {"vision": [0, 3], "text": [1]}
    assert entry["result"]["student"]["parameters"] == {"before": model.parameters(), "after": new.parameters()}
    new.save(tmp_path / "student")
    assert sum(p.numel() for p in CLIPModel.from_pretrained(tmp_path / "student").parameters()) == new.parameters()


def test_one_shape_for_all_towers_with_a_criterion_that_sees_data() -> None:
    model = tiny.clip()
    new = Distill(**SHORT, student={"depth": 2, "ffn": 0.5, "width": 0.67}).apply(model, context=context(model))
    found = sizes(new)
    assert {tower: own["depth"] for tower, own in found.items()} == {"vision": 2, "text": 2}
    assert FAMILY.config_sizes(new.module.config)["vision"] == {"ffn": 48, "depth": 2, "width": 32, "heads": 2}
    again = Distill(**SHORT, student={"depth": 2, "ffn": 0.5, "width": 0.67}).apply(model, context=context(model))
    assert all(torch.equal(a, b) for a, b in zip(new.module.parameters(), again.module.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["whisper", "blip"])
def test_other_families(kind: str) -> None:
    model = tiny_whisper.whisper() if kind == "whisper" else tiny_blip.captions()
    family = model.family
    shape = _student.Shape(depth=1, ffn=0.5, criterion="magnitude")
    before = family.config_sizes(model.module.config)
    assert _student.mistakes(shape, family, before) == []
    parameters = model.parameters()
    new, facts = _student.inherit(shape, model, Context(consume=True))  # as in a run: the model given is cut itself
    after = family.config_sizes(new.module.config)
    assert after == _student.plan(shape, family, before)
    assert all(own["depth"] == 1 and own["ffn"] * 2 == before[tower]["ffn"] for tower, own in after.items())
    assert facts["parameters"] == {"before": parameters, "after": new.parameters()}
    assert new.parameters() < parameters
    if kind == "blip":
        (said,) = _student.mistakes(_student.Shape(width=0.5), family, before)
        assert "student: width cannot be cut in the family" in said


def test_a_checkpoint_takes_the_models_place(tmp_path: Path) -> None:
    small = tiny.clip(seed=4, num_hidden_layers=1)
    folder = small.save(tmp_path / "small")
    teacher = tiny.clip()
    new = Distill(**SHORT, student=str(folder)).apply(teacher, context=context(teacher))
    assert FAMILY.config_sizes(new.module.config) == FAMILY.config_sizes(small.module.config)
    assert new.history[-1]["result"]["student"] == {"source": str(folder), "parameters": small.parameters()}
    assert new.history[-1]["result"]["steps"] == 1
    other = tiny.clip(image_size=24)
    with pytest.raises(ModelError, match="made for pictures of shape"):
        Distill(**SHORT, student=str(folder)).apply(other, context=context(other))


def test_a_config_alone_starts_from_the_seed(tmp_path: Path) -> None:
    folder = tmp_path / "config"
    tiny.clip_config(num_hidden_layers=1).save_pretrained(folder)
    teacher = tiny.clip()
    made = [Distill(**SHORT, student=str(folder)).apply(teacher, context=context(teacher)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(m.module.parameters() for m in made), strict=True))
    assert load(made[0].save(tmp_path / "saved")).parameters() == made[0].parameters()


def recipe(tmp_path: Path, student: Any) -> Path:
    data = tiny.recipe(tmp_path, passes=[{"pass": "distill", "student": student}])
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(data))
    return path


def test_check_knows_the_students_size_without_weights(tmp_path: Path) -> None:
    steps = plan(load_recipe(recipe(tmp_path, {"depth": 1, "ffn": 0.5, "criterion": "magnitude"})), 48)
    model = load(tmp_path / "model")
    new = Distill(**SHORT, student={"depth": 1, "ffn": 0.5, "criterion": "magnitude"}).apply(model, context=context(model))
    assert steps[1].parameters == new.parameters() < steps[0].parameters
    config = tmp_path / "config"
    tiny.clip_config(num_hidden_layers=1, intermediate_size=32).save_pretrained(config)
    steps = plan(load_recipe(recipe(tmp_path, str(config))), 48)
    assert steps[1].sizes["vision"] == {"ffn": 32, "depth": 1, "width": 48, "heads": 3}


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"depth": 9}, "depth: the vision tower has 3 layers, fewer than the 9"),
        ({"visoin": {"depth": 1}}, "unknown tower 'visoin'"),
        ({"ffn": 0.01}, "would leave none"),
        ({"ffn": 1.5}, "student.ffn"),
        ({"dpth": 2}, "dpth"),
        ({}, "says nothing to make smaller"),
        ({"ffn": 0.5, "criterion": "spacing"}, "unknown criterion 'spacing'"),
        ("/no/such/folder", "no such folder"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path: Path, student: Any, said: str) -> None:
    with pytest.raises((RecipeError, ModelError)) as caught:
        plan(load_recipe(recipe(tmp_path, student)), 48)
    assert said in str(caught.value)
    assert "shape." not in str(caught.value)
