"""VisionTextDualEncoder: each encoder's own axes, and a ResNet, whose config scales all channels together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, DistilBertConfig, RobertaConfig, SiglipVisionConfig, VisionTextDualEncoderModel, ViTConfig
from transformers import VisionTextDualEncoderConfig as Config

from mmcompress import passes
from mmcompress.config import family_of
from mmcompress.context import Context
from mmcompress.errors import ModelError, RecipeError
from mmcompress.measure.size import flops_by_component, shape_cost
from mmcompress.model import CompressedModel, align
from mmcompress.registry import find
from tests import tiny_data
from tests.families import tiny_clap, tiny_siglip, tiny_siglip2
from tests.families import tiny_vision_text_dual_encoder as tiny_dual

TRANSFORMERS = [name for name in tiny_dual.MODELS if "resnet" not in name]
KIND = "image-text-retrieval"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_forward_is_the_stock_models(name: str) -> None:
    model = tiny_dual.MODELS[name]()
    batch = model.family.example_batch(model.module.config, 3)
    with torch.no_grad():
        stock = model.module(**batch)
        embeds = model.family.forward(model.module, batch).embeds
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(embeds["vision"], dim=-1), stock.image_embeds)
    torch.testing.assert_close(unit(embeds["text"], dim=-1), stock.text_embeds)


def test_the_variant_says_what_can_be_cut() -> None:
    found = {name: make().family for name, make in tiny_dual.MODELS.items()}
    assert found["vit-bert"].tower_axes("vision") == ("ffn", "depth", "width")
    assert found["resnet-bert"].tower_axes("vision") == ("width",)
    assert found["resnet-bert"].tower_axes("text") == ("ffn", "depth", "width")
    assert family_of(tiny_dual.MODELS["vit-bert"]().module.config, "x") is found["vit-bert"]
    with pytest.raises(RecipeError, match="ffn"):
        passes.Prune(axis="ffn", ratio={"vision": 0.5}).apply(tiny_dual.MODELS["resnet-bert"]())


def test_a_resnet_is_cut_in_proportion_and_stock_transformers_reloads_it(tmp_path: Path) -> None:
    model = tiny_dual.MODELS["resnet-bert"]()
    where = Context(task=find("tasks", KIND).TASK.model_validate({"type": KIND}), train=tiny_data.examples(16))
    for criterion in ("magnitude", "taylor", "activation"):
        pruned, _ = passes.Prune(axis="width", ratio={"vision": 0.25}, criterion=criterion, samples=8).run(model, where)
        vision = pruned.module.config.vision_config
        assert (vision.embedding_size, vision.hidden_sizes, vision.hidden_size) == (12, [48, 96], 96)
        inner = [layer.layer[0].convolution.out_channels for layer in pruned.family.layers(pruned.module, "vision")]
        assert inner == [12, 12, 24, 24]
    pruned.save(tmp_path / "m")
    stock = VisionTextDualEncoderModel.from_pretrained(tmp_path / "m")
    align(stock)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        ours = pruned.family.forward(pruned.module, {"pixel_values": pixels}).embeds["vision"]
        theirs = stock.visual_projection(stock.vision_model(pixels).pooler_output.flatten(1))
    assert torch.equal(ours, theirs)


def test_channels_of_a_resnet_that_do_nothing_can_go() -> None:
    model = tiny_dual.MODELS["resnet-bert"]()
    with torch.no_grad():
        for layer in model.family.layers(model.module, "vision"):
            for part in layer.layer[:-1]:
                half = part.convolution.out_channels // 4
                part.convolution.weight[:half] = 0
                part.normalization.weight[:half] = part.normalization.bias[:half] = part.normalization.running_mean[:half] = 0
            # What the next convolution would read of them.
            layer.layer[1].convolution.weight[:, :half] = 0
            layer.layer[2].convolution.weight[:, :half] = 0
        for s, stage in enumerate(model.module.vision_model.encoder.stages):
            gone = model.module.config.vision_config.hidden_sizes[s] // 4
            for layer in stage.layers:
                parts = [layer.layer[-1], *([layer.shortcut] if hasattr(layer.shortcut, "convolution") else [])]
                for part in parts:
                    part.convolution.weight[:gone] = 0
                    part.normalization.weight[:gone] = part.normalization.bias[:gone] = part.normalization.running_mean[:gone] = 0
            for layer in stage.layers[1:]:
                layer.layer[0].convolution.weight[:, :gone] = 0
        model.module.visual_projection.weight[:, :gone] = 0
        after_first = model.module.vision_model.encoder.stages[1].layers[0]
        after_first.layer[0].convolution.weight[:, :16] = after_first.shortcut.convolution.weight[:, :16] = 0
        stem = model.module.vision_model.embedder.embedder
        stem.convolution.weight[:4] = 0
        stem.normalization.weight[:4] = stem.normalization.bias[:4] = stem.normalization.running_mean[:4] = 0
        first = model.module.vision_model.encoder.stages[0].layers[0]
        first.layer[0].convolution.weight[:, :4] = first.shortcut.convolution.weight[:, :4] = 0
    batch = {"pixel_values": torch.randn(4, 3, 16, 16)}
    before = model.family.forward(model.module, batch).embeds["vision"]
    pruned = passes.Prune(axis="width", ratio={"vision": 0.25}, criterion="magnitude").apply(model)
    after = pruned.family.forward(pruned.module, batch).embeds["vision"]
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [*tiny_dual.MODELS.values(), tiny_clap.clap, tiny_siglip.siglip, tiny_siglip2.siglip2])
def test_costs_can_be_estimated_from_the_config_alone(make: Callable[[], CompressedModel]) -> None:
    model = make()
    parameters, flops = shape_cost(model.family, model.module.config)
    assert (parameters, flops) == (model.parameters(), sum(flops_by_component(model).values()))


def test_roberta_has_fewer_positions_than_its_config_says() -> None:
    vision = ViTConfig(**tiny_dual.SEEN)
    for text, limit in ((RobertaConfig(**{**tiny_dual.READ, "pad_token_id": 1}), 15), (BertConfig(**tiny_dual.READ), 17)):
        model = tiny_dual.dual(vision, text)
        assert model.family.text_limit(model.module.config) == limit
        ids = torch.full((1, limit), 5)
        model.module.text_model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_encoders_that_are_not_known_are_refused() -> None:
    text = BertConfig(**tiny_dual.READ)
    with pytest.raises(ModelError, match=r"text encoder: .*distilbert"):
        family_of(Config.from_vision_text_configs(ViTConfig(), DistilBertConfig()), "x")
    with pytest.raises(ModelError, match=r"vision encoder: .*bert"):
        family_of(Config.from_vision_text_configs(text, text), "x")
    with pytest.raises(ModelError, match="vision_use_head is false"):
        family_of(Config.from_vision_text_configs(SiglipVisionConfig(vision_use_head=False), text), "x")
    config = tiny_dual.resnet_config()
    del config.hidden_size
    with pytest.raises(ModelError, match=r"no hidden_size.*of a resnet set it to the last of hidden_sizes"):
        family_of(Config.from_vision_text_configs(config, text), "x")
