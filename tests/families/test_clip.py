"""The family CLIP: what it says about a model, against the model itself."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPModel

from mmcompress.families.base import count, tower_parameters
from mmcompress.families.clip import FAMILY
from mmcompress.measure.size import flops_by_component
from mmcompress.model import CompressedModel
from tests import tiny


def test_towers_and_the_rest_are_all_parameters(model: CompressedModel) -> None:
    found = tower_parameters(FAMILY, model.module)
    assert set(found) == {"vision", "text", "shared"}
    assert sum(count(p) for p in found.values()) == model.parameters()
    assert count(found["shared"]) == 1


def test_components_give_stock_embeddings(model: CompressedModel) -> None:
    batch = FAMILY.example_batch(model.module.config, 3)
    parts = FAMILY.components(model.module)
    with torch.no_grad():
        (images,) = parts["vision_model"].module(batch["pixel_values"])
        (texts,) = parts["text_model"].module(batch["input_ids"], batch["attention_mask"])
        stock = model.module(**batch)
    unit = torch.nn.functional.normalize
    assert torch.allclose(unit(images, dim=-1), stock.image_embeds, atol=1e-6)
    assert torch.allclose(unit(texts, dim=-1), stock.text_embeds, atol=1e-6)


def test_forward_gives_embeddings_scale_and_hidden_states(model: CompressedModel) -> None:
    batch = FAMILY.example_batch(model.module.config, 3)
    out = FAMILY.forward(model.module, batch, hidden=True)
    assert {k: v.shape for k, v in out.embeds.items()} == {"vision": (3, 24), "text": (3, 24)}
    assert out.logit_scale.item() == pytest.approx(float(model.module.logit_scale.exp()))
    assert len(out.hidden["vision"]) == 4
    assert out.hidden["text"][0].shape == (3, 16, 32)
    only = FAMILY.forward(model.module, {"pixel_values": batch["pixel_values"]})
    assert list(only.embeds) == ["vision"]


def test_sizes_round_trip_through_a_config(model: CompressedModel) -> None:
    sizes = FAMILY.config_sizes(model.module.config)
    assert sizes["vision"] == {"ffn": 96, "depth": 3, "width": 48, "heads": 3}
    sizes["vision"] = {"ffn": 40, "depth": 2, "width": 32, "heads": 2}
    smaller = FAMILY.resized_config(model.module.config, sizes)
    assert FAMILY.config_sizes(smaller) == sizes
    assert FAMILY.config_sizes(model.module.config)["vision"]["ffn"] == 96
    assert CLIPModel(smaller).vision_model.encoder.layers[0].mlp.fc1.out_features == 40


def test_uneven_layers_have_no_stock_config(model: CompressedModel) -> None:
    assert FAMILY.shrunk_config(model.module) is not None
    model.module.vision_model.encoder.layers[1].mlp.fc1 = torch.nn.Linear(48, 64)
    assert FAMILY.shrunk_config(model.module) is None


def test_flops_by_hand(model: CompressedModel) -> None:
    # Vision: 5 tokens (4 patches and the class), width 48, ffn 96, 3 layers, projection 24.
    tokens, width, ffn = 5, 48, 96
    layer = 2 * tokens * (4 * width * width + 2 * width * ffn) + 2 * 2 * tokens * tokens * width
    patches = 2 * 4 * 3 * 8 * 8 * width
    assert flops_by_component(model)["vision_model"] == 3 * layer + patches + 2 * width * 24


def test_example_ids_end_with_the_pooled_token() -> None:
    config = tiny.clip_config()
    batch = FAMILY.example_batch(config, 4)
    assert (batch["input_ids"][:, -1] == config.text_config.eos_token_id).all()
    config.text_config.eos_token_id = 2
    assert (FAMILY.example_batch(config, 4)["input_ids"].argmax(-1) == 15).any()
