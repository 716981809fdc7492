"""The combined file of a dual encoder: its parts' own numbers, and the stock model's similarities."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from transformers import SiglipConfig, SiglipModel

from mmcompress.families.base import Combined
from mmcompress.quantization import onnx_graph
from mmcompress.quantization.combine import combine_components, combine_dual_encoder
from mmcompress.quantization.onnx_export import ExportError, export_component
from mmcompress.quantization.ptq import quantize_dynamic_int8, quantize_static_int8
from tests.quantization.conftest import Component, image_inputs, text_inputs

Arrays = dict[str, NDArray[Any]]
IMAGES, TEXTS = 3, 5


def numpy(tensors: dict[str, torch.Tensor]) -> Arrays:
    return {name: value.numpy() for name, value in tensors.items()}


def run(path: Path, feeds: Arrays) -> Arrays:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True))


def unit(rows: NDArray[Any]) -> NDArray[Any]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def feeds() -> Arrays:
    return numpy({**image_inputs(IMAGES), **text_inputs(TEXTS, 9)})


@pytest.fixture(scope="module")
def files(exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """By precision the two component files."""
    folder = tmp_path_factory.mktemp("precisions")
    found = {"float": exported, "dynamic": {}, "static": {}}
    for name, source in exported.items():
        found["dynamic"][name] = folder / f"{name}_dynamic.onnx"
        quantize_dynamic_int8(source, found["dynamic"][name])
        made = image_inputs if name == "vision" else lambda batch: text_inputs(batch, 9)
        batches: Iterator[Arrays] = (numpy(made(batch)) for batch in (2, 3, 4))
        found["static"][name] = folder / f"{name}_static.onnx"
        quantize_static_int8(source, found["static"][name], batches)
    return found


@pytest.mark.parametrize("precision", ["float", "dynamic", "static"])
def test_the_combined_file_gives_the_very_numbers_of_its_parts(
    precision: str, files: dict[str, dict[str, Path]], feeds: Arrays, tmp_path: Path
) -> None:
    parts = files[precision]
    combine_dual_encoder(parts["vision"], parts["text"], tmp_path / "model.onnx", scale=20.0)
    found = run(tmp_path / "model.onnx", feeds)
    images = unit(run(parts["vision"], feeds)["image_embeds"])
    texts = unit(run(parts["text"], feeds)["text_embeds"])
    assert list(found) == ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
    np.testing.assert_allclose(found["image_embeds"], images, atol=1e-6)
    np.testing.assert_allclose(found["text_embeds"], texts, atol=1e-6)
    np.testing.assert_allclose(found["logits_per_image"], 20 * images @ texts.T, atol=2e-5)
    np.testing.assert_array_equal(found["logits_per_text"], found["logits_per_image"].T)
    kinds = onnx_graph.op_counts(onnx.load(tmp_path / "model.onnx"))
    integer = {"float": 0, "dynamic": kinds.get("MatMulInteger", 0), "static": kinds.get("QuantizeLinear", 0)}[precision]
    assert (integer > 0) == (precision != "float")


def test_the_combined_file_is_the_stock_clip(
    components: dict[str, Component], exported: dict[str, Path], feeds: Arrays, tmp_path: Path
) -> None:
    model = components["vision"].module.model
    scale = model.logit_scale.exp().item()
    combine_dual_encoder(exported["vision"], exported["text"], tmp_path / "model.onnx", scale=scale)
    found = run(tmp_path / "model.onnx", feeds)
    with torch.no_grad():
        wanted = model(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        np.testing.assert_allclose(found[name], wanted[name].numpy(), atol=1e-5, rtol=1e-5)


def test_inputs_come_in_the_order_of_optimum_with_batches_of_their_own(exported: dict[str, Path], tmp_path: Path) -> None:
    combine_dual_encoder(exported["vision"], exported["text"], tmp_path / "model.onnx", scale=1.0)
    graph = onnx.load(tmp_path / "model.onnx").graph
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    axes = {v.name: v.type.tensor_type.shape.dim[0].dim_param for v in graph.input}
    # Both components of the fixture call their batch `batch_size`.
    assert list(axes.items()) == [
        ("input_ids", "text_batch_size"),
        ("pixel_values", "media_batch_size"),
        ("attention_mask", "text_batch_size"),
    ]


def export_tower(module: torch.nn.Module, inputs: dict[str, torch.Tensor], outputs: tuple[str, ...], path: Path) -> Path:
    axes = {name: {0: f"{path.stem}_batch_size"} for name in (*inputs, *outputs)}
    export_component(Component(path.stem, module, tuple(inputs), outputs, axes, inputs), inputs, path)
    return path


class Siglip(torch.nn.Module):
    def __init__(self, model: SiglipModel, tower: str) -> None:
        super().__init__()
        self.tower = model.vision_model if tower == "vision" else model.text_model

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.tower(values)
        return found.last_hidden_state, found.pooler_output


def test_siglip_has_a_bias_and_names_its_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**layers, "vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**layers, "image_size": 16, "patch_size": 8})).eval()
    model.logit_scale.data.fill_(2.0)
    model.logit_bias.data.fill_(-3.5)
    pixels, ids = torch.randn(IMAGES, 3, 16, 16), torch.randint(0, 50, (TEXTS, 8))
    outputs = ("last_hidden_state", "pooler_output")
    vision = export_tower(Siglip(model, "vision"), {"pixel_values": pixels}, outputs, tmp_path / "vision.onnx")
    words = export_tower(Siglip(model, "text"), {"input_ids": ids}, outputs, tmp_path / "text.onnx")
    scale, bias = model.logit_scale.exp().item(), model.logit_bias.item()
    with pytest.raises(ExportError, match="say which of them is the embedding"):
        combine_dual_encoder(vision, words, tmp_path / "model.onnx", scale=scale, bias=bias)
    chosen = ("pooler_output", "pooler_output")
    combine_dual_encoder(vision, words, tmp_path / "model.onnx", scale=scale, bias=bias, embeds=chosen)
    found = run(tmp_path / "model.onnx", {"pixel_values": pixels.numpy(), "input_ids": ids.numpy()})
    with torch.no_grad():
        wanted = model(pixel_values=pixels, input_ids=ids)
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        np.testing.assert_allclose(found[name], wanted[name].numpy(), atol=1e-5)


def linear(rows: list[list[float]]) -> torch.nn.Linear:
    weight = torch.tensor(rows)
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return layer


class Tower(torch.nn.Module):
    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.linear = linear(rows)

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.linear(values),)


def worked_by_hand(folder: Path) -> tuple[Path, Path]:
    """Sounds keep what they are given; texts have their two numbers swapped."""
    audio = {"input_features": torch.randn(2, 2)}
    text = {"input_ids": torch.randn(3, 2)}
    return (
        export_tower(Tower([[1.0, 0.0], [0.0, 1.0]]), audio, ("audio_embeds",), folder / "audio.onnx"),
        export_tower(Tower([[0.0, 1.0], [1.0, 0.0]]), text, ("text_embeds",), folder / "text.onnx"),
    )


FEEDS = {"input_features": np.array([[3, 4], [0, 2]], np.float32), "input_ids": np.array([[5, 12], [1, 0], [2, 2]], np.float32)}


def test_audio_and_text_with_a_scale_each_worked_by_hand(tmp_path: Path) -> None:
    worked_by_hand(tmp_path)
    combine_components(Combined("audio", "text", "audio", 10.0, 2.0, 1.0), tmp_path)
    assert not (tmp_path / "model_quantized.onnx").exists()
    found = run(tmp_path / "model.onnx", FEEDS)
    half = 0.5**0.5
    # Sounds (3, 4) / 5 and (0, 1); texts (12, 5) / 13, (0, 1) and (1, 1) / sqrt(2).
    np.testing.assert_allclose(found["audio_embeds"], [[0.6, 0.8], [0, 1]], atol=1e-6)
    np.testing.assert_allclose(found["text_embeds"], [[12 / 13, 5 / 13], [0, 1], [half, half]], atol=1e-6)
    cosines = np.array([[56 / 65, 0.8, 1.4 * half], [5 / 13, 1, half]])
    np.testing.assert_allclose(found["logits_per_audio"], 10 * cosines + 1, atol=1e-5)
    np.testing.assert_allclose(found["logits_per_text"], 2 * cosines.T + 1, atol=1e-5)


def test_weights_of_large_parts_are_kept_beside_the_file(
    exported: dict[str, Path], feeds: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "EXTERNAL_DATA_LIMIT_BYTES", 10_000)
    parts = {}
    for name, source in exported.items():
        parts[name] = tmp_path / f"{name}.onnx"
        onnx_graph.save(onnx.load(source), parts[name])
        assert onnx_graph.file_bytes(parts[name]) > parts[name].stat().st_size
    combine_dual_encoder(parts["vision"], parts["text"], tmp_path / "model.onnx", scale=3.0)
    assert (tmp_path / "model.onnx").stat().st_size < 300_000 < onnx_graph.file_bytes(tmp_path / "model.onnx")
    combine_dual_encoder(exported["vision"], exported["text"], tmp_path / "inline.onnx", scale=3.0)
    monkeypatch.undo()
    beside, inline = run(tmp_path / "model.onnx", feeds), run(tmp_path / "inline.onnx", feeds)
    np.testing.assert_array_equal(beside["logits_per_image"], inline["logits_per_image"])


def test_what_cannot_be_combined_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    audio, text = worked_by_hand(tmp_path)
    target = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match=r"both take pixel_values"):
        combine_dual_encoder(exported["vision"], exported["vision"], target, scale=1.0)
    with pytest.raises(ExportError, match=r"embeddings of 32 and 2 numbers"):
        combine_dual_encoder(exported["vision"], text, target, scale=1.0)
    with pytest.raises(ExportError, match=r"has no output pooled; its outputs are audio_embeds"):
        combine_dual_encoder(audio, text, target, scale=1.0, embeds=("pooled", None))
    model = onnx.load(text)
    model.opset_import[0].version = 19
    onnx.save(model, text)
    with pytest.raises(ExportError, match=r"versions 20 and 19 of operator set ai.onnx"):
        combine_dual_encoder(audio, text, target, scale=1.0)
    assert not target.exists()
