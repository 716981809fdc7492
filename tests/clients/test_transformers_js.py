"""transformers.js opens the folders that mmcompress leaves, unchanged, and gives the same answers as torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mmcompress as mm
from mmcompress.context import Context
from mmcompress.data.audio import Audio
from mmcompress.runtimes.onnx_predict import OnnxPredict
from tests import tiny
from tests.clients.folders import SOUNDS, TEXTS, WHISPERS, before_end, finished, pictures, sound
from tests.clients.node import array, arrays, ask, packages
from tests.families import tiny_clap, tiny_siglip, tiny_smolvlm

# Installing it takes a network; `make test-all` runs these.
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _installed() -> None:
    packages()


def sent(images: list[Image.Image]) -> list[dict[str, Any]]:
    return [{"data": np.asarray(i).ravel().tolist(), "width": i.width, "height": i.height} for i in images]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tiny.clip(), tmp_path_factory.mktemp("clip"))


CLIP_CLASSES = {"text": "CLIPTextModelWithProjection", "media": "CLIPVisionModelWithProjection", "both": "CLIPModel"}


def test_clip_gives_the_embeddings_and_similarities_of_torch(clip: Path) -> None:
    found = ask(clip, "embed", dtype="fp32", texts=TEXTS, images=sent(pictures(16)), classes=CLIP_CLASSES)
    model = mm.load(clip)
    inputs = {**model.processor.tokens(TEXTS), "pixel_values": model.processor.pixels(pictures(16))}
    for name, value in arrays(found["inputs"]).items():
        np.testing.assert_allclose(value, inputs[name].numpy(), atol=1e-5, err_msg=name)
    with torch.no_grad():
        stock = model.module(**inputs)
    both = arrays(found["both"])
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        np.testing.assert_allclose(both[name], stock[name].numpy(), atol=1e-5, err_msg=name)
    apart = {**arrays(found["text"]), **arrays(found["media"])}
    for name in ("image_embeds", "text_embeds"):
        unit = apart[name] / np.linalg.norm(apart[name], axis=1, keepdims=True)
        np.testing.assert_allclose(unit, stock[name].numpy(), atol=1e-5, err_msg=name)


def test_quantized_clip_gives_what_onnx_runtime_gives_in_python(clip: Path) -> None:
    found = ask(clip, "embed", dtype="q8", texts=TEXTS, images=sent(pictures(16)), classes=CLIP_CLASSES)
    model, predict = mm.load(clip), OnnxPredict(clip)
    assert all(path.stem.endswith("_quantized") for path in predict.files.values())
    texts = predict("text_model", {k: v.numpy() for k, v in model.processor.tokens(TEXTS).items()})["text_embeds"]
    pixels = model.processor.pixels(pictures(16)).numpy()
    images = predict("vision_model", {"pixel_values": pixels})["image_embeds"]
    np.testing.assert_allclose(arrays(found["text"])["text_embeds"], texts, atol=1e-4)
    np.testing.assert_allclose(arrays(found["media"])["image_embeds"], images, atol=1e-4)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts)]
    logits = model.module.logit_scale.exp().item() * unit[0] @ unit[1].T
    np.testing.assert_allclose(arrays(found["both"])["logits_per_image"], logits, atol=1e-3)


def test_the_zero_shot_pipeline_ranks_labels_as_torch_does(clip: Path) -> None:
    labels = list(tiny.COLOURS)
    settings = {"hypothesis_template": "a photo of a {}"}
    task = "zero-shot-image-classification"
    found = ask(clip, "classify", dtype="fp32", task=task, labels=labels, settings=settings, images=sent(pictures(16)))
    model = mm.load(clip)
    texts = model.processor.tokens([f"a photo of a {label}" for label in labels])
    with torch.no_grad():
        logits = model.module(**texts, pixel_values=model.processor.pixels(pictures(16))).logits_per_image
    for scores, probabilities in zip(found, logits.softmax(-1), strict=True):
        by_label = {one["label"]: one["score"] for one in scores}
        np.testing.assert_allclose([by_label[label] for label in labels], probabilities.numpy(), atol=1e-5)


@dataclass(frozen=True)
class Dual:
    """A dual encoder beside CLIP: how it is made, what opens its files, and what it is shown."""

    make: Callable[[], mm.CompressedModel]
    classes: dict[str, str]
    job: dict[str, Any]
    task: str
    kind: str


# At the full length that its extractor takes, where nothing is padded: the client pads shorter ones in another way.
HEARD = Audio(sound(1, rate=8_000), 8_000)
DUALS = {
    "siglip": Dual(
        tiny_siglip.siglip,
        {"text": "SiglipTextModel", "media": "SiglipVisionModel", "both": "SiglipModel"},
        {"images": sent(pictures(16)[:1]), "padding": {"padding": "max_length"}},
        "zero-shot-image-classification",
        "image",
    ),
    "clap": Dual(
        tiny_clap.clap,
        {"text": "ClapTextModelWithProjection", "media": "ClapAudioModelWithProjection", "both": "ClapModel"},
        {"audio": [HEARD.samples.tolist()]},
        "zero-shot-audio-classification",
        "audio",
    ),
}


@pytest.mark.parametrize("name", list(DUALS))
def test_other_dual_encoders_give_the_answers_of_torch(name: str, tmp_path: Path) -> None:
    dual = DUALS[name]
    folder = finished(dual.make(), tmp_path)
    model = mm.load(folder)
    found = ask(folder, "embed", dtype="fp32", texts=TEXTS, classes=dual.classes, **dual.job)
    given = {k: torch.from_numpy(v) for k, v in arrays(found["inputs"]).items()}
    ours = model.processor.media(dual.kind, [HEARD if dual.kind == "audio" else pictures(16)[0]])[0]
    for key, value in ours.items():
        # Spectrograms are in dB, of tens: the client computes them in another order.
        tolerance = 1e-5 if dual.kind == "image" else 0.05
        np.testing.assert_allclose(given[key][0].numpy(), value.numpy(), atol=tolerance)
    tokens = model.processor.tokens(TEXTS)
    assert given["input_ids"].tolist() == tokens["input_ids"].tolist()
    wanted = {key: value for key, value in given.items() if key != "attention_mask" or name != "siglip"}
    with torch.no_grad():
        stock = model.module(**wanted)
    both = arrays(found["both"])
    for key in (f"{dual.kind}_embeds", "text_embeds", f"logits_per_{dual.kind}", "logits_per_text"):
        np.testing.assert_allclose(both[key], stock[key].numpy(), atol=1e-4, err_msg=key)
    for part, key in (("media", f"{dual.kind}_embeds"), ("text", "text_embeds")):
        (apart,) = arrays(found[part]).values()
        np.testing.assert_allclose(apart / np.linalg.norm(apart, axis=1, keepdims=True), both[key], atol=1e-5)
    labels = list(tiny.COLOURS)
    scores = ask(folder, "classify", dtype="q8", task=dual.task, labels=labels, **dual.job)
    (ranked,) = scores
    assert {one["label"] for one in ranked} == set(labels)
    assert all(0 <= one["score"] <= 1 for one in ranked)


@pytest.fixture(scope="module", params=list(WHISPERS))
def whisper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(WHISPERS[request.param](), tmp_path_factory.mktemp(request.param))


def transcribed(folder: Path, dtype: str) -> list[dict[str, Any]]:
    """For each sound the features and the tokens, the prompt and the end included."""
    found: list[dict[str, Any]] = ask(
        folder,
        "transcribe",
        dtype=dtype,
        audio=[audio.samples.tolist() for audio in SOUNDS],
        cls="WhisperForConditionalGeneration",
        settings={"max_new_tokens": 12},
    )
    return found


def test_whisper_writes_the_tokens_of_stock_generate(whisper: Path) -> None:
    model = mm.load(whisper)
    end = model.module.generation_config.eos_token_id
    written = []
    for audio, found in zip(SOUNDS, transcribed(whisper, "fp32"), strict=True):
        features = model.processor.media("audio", [audio])[0]["input_features"][None]
        np.testing.assert_allclose(array(found["inputs"]["input_features"]), features.numpy(), atol=1e-4)
        stock = model.module.generate(input_features=features, max_new_tokens=12, num_beams=1)
        theirs = before_end(stock.numpy(), end)
        assert before_end(array(found["tokens"]), end)[-len(theirs) :] == theirs
        written.append(tuple(theirs))
    assert len(set(written)) > 2, "a model that says the same of every sound proves nothing"


def test_quantized_whisper_writes_what_our_own_decoding_writes(whisper: Path) -> None:
    model, predict = mm.load(whisper), OnnxPredict(whisper)
    assert all(path.stem.endswith("_quantized") for path in predict.files.values())
    texts = []
    for audio, found in zip(SOUNDS, transcribed(whisper, "q8"), strict=True):
        media = {name: value[None].numpy() for name, value in model.processor.media("audio", [audio])[0].items()}
        (text,) = model.family.respond(predict, model.processor, media, None, 12)
        tokens = array(found["tokens"]).ravel().tolist()
        assert model.processor.tokenizer.decode(tokens, skip_special_tokens=True).split() == text.split()
        texts.append(text)
    assert len(set(texts)) > 1


def test_smolvlm_answers_with_the_tokens_of_stock_generate(tmp_path: Path) -> None:
    made = mm.passes.Export().apply(tiny_smolvlm.smolvlm(), context=Context(workdir=tmp_path / "export"))
    folder = made.save(tmp_path / "model")
    model = mm.load(folder)
    found = ask(
        folder,
        "answer",
        dtype="fp32",
        cls="AutoModelForImageTextToText",
        prompt="<|im_start|>User:<image>what colour is this ?<end_of_utterance>\nAssistant:",
        images=sent(pictures(32)[:1]),
        settings={"max_new_tokens": 8, "do_sample": False},
    )
    inputs = {name: torch.from_numpy(value) for name, value in arrays(found["inputs"]).items()}
    # Four parts and then the whole; only that is made smaller, which is a matter of the client's picture library.
    ours = model.processor.media("image", pictures(32)[:1])[0]["pixel_values"]
    assert inputs["pixel_values"][0].shape == ours.shape
    np.testing.assert_allclose(inputs["pixel_values"][0, :4].numpy(), ours[:4].numpy(), atol=1e-5)
    stock = model.module.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    assert array(found["tokens"]).ravel().tolist() == stock.tolist()
    written = stock[inputs["input_ids"].shape[1] :].tolist()
    assert len(set(written)) > 1
