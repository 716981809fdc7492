"""ViLT with every patch kept: the logits of stock ViLT for pictures of any shape, in torch and in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoTokenizer, ViltForQuestionAnswering

from mmcompress import passes
from mmcompress.errors import ModelError
from mmcompress.families.vilt import FAMILY, INPUTS, interpolation
from mmcompress.model import load
from mmcompress.quantization.onnx_export import export_component
from mmcompress.runtimes.torch_predict import TorchPredict
from tests.families import tiny_vilt

# Of one size and of several; narrower than one embedding; not a multiple of the patch (8), where stock takes the nearest pixel.
SIZES: list[list[tuple[int, int]]] = [
    [(16, 16)] * 3,
    [(16, 24), (40, 16), (8, 56)],
    [(8, 8), (24, 72)],
    [(20, 44), (33, 28)],
]


def batch_of(sizes: Sequence[tuple[int, int]], words: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pictures (height, width) padded to one canvas, and questions of which the first is shorter than the others."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(side) for side in zip(*sizes, strict=True))
    pixels, mask = torch.zeros(len(sizes), 3, height, width), torch.zeros(len(sizes), height, width, dtype=torch.int64)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        mask[i, :h, :w] = 1
    ids = torch.randint(5, len(tiny_vilt.WORDS), (len(sizes), words), generator=generator)
    attention = torch.ones_like(ids)
    attention[0, words - 2 :] = 0
    return dict(zip(INPUTS, (ids, attention, torch.zeros_like(ids), pixels, mask), strict=True))


def stock_logits(module: Any, batch: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = module(**batch).logits.numpy()
    return found


def test_interpolation_by_hand() -> None:
    # Two embeddings over three of four places: the first, their mean, the second, nothing. Over one place: the first.
    found = interpolation(torch.tensor([3, 1]), size=4, places=2)
    assert found.tolist() == [[[1, 0], [0.5, 0.5], [0, 1], [0, 0]], [[1, 0], [0, 0], [0, 0], [0, 0]]]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (3, 2), (12, 12), (12, 20), (25, 41)])
def test_interpolation_is_torchs(height: int, width: int) -> None:
    table = torch.randn(5, 12, 12, dtype=torch.float64)
    wanted = F.interpolate(table[None], size=(height, width), mode="bilinear", align_corners=True)[0]
    rows, columns = (interpolation(torch.tensor([n]), n + 2, 12)[0].double() for n in (height, width))
    found = torch.einsum("ip,jq,cpq->cij", rows, columns, table)
    torch.testing.assert_close(found[:, :height, :width], wanted, atol=1e-5, rtol=0)
    assert found[:, height:].abs().sum() == found[:, :, width:].abs().sum() == 0


@pytest.mark.parametrize("sizes", SIZES)
def test_logits_are_stock_vilts(sizes: list[tuple[int, int]]) -> None:
    module, batch = tiny_vilt.vilt().module, batch_of(sizes)
    with torch.no_grad():
        ours = FAMILY.forward(module, batch, hidden=True)
        stock = module(**batch, output_hidden_states=True)
    assert ours.logits is not None
    torch.testing.assert_close(ours.logits, stock.logits, atol=2e-5, rtol=0)
    assert len(ours.hidden["fused"]) == len(stock.hidden_states)
    torch.testing.assert_close(ours.hidden["fused"][-1][:, :7], stock.hidden_states[-1][:, :7], atol=1e-4, rtol=0)


def test_the_picture_matters_and_its_padding_does_not() -> None:
    module, batch = tiny_vilt.vilt().module, batch_of([(16, 24), (40, 16)])
    before = stock_logits(module, batch)
    padded = {**batch, "pixel_values": batch["pixel_values"] + 3 * (1 - batch["pixel_mask"][:, None])}
    other = {**batch, "pixel_values": -batch["pixel_values"]}
    with torch.no_grad():
        same, changed = (FAMILY.forward(module, b).logits for b in (padded, other))
    assert same is not None
    assert changed is not None
    np.testing.assert_allclose(same.numpy(), before, atol=2e-5)
    assert np.abs(changed.numpy() - before).max() > 1e-2


def test_onnx_takes_any_batch_text_and_canvas(tmp_path: Path) -> None:
    model = tiny_vilt.vilt()
    part = FAMILY.components(model.module)["model"]
    export_component(part, FAMILY.example_inputs(model.module.config, part, 2), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [i.name for i in session.get_inputs()] == list(INPUTS)
    for words, sizes in enumerate([*SIZES, [(48, 8)]], start=4):
        batch = batch_of(sizes, words)
        found = session.run(["logits"], {name: values.numpy() for name, values in batch.items()})[0]
        np.testing.assert_allclose(found, stock_logits(model.module, batch), atol=2e-5)


def test_pictures_keep_their_shape_and_answers_do_not_depend_on_the_batch() -> None:
    model = tiny_vilt.vilt()
    pictures = [Image.effect_noise(size, 90).convert("RGB") for size in ((40, 20), (20, 30), (32, 32))]
    media = model.processor.media("image", pictures)
    assert [tuple(one["pixel_values"].shape) for one in media] == [(3, 8, 24), (3, 24, 16), (3, 16, 16)]
    stacked = {name: values.numpy() for name, values in model.processor.stack(media).items()}
    assert stacked["pixel_values"].shape == (3, 3, 24, 24)
    assert stacked["pixel_mask"].sum(axis=(1, 2)).tolist() == [8 * 24, 24 * 16, 16 * 16]
    questions = ["what colour is the square?", "is it red?", "which?"]
    predict = TorchPredict(model)
    together = FAMILY.respond(predict, model.processor, stacked, questions, 1)
    for i, one in enumerate(media):
        alone = {name: values[None].numpy() for name, values in one.items()}
        assert FAMILY.respond(predict, model.processor, alone, questions[i : i + 1], 1) == together[i : i + 1]
    assert set(together) <= set(tiny_vilt.ANSWERS)
    with pytest.raises(ValueError, match="none were given"):
        FAMILY.respond(predict, model.processor, stacked, None, 1)


def test_targets_are_soft_and_answers_that_are_no_label_have_none() -> None:
    processor = tiny_vilt.vilt().processor
    answers = [{"Red.": 1.0, "pink": 1.0, "blue": 2 / 3}, {"two": 1.0}, {"pink": 1.0}]
    batch = FAMILY.text_batch(processor, [{}] * 3, ["which?", "how many", "a"], answers)
    wanted = torch.zeros(3, len(tiny_vilt.ANSWERS))
    wanted[0, 0], wanted[0, 2], wanted[1, 8] = 1.0, 2 / 3, 1.0
    torch.testing.assert_close(batch["labels"], wanted)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert FAMILY.fixed_answers(processor) == set(tiny_vilt.ANSWERS)
    one = FAMILY.text_batch(processor, [{}], ["a"], ["blue"])["labels"]
    assert one.argmax() == 2
    assert one.sum() == 1


def test_a_narrow_vilt_is_stock_and_small_everywhere(tmp_path: Path) -> None:
    model = tiny_vilt.vilt()
    narrow = passes.Prune(axis="width", ratio={"fused": 1 / 3}, criterion="magnitude").apply(model)
    narrow.save(tmp_path / "narrow")
    stock = ViltForQuestionAnswering.from_pretrained(tmp_path / "narrow").eval()
    assert (stock.config.hidden_size, stock.config.num_attention_heads) == (32, 2)
    assert (stock.vilt.pooler.dense.out_features, stock.classifier[0].out_features) == (32, 64)
    batch = batch_of([(16, 24), (40, 16)])
    with torch.no_grad():
        ours = FAMILY.forward(load(tmp_path / "narrow").module, batch).logits
    assert ours is not None
    np.testing.assert_allclose(ours.numpy(), stock_logits(stock, batch), atol=2e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "narrow")("is it red?")["input_ids"][0] == 2


def test_fewer_heads_run_in_a_loaded_module_too(tmp_path: Path) -> None:
    model = tiny_vilt.vilt()
    fewer = passes.Prune(axis="heads", ratio={"fused": 1 / 3}, criterion="magnitude", allow_custom=True).apply(model)
    fewer.save(tmp_path / "fewer")
    batch = batch_of([(16, 16)] * 2)
    # Not bit by bit: stock draws the order of the patches.
    found = stock_logits(load(tmp_path / "fewer").module, batch)
    np.testing.assert_allclose(found, stock_logits(fewer.module, batch), atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"architectures": ["ViltForMaskedLM"]}, "ViltForQuestionAnswering"), ({"patch_size": (8, 8)}, "patch_size")],
)
def test_other_vilts_are_refused(changes: dict[str, Any], said: str) -> None:
    config = tiny_vilt.config()
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(ModelError, match=said):
        FAMILY.of(config)
