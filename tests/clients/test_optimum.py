"""Optimum's ONNX Runtime classes open the folders that mmcompress leaves, unchanged, and give the same answers.

Optimum's release for ONNX Runtime wants transformers 4, so it runs in an environment of its own, named by a variable:

    python -m venv optimum-env
    optimum-env/bin/pip install torch "transformers<5" optimum-onnx onnxruntime pillow
    MMCOMPRESS_OPTIMUM_PYTHON=optimum-env/bin/python python -m pytest tests/clients/test_optimum.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import mmcompress as mm
from mmcompress.runtimes.onnx_predict import OnnxPredict
from tests import tiny
from tests.clients.folders import SOUNDS, TEXTS, WHISPERS, before_end, finished, pictures
from tests.clients.node import array, arrays

PYTHON = "MMCOMPRESS_OPTIMUM_PYTHON"
CLIENT = Path(__file__).parent / "optimum_client.py"

pytestmark = pytest.mark.skipif(
    PYTHON not in os.environ, reason=f"{PYTHON} does not name a Python with optimum-onnx: Optimum is not tried"
)


def ask(folder: Path, does: str, **job: Any) -> Any:
    """What ``optimum_client.py`` says of a model folder."""
    told = json.dumps({"folder": str(folder), "does": does, **job})
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [os.environ[PYTHON], str(CLIENT)]
    done = subprocess.run(command, input=told, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise AssertionError(f"Optimum failed on {folder.name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def sent(values: NDArray[Any]) -> dict[str, Any]:
    return {"dims": list(values.shape), "type": str(values.dtype), "data": values.ravel().tolist()}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tiny.clip(), tmp_path_factory.mktemp("clip"))


def test_clip_as_zero_shot_classifier(clip: Path) -> None:
    model = mm.load(clip)
    inputs = {**model.processor.tokens(TEXTS), "pixel_values": model.processor.pixels(pictures(16))}
    given = {name: sent(value.numpy()) for name, value in inputs.items()}
    found = arrays(ask(clip, "forward", cls="ORTModelForZeroShotImageClassification", inputs=given))
    with torch.no_grad():
        stock = model.module(**inputs)
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        np.testing.assert_allclose(found[name], stock[name].numpy(), atol=1e-5, err_msg=name)
    small = {"file_name": "model_quantized.onnx"}
    quantized = arrays(ask(clip, "forward", cls="ORTModelForZeroShotImageClassification", inputs=given, files=small))
    images = OnnxPredict(clip)("vision_model", {"pixel_values": inputs["pixel_values"].numpy()})["image_embeds"]
    unit = images / np.linalg.norm(images, axis=1, keepdims=True)
    np.testing.assert_allclose(quantized["image_embeds"], unit, atol=1e-4)


def test_a_single_tower_as_a_model_of_its_own(clip: Path) -> None:
    pixels = mm.load(clip).processor.pixels(pictures(16)).numpy()
    files = {"file_name": "vision_model_quantized.onnx"}
    found = arrays(ask(clip, "forward", cls="ORTModelForCustomTasks", inputs={"pixel_values": sent(pixels)}, files=files))
    ours = OnnxPredict(clip)("vision_model", {"pixel_values": pixels})
    np.testing.assert_allclose(found["image_embeds"], ours["image_embeds"], atol=1e-4)


def test_the_tokenizer_is_read_by_transformers_4(clip: Path) -> None:
    found = arrays(ask(clip, "tokenize", texts=TEXTS))
    ours = mm.load(clip).processor.tokens(TEXTS)
    assert found["input_ids"].tolist() == ours["input_ids"].tolist()


@pytest.mark.parametrize("name", list(WHISPERS))
def test_whisper_writes_the_tokens_of_stock_generate(name: str, tmp_path: Path) -> None:
    folder = finished(WHISPERS[name](), tmp_path)
    model = mm.load(folder)
    features = torch.stack([model.processor.media("audio", [audio])[0]["input_features"] for audio in SOUNDS])
    settings = {"max_new_tokens": 12, "num_beams": 1}
    written = []
    for row in features:
        given = {"input_features": sent(row[None].numpy())}
        found = ask(folder, "generate", cls="ORTModelForSpeechSeq2Seq", inputs=given, settings=settings)
        assert found["cache"]
        end = model.module.generation_config.eos_token_id
        theirs = before_end(model.module.generate(input_features=row[None], **settings).numpy(), end)
        assert before_end(array(found["tokens"]), end)[-len(theirs) :] == theirs
        written.append(tuple(theirs))
    assert len(set(written)) > 2
