"""A graph whose layers are switched between int8 and float gives what files with those layers excluded give."""

import re
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from mmcompress.quantization.ptq import quantize_static_int8
from mmcompress.quantization.ranges import collect_ranges
from mmcompress.quantization.switchboard import Switchboard

from .conftest import image_inputs, text_inputs


def feeds(name: str, batch: int) -> dict[str, np.ndarray]:
    made = image_inputs(batch) if name == "vision" else text_inputs(batch, 8)
    return {key: value.numpy() for key, value in made.items()}


def run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return ort.InferenceSession(path).run(None, inputs)[0]


@pytest.mark.parametrize("name", ["vision", "text"])
def test_every_choice_gives_what_its_own_file_gives(exported, tmp_path, name):
    """Integer kernels add in another order, so to rounding; a step of an activation is a hundred times as much."""
    ranges = collect_ranges(exported[name], [feeds(name, 6)])
    exclude = ["token_embedding"]
    quantize_static_int8(exported[name], tmp_path / "all.onnx", ranges, exclude=exclude, reduce_range=True)
    board = Switchboard(exported[name], tmp_path / "all.onnx")
    assert len(board.layers) == 13 + (name == "vision")
    inputs = feeds(name, 5)
    output = f"{'image' if name == 'vision' else 'text'}_embeds"
    for kept in ([], [board.layers[3]], list(board.layers[5:])):
        target = tmp_path / "chosen.onnx"
        patterns = [f"re:^{re.escape(layer)}$" for layer in kept]
        quantize_static_int8(exported[name], target, ranges, exclude=[*exclude, *patterns], reduce_range=True)
        found = board(inputs, [layer for layer in board.layers if layer not in kept])[output]
        np.testing.assert_allclose(found, run(target, inputs), atol=2e-5)
    np.testing.assert_allclose(board(inputs, [])[output], run(exported[name], inputs), atol=2e-5)


def test_distances_are_those_of_single_layers(exported, tmp_path):
    ranges = collect_ranges(exported["vision"], [feeds("vision", 6)])
    quantize_static_int8(exported["vision"], tmp_path / "all.onnx", ranges, reduce_range=True)
    board = Switchboard(exported["vision"], tmp_path / "all.onnx")
    found = board.distances([feeds("vision", 5)])
    assert set(found) == set(board.layers)
    layer = max(found, key=lambda one: found[one])
    only = tmp_path / "only.onnx"
    quantize_static_int8(exported["vision"], only, ranges, include=[f"re:^{re.escape(layer)}$"], reduce_range=True)
    ours, theirs = run(only, feeds("vision", 5)), run(exported["vision"], feeds("vision", 5))
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert found[layer] == pytest.approx(1 - cosines.mean(), rel=0.02)
    assert found[layer] > 1e-7
