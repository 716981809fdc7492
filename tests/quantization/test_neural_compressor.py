"""The optional backend: what is refused without it, what is read out of it, and, where it is installed, that it rounds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mmcompress as mm
from mmcompress.passes._weights import backend_mistakes
from mmcompress.quantization import neural_compressor
from mmcompress.quantization.blocks import nearest_grid
from mmcompress.quantization.neural_compressor import BackendError, Toy, probe, round_weights
from mmcompress.quantization.weight_only import quantize_weights

from .conftest import image_inputs
from .test_gptq import run

INSTALLED = importlib.util.find_spec("neural_compressor") is not None
needs_it = pytest.mark.skipif(not INSTALLED, reason="needs the extra neural-compressor")
BATCHES = [(torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(i)),) for i in range(2)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "probes"


@pytest.mark.skipif(INSTALLED, reason="says what is missing")
def test_without_the_package_the_extra_is_named() -> None:
    (said,) = backend_mistakes("gptq")
    assert said.startswith(
        "algorithm: gptq with backend neural-compressor does not work here: neural-compressor is not installed"
    )
    assert "pip install 'mmcompress[neural-compressor]'" in said
    with pytest.raises(BackendError, match=r"cannot be imported .*pip install 'mmcompress\[neural-compressor\]'"):
        round_weights(Toy().eval(), BATCHES, 4, 32, "rtn")


def test_the_pass_asks_the_probe_and_nothing_else(model: mm.CompressedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(neural_compressor, "probe", lambda algorithm: asked.append(algorithm) or f"no {algorithm} today")
    step = mm.passes.Quantize(scheme="int4-weight-only", backend="neural-compressor", algorithm="awq")
    assert step.check_against(model.family, {}) == [
        "algorithm: awq with backend neural-compressor does not work here: no awq today"
    ]
    assert mm.passes.Quantize(scheme="int4-weight-only", algorithm="awq").check_against(model.family, {}) == []
    assert asked == ["awq"]


def test_static_int8_is_asked_for_as_well(model: mm.CompressedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(neural_compressor, "probe", lambda algorithm: asked.append(algorithm) or f"no {algorithm} today")
    step = mm.passes.Quantize(scheme={"vision": "int8-static"}, backend="neural-compressor", reduce_range=False)
    wrong = step.check_against(model.family, {})
    assert wrong[1] == "scheme: int8-static with backend neural-compressor does not work here: no static today"
    assert len(wrong) == 2
    assert asked == ["rtn", "static"]
    narrow = mm.passes.Quantize(scheme="int8-static", backend="neural-compressor", reduce_range=True)
    assert "overflow on x86 without VNNI" in narrow.check_against(model.family, {})[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"smooth": "auto"}, "smooth: int8-static of the backend neural-compressor takes only what is the default"),
        ({"max_drop": 1}, "max_drop: int8-static of"),
        ({"placement": "measure"}, "placement: int8-static of"),
        ({"calibration": "mse"}, "calibration: int8-static of the backend neural-compressor takes min-max or entropy"),
    ],
)
def test_what_the_backend_does_not_do_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mm.passes.Quantize(scheme="int8-static", backend="neural-compressor", **settings)
    mm.passes.Quantize(scheme="int8-static", backend="neural-compressor", calibration="entropy")


def test_settings_that_contradict_are_mistakes() -> None:
    with pytest.raises(ValueError, match="algorithm: autoround needs `backend: neural-compressor`; here are rtn, gptq, awq"):
        mm.passes.Quantize(scheme="int4-weight-only", algorithm="autoround")
    with pytest.raises(ValueError, match="backend: neural-compressor is of the weight-only schemes, and `scheme` names none"):
        mm.passes.Quantize(scheme="float16", backend="neural-compressor")


def test_a_probe_is_asked_once_for_each_set_of_versions(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    versions = {"neural-compressor": "1"}

    class Done:
        stdout, stderr = "noise\nneural-compressor's gptq fails: KeyError: 'x'\n", ""

    monkeypatch.setattr(neural_compressor, "_version", versions.get)
    monkeypatch.setattr(neural_compressor.subprocess, "run", lambda words, **_: calls.append(words) or Done)
    for _ in range(2):
        assert probe("gptq") == "neural-compressor's gptq fails: KeyError: 'x'"
    assert len(calls) == 1
    versions["torch"] = "2"
    monkeypatch.setattr(Done, "stdout", "noise\nworks\n")
    assert probe("gptq") is None
    assert len(calls) == 2
    assert sorted(json.loads(path.read_text())["wrong"] is None for path in cache.iterdir()) == [False, True]


def test_given_digits_stand_in_the_file(exported, tmp_path) -> None:
    """One layer's digits are given and wrong on purpose; the others are rounded as ever."""
    path = "model.vision_model.encoder.layers.0.mlp.fc1"
    weight = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    for bits in (4, 8):
        grid = nearest_grid(weight, bits, 32)
        # Zero points of their own, at 8 bits as well.
        grid.zeros[:] = np.clip(grid.zeros + 1, 0, 2**bits - 1)
        digits = grid.digits(weight)
        inputs = {key: value.numpy() for key, value in image_inputs(3).items()}
        plain, given = tmp_path / "plain.onnx", tmp_path / "given.onnx"
        quantize_weights(exported["vision"], plain, bits=bits, block_size=32)
        result = quantize_weights(exported["vision"], given, bits=bits, block_size=32, rounded={path: (digits, grid)})
        assert result.left_float == ()
        assert np.abs(run(plain, inputs)[0] - run(given, inputs)[0]).max() > 0.01
        excluded = quantize_weights(exported["vision"], given, bits=bits, rounded={path: (digits, grid)}, exclude=["fc1"])
        assert len(excluded.left_float) == 2


@needs_it
@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "bits"), [("rtn", 4), ("rtn", 8), ("gptq", 4), ("gptq", 8), ("autotune", 4)])
def test_it_rounds_what_our_grid_holds(algorithm: str, bits: int) -> None:
    toy = Toy().eval()
    found = round_weights(toy, BATCHES, bits, 32, algorithm)
    assert {"layers.0.fc1", "layers.1.fc2"} <= set(found)
    for name, (digits, grid) in found.items():
        weight = toy.get_submodule(name).weight.detach().numpy().T
        far = np.abs(grid.values(digits) - weight) / np.repeat(grid.scales, grid.block_size, axis=0)[: len(weight)]
        assert far.max() < (0.55 if algorithm == "rtn" else 8)  # its scales are of 16 bits
        assert digits.shape == weight.shape


@needs_it
@pytest.mark.slow
def test_what_does_not_work_is_refused_by_name() -> None:
    assert probe("rtn") is None
    for algorithm in ("awq", "autoround"):
        wrong = probe(algorithm)
        assert wrong is None or wrong.startswith(f"neural-compressor's {algorithm}")
