"""BLIP: answers through the components against stock transformers, token by token, and what is special about its three models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BlipConfig

from mmcompress.context import Context
from mmcompress.errors import ModelError, RecipeError
from mmcompress.families._blip_texts import prompt_ids
from mmcompress.families.base import Arrays, tower_parameters
from mmcompress.families.blip import FAMILY
from mmcompress.model import CompressedModel, align
from mmcompress.passes.prune import Prune
from mmcompress.quantization.onnx_export import export_component
from mmcompress.quantization.ptq import quantize_dynamic_int8
from mmcompress.runtimes.base import Predict
from mmcompress.runtimes.decoding import decode, empty_cache, next_cache
from mmcompress.runtimes.onnx_predict import OnnxPredict
from mmcompress.runtimes.torch_predict import TorchPredict
from tests.families import tiny_blip
from tests.families.tiny_blip import DEC, MODELS, PAD, SEP, WORDS

NEW = 10
QUESTIONS = ["what color is this?", "is the square red?", "which?"]


def export(model: CompressedModel, folder: Path) -> OnnxPredict:
    """All components as ONNX files, opened."""
    for name, part in model.family.components(model.module).items():
        export_component(part, model.family.example_inputs(model.module.config, part, 2), folder / f"{name}.onnx")
    return OnnxPredict(folder, threads=1)


@pytest.fixture(scope="module")
def models() -> dict[str, CompressedModel]:
    return {name: make() for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def exported(models: dict[str, CompressedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, OnnxPredict]:
    return {name: export(model, tmp_path_factory.mktemp(name)) for name, model in models.items()}


def pixels(count: int, seed: int = 3) -> np.ndarray:
    return torch.randn((count, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).numpy()


def runtimes(name: str, models: dict[str, CompressedModel], exported: dict[str, OnnxPredict]) -> list[Predict]:
    return [TorchPredict(models[name]), exported[name]]


def tokens_of(predict: Predict, ids: np.ndarray, fixed: Arrays) -> list[list[int]]:
    made = decode(predict, "decoder_model_merged", ids, end=(SEP,), limit=NEW, pad=PAD, fixed=fixed)
    found: list[list[int]] = made.tolist()
    return found


@pytest.mark.parametrize("prompt", [None, "a picture of"])
def test_captions_are_stock_generate_s_token_by_token(
    prompt: str | None, models: dict[str, CompressedModel], exported: dict[str, OnnxPredict]
) -> None:
    model, seen = models["blip-captions"], pixels(6)
    asked = None if prompt is None else [prompt] * 6
    given = {} if prompt is None else dict(model.processor.tokens([prompt] * 6))
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW}
    stock = model.module.generate(pixel_values=torch.from_numpy(seen), **given, **settings)
    starts = np.array(prompt_ids(model.processor, asked, 6))
    assert stock[:, : starts.shape[1]].tolist() == starts.tolist()
    new = stock[:, starts.shape[1] :].tolist()
    assert len({tuple(row) for row in new}) > 2, "a model that says the same of every picture proves nothing"
    assert any(len(set(row)) > 2 for row in new)
    for predict in runtimes("blip-captions", models, exported):
        states = predict("vision_model", {"pixel_values": seen})["last_hidden_state"]
        assert tokens_of(predict, starts, {"encoder_hidden_states": states}) == new
        said = model.family.respond(predict, model.processor, {"pixel_values": seen}, asked, NEW)
        assert said == [text.strip() for text in model.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def test_captions_end_where_stock_s_end(models: dict[str, CompressedModel]) -> None:
    """With a bias towards the end some sequences end early, others later."""
    model = models["blip-captions"].clone()
    with torch.no_grad():
        model.module.text_decoder.cls.predictions.decoder.bias[SEP] += 4.0
    seen = pixels(12)
    stock = model.module.generate(pixel_values=torch.from_numpy(seen), do_sample=False, num_beams=1, max_new_tokens=NEW)
    ends = {row.tolist().index(SEP) for row in stock if SEP in row}
    assert len(ends) > 1
    predict = TorchPredict(model)
    states = predict("vision_model", {"pixel_values": seen})["last_hidden_state"]
    assert tokens_of(predict, np.full((12, 1), DEC), {"encoder_hidden_states": states}) == stock[:, 1:].tolist()


def test_prompts_of_different_lengths_do_not_disturb_each_other(models: dict[str, CompressedModel]) -> None:
    model, seen = models["blip-captions"], pixels(4)
    prompts = ["a picture of", "a", "the photo", "this"]
    predict = TorchPredict(model)
    together = model.family.respond(predict, model.processor, {"pixel_values": seen}, prompts, NEW)
    alone = [
        model.family.respond(predict, model.processor, {"pixel_values": seen[i : i + 1]}, [prompts[i]], NEW)[0] for i in range(4)
    ]
    assert together == alone


def test_answers_are_stock_generate_s_token_by_token(
    models: dict[str, CompressedModel], exported: dict[str, OnnxPredict]
) -> None:
    """In one batch questions of several lengths; stock is asked one by one, as it looks at padding in a batch."""
    model, seen = models["blip-answers"], pixels(6)
    questions = QUESTIONS * 2
    tokens = model.processor.tokens(questions)
    assert 0 in tokens["attention_mask"]
    stock = []
    for i, question in enumerate(questions):
        one = model.processor.tokens([question])
        made = model.module.generate(pixel_values=torch.from_numpy(seen[i : i + 1]), do_sample=False, max_new_tokens=NEW, **one)
        stock.append(made[0, 1:].tolist() + [PAD] * (NEW + 1 - made.shape[1]))
    assert len({tuple(row) for row in stock}) > 2
    for predict in runtimes("blip-answers", models, exported):
        inputs = {name: values.numpy() for name, values in tokens.items()}
        states = predict("vision_model", {"pixel_values": seen})["last_hidden_state"]
        asked = predict("question_encoder", {**inputs, "encoder_hidden_states": states})["last_hidden_state"]
        fixed = {"encoder_hidden_states": asked, "encoder_attention_mask": inputs["attention_mask"]}
        assert tokens_of(predict, np.full((6, 1), DEC), fixed) == stock
        said = model.family.respond(predict, model.processor, {"pixel_values": seen}, questions, NEW)
        assert said == [text.strip() for text in model.processor.tokenizer.batch_decode(stock, skip_special_tokens=True)]


def test_answers_in_a_batch_without_padding_are_stock_s(models: dict[str, CompressedModel]) -> None:
    model, seen = models["blip-answers"], pixels(4)
    tokens = model.processor.tokens([QUESTIONS[0]] * 4)
    stock = model.module.generate(pixel_values=torch.from_numpy(seen), do_sample=False, max_new_tokens=NEW, **tokens)
    said = model.family.respond(TorchPredict(model), model.processor, {"pixel_values": seen}, [QUESTIONS[0]] * 4, NEW)
    assert said == [t.strip() for t in model.processor.tokenizer.batch_decode(stock[:, 1:], skip_special_tokens=True)]


def test_matching_is_the_softmax_of_stock_s_scores(models: dict[str, CompressedModel], exported: dict[str, OnnxPredict]) -> None:
    model, seen = models["blip-matches"], pixels(3)
    texts = ["a red square", "the picture of a blue square .", "yes"]
    with torch.no_grad():
        stock = model.module(pixel_values=torch.from_numpy(seen), **model.processor.tokens(texts)).itm_score.softmax(-1)[:, 1]
    assert stock.std() > 0.01
    for predict in runtimes("blip-matches", models, exported):
        found = model.family.match(predict, model.processor, {"pixel_values": seen}, texts)
        np.testing.assert_allclose(found, stock.numpy(), atol=2e-6)


@pytest.mark.parametrize("name", ["blip-captions", "blip-answers"])
def test_the_cache_spares_work_and_changes_nothing(
    name: str, models: dict[str, CompressedModel], exported: dict[str, OnnxPredict]
) -> None:
    """Token by token with a cache gives the logits of all tokens at once; after the first call the states are not read again."""
    model = models[name]
    part = model.family.components(model.module)["decoder_model_merged"]
    given = {k: v.numpy() for k, v in model.family.example_inputs(model.module.config, part, 2).items()}
    fixed = {k: v for k, v in given.items() if k.startswith("encoder_")}
    ids = torch.randint(5, 20, (2, 6), generator=torch.Generator().manual_seed(0)).numpy()
    for predict in runtimes(name, models, exported):
        empty = empty_cache(predict, part.name, 2)
        assert set(empty) == {i for i in part.inputs if i.startswith("past_key_values.")}
        whole = predict(part.name, {**fixed, "input_ids": ids, **empty})
        cache = empty
        for step in range(6):
            found = predict(part.name, {**fixed, "input_ids": ids[:, step : step + 1], **cache})
            np.testing.assert_allclose(found["logits"][:, 0], whole["logits"][:, step], atol=2e-4)
            cache = next_cache(found)
            fixed = {k: np.zeros_like(v) if k == "encoder_hidden_states" else v for k, v in fixed.items()}
        np.testing.assert_allclose(cache["past_key_values.1.encoder.value"], whole["present.1.encoder.value"], atol=1e-5)
        assert cache["past_key_values.1.decoder.key"].shape[2] == 6
        fixed = {k: v for k, v in given.items() if k.startswith("encoder_")}


def test_the_int8_decoder_runs_with_an_empty_and_a_full_cache(models: dict[str, CompressedModel], tmp_path: Path) -> None:
    """In later calls cross-attention projects no rows, whose ranges a dynamically quantized graph must still find."""
    model, seen = models["blip-captions"], pixels(4)
    float_folder, int8_folder = tmp_path / "float", tmp_path / "int8"
    float_folder.mkdir()
    int8_folder.mkdir()
    exact = export(model, float_folder)
    for path in float_folder.glob("*.onnx"):
        quantize_dynamic_int8(path, int8_folder / f"{path.stem}_quantized.onnx")
    rough = OnnxPredict(int8_folder, threads=1)
    states = exact("vision_model", {"pixel_values": seen})["last_hidden_state"]
    ids = np.full((4, 1), DEC)
    cache = empty_cache(rough, "decoder_model_merged", 4)
    for step in range(3):
        given = {"input_ids": ids, "encoder_hidden_states": states, **cache}
        ours, theirs = rough("decoder_model_merged", given), exact("decoder_model_merged", given)
        assert np.isfinite(ours["logits"]).all()
        away = np.linalg.norm(ours["logits"] - theirs["logits"]) / np.linalg.norm(theirs["logits"])
        assert 0 < away < 0.1, step
        cache, ids = next_cache(theirs), theirs["logits"][:, -1:].argmax(-1)


def test_training_on_captions_is_stock_s_loss(models: dict[str, CompressedModel]) -> None:
    model = models["blip-captions"]
    texts = ["a red square", "the blue picture of a square ."]
    batch = model.family.text_batch(model.processor, [{}, {}], None, texts)
    assert batch["input_ids"][:, 0].tolist() == [DEC, DEC]
    seen = torch.from_numpy(pixels(2))
    whole = model.processor.tokens(texts)
    whole["input_ids"][:, 0] = DEC
    labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
    ours, stock = losses(model, {"pixel_values": seen, **batch}, {"pixel_values": seen, **whole, "labels": labels})
    assert ours == pytest.approx(stock, rel=1e-5)


def test_no_loss_falls_on_the_prompt(models: dict[str, CompressedModel]) -> None:
    model = models["blip-captions"]
    batch = model.family.text_batch(model.processor, [{}, {}], ["a picture of", "a"], ["red", "blue square"])
    words = [[WORDS[i] if i >= 0 else "-" for i in row] for row in batch["labels"]]
    assert words == [["-", "-", "-", "red", "[SEP]"], ["-", "blue", "square", "[SEP]", "-"]]
    read = [[WORDS[i] for i in row] for row in batch["input_ids"]]
    assert read == [["[DEC]", "a", "picture", "of", "red"], ["[DEC]", "a", "blue", "square", "[PAD]"]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_training_on_answers_is_stock_s_loss(models: dict[str, CompressedModel]) -> None:
    """Of answers with weights the heaviest is learned."""
    model = models["blip-answers"]
    weighted = [{"no": 0.3, "yes it is": 1.0}, {"red": 0.6}]
    batch = model.family.text_batch(model.processor, [{}, {}], QUESTIONS[:2], weighted)
    seen = torch.from_numpy(pixels(2))
    said = model.processor.tokens(["yes it is", "red"])
    said["input_ids"][:, 0] = DEC
    labels = said["input_ids"].masked_fill(said["attention_mask"] == 0, -100)
    stock_batch = {
        **model.processor.tokens(QUESTIONS[:2]),
        "decoder_input_ids": said["input_ids"],
        "decoder_attention_mask": said["attention_mask"],
        "labels": labels,
    }
    ours, stock = losses(model, {"pixel_values": seen, **batch}, {"pixel_values": seen, **stock_batch})
    assert ours == pytest.approx(stock, rel=1e-5)


def losses(model: CompressedModel, batch: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> tuple[float, float]:
    from mmcompress.tasks._respond import answer_loss

    with torch.no_grad():
        outputs = model.family.forward(model.module, batch)
        return float(answer_loss(outputs, batch)), float(model.module(**stock).loss)


@pytest.mark.parametrize("name", list(MODELS))
def test_hidden_states_and_towers(name: str, models: dict[str, CompressedModel]) -> None:
    model = models[name]
    found = tower_parameters(model.family, model.module)
    assert tuple(found) == model.family.towers
    assert sum(p.numel() for own in found.values() for p in own) == model.parameters()
    batch = model.family.example_batch(model.module.config, 2)
    outputs = model.family.forward(model.module, batch, hidden=True)
    assert set(outputs.hidden) == set(model.family.towers)
    for tower, states in outputs.hidden.items():
        # transformers gives what goes into the first layer and what comes out of each
        assert len(states) == len(model.family.layers(model.module, tower)) + 1
    assert outputs.logits is not None
    assert model.family.forward(model.module, {"pixel_values": batch["pixel_values"]}).logits is None


@pytest.mark.parametrize(
    ("name", "axis", "ratio"),
    [
        ("blip-captions", "ffn", {"vision": 0.5, "text": 0.25}),
        ("blip-captions", "depth", {"vision": 0.34, "text": 0.5}),
        ("blip-answers", "ffn", {"vision": 0.5, "question": 0.5, "text": 0.5}),
        ("blip-answers", "depth", {"question": 0.5, "text": 0.5}),
        ("blip-matches", "ffn", {"text": 0.5}),
        ("blip-matches", "depth", {"vision": 0.34, "text": 0.5}),
    ],
)
def test_stock_transformers_reloads_what_is_cut(
    name: str, axis: str, ratio: dict[str, float], models: dict[str, CompressedModel], tmp_path: Path
) -> None:
    model = models[name]
    small = Prune.model_validate({"pass": "prune", "axis": axis, "ratio": ratio}).run(model, Context())[0]
    sizes, before = small.family.config_sizes(small.module.config), model.family.config_sizes(model.module.config)
    assert {t for t in sizes if sizes[t][axis] < before[t][axis]} == set(ratio)
    small.module.save_pretrained(tmp_path / "stock")
    again, info = model.family.model_class().from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in again.parameters()) == small.parameters() < model.parameters()
    align(again)
    batch = model.family.example_batch(small.module.config, 3)
    with torch.no_grad():
        ours, theirs = (model.family.forward(m, batch).logits for m in (small.module, again.eval()))
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours, theirs)
    small.save(tmp_path / "model")


def test_zeroed_units_can_go_without_a_trace(models: dict[str, CompressedModel]) -> None:
    """Units whose weights are 0 are the ones that go, and the logits stay what they were."""
    model = models["blip-answers"].clone()
    with torch.no_grad():
        for tower in model.family.towers:
            for group, layer in zip(
                model.family.unit_groups(model.module, tower, "ffn"), model.family.layers(model.module, tower), strict=True
            ):
                group.root.weight[::2] = 0
                group.root.bias[::2] = 0
                (layer.mlp.fc2 if tower == "vision" else layer.output.dense).weight[:, ::2] = 0
    small = Prune.model_validate({"pass": "prune", "axis": "ffn", "ratio": 0.5}).run(model, Context())[0]
    batch = model.family.example_batch(model.module.config, 2)
    with torch.no_grad():
        before, after = (model.family.forward(m.module, batch).logits for m in (model, small))
    assert before is not None
    assert after is not None
    assert torch.allclose(before, after, atol=1e-4)


def test_question_and_text_are_cut_alike_or_not_at_all(models: dict[str, CompressedModel]) -> None:
    model = models["blip-answers"]
    with pytest.raises(RecipeError, match="question and text share their depth"):
        Prune.model_validate({"pass": "prune", "axis": "depth", "ratio": {"question": 0.5}}).run(model, Context())[0]
    sizes = model.family.config_sizes(model.module.config)
    sizes["question"]["ffn"] = 32
    with pytest.raises(ModelError, match="cut both alike"):
        model.family.resized_config(model.module.config, sizes)


def test_the_head_is_chosen_by_architectures() -> None:
    for name, make in MODELS.items():
        model = make()
        assert type(model.family).__name__.lower() == name.replace("-", "")
        assert isinstance(model.module, model.family.model_class())
    for named in (["BlipModel"], None):
        config = BlipConfig()
        config.architectures = named
        with pytest.raises(ModelError, match="BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval"):
            FAMILY.of(config)
    config = tiny_blip.config("BlipForQuestionAnswering")
    config.text_config.is_decoder = False
    with pytest.raises(ModelError, match="is_decoder"):
        FAMILY.of(config)


def test_a_prompt_that_fills_all_positions_is_refused(models: dict[str, CompressedModel]) -> None:
    model = models["blip-captions"]
    with pytest.raises(ModelError, match="32"):
        prompt_ids(model.processor, ["a red square " * 20], 1)


@pytest.mark.parametrize("name", list(MODELS))
def test_walk_feeds_every_component_with_real_inputs(name: str, models: dict[str, CompressedModel]) -> None:
    model = models[name]
    predict = TorchPredict(model)
    batch = {k: v.numpy() for k, v in model.family.example_batch(model.module.config, 3).items()}
    seen: list[str] = []
    for component, inputs in model.family.walk(predict, batch, model.module):
        part = model.family.components(model.module)[component]
        assert tuple(inputs) == part.inputs
        outputs = predict(component, inputs)
        assert all(np.isfinite(values).all() for values in outputs.values())
        if part.decoder and component in seen:
            assert inputs["input_ids"].shape[1] == 1
            assert inputs["past_key_values.0.encoder.key"].shape[2] == inputs["encoder_hidden_states"].shape[1]
        elif part.decoder:
            with torch.no_grad():
                logits = model.family.forward(model.module, {k: torch.from_numpy(v) for k, v in batch.items()}).logits
            assert logits is not None
            np.testing.assert_allclose(outputs["logits"], logits.numpy(), atol=1e-4)
        seen.append(component)
    expected = list(model.family.components(model.module))
    assert list(dict.fromkeys(seen)) == expected
    assert seen.count("decoder_model_merged") == (2 if "decoder_model_merged" in expected else 0)
