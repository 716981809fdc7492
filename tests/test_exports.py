"""The exports that tests share: nothing that matters may be left out of what they are known by."""

from __future__ import annotations

from typing import Any

import torch

from mmcompress.families.base import Component
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
