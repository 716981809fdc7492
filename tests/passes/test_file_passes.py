"""Quantize and export as passes: what they leave, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest

import mmcompress as mm
from mmcompress.context import Context
from mmcompress.data.examples import as_examples
from mmcompress.errors import DataError, RecipeError, UnavailableError
from mmcompress.passes._placement import _check_memory
from mmcompress.runtimes.onnx_predict import OnnxPredict
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.automatic_speech_recognition import AutomaticSpeechRecognition
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from tests import tiny
from tests.families import tiny_whisper
from tests.tiny_audio import recordings

TASK = ZeroShotImageClassification(type="zero-shot-image-classification", templates=["a photo of a {} ."])


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(task=TASK, train=as_examples(tiny.dataset(40)), workdir=tmp_path / "work")


def weights(path: Path) -> set[int]:
    return {t.data_type for t in onnx.load(path).graph.initializer if len(t.dims) == 2}


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
def test_quantize_leaves_int8_components_close_to_torch(model: mm.CompressedModel, context: Context, scheme: str) -> None:
    new = mm.passes.Quantize(scheme=scheme, samples=16).apply(model, context=context)
    assert new.onnx is not None
    assert sorted(p.name for p in new.onnx.iterdir()) == ["text_model_quantized.onnx", "vision_model_quantized.onnx"]
    assert onnx.TensorProto.INT8 in weights(new.onnx / "vision_model_quantized.onnx")
    pixels = {"pixel_values": np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype(np.float32)}
    ours, theirs = OnnxPredict(new.onnx)("vision_model", pixels), TorchPredict(model)("vision_model", pixels)
    a, b = ours["image_embeds"], theirs["image_embeds"]
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosine.min() > 0.98
    assert not np.array_equal(a, b)
    assert model.onnx is None
    assert not list((context.workdir / "float").iterdir())  # type: ignore[operator]


def test_static_quantization_needs_data(model: mm.CompressedModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="calibration"):
        mm.passes.Quantize().apply(model, context=Context(task=TASK, workdir=tmp_path))


def test_an_exclude_that_matches_nothing_is_a_mistake(model: mm.CompressedModel, context: Context) -> None:
    with pytest.raises(RecipeError, match="'visual_projecton' matches no layer"):
        mm.passes.Quantize(scheme="int8-dynamic", exclude=["visual_projecton"]).apply(model, context=context)
    mm.passes.Quantize(scheme="int8-dynamic", exclude=["visual_projection"]).apply(model, context=context)


def test_export_keeps_what_is_quantized_and_adds_the_rest(model: mm.CompressedModel, context: Context, tmp_path: Path) -> None:
    plain = mm.passes.Export().apply(model, context=context)
    assert plain.onnx is not None
    assert sorted(p.name for p in plain.onnx.iterdir()) == ["model.onnx", "text_model.onnx", "vision_model.onnx"]
    assert context.facts["parity"]["vision_model"]["min_cosine"] > 0.99999
    context.workdir = context.workdir / "two"  # type: ignore[operator]
    quantized = mm.passes.Quantize(scheme="int8-dynamic").apply(model, context=context)
    context.workdir = context.workdir / "three"
    both = mm.passes.Export(keep_float=True).apply(quantized, context=context)
    assert both.onnx is not None
    assert len(list(both.onnx.iterdir())) == 6
    apart = mm.passes.Export(combined=False).apply(quantized, context=Context(workdir=tmp_path))
    assert apart.onnx is not None
    assert sorted(p.name for p in apart.onnx.iterdir()) == ["text_model_quantized.onnx", "vision_model_quantized.onnx"]
    assert [h["pass"] for h in both.history] == ["quantize", "export"]


def test_a_pass_that_changes_weights_drops_stale_files(model: mm.CompressedModel, context: Context) -> None:
    exported = mm.passes.Export().apply(model, context=context)
    assert mm.passes.Prune(ratio=0.5).apply(exported).onnx is None


@pytest.mark.parametrize("name", ["Quantize", "Export"])
def test_file_passes_need_a_folder(model: mm.CompressedModel, name: str) -> None:
    with pytest.raises(DataError, match="workdir"):
        getattr(mm.passes, name)().apply(model)


@pytest.mark.parametrize(
    ("scheme", "suffixes", "least"),
    [
        ("int8-weight-only", ("_int8", "_int8"), 0.999),
        ("int4-weight-only", ("_q4", "_q4"), 0.9),
        ("float16", ("_fp16", "_fp16"), 0.9999),
        ("bfloat16", ("_bf16", "_bf16"), 0.999),
        ({"vision": "int8-dynamic", "text_model": "int4-weight-only"}, ("_q4", "_quantized"), 0.9),
        ({"vision": "float16"}, ("", "_fp16"), 0.9999),
    ],
)
def test_files_of_every_scheme_are_found_and_close(
    model: mm.CompressedModel, context: Context, scheme: str | dict[str, str], suffixes: tuple[str, str], least: float
) -> None:
    new = mm.passes.Quantize(scheme=scheme).apply(model, context=context)
    assert new.onnx is not None
    assert sorted(p.name for p in new.onnx.iterdir()) == [
        f"{name}{suffix}.onnx" for name, suffix in zip(("text_model", "vision_model"), suffixes, strict=True)
    ]
    pixels = {"pixel_values": np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype(np.float32)}
    a = OnnxPredict(new.onnx, 1)("vision_model", pixels)["image_embeds"]
    b = TorchPredict(model)("vision_model", pixels)["image_embeds"]
    assert ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min() > least
    combined = mm.passes.Export().apply(new, context=Context(workdir=context.workdir / "two"))  # type: ignore[operator]
    assert combined.onnx is not None
    one = f"model{suffixes[0]}.onnx"
    assert (combined.onnx / one).exists() == (suffixes[0] == suffixes[1])


@pytest.mark.slow
def test_weights_are_rounded_by_calibration_examples(model: mm.CompressedModel, context: Context) -> None:
    new = mm.passes.Quantize(scheme="int4-weight-only", algorithm="gptq", samples=16).apply(model, context=context)
    assert new.onnx is not None
    # What rounding to the nearest would have made of the same float model, on an example that calibrated.
    again = mm.passes.Quantize(scheme="int4-weight-only").apply(model, context=Context(workdir=context.workdir / "rtn"))  # type: ignore[operator]
    assert again.onnx is not None
    pixels = {"pixel_values": next(mm.passes.Quantize(samples=16)._calibration(model, context, "vision_model"))["pixel_values"]}
    wanted = TorchPredict(model)("vision_model", pixels)["image_embeds"]
    ours, nearest = (OnnxPredict(f, 1)("vision_model", pixels)["image_embeds"] for f in (new.onnx, again.onnx))
    assert np.linalg.norm(ours - wanted) < 0.8 * np.linalg.norm(nearest - wanted)


def test_a_decoder_learns_from_answers_of_one_word_too(tmp_path: Path) -> None:
    model, task = tiny_whisper.whisper(), AutomaticSpeechRecognition(type="automatic-speech-recognition", max_new_tokens=4)
    examples = recordings(["one", "two", "three"] * 4)
    examples.narrow(task.roles, task.type, task.optional)
    step = mm.passes.Quantize(scheme="int4-weight-only", algorithm="gptq", samples=12)
    new = step.apply(model, context=Context(task=task, train=examples, workdir=tmp_path))
    assert new.onnx is not None
    assert (new.onnx / "decoder_model_merged_q4.onnx").exists()
    given = list(step._calibration(model, Context(task=task, train=examples), "decoder_model_merged"))
    assert [ids.shape[1] for ids in (one["input_ids"] for one in given)] == [1, 1]
    assert len(np.unique(given[0]["input_ids"])) == 1
    assert len(np.unique(given[1]["input_ids"])) == 3


def test_an_algorithm_without_weights_to_round_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="algorithm: gptq is of the weight-only schemes, and `scheme` names none"):
        mm.passes.Quantize(scheme="float16", algorithm="gptq")
    with pytest.raises(ValueError, match="names none"):
        mm.passes.Quantize(scheme={"vision": "int8-static"}, algorithm="awq")
    mm.passes.Quantize(scheme="int8-static", algorithm="gptq")  # of decoders


def test_a_scheme_for_something_unknown_is_refused(model: mm.CompressedModel, context: Context) -> None:
    step = mm.passes.Quantize(scheme={"vison": "float16"})
    with pytest.raises(RecipeError, match=r"'vison' is neither a tower nor a component; allowed: vision, text, vision_model"):
        step.settled(model.family, model.module.config)
    with pytest.raises(RecipeError, match="'vison' is neither"):
        step.apply(model, context=context)


def test_a_broken_expression_is_refused_with_the_recipe() -> None:
    with pytest.raises(ValueError, match=r"exclude: 're:\(' is no regular expression"):
        mm.passes.Quantize(exclude=["re:("])


def test_a_measured_placement_can_be_used_again_without_measuring(
    model: mm.CompressedModel, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmcompress.passes._placement.candidates", lambda scheme, runtime: ("static", "dynamic-fused"))
    monkeypatch.setattr("mmcompress.passes._placement.TURN_SECONDS", 0.001)
    settings = {"samples": 16, "threads": 1, "min_cosine": 0.9}
    measured = mm.passes.Quantize(placement="measure", **settings).apply(model, context=context)
    assert measured.onnx is not None
    found = context.facts["placement"]
    chosen = {name: one["chosen"] for name, one in found.items()}
    assert set(chosen) == {"vision_model", "text_model"}
    assert set(chosen.values()) <= {"static", "dynamic-fused"}
    for one in found.values():
        assert {c["name"] for c in one["candidates"]} == {"float32", "static", "dynamic-fused"}
        assert all(0 < c["low"] <= c["ms"] <= c["high"] for c in one["candidates"])
        assert sum(one["profile_ms"].values()) > 0
        # Sizes this small never pay, and then the reasons are there; where they do, there are none.
        assert bool(one["reasons"]) != one["pays"]
    assert {n: c["placement"] for n, c in measured.history[-1]["result"]["components"].items()} == chosen
    context.workdir = context.workdir / "again"  # type: ignore[operator]
    context.facts.clear()
    again = mm.passes.Quantize(placement=chosen, **settings).apply(model, context=context)
    assert again.onnx is not None
    assert context.facts == {}
    for path in sorted(measured.onnx.iterdir()):
        assert (again.onnx / path.name).read_bytes() == path.read_bytes()


def test_placements_that_do_not_fit_into_memory_together_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [250_000], np.zeros(250_000, np.float32))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "one", [], [], [weight])), tmp_path / "one.onnx")
    files = dict.fromkeys(("float32", "static"), tmp_path / "one.onnx")  # 2 times 100 MB and twice 1 MB
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=205_000_000))
    _check_memory("vision_model", files)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=203_000_000))
    said = "the 2 files of vision_model that take turns need about 0.2 GB of memory together, and 0.2 GB are free; set placement"
    with pytest.raises(UnavailableError, match=said):
        _check_memory("vision_model", files)


def test_a_tower_stays_float_where_no_placement_keeps_the_bound(
    model: mm.CompressedModel, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmcompress.passes._placement.candidates", lambda scheme, runtime: ("dynamic",))
    monkeypatch.setattr("mmcompress.passes._placement.TURN_SECONDS", 0.001)
    new = mm.passes.Quantize(placement="measure", min_cosine=1.0, threads=1, samples=8).apply(model, context=context)
    assert new.onnx is not None
    assert sorted(p.name for p in new.onnx.iterdir()) == ["text_model.onnx", "vision_model.onnx"]
    assert [text for text in context.warnings if "keeps a cosine of 1.0; it stays in float32" in text]


def test_a_placement_of_something_unknown_is_refused(model: mm.CompressedModel) -> None:
    step = mm.passes.Quantize(placement={"txt": "dynamic"})
    with pytest.raises(RecipeError, match="placement: 'txt' is neither a tower nor a component"):
        step.settled(model.family, model.module.config)


@pytest.mark.parametrize(
    ("scheme", "settings"), [("int8-static", {"algorithm": "gptq"}), ("int8-dynamic", {"backend": "neural-compressor"})]
)
def test_rounding_of_decoders_is_refused_where_there_are_none(
    scheme: Any, settings: dict[str, Any], model: mm.CompressedModel, context: Context
) -> None:
    step = mm.passes.Quantize(scheme=scheme, **settings)
    name, value = next(iter(settings.items()))
    said = f"{name}: {value} rounds the weights of weight-only schemes; under {scheme} only decoders get one, and clip has none"
    with pytest.raises(RecipeError, match=said):
        step.settled(model.family, model.module.config)
    with pytest.raises(RecipeError, match=said):
        step.run(model, context)
