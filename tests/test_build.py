"""A dual encoder from two encoders that were trained by themselves: weights kept, stock folder, fine-tuned together."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ResNetConfig,
    ResNetModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from typer.testing import CliRunner

import mmcompress as mm
from mmcompress.cli import app
from mmcompress.context import Context
from mmcompress.errors import ModelError
from mmcompress.model import load
from mmcompress.registry import find
from mmcompress.runtimes.torch_predict import TorchPredict
from tests import tiny, tiny_data
from tests.families.tiny_vision_text_dual_encoder import READ, SEEN


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SEEN, initializer_range=0.2)).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    # At their usual 0.02, encoders as narrow as these give the same for all inputs, and take long to learn otherwise.
    BertModel(BertConfig(**READ, initializer_range=0.2)).save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_the_encoders_keep_their_weights_and_stock_loads_it(vit: Path, bert: Path, tmp_path: Path) -> None:
    built = mm.build_dual_encoder(vit, bert, tmp_path / "dual", projection_dim=24)
    stock = VisionTextDualEncoderModel.from_pretrained(tmp_path / "dual")
    for part, source in (
        (stock.vision_model, ViTModel.from_pretrained(vit)),
        (stock.text_model, BertModel.from_pretrained(bert)),
    ):
        weights = source.state_dict()
        assert set(weights) == set(part.state_dict())
        assert all(torch.equal(values, weights[name]) for name, values in part.state_dict().items())
    assert stock.visual_projection.weight.shape == (24, 48)
    assert torch.equal(stock.text_projection.weight, built.module.text_projection.weight)
    again = mm.build_dual_encoder(vit, bert, tmp_path / "again", projection_dim=24)
    assert torch.equal(again.module.text_projection.weight, built.module.text_projection.weight)
    other = mm.build_dual_encoder(vit, bert, tmp_path / "other", projection_dim=24, seed=1)
    assert not torch.equal(other.module.text_projection.weight, built.module.text_projection.weight)


def test_it_learns_by_the_normal_passes(vit: Path, bert: Path, tmp_path: Path) -> None:
    mm.build_dual_encoder(vit, bert, tmp_path / "dual", projection_dim=24)
    model = load(tmp_path / "dual")
    task = find("tasks", "zero-shot-image-classification").TASK.model_validate({"type": "zero-shot-image-classification"})
    train, test = tiny_data.examples(96), tiny_data.examples(48, seed=1)
    where = Context(task=task, train=train)
    tuned, _ = mm.passes.Finetune(epochs=25, batch_size=32, learning_rate=2e-3).run(model, where)

    def accuracy(one: mm.CompressedModel) -> float:
        scores = task.evaluate(TorchPredict(one), one.processor, test, where.reporter)
        return float(scores.per_example["accuracy"].mean())

    assert accuracy(model) < 0.5
    assert accuracy(tuned) > 0.8


def test_a_resnet_gets_what_the_stock_class_asks_for(bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ResNetModel(ResNetConfig(hidden_sizes=[64, 128], depths=[1, 1], embedding_size=16)).save_pretrained(tmp_path / "resnet")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "resnet")
    assert CliRunner().invoke(app, ["build", str(tmp_path / "resnet"), str(bert), "-o", str(tmp_path / "dual")]).exit_code == 0
    model = load(tmp_path / "dual")
    vision = model.module.config.vision_config
    assert (vision.hidden_size, vision.image_size, model.module.config.projection_dim) == (128, 16, 512)
    weights = ResNetModel.from_pretrained(tmp_path / "resnet").state_dict()
    assert all(torch.equal(values, weights[name]) for name, values in model.module.vision_model.state_dict().items())


def test_a_new_pooling_layer_is_said(vit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    BertForMaskedLM(BertConfig(**READ)).save_pretrained(tmp_path / "masked")
    tiny.tokenizer().save_pretrained(tmp_path / "masked")
    with caplog.at_level(logging.WARNING, "mmcompress"):
        mm.build_dual_encoder(vit, tmp_path / "masked", tmp_path / "dual")
    assert "masked: has no pooling layer of its own" in caplog.text


def test_encoders_that_do_not_fit_are_refused(vit: Path, bert: Path, tmp_path: Path) -> None:
    DistilBertModel(DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, vocab_size=40)).save_pretrained(
        tmp_path / "db"
    )
    with pytest.raises(ModelError, match=r"text encoder: .*distilbert"):
        mm.build_dual_encoder(vit, tmp_path / "db", tmp_path / "dual")
    with pytest.raises(ModelError, match=r"vision encoder.*bert"):
        mm.build_dual_encoder(bert, vit, tmp_path / "dual")
    (vit / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        mm.build_dual_encoder(vit, bert, tmp_path / "dual")
    with pytest.raises(ModelError, match="projection_dim: found 0"):
        mm.build_dual_encoder(vit, bert, tmp_path / "dual", projection_dim=0)
    assert not (tmp_path / "dual").exists()
