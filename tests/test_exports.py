"""The exports that tests share: nothing that matters may be left out of what they are known by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from mmcompress.families.base import Component
from mmcompress.quantization import onnx_export
from tests import exports, tiny


def key(model: Any, **settings: Any) -> str | None:
    part: Component = model.family.components(model.module)["vision_model"]
    return exports.key(part, model.family.example_inputs(model.module.config, part, 2), settings)


def test_whatever_changes_an_export_changes_its_key() -> None:
    same = key(tiny.clip())
    assert same is not None
    assert key(tiny.clip()) == same
    assert key(tiny.clip(), opset=21) != same
    heads, eps, weight = tiny.clip(), tiny.clip(), tiny.clip()
    heads.module.vision_model.encoder.layers[0].self_attn.num_heads = 1
    eps.module.vision_model.config.layer_norm_eps = 0.1
    with torch.no_grad():
        weight.module.vision_model.encoder.layers[0].mlp.fc1.weight[0, 0] += 1
    assert len({same, key(heads), key(eps), key(weight)}) == 4


def test_a_module_that_holds_more_than_weights_is_exported_anew() -> None:
    part = Component("sum", "vision", torch.nn.Linear(2, 2), ("x",), ("y",), {})
    assert exports.key(part, {"x": torch.ones(2, 2)}, {}) is None


def exported(model: Any, path: Path, **settings: Any) -> None:
    part: Component = model.family.components(model.module)["vision_model"]
    onnx_export.export_component(part, model.family.example_inputs(model.module.config, part, 2), path, **settings)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The paths of what is really exported, from an empty store."""
    made: list[Path] = []
    real = onnx_export.export_component.__wrapped__  # type: ignore[attr-defined]

    def noted(component: Any, example_inputs: Any, path: Path, **settings: Any) -> None:
        made.append(path)
        real(component, example_inputs, path, **settings)

    store = tmp_path / "store"
    store.mkdir()
    monkeypatch.setattr(exports, "folder", lambda: store)
    monkeypatch.setattr(onnx_export, "export_component", exports.remembered(noted, onnx_export._save))
    return made


def answers(model: Any, path: Path) -> bool:
    """Whether a file answers as the model does on pictures that no export has seen."""
    part: Component = model.family.components(model.module)["vision_model"]
    pictures = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = part.module(pictures)[0]
    found = ort.InferenceSession(path).run(list(part.outputs), {part.inputs[0]: pictures.numpy()})[0]
    return np.allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("beside", [False, True])
def test_other_weights_in_the_same_structure_need_no_export(counted: list[Path], tmp_path: Path, beside: bool) -> None:
    first, second = tiny.clip(seed=0), tiny.clip(seed=1)
    exported(first, tmp_path / "a.onnx", beside=beside)
    (tmp_path / "there").mkdir()
    exported(second, tmp_path / "there" / "a.onnx", beside=beside)
    assert counted == [tmp_path / "a.onnx"]
    assert answers(first, tmp_path / "a.onnx")
    assert answers(second, tmp_path / "there" / "a.onnx")
    assert not answers(second, tmp_path / "a.onnx")
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["a.onnx", *(["a.onnx_data"] if beside else [])]


def test_a_graph_that_would_answer_wrongly_is_not_taken(counted: list[Path], tmp_path: Path) -> None:
    exported(tiny.clip(seed=0), tmp_path / "a.onnx")
    (noted,) = (tmp_path / "store").glob(f"*/{exports.WEIGHTS}")
    known = json.loads(noted.read_text())
    one, other = (
        next(name for name, (own, _) in known.items() if f"layers.0.mlp.{part}.weight" in own) for part in ("fc1", "fc2")
    )
    known[one], known[other] = [known[other][0], not known[other][1]], [known[one][0], not known[one][1]]
    noted.write_text(json.dumps(known))
    second = tiny.clip(seed=1)
    (tmp_path / "there").mkdir()
    exported(second, tmp_path / "there" / "a.onnx")
    assert counted == [tmp_path / "a.onnx", tmp_path / "there" / "a.onnx"]
    assert answers(second, tmp_path / "there" / "a.onnx")


def test_equal_weights_that_a_graph_holds_once_may_differ_later(counted: list[Path], tmp_path: Path) -> None:
    """All biases of a new model are 0."""
    exported(tiny.clip(seed=0), tmp_path / "a.onnx")
    trained = tiny.clip(seed=1)
    with torch.no_grad():
        for values in trained.module.parameters():
            values += 0.01 * torch.randn_like(values)
    (tmp_path / "there").mkdir()
    exported(trained, tmp_path / "there" / "a.onnx")
    assert answers(trained, tmp_path / "there" / "a.onnx")
