"""SigLIP: its pooling head in a form that can be cut, the width that both towers share, and the sigmoid loss."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipModel

from mmcompress import passes
from mmcompress.config import check_config, family_of
from mmcompress.context import Context
from mmcompress.errors import ModelError
from mmcompress.families._siglip_parts import SplitHead
from mmcompress.families.siglip import FAMILY
from mmcompress.model import CompressedModel
from mmcompress.registry import find
from mmcompress.tasks._contrastive import contrastive_loss
from tests import tiny_data
from tests.families import tiny_siglip


@pytest.fixture
def model() -> CompressedModel:
    return tiny_siglip.siglip()


def test_components_give_stock_embeddings(model: CompressedModel) -> None:
    batch = FAMILY.example_batch(model.module.config, 3)
    parts = FAMILY.components(model.module)
    with torch.no_grad():
        stock = model.module(**batch)
        (images,) = parts["vision_model"].module(batch["pixel_values"])
        (texts,) = parts["text_model"].module(batch["input_ids"])
        forward = FAMILY.forward(model.module, batch)
    torch.testing.assert_close(images, stock.vision_model_output.pooler_output, atol=1e-6, rtol=0)
    assert torch.equal(texts, stock.text_model_output.pooler_output)
    assert torch.equal(forward.embeds["vision"], stock.vision_model_output.pooler_output)
    assert [part.outputs for part in parts.values()] == [("pooler_output",), ("pooler_output",)]
    assert not isinstance(model.module.vision_model.head, SplitHead), "the model itself was changed"


def test_the_split_head_has_the_stock_state_and_shares_its_memory(model: CompressedModel) -> None:
    head = model.module.vision_model.head
    split = SplitHead(head)
    assert set(split.state_dict()) == set(head.state_dict())
    assert all(torch.equal(values, head.state_dict()[name]) for name, values in split.state_dict().items())
    states = torch.randn(2, 4, 48)
    before = split(states)
    with torch.no_grad():
        head.attention.in_proj_weight.mul_(3)
        head.probe.add_(1)
    torch.testing.assert_close(split(states), head(states), atol=1e-5, rtol=0)
    assert not torch.allclose(split(states), before, atol=1e-3)


def test_the_loss_is_stock_siglips_where_each_picture_has_a_text(model: CompressedModel) -> None:
    batch = FAMILY.example_batch(model.module.config, 5)
    outputs = FAMILY.forward(model.module, batch)
    stock = model.module(**batch, return_loss=True)
    assert outputs.logit_scale.shape == ()
    assert outputs.logit_bias is not None
    assert outputs.logit_bias.shape == ()
    torch.testing.assert_close(contrastive_loss(outputs, torch.arange(5)), stock.loss)


def test_the_vision_width_is_cut_with_the_text_towers_last_layer(model: CompressedModel) -> None:
    pruned = passes.Prune(axis="width", ratio={"vision": 0.34}, criterion="magnitude").apply(model)
    config = pruned.module.config
    assert (config.vision_config.hidden_size, config.vision_config.num_attention_heads) == (32, 2)
    assert (config.text_config.projection_size, config.text_config.hidden_size) == (32, 32)
    assert pruned.module.text_model.head.weight.shape == (32, 32)
    batch = FAMILY.example_batch(config, 2)
    logits = pruned.module(**batch).logits_per_image
    assert logits.shape == (2, 2)
    assert torch.isfinite(logits).all()


def test_cutting_units_that_do_nothing_changes_nothing(model: CompressedModel) -> None:
    """The heads, FFN units and channels that are dead are those that magnitude drops; what is left computes the same."""
    with torch.no_grad():
        vision, text = model.module.vision_model, model.module.text_model
        for mlp in (*[layer.mlp for layer in vision.encoder.layers], vision.head.mlp):
            mlp.fc1.weight[::2] = 0
            mlp.fc1.bias[::2] = 0
            mlp.fc2.weight[:, ::2] = 0
        at = vision.head.attention
        at.in_proj_weight[16:32] = at.in_proj_weight[64:80] = at.in_proj_weight[112:128] = 0
        at.in_proj_bias[16:32] = at.in_proj_bias[64:80] = at.in_proj_bias[112:128] = 0
        at.out_proj.weight[:, 16:32] = 0
        for layer in vision.encoder.layers:
            own = layer.self_attn
            for part in (own.q_proj, own.k_proj, own.v_proj):
                part.weight[16:32] = 0
                part.bias[16:32] = 0
            own.out_proj.weight[:, 16:32] = 0
        # The channels of the embedding that no picture uses, so that the text tower's are of no use either.
        for part in (at.out_proj, vision.head.mlp.fc2, text.head):
            part.weight[:16] = 0
            part.bias[:16] = 0
        vision.head.layernorm.weight[:16] = vision.head.layernorm.bias[:16] = 0
        vision.head.mlp.fc1.weight[:, :16] = 0
    batch = FAMILY.example_batch(model.module.config, 3)
    before = FAMILY.forward(model.module, batch).embeds
    half = passes.Prune(axis="ffn", ratio={"vision": 0.5}, criterion="magnitude", round_to=1).apply(model)
    after = FAMILY.forward(half.module, batch).embeds
    assert half.module.vision_model.head.mlp.fc1.out_features == 48
    torch.testing.assert_close(after["vision"], before["vision"], atol=1e-6, rtol=0)
    narrow = passes.Prune(axis="width", ratio={"vision": 0.34}, criterion="magnitude").apply(model)
    texts = FAMILY.forward(narrow.module, batch).embeds["text"]
    torch.testing.assert_close(texts, before["text"][:, 16:], atol=1e-6, rtol=0)
    ours = narrow.module.vision_model.head.attention.in_proj_weight
    assert ours.shape == (96, 32)
    assert (ours.abs().sum(1) > 0).all(), "a dead head of the pooling attention stayed"


def test_published_configs_pass_though_their_end_token_lies_outside_of_the_vocabulary() -> None:
    config = SiglipConfig()
    assert config.text_config.eos_token_id >= config.text_config.vocab_size
    check_config(config, family_of(config, "x"), "x")
    assert FAMILY.config_sizes(config)["vision"] == {"ffn": 3072, "depth": 12, "width": 768, "heads": 12}


def test_models_whose_towers_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ModelError, match="vision_use_head is false"):
        family_of(tiny_siglip.config(use_head=False), "x")
    with pytest.raises(ModelError, match="projects to 40 numbers"):
        family_of(tiny_siglip.config(projection=40), "x")


def test_texts_are_padded_to_their_full_length(model: CompressedModel) -> None:
    assert model.processor.tokens(["a square"])["input_ids"].shape == (1, tiny_siglip.LENGTH)


def test_the_pooling_head_is_quantized_whole(model: CompressedModel, tmp_path: Path) -> None:
    kind = "zero-shot-image-classification"
    where = Context(task=find("tasks", kind).TASK.model_validate({"type": kind}), train=tiny_data.examples(16), workdir=tmp_path)
    new, _ = passes.Quantize(scheme="int8-static", samples=16).run(model, where)
    assert new.onnx is not None
    graph = onnx.load(new.onnx / "vision_model_quantized.onnx").graph
    weights = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2]
    floats = [t.name for t in weights if min(t.dims) > 16]
    assert not floats, f"matrices left in float: {floats}"


def test_a_stock_model_reloads_what_is_saved_after_a_cut(model: CompressedModel, tmp_path: Path) -> None:
    passes.Prune(axis="width", ratio={"vision": 0.34, "text": 0.5}, criterion="random").apply(model).save(tmp_path / "m")
    stock, info = SiglipModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    scores = F.normalize(stock(**FAMILY.example_batch(stock.config, 2)).image_embeds, dim=-1)
    assert scores.shape == (2, 32)
