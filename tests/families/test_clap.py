"""CLAP: one ratio for FFN layers of several widths, recordings of any length, and BatchNorm under training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import ClapConfig

from mmcompress import passes
from mmcompress.config import check_config, family_of
from mmcompress.context import Context
from mmcompress.data.audio import Audio
from mmcompress.data.examples import Examples
from mmcompress.errors import ModelError
from mmcompress.families.clap import FAMILY, ratio_for
from mmcompress.model import CompressedModel
from mmcompress.progress import SILENT
from mmcompress.registry import find
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks._guess import guess_task
from tests import tiny_data
from tests.families import tiny_clap

KIND = "zero-shot-audio-classification"
TASK = find("tasks", KIND).TASK.model_validate({"type": KIND})


@pytest.fixture
def model() -> CompressedModel:
    return tiny_clap.clap()


def examples(count: int, seed: int = 0) -> Examples:
    found = tiny_data.examples(count, seed)
    found.narrow(TASK.roles, TASK.type, TASK.optional)
    return found


def tone(seconds: float, rate: int = 8_000) -> Audio:
    time = np.arange(int(seconds * rate)) / rate
    return Audio(np.sin(2 * np.pi * (200 + 400 * time) * time).astype(np.float32), rate)


def test_components_give_stock_embeddings(model: CompressedModel) -> None:
    batch = FAMILY.example_batch(model.module.config, 3)
    parts = FAMILY.components(model.module)
    unit = torch.nn.functional.normalize
    with torch.no_grad():
        stock = model.module(**batch)
        (sounds,) = parts["audio_model"].module(batch["input_features"])
        (texts,) = parts["text_model"].module(batch["input_ids"], batch["attention_mask"])
        outputs = FAMILY.forward(model.module, batch, hidden=True)
    torch.testing.assert_close(unit(sounds, dim=-1), stock.audio_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(unit(texts, dim=-1), stock.text_embeds, atol=1e-6, rtol=0)
    logits = outputs.logit_scale * unit(outputs.embeds["audio"], dim=-1) @ unit(outputs.embeds["text"], dim=-1).T
    torch.testing.assert_close(logits, stock.logits_per_audio, atol=1e-4, rtol=1e-5)
    assert [tuple(s.shape) for s in outputs.hidden["audio"]] == [(3, 256, 16), (3, 64, 32), (3, 64, 32)]


def test_every_ffn_width_has_a_ratio_that_transformers_reads_back() -> None:
    for dim in (96, 128, 32, 48):
        for out in range(1, 4 * dim + 1):
            ratio = ratio_for(dim, out)
            assert [int(ratio * dim * 2**stage) for stage in range(4)] == [out * 2**stage for stage in range(4)], (dim, out)


def test_stages_are_cut_in_proportion(model: CompressedModel) -> None:
    pruned = passes.Prune(axis="ffn", ratio={"audio": 0.4}, criterion="magnitude").apply(model)
    assert pruned.module.config.audio_config.mlp_ratio == 2.5
    widths = [layer.intermediate.dense.out_features for layer in FAMILY.layers(pruned.module, "audio")]
    assert widths == [40, 40, 80, 80]


def test_published_sizes() -> None:
    config = ClapConfig()
    check_config(config, family_of(config, "x"), "x")
    assert FAMILY.config_sizes(config)["audio"] == {"ffn": 384}
    assert FAMILY.example_batch(config, 1)["input_features"].shape == (1, 1, 1001, 64)
    assert FAMILY.text_limit(config) == 512


def test_a_fused_model_is_refused() -> None:
    config = tiny_clap.config()
    config.audio_config.enable_fusion = True
    with pytest.raises(ModelError, match="enable_fusion is true"):
        family_of(config, "x")


def test_recordings_are_prepared_the_same_way_each_time(model: CompressedModel) -> None:
    long, short = tone(3.0), tone(0.25)
    (first,), (second,) = (model.processor.media("audio", [long]) for _ in range(2))
    assert torch.equal(first["input_features"], second["input_features"])
    middle = Audio(long.samples[8_000:16_000], 8_000)
    assert torch.equal(first["input_features"], model.processor.media("audio", [middle])[0]["input_features"])
    together = model.processor.media("audio", [short, long, middle])
    assert [tuple(one["input_features"].shape) for one in together] == [(1, 251, 16)] * 3
    assert torch.equal(together[1]["input_features"], first["input_features"])
    stock = tiny_clap.extractor()(short.samples.astype(np.float64), sampling_rate=8_000, return_tensors="pt")
    torch.testing.assert_close(together[0]["input_features"], stock["input_features"][0].float())


def test_an_extractor_that_does_not_fit_is_refused(model: CompressedModel) -> None:
    model.processor.feature_extractor.truncation = "fusion"
    with pytest.raises(ValueError, match="allowed: 'rand_trunc'"):
        model.processor.media("audio", [tone(0.5)])
    model.processor.feature_extractor = tiny_clap.extractor()
    model.processor.feature_extractor.nb_max_samples *= 2
    with pytest.raises(ValueError, match="gives 501 frames of 16 mel bands; the model takes up to 256 of 16"):
        model.processor.media("audio", [tone(0.5)])


def test_the_exported_audio_tower_takes_fewer_frames_too(model: CompressedModel, tmp_path: Path) -> None:
    where = Context(task=TASK, train=examples(8), workdir=tmp_path)
    new, _ = passes.Export().run(model, where)
    assert new.onnx is not None
    session = onnxruntime.InferenceSession(new.onnx / "audio_model.onnx", providers=["CPUExecutionProvider"])
    part = FAMILY.components(model.module)["audio_model"].module
    for frames in (100, 256):
        features = torch.randn(3, 1, frames, 16)
        with torch.no_grad():
            wanted = part(features)[0].numpy()
        np.testing.assert_allclose(session.run(None, {"input_features": features.numpy()})[0], wanted, atol=1e-4)


def test_training_moves_running_statistics_except_of_a_frozen_tower(model: CompressedModel) -> None:
    where = Context(task=TASK, train=examples(24))
    name = "audio_model.audio_encoder.batch_norm.running_mean"
    before = model.module.state_dict()[name].clone()
    step = {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3}
    tuned, _ = passes.Finetune(**step).run(model, where)
    after = tuned.module.state_dict()[name]
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)
    assert not any(part.training for part in tuned.module.modules())
    frozen, _ = passes.Finetune(freeze=["audio"], **step).run(model, where)
    audio = {k: v for k, v in frozen.module.state_dict().items() if k.startswith("audio_")}
    assert all(torch.equal(values, model.module.state_dict()[k]) for k, values in audio.items())


def test_it_learns_to_tell_tones_apart(model: CompressedModel) -> None:
    train, test = examples(48), examples(24, seed=1)
    tuned, _ = passes.Finetune(epochs=40, batch_size=24, learning_rate=3e-3).run(model, Context(task=TASK, train=train))
    scores = TASK.evaluate(TorchPredict(tuned), tuned.processor, test, SILENT)
    # A sixth of it is chance; what is reached depends on the number of threads.
    assert scores.per_example["accuracy"].mean() > 0.4
    retrieval = find("tasks", "audio-text-retrieval").TASK.model_validate({"type": "audio-text-retrieval"})
    test = tiny_data.examples(24, seed=1)
    test.narrow(retrieval.roles, retrieval.type, retrieval.optional)
    found = retrieval.evaluate(TorchPredict(tuned), tuned.processor, test, SILENT).per_example
    assert set(found) == set(retrieval.metrics)
    # All texts but one of each class are the same, so that a right one is among the six there are.
    assert found["audio_to_text_r10"].mean() == 1.0


def test_the_task_is_guessed_from_recordings() -> None:
    assert guess_task(examples(4), FAMILY.abilities).type == KIND
    found = tiny_data.examples(4)
    found.narrow({"audio": "", "text": ""}, "audio-text-retrieval")
    assert guess_task(found, FAMILY.abilities).type == "audio-text-retrieval"
