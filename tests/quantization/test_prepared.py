"""A prepared file serves any number of quantizers, and they leave it as it is."""

import onnx
import pytest

from mmcompress.quantization import onnx_graph
from mmcompress.quantization.arrangements import ARRANGEMENTS, arrange, candidates
from mmcompress.quantization.prepared import Prepared
from mmcompress.quantization.ranges import collect_ranges

from .conftest import image_inputs, text_inputs

MAKE = {"vision": lambda: image_inputs(4), "text": lambda: text_inputs(4, 8)}


@pytest.mark.parametrize("name", ["vision", "text"])
def test_files_from_one_preparation_are_those_from_their_own(exported, tmp_path, monkeypatch, name):
    source = exported[name]
    ranges = collect_ranges(source, [{key: value.numpy() for key, value in MAKE[name]().items()}])
    once, made = Prepared(source, tmp_path), []

    def prepare(*args: object, **options: object) -> tuple[str, ...]:
        made.append(options)
        return given(*args, **options)

    given = onnx_graph.prepare
    own = {}
    for one in candidates("int8-static"):
        own[one] = arrange(one, source, tmp_path / f"{one}-own.onnx", lambda: ranges)
    monkeypatch.setattr(onnx_graph, "prepare", prepare)
    for one in (*own, *reversed(own)):
        assert arrange(one, once, tmp_path / f"{one}.onnx", lambda: ranges) == own[one]
        assert onnx.load(tmp_path / f"{one}.onnx") == onnx.load(tmp_path / f"{one}-own.onnx")
    assert sorted(made, key=str) == [{"patches": False}, {"patches": True}]
    assert {ARRANGEMENTS[one].conv for one in own} == {True, False}
