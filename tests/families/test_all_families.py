"""Every family x every pass x save, stock reload, ONNX parity: what all families promise, on tiny models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmcompress import passes, registry
from mmcompress.context import Context
from mmcompress.data.examples import Examples
from mmcompress.inspect import inspect_model, render_inspection
from mmcompress.measure.rows import PARITY_EXAMPLES, check_float_parity, parity
from mmcompress.measure.size import flops_by_component, parameters_by_tower
from mmcompress.model import CompressedModel, align, load
from mmcompress.pruning import cut
from mmcompress.runtimes.onnx_predict import OnnxPredict
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.base import Task
from mmcompress.training.autocast import computing
from mmcompress.training.teacher import store_halves
from tests import tiny_data

HERE = Path(__file__).parent
Make = Callable[[], CompressedModel]


def _collected() -> dict[str, tuple[Make, str]]:
    found: dict[str, tuple[Make, str]] = {}
    for path in sorted(HERE.glob("tiny_*.py")):
        module: Any = importlib.import_module(f"tests.families.{path.stem}")
        found |= {name: (make, module.TASKS[name]) for name, make in module.MODELS.items()}
    return found


MODELS = _collected()
# One model of each family in the default suite, all of them in the slow one, where a test exports: that takes seconds.
FIRST = {make().family.name: name for name, (make, _) in reversed(MODELS.items())}
EXPORTED = [pytest.param(name, marks=() if name in FIRST.values() else pytest.mark.slow) for name in MODELS]
# Rounding is the same code for all families: three kinds of model in the default suite, all of them in the slow one.
ROUNDED = [pytest.param(n, marks=() if n in ("clip", "blip-captions", "whisper") else pytest.mark.slow) for n in MODELS]
AXES = [(name, axis) for name in MODELS for axis in ("ffn", "depth", "width", "heads")]


def made(name: str) -> CompressedModel:
    """A fresh tiny model."""
    return MODELS[name][0]()


@cache
def task_of(name: str) -> Task:
    kind = MODELS[name][1]
    task: Task = registry.find("tasks", kind).TASK.model_validate({"type": kind})
    return task


def context(name: str, folder: Path | None = None, count: int = 24) -> Context:
    task = task_of(name)
    found: Examples = tiny_data.examples(count)
    found.narrow(task.roles, task.type, task.optional)
    return Context(task=task, train=found, workdir=folder, baseline=lambda: made(name))


def same_outputs(model: CompressedModel, again: CompressedModel) -> None:
    """Both give the same numbers, bit by bit."""
    ours, theirs = TorchPredict(model), TorchPredict(again)
    for name, part in model.family.components(model.module).items():
        inputs = {k: v.numpy() for k, v in model.family.example_inputs(model.module.config, part, 2).items()}
        a, b = ours(name, inputs), theirs(name, inputs)
        assert list(a) == list(part.outputs)
        for output in a:
            np.testing.assert_array_equal(a[output], b[output], err_msg=f"{name}.{output}")


def check_stock(model: CompressedModel, folder: Path) -> CompressedModel:
    """Saves, loads with stock transformers alone, and compares; returns what `load` gives."""
    model.save(folder)
    stock = model.family.model_class().from_pretrained(folder).eval()
    align(stock)
    same_outputs(model, CompressedModel(stock, model.processor, model.family, "stock"))
    again = load(folder)
    assert again.history == model.history
    return again


def test_every_family_is_tried() -> None:
    tried = {make().family.name for make, _ in MODELS.values()}
    assert set(registry.names("families")) == {name.replace("_", "-") for name in tried}


@pytest.mark.parametrize("name", MODELS)
def test_a_teacher_with_rounded_weights_answers_the_same_under_autocast(name: str) -> None:
    model = made(name)
    batch = {**model.family.example_batch(model.module.config, 3)}
    cpu = torch.device("cpu")
    with torch.no_grad(), computing(cpu, "bf16"):
        before = model.family.forward(model.module, batch)
    weights = sum(p.nbytes for p in model.module.parameters())
    store_halves(model.module)
    with torch.no_grad(), computing(cpu, "bf16"):
        after = model.family.forward(model.module, batch)
    assert sum(p.nbytes for p in model.module.parameters()) < 0.9 * weights
    for tower, embeds in before.embeds.items():
        assert torch.equal(embeds, after.embeds[tower]), tower
    if before.logits is not None:
        assert torch.equal(before.logits, after.logits)


@pytest.mark.parametrize("name", MODELS)
def test_it_saves_loads_and_is_inspected_by_tower(name: str, tmp_path: Path) -> None:
    model = made(name)
    again = check_stock(model, tmp_path / "model")
    found = inspect_model(again)
    assert set(model.family.towers) <= set(found["towers"])
    assert sum(t["parameters"] for t in found["towers"].values()) == found["parameters"] == model.parameters()
    for tower in model.family.towers:
        assert set(found["towers"][tower]["axes"]) == set(model.family.tower_axes(tower))
        for axis, one in found["towers"][tower]["axes"].items():
            assert one["size"] >= 1, f"{tower} {axis}"
            assert f"{tower}" in render_inspection(found)
    assert all(flops > 0 for flops in flops_by_component(model).values() if flops is not None) or "embed" in str(
        flops_by_component(model)
    )


@pytest.mark.parametrize("name", MODELS)
def test_config_sizes_are_the_modules_and_can_be_set(name: str) -> None:
    model = made(name)
    family, config = model.family, model.module.config
    sizes = family.config_sizes(config)
    measured = cut.smallest(cut.sizes(model))
    for tower, axes in measured.items():
        for axis, size in axes.items():
            assert sizes[tower][axis] == size, f"{tower} {axis}"
    fewer = {t: {a: (1 if a == "depth" else s) for a, s in axes.items()} for t, axes in sizes.items()}
    assert family.config_sizes(family.resized_config(config, fewer)) == fewer
    assert family.config_sizes(config) == sizes, "the config itself was changed"


@pytest.mark.parametrize("name", MODELS)
def test_forward_gives_what_the_task_trains_on(name: str) -> None:
    model, where = made(name), context(name)
    task = task_of(name)
    task.fits(model.family.abilities, model.family.name)
    rows = [where.need_train("x")[i] for i in range(6)]
    batch = task.collate(rows, model.processor, where.need_train("x"), 0)
    outputs = model.family.forward(model.module, {k: v for k, v in batch.items() if k != "target"}, hidden=False)
    loss = task.loss(outputs, batch)
    loss.backward()
    assert torch.isfinite(loss)
    towers = {
        t: any(p.grad is not None and p.grad.abs().sum() > 0 for m in ms for p in m.parameters())
        for t, ms in model.family.tower_modules(model.module).items()
    }
    assert all(towers.values()), f"no gradient in some tower: {towers}"


@pytest.mark.parametrize(("name", "axis"), AXES)
def test_prune_on_every_axis_named(name: str, axis: str, tmp_path: Path) -> None:
    model = made(name)
    family = model.family
    towers = [t for t in family.towers if axis in family.tower_axes(t)]
    if not towers:
        pytest.skip(f"{name} has no axis {axis}")
    stock = axis in family.stock_axes
    together = family.cut_together(axis)
    for tower in [*([together] if together else [(t,) for t in towers])]:
        ratio = dict.fromkeys(tower, 0.5)
        pruned = passes.Prune(axis=axis, ratio=ratio, criterion="magnitude", round_to=1, allow_custom=not stock).apply(model)
        before, after = parameters_by_tower(model), parameters_by_tower(pruned)
        assert all(after[t] < before[t] for t in tower)
        assert pruned.custom == (not stock)
        if stock:
            check_stock(pruned, tmp_path / "-".join(tower))
        else:
            pruned.save(tmp_path / "-".join(tower))
            same_outputs(pruned, load(tmp_path / "-".join(tower)))


@pytest.mark.parametrize("name", [name for name in MODELS if "width" in made(name).family.stock_axes])
def test_width_with_narrower_heads(name: str, tmp_path: Path) -> None:
    model = made(name)
    family = model.family
    before = family.config_sizes(model.module.config)
    towers = [t for t in family.towers if "width" in family.tower_axes(t)]
    for tower in [family.cut_together("width")] if family.cut_together("width") else [(t,) for t in towers]:
        step = passes.Prune(axis="width", heads="narrower", ratio=dict.fromkeys(tower, 0.5), round_to=1)
        pruned = step.apply(model)
        after = family.config_sizes(pruned.module.config)
        assert after == step.plan(before)
        assert all(after[t].get("heads") == before[t].get("heads") for t in tower)
        assert all(after[t]["width"] == before[t]["width"] // 2 for t in tower)
        check_stock(pruned, tmp_path / "-".join(tower))


@pytest.mark.parametrize("name", MODELS)
def test_prune_by_data(name: str, tmp_path: Path) -> None:
    model = made(name)
    towers = [t for t in model.family.towers if "ffn" in model.family.tower_axes(t)]
    for how in ({"criterion": "taylor"}, {"criterion": "activation"}, {"reconstruct": True}):
        step = passes.Prune(axis="ffn", ratio=dict.fromkeys(towers, 0.5), **how, round_to=1, samples=16, batch_size=8)
        pruned, facts = step.run(model, context(name))
        assert facts["parameters"] != {}
    assert 0 <= facts["not_made_up_for"] < 1
    check_stock(pruned, tmp_path / "model")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", ["finetune", "distill"])
def test_training_passes(name: str, which: str, tmp_path: Path) -> None:
    model = made(name)
    step = {"finetune": passes.Finetune, "distill": passes.Distill}[which](max_steps=2, batch_size=8, learning_rate=1e-3)
    new, facts = step.run(model, context(name))
    assert facts["steps"] == 2
    before, after = model.module.state_dict(), new.module.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    check_stock(new, tmp_path / "model")


@pytest.mark.parametrize("name", EXPORTED)
def test_export_gives_the_same_answers(name: str, tmp_path: Path) -> None:
    model, where = made(name), context(name, tmp_path)
    new, _ = passes.Export().run(model, where)
    assert new.onnx is not None
    predict = OnnxPredict(new.onnx)
    assert set(predict.components) == set(model.family.components(model.module))
    found = parity(model, predict, task_of(name), where.need_train("x"))
    assert set(found) == set(predict.components)
    check_float_parity(found, name)
    assert all(one.max_abs_difference < 1e-4 and 0 < one.n <= PARITY_EXAMPLES * 8 for one in found.values()), found
    ours, theirs = (
        task_of(name).evaluate(p, model.processor, where.need_train("x"), where.reporter) for p in (TorchPredict(model), predict)
    )
    for metric, values in ours.per_example.items():
        np.testing.assert_allclose(values, theirs.per_example[metric], err_msg=metric)


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("scheme", ["int8-static", pytest.param("int8-dynamic", marks=pytest.mark.slow)])
def test_quantize(name: str, scheme: str, tmp_path: Path) -> None:
    model, where = made(name), context(name, tmp_path)
    new, _ = passes.Quantize(scheme=scheme, samples=16).run(model, where)
    assert new.onnx is not None
    predict = OnnxPredict(new.onnx)
    assert set(predict.components) == set(model.family.components(model.module))
    assert all(path.stem.endswith("_quantized") for path in predict.files.values())
    found = parity(model, predict, task_of(name), where.need_train("x"))
    assert all(one.min_cosine > 0.8 for one in found.values()), found
    task_of(name).evaluate(predict, model.processor, where.need_train("x"), where.reporter)


@pytest.mark.parametrize("name", ROUNDED)
def test_qat(name: str, tmp_path: Path) -> None:
    model, where = made(name), context(name, tmp_path)
    new, facts = passes.Qat(max_steps=2, batch_size=8).run(model, where)
    assert new.onnx is not None
    for part, found in facts["components"].items():
        if found:
            assert found["onnx_to_fake"]["least_cosine"] > 0.99, part
    predict = OnnxPredict(new.onnx)
    task_of(name).evaluate(predict, new.processor, where.need_train("x"), where.reporter)
    check_stock(new, tmp_path / "model")
