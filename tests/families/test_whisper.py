"""Whisper: transcripts through the components against stock `generate`, token by token, and what is special about its towers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

from mmcompress import passes
from mmcompress.context import Context
from mmcompress.data.audio import Audio
from mmcompress.data.examples import Examples
from mmcompress.errors import DataError, ModelError, RecipeError
from mmcompress.families._whisper_prompt import prompt_of
from mmcompress.families.base import NEW_TOKENS, tower_parameters
from mmcompress.families.whisper import DECODER, ENCODER, FAMILY, transcribe
from mmcompress.model import CompressedModel, align, load
from mmcompress.quantization.onnx_export import export_component
from mmcompress.quantization.ptq import quantize_dynamic_int8
from mmcompress.runtimes.base import Predict
from mmcompress.runtimes.decoding import empty_cache, next_cache
from mmcompress.runtimes.onnx_predict import OnnxPredict
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.automatic_speech_recognition import TASK
from tests import tiny_data
from tests.families.tiny_whisper import MELS, RATE, SECONDS, whisper, whisper_of_two_languages

NEW = 12


def free(model: CompressedModel) -> CompressedModel:
    """The same without forbidden tokens."""
    assert model.module.generation_config is not None
    model.module.generation_config.suppress_tokens = None
    return model


MAKERS: dict[str, Callable[[], CompressedModel]] = {
    "one language": whisper,
    "two languages": whisper_of_two_languages,
    "language detected": lambda: whisper_of_two_languages(language=None),
    "nothing forbidden": lambda: free(whisper(seed=1)),
    "untied": lambda: whisper(tie_word_embeddings=False),
}


def export(model: CompressedModel, folder: Path) -> OnnxPredict:
    """All components as ONNX files, opened."""
    for name, part in FAMILY.components(model.module).items():
        export_component(part, FAMILY.example_inputs(model.module.config, part, 2), folder / f"{name}.onnx")
    return OnnxPredict(folder, threads=1)


@pytest.fixture(scope="module")
def models() -> dict[str, CompressedModel]:
    return {name: make() for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def exported(models: dict[str, CompressedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, OnnxPredict]:
    return {name: export(model, tmp_path_factory.mktemp(name.replace(" ", "-"))) for name, model in models.items()}


def features(count: int = 6) -> torch.Tensor:
    """Random spectrograms of different strength, so that transcripts differ and end at different places."""
    drawn = torch.randn((count, MELS, SECONDS * 100), generator=torch.Generator().manual_seed(3))
    return drawn * torch.linspace(0.2, 3, count)[:, None, None]


def stock(model: CompressedModel, heard: torch.Tensor, new: int, **settings: Any) -> list[list[int]]:
    """What stock `generate` writes, without start, end and padding."""
    module: Any = model.module
    made = module.generate(input_features=heard, do_sample=False, num_beams=1, max_new_tokens=new, **settings)
    end = model.processor.generation.eos_token_id  # type: ignore[union-attr] # a Whisper has it
    pad = model.processor.generation.pad_token_id  # type: ignore[union-attr] # a Whisper has it
    rows = []
    for row in made.tolist():
        row = row[: row.index(end)] if end in row else row
        while row and row[-1] == pad:  # ends are cut off, and shorter rows padded to the longest
            row.pop()
        rows.append(row)
    return rows


def unpadded(rows: list[list[int]], pad: int) -> list[list[int]]:
    """Random models write the padding token too; at the end stock cuts it off."""
    return [row[: max((i + 1 for i, token in enumerate(row) if token != pad), default=0)] for row in rows]


@pytest.mark.parametrize("name", MAKERS)
def test_it_writes_what_stock_generate_writes(
    name: str, models: dict[str, CompressedModel], exported: dict[str, OnnxPredict]
) -> None:
    model, heard = models[name], features()
    wanted = stock(model, heard, NEW)
    assert len({tuple(row) for row in wanted}) > 3, "this test needs transcripts that differ"
    for predict in (TorchPredict(model), exported[name]):
        assert unpadded(transcribe(predict, model.processor, heard.numpy(), None, NEW), 0) == wanted, predict.runtime
        alone = transcribe(predict, model.processor, heard[4:5].numpy(), None, NEW)
        assert unpadded(alone, 0) == wanted[4:5], predict.runtime


def test_some_transcripts_end_early_and_none_passes_the_decoders_limit(models: dict[str, CompressedModel]) -> None:
    model, heard = models["one language"], features(24)
    most = model.module.config.max_target_positions - 1
    wanted = stock(model, heard, most)
    found = transcribe(TorchPredict(model), model.processor, heard.numpy(), None, 1000)
    assert unpadded(found, 0) == wanted
    lengths = {len(row) for row in found}
    assert max(lengths) == most
    assert min(lengths) < most


def test_the_language_can_be_said_for_each_recording(
    models: dict[str, CompressedModel], exported: dict[str, OnnxPredict]
) -> None:
    model, heard = models["language detected"], features()
    spoken = ["en", "German", "en", "<|de|>", "de", "english"]
    codes = ["en", "de", "en", "de", "de", "en"]
    wanted = [stock(model, heard[i : i + 1], NEW, language=codes[i], task="transcribe")[0] for i in range(6)]
    for predict in (TorchPredict(model), exported["language detected"]):
        assert unpadded(transcribe(predict, model.processor, heard.numpy(), spoken, NEW), 0) == wanted
    assert wanted != stock(model, heard, NEW, language="en", task="transcribe"), "this test needs languages that matter"


def test_texts_are_free_of_special_tokens(models: dict[str, CompressedModel]) -> None:
    model, heard = models["two languages"], features()
    predict = TorchPredict(model)
    texts = FAMILY.respond(predict, model.processor, {"input_features": heard.numpy()}, None, NEW)
    words = model.processor.tokenizer.convert_ids_to_tokens
    for text, row in zip(texts, transcribe(predict, model.processor, heard.numpy(), None, NEW), strict=True):
        assert text == " ".join(word for word in words(row) if "<" not in word)


@pytest.mark.parametrize("quantized", [False, True])
def test_one_graph_projects_the_encoders_states_once(
    quantized: bool, models: dict[str, CompressedModel], exported: dict[str, OnnxPredict], tmp_path: Path
) -> None:
    model, predict = models["one language"], exported["one language"]
    if quantized:
        for name, path in predict.files.items():
            quantize_dynamic_int8(path, tmp_path / f"{name}_quantized.onnx")
        predict = OnnxPredict(tmp_path, threads=1)
    heard, ids = features(2).numpy(), np.array([[1, 5, 6], [1, 7, 8]])
    fixed = {"encoder_hidden_states": predict(ENCODER, {"input_features": heard})["last_hidden_state"]}
    first = predict(DECODER, {"input_ids": ids, **fixed, **empty_cache(predict, DECODER, 2)})
    cache = next_cache(first)
    given = {"input_ids": ids[:, :1], **cache}
    later = predict(DECODER, {**given, **fixed})
    # Other states change nothing, and the cache comes back as it was: nothing was projected.
    for name, values in predict(DECODER, {**given, "encoder_hidden_states": -fixed["encoder_hidden_states"]}).items():
        np.testing.assert_array_equal(values, later[name])
        if ".encoder." in name:
            np.testing.assert_array_equal(values, first[name])
            assert values.shape[2] == model.module.config.max_source_positions
    assert later["present.1.decoder.value"].shape[2] == 4
    if quantized:
        text = FAMILY.respond(predict, model.processor, {"input_features": heard}, None, NEW)
        assert len(text) == 2


def test_the_decoder_file_has_the_names_that_clients_feed(exported: dict[str, OnnxPredict]) -> None:
    session = exported["one language"].sessions[DECODER]
    shapes = {i.name: i.shape for i in session.get_inputs()}
    layer = [f"past_key_values.0.{side}.{part}" for side in ("decoder", "encoder") for part in ("key", "value")]
    assert list(shapes)[:6] == ["input_ids", "encoder_hidden_states", *layer]
    # transformers.js makes an empty cache of these: the batch by its name, 0 for any other name.
    assert all(shapes[name][0] == "batch_size" and shapes[name][1] == 2 and shapes[name][3] == 16 for name in layer)
    assert all(isinstance(shapes[name][2], str) for name in layer)
    outputs = [o.name for o in session.get_outputs()]
    assert outputs[0] == "logits"
    assert outputs[1:] == [name.replace("past_key_values", "present") for name in list(shapes)[2:]]


def test_labels_are_the_decoders_inputs_one_further(models: dict[str, CompressedModel]) -> None:
    model = models["two languages"]
    texts = ["one two three", {"a square": 0.3, "red": 1.0}]
    batch = FAMILY.text_batch(model.processor, [], None, texts)  # type: ignore[arg-type]
    words = [model.processor.tokenizer.convert_ids_to_tokens(row) for row in batch["decoder_input_ids"].tolist()]
    start = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    assert words[0] == [*start, "one", "two", "three"]
    assert words[1][:5] == [*start, "red"]
    end = 2
    assert batch["labels"].tolist()[0] == [*batch["decoder_input_ids"].tolist()[0][1:], end]
    assert batch["labels"].tolist()[1] == [*batch["decoder_input_ids"].tolist()[1][1:5], end, -100, -100]
    # As stock makes inputs of labels, where a label is.
    inputs = {"decoder_input_ids": batch["decoder_input_ids"], "input_features": features(2)}
    with torch.no_grad():
        ours = FAMILY.forward(model.module, inputs).logits
        theirs = model.module(input_features=inputs["input_features"], labels=batch["labels"])
    assert ours is not None
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(ours.flatten(0, 1), batch["labels"].flatten()), theirs.loss, rtol=1e-5, atol=1e-6
    )
    german = FAMILY.text_batch(model.processor, [], ["de", "de"], ["one", "two"])
    assert set(german["labels"][:, 0].tolist()) == {model.processor.generation.lang_to_id["<|de|>"]}  # type: ignore[union-attr]


def test_texts_too_long_for_the_decoder_are_cut_without_an_end(models: dict[str, CompressedModel]) -> None:
    model = models["one language"]
    batch = FAMILY.text_batch(model.processor, [], None, ["one " * 40])
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (1, 24)
    assert 2 not in batch["labels"]


def test_training_needs_a_language(models: dict[str, CompressedModel]) -> None:
    with pytest.raises(ModelError, match=r"task\.language"):
        FAMILY.text_batch(models["language detected"].processor, [], None, ["one"])


# Expected by hand from _retrieve_init_tokens of transformers 5.23.
PROMPTS: list[tuple[dict[str, Any], str | None, tuple[int, ...], int | None]] = [
    ({}, None, (1,), None),
    ({"forced_decoder_ids": [[1, 7], [2, 9]]}, None, (1, 7, 9), None),
    ({"forced_decoder_ids": [[1, None], [2, 9]], "no_timestamps_token_id": 11}, None, (1, 9, 11), None),
    ({"forced_decoder_ids": [[1, None], [2, 9]], "lang_to_id": {"<|en|>": 7}}, None, (1, 0, 9), 1),
    ({"lang_to_id": {"<|en|>": 7}, "no_timestamps_token_id": 11}, None, (1, 0, 11), 1),
    ({"lang_to_id": {"<|en|>": 7}, "task_to_id": {"transcribe": 9, "translate": 8}}, "en", (1, 7, 9), None),
    ({"lang_to_id": {"<|en|>": 7}, "task_to_id": {"transcribe": 9, "translate": 8}, "task": "translate"}, None, (1, 0, 8), 1),
    ({"forced_decoder_ids": [[1, 7], [2, 9]], "lang_to_id": {"<|en|>": 5}, "language": "en"}, None, (1, 5), None),
]


@pytest.mark.parametrize(("settings", "language", "tokens", "detected"), PROMPTS)
def test_start_tokens(settings: dict[str, Any], language: str | None, tokens: tuple[int, ...], detected: int | None) -> None:
    generation = GenerationConfig(decoder_start_token_id=1, eos_token_id=2, **settings)
    found = prompt_of(generation, WhisperConfig(), language)
    assert (found.tokens, found.language_at) == (tokens, detected)


@pytest.mark.parametrize(
    ("settings", "language", "said"),
    [
        ({}, "en", "one language"),
        ({"lang_to_id": {"<|en|>": 7, "<|de|>": 8}}, "klingon", "unknown language 'klingon'; allowed: en, de"),
        ({"forced_decoder_ids": [[2, 9]]}, None, "in order"),
        ({"task": "sing", "task_to_id": {"transcribe": 9}, "lang_to_id": {"<|en|>": 7}}, "en", "unknown task 'sing'"),
    ],
)
def test_settings_that_cannot_be_followed(settings: dict[str, Any], language: str | None, said: str) -> None:
    generation = GenerationConfig(decoder_start_token_id=1, eos_token_id=2, **settings)
    with pytest.raises(ModelError, match=said):
        prompt_of(generation, WhisperConfig(), language)


def test_a_recording_longer_than_the_window_is_refused(models: dict[str, CompressedModel]) -> None:
    processor = models["one language"].processor
    assert processor.media("audio", [Audio(np.zeros(RATE, np.float32), RATE)])[0]["input_features"].shape == (MELS, 100)
    with pytest.raises(DataError, match=r"lasts 1\.50 s; this Whisper hears 1 s at once"):
        processor.media("audio", [Audio(np.zeros(3 * RATE // 2, np.float32), RATE)])


def test_other_whisper_models_are_refused() -> None:
    with pytest.raises(ModelError, match="WhisperForAudioClassification"):
        FAMILY.of(WhisperConfig(architectures=["WhisperForAudioClassification"]))
    with pytest.raises(ModelError, match="decoder_attention_heads: 5 heads do not divide d_model 384"):
        FAMILY.of(WhisperConfig(decoder_attention_heads=5))


def test_tied_weights_count_once_and_untied_ones_belong_to_the_decoder(models: dict[str, CompressedModel]) -> None:
    tied, untied = models["one language"], models["untied"]
    for model in (tied, untied):
        found = tower_parameters(FAMILY, model.module)
        assert set(found) == {"encoder", "decoder"}
        assert sum(p.numel() for own in found.values() for p in own) == model.parameters()
    assert untied.parameters() - tied.parameters() == tied.module.config.vocab_size * 32


def test_width_is_one_for_both_towers(tmp_path: Path, models: dict[str, CompressedModel]) -> None:
    for model in (models["one language"], models["untied"]):
        with pytest.raises(
            RecipeError, match="the towers encoder and decoder share their width; give all of them the same ratio"
        ):
            passes.Prune(axis="width", ratio={"encoder": 0.5}).apply(model)
        pruned = passes.Prune(axis="width", ratio=0.5).apply(model)
        config: Any = pruned.module.config
        assert (config.d_model, config.encoder_attention_heads, config.decoder_attention_heads) == (16, 1, 1)
        pruned.save(tmp_path / f"{model.parameters()}")
        again = WhisperForConditionalGeneration.from_pretrained(tmp_path / f"{model.parameters()}").eval()
        align(again)
        batch = FAMILY.example_batch(config, 2)
        with torch.no_grad():
            ours, theirs = FAMILY.forward(pruned.module, batch).logits, FAMILY.forward(again, batch).logits
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


def test_cut_models_still_write_what_stock_generate_writes(tmp_path: Path, models: dict[str, CompressedModel]) -> None:
    model, heard = models["two languages"], features()
    for step in (
        passes.Prune(axis="width", ratio=0.5),
        passes.Prune(axis="depth", ratio={"decoder": 0.5, "encoder": 0.3}),
        passes.Prune(axis="ffn", ratio={"decoder": 0.5}),
    ):
        model = step.apply(model)
    wanted = stock(model, heard, NEW)
    folder = tmp_path / "onnx"
    folder.mkdir()
    for predict in (TorchPredict(model), export(model, folder)):
        assert unpadded(transcribe(predict, model.processor, heard.numpy(), None, NEW), 0) == wanted


def test_cutting_nothing_but_the_weakest_leaves_the_answers(models: dict[str, CompressedModel]) -> None:
    """Units whose weights are all zero can go from both widths without a change: the right rows and columns are cut."""
    model = models["untied"].clone()
    module: Any = model.module
    with torch.no_grad():
        for tower in (module.model.encoder, module.model.decoder):
            for layer in tower.layers:
                layer.fc1.weight[1::2] = 0
                layer.fc1.bias[1::2] = 0
                layer.fc2.weight[:, 1::2] = 0
    batch = FAMILY.example_batch(module.config, 2)
    pruned = passes.Prune(axis="ffn", ratio=0.5).apply(model)
    with torch.no_grad():
        before, after = FAMILY.forward(module, batch).logits, FAMILY.forward(pruned.module, batch).logits
    assert before is not None
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_heads_alone_are_custom_and_still_the_same_in_every_runtime(tmp_path: Path, models: dict[str, CompressedModel]) -> None:
    model, heard = models["one language"], features()
    pruned = passes.Prune(axis="heads", ratio={"decoder": 0.5}, allow_custom=True).apply(model)
    pruned.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.custom
    wanted = stock(pruned, heard, NEW)
    folder = tmp_path / "onnx"
    folder.mkdir()
    for predict in (TorchPredict(again), export(again, folder)):
        assert predict.cache(DECODER)["past_key_values.0.encoder.key"] == (1, 16)
        assert unpadded(transcribe(predict, pruned.processor, heard.numpy(), None, NEW), 0) == wanted


@pytest.mark.parametrize(("axis", "stays"), [("ffn", True), ("depth", False), ("width", False)])
def test_places_of_alignment_heads_do_not_outlive_the_heads(axis: Any, stays: bool) -> None:
    model = whisper()
    assert model.module.generation_config is not None
    model.module.generation_config.alignment_heads = [[1, 0], [1, 1]]  # type: ignore[attr-defined]
    pruned = passes.Prune(axis=axis, ratio=0.5).apply(model)
    assert hasattr(pruned.module.generation_config, "alignment_heads") == stays
    assert hasattr(model.module.generation_config, "alignment_heads"), "the model that was given is changed"


def test_conv_width_is_seen_by_its_activations() -> None:
    """The width between the convolutions is no LayerNorm's: channels that are silent there go first."""
    model = whisper()
    conv: Any = model.module.model.encoder.conv1
    with torch.no_grad():
        conv.weight[::2] *= 1e-3
        conv.bias[::2] = 0
    found: Examples = tiny_data.examples(16)
    task = TASK.model_validate({"type": "automatic-speech-recognition"})
    found.narrow(task.roles, task.type, task.optional)
    step = passes.Prune(axis="width", ratio=0.5, criterion="activation", samples=8, batch_size=4)
    pruned, _ = step.run(model, Context(task=task, train=found))
    loud = pruned.module.model.encoder.conv1.weight.abs().amax((1, 2))
    assert bool((loud > 0.05).all())


def test_calls_are_one_hearing_and_so_many_tokens(models: dict[str, CompressedModel]) -> None:
    calls = FAMILY.calls(models["two languages"].module, 3)
    assert [(call.component, call.times) for call in calls] == [(ENCODER, 1), (DECODER, 1), (DECODER, NEW_TOKENS - 1)]
    assert calls[1].inputs["input_ids"].shape == (3, 4)
    assert calls[1].inputs["past_key_values.0.encoder.key"].shape == (3, 2, 0, 16)
    assert calls[2].inputs["past_key_values.0.encoder.key"].shape == (3, 2, 50, 16)
    parts = FAMILY.components(models["two languages"].module)
    with torch.no_grad():
        for call in calls:
            parts[call.component].module(*(call.inputs[name] for name in parts[call.component].inputs))


def test_the_walk_gives_the_logits_of_forward(models: dict[str, CompressedModel]) -> None:
    model = models["one language"]
    batch = FAMILY.example_batch(model.module.config, 2)
    predict: Predict = TorchPredict(model)
    arrays = {name: values.numpy() for name, values in batch.items()}
    steps = list(FAMILY.walk(predict, arrays, model.module))
    assert [name for name, _ in steps] == [ENCODER, DECODER, DECODER]
    found = np.concatenate([predict(name, inputs)["logits"] for name, inputs in steps[1:]], axis=1)
    with torch.no_grad():
        wanted = FAMILY.forward(model.module, batch).logits
    assert wanted is not None
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_trained_model_writes_what_stock_generate_writes(tmp_path: Path) -> None:
    """`MMCOMPRESS_SHARED` names a folder with `models/digits-whisper` and `data/spoken-digits/test.parquet`."""
    from datasets import load_dataset

    shared = Path(os.environ.get("MMCOMPRESS_SHARED", ""))
    folder, data = shared / "models" / "digits-whisper", shared / "data" / "spoken-digits" / "test.parquet"
    if not os.environ.get("MMCOMPRESS_SHARED") or not folder.is_dir() or not data.is_file():
        pytest.skip("MMCOMPRESS_SHARED names no folder with models/digits-whisper and data/spoken-digits")
    model = load(folder)
    rows = load_dataset("parquet", data_files=str(data), split="train", cache_dir=str(tmp_path)).with_format("arrow")[:64]
    from mmcompress.data.audio import decode_audio

    sounds = [decode_audio(value.as_py(), "row") for value in rows["audio"]]
    media = model.processor.stack(model.processor.media("audio", sounds))["input_features"]
    wanted = stock(model, media, 11)
    right = 0
    for predict in (TorchPredict(model), export(model, tmp_path)):
        found = transcribe(predict, model.processor, media.numpy(), None, 11)
        assert unpadded(found, 0) == wanted
        texts = FAMILY.respond(predict, model.processor, {"input_features": media.numpy()}, None, 11)
        right = sum(text == word.as_py() for text, word in zip(texts, rows["text"], strict=True))
    assert right > 32
