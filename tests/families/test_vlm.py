"""SmolVLM, Idefics3 and LLaVA against stock transformers: answers, prompts, picture vectors, losses, cuts."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, Idefics3Processor, LlavaProcessor

from mmcompress.context import Context
from mmcompress.errors import ModelError
from mmcompress.families import _vlm_text, llava
from mmcompress.families.base import without_weights
from mmcompress.model import CompressedModel, align, load
from mmcompress.passes.export import Export
from mmcompress.passes.prune import Prune
from mmcompress.pruning import cut
from mmcompress.runtimes.base import Predict
from mmcompress.runtimes.onnx_predict import OnnxPredict
from mmcompress.runtimes.torch_predict import TorchPredict
from tests.families import tiny_llava, tiny_smolvlm

MODELS = {**tiny_smolvlm.MODELS, **tiny_llava.MODELS}
PROMPTS = ["what is this?", "what colour is this square ?", "Describe the image."]
TOKENS = 12
DECODER = "decoder_model_merged"


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> CompressedModel:
    return MODELS[request.param]()


def pictures() -> list[Image.Image]:
    """High, flat, nearly square: SmolVLM splits them into 4, 2 and 4 sub-images beside the whole one."""
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 30), (20, 60), (30, 31))]


def media(model: CompressedModel) -> dict[str, torch.Tensor]:
    return model.processor.stack(model.processor.media("image", pictures()))


def stock_inputs(model: CompressedModel, prompts: Sequence[str] = PROMPTS) -> Any:
    """What the stock processor makes of pictures and prompts, padded in front."""
    held = model.processor
    words = copy.deepcopy(held.tokenizer)
    words.padding_side = "left"
    facts = json.loads(held.files["processor_config.json"])
    stock = {"Idefics3Processor": Idefics3Processor, "LlavaProcessor": LlavaProcessor}[facts.pop("processor_class")]
    made: Any = stock(held.image_processor, words, chat_template=words.chat_template, **facts)
    turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": p}]}] for p in prompts]
    texts = [made.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    return made(images=[[p] for p in pictures()], text=texts, padding=True, return_tensors="pt")


class Watched:
    """Another Predict, with what went in and which tokens came out."""

    def __init__(self, inner: Predict) -> None:
        self.inner, self.runtime, self.components = inner, inner.runtime, inner.components
        self.calls: list[tuple[str, dict[str, np.ndarray]]] = []
        self.tokens: list[np.ndarray] = []

    def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self.inner(component, inputs)
        self.calls.append((component, dict(inputs)))
        if component == DECODER:
            self.tokens.append(found["logits"][:, -1].argmax(-1))
        return found

    def cache(self, component: str) -> Mapping[str, tuple[int, int]]:
        return self.inner.cache(component)


def answers_are_stock(model: CompressedModel, predict: Predict) -> list[list[int]]:
    """Token by token, in a batch of prompts of unequal lengths with pictures of unequal numbers of sub-images."""
    given = stock_inputs(model)
    lengths = given["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    stock = model.module.generate(**given, do_sample=False, max_new_tokens=TOKENS)[:, given["input_ids"].shape[1] :]
    watched = Watched(predict)
    arrays = {name: values.numpy() for name, values in media(model).items()}
    said = model.family.respond(watched, model.processor, arrays, PROMPTS, TOKENS)
    assert np.array_equal(next(c for n, c in watched.calls if n == "embed_tokens")["input_ids"], given["input_ids"].numpy())
    end = model.module.config.text_config.eos_token_id
    ours = np.stack(watched.tokens, axis=1)
    assert ours.shape == tuple(stock.shape)
    live = (stock == end).int().cumsum(1) - (stock == end).int() == 0
    assert np.array_equal(ours[live.numpy()], stock[live].numpy())
    assert said == [text.strip() for text in model.processor.tokenizer.batch_decode(stock, skip_special_tokens=True)]
    decodes = [c for n, c in watched.calls if n == DECODER]
    assert decodes[0]["past_key_values.0.key"].shape[2] == 0
    assert [c["inputs_embeds"].shape[1] for c in decodes[1:]] == [1] * (len(decodes) - 1)
    tokens: list[list[int]] = stock.tolist()
    return tokens


def test_answers_are_stock_generate_token_by_token(model: CompressedModel) -> None:
    tokens = answers_are_stock(model, TorchPredict(model))
    assert len({tuple(row) for row in tokens}) == 3  # the answers depend on what is asked and shown
    assert sum(len(set(row)) > 1 for row in tokens) >= 2  # and on what was said before


def test_answers_of_onnx_files_are_stock_generate_token_by_token(model: CompressedModel, tmp_path: Path) -> None:
    made = Export().apply(model, context=Context(workdir=tmp_path))
    assert made.onnx is not None
    predict = OnnxPredict(made.onnx)
    answers_are_stock(model, predict)
    assert {p.name for p in made.onnx.glob("*.onnx")} == {"vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"}
    inputs = {i.name: i for i in predict.sessions[DECODER].get_inputs()}
    assert list(inputs)[:3] == ["inputs_embeds", "attention_mask", "position_ids"]
    # transformers.js takes an axis of this name for the batch, numbers as they are, and all other names for 0.
    assert inputs["past_key_values.0.key"].shape == ["batch_size", 2, "past_sequence_length", 8]
    assert [o.name for o in predict.sessions[DECODER].get_outputs()][:3] == ["logits", "present.0.key", "present.0.value"]


def test_each_answer_alone_is_the_answer_in_a_batch(model: CompressedModel) -> None:
    predict, batch = TorchPredict(model), media(model)
    whole = model.family.respond(predict, model.processor, {n: v.numpy() for n, v in batch.items()}, PROMPTS, TOKENS)
    for i, (picture, prompt) in enumerate(zip(pictures(), PROMPTS, strict=True)):
        one = model.processor.stack(model.processor.media("image", [picture]))
        alone = model.family.respond(predict, model.processor, {n: v.numpy() for n, v in one.items()}, [prompt], TOKENS)
        assert alone == whole[i : i + 1]


def test_captions_without_a_prompt_take_the_default_one(model: CompressedModel) -> None:
    predict, arrays = TorchPredict(model), {n: v.numpy() for n, v in media(model).items()}
    asked = model.family.respond(predict, model.processor, arrays, ["Describe the image."] * 3, TOKENS)
    assert model.family.respond(predict, model.processor, arrays, None, TOKENS) == asked


def test_picture_vectors_are_stock(model: CompressedModel) -> None:
    batch = media(model)
    if "pixel_attention_mask" in batch:  # a sub-image that is part padding, as videos and odd sizes have them
        batch["pixel_attention_mask"][0, 1, 10:] = False
        batch["pixel_attention_mask"][0, 1, :, 6:] = False
        assert not batch["pixel_attention_mask"][1, 3:].any()  # the flat picture has 2 sub-images and itself
    inputs = {name: batch[name] for name in model.family.components(model.module)["vision_encoder"].inputs}
    with torch.no_grad():
        stock = torch.cat([f.reshape(-1, 48) for f in model.module.get_image_features(**inputs).pooler_output])
        ours = model.family.components(model.module)["vision_encoder"].module(*inputs.values())[0]
    assert torch.allclose(ours.reshape(-1, 48), stock, atol=1e-5)
    assert stock.abs().max() > 0.1


@pytest.mark.parametrize("side", [1, 4, 7, 27, 32])
def test_positions_are_stock_bucketize(side: int) -> None:
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

    from mmcompress.families.smolvlm import _positions

    config = SmolVLMVisionConfig(hidden_size=1, image_size=side * 2, patch_size=2, num_channels=1)
    stock = SmolVLMVisionEmbeddings(config)
    nn.init.zeros_(stock.patch_embedding.weight)
    nn.init.zeros_(stock.patch_embedding.bias)
    stock.position_embedding.weight = nn.Parameter(torch.arange(float(side**2))[:, None])
    masks = torch.zeros((side * side, side, side), dtype=torch.bool)
    for i in range(side * side):
        masks[i, : i // side + 1, : i % side + 1] = True
    wanted = stock(torch.zeros(len(masks), 1, side * 2, side * 2), masks)[..., 0]
    assert torch.equal(_positions(masks, side), wanted.long())


def test_training_loss_is_stock(model: CompressedModel) -> None:
    family, prepared = model.family, model.processor.media("image", pictures())
    joined = family.text_batch(model.processor, prepared, PROMPTS, ["red", {"blue": 0.3, "a green square": 1.0}, "blue"])
    labels, ids = joined["labels"], joined["input_ids"]
    end = model.processor.tokenizer.eos_token
    words = [model.processor.tokenizer.convert_ids_to_tokens(row[row != -100].tolist()) for row in labels]
    assert words == [["red", end], ["a", "green", "square", end], ["blue", end]]
    whole = torch.full_like(ids, -100)
    for i, row in enumerate(labels):
        last = int(joined["attention_mask"][i].sum())
        count = int((row != -100).sum())
        whole[i, last - count : last] = ids[i, last - count : last]
    batch = {**model.processor.stack(prepared), **joined}
    inputs = {name: batch[name] for name in family.components(model.module)["vision_encoder"].inputs}
    stock = model.module(input_ids=ids, attention_mask=joined["attention_mask"], labels=whole, **inputs).loss
    seen = family.forward(model.module, batch, hidden=True)
    assert seen.logits is not None
    assert seen.logits.shape == (*labels.shape, model.module.config.text_config.vocab_size)
    ours = F.cross_entropy(seen.logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(ours, stock, rtol=1e-5)
    assert len(seen.hidden["text"]) == 3
    assert seen.hidden["text"][0].shape == (*ids.shape, 48)
    ours.backward()
    assert all(p.grad is not None for p in family.parts(model.module)[1].parameters())


def test_labels_by_hand() -> None:
    found = _vlm_text.learning_batch([[7, 8, 9], [7]], [[4, 2], [5, 6, 2]], pad=0, longest=5)
    assert found["input_ids"].tolist() == [[7, 8, 9, 4, 2], [7, 5, 6, 2, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert found["labels"].tolist() == [[4, 2, -100], [5, 6, 2]]
    assert found["label_positions"].tolist() == [[2, 3, 0], [0, 1, 2]]
    assert _vlm_text.learning_batch([[7, 8, 9]], [[4, 2]], 0, 4)["labels"].tolist() == [[4]]
    with pytest.raises(ModelError, match="no room for an answer"):
        _vlm_text.learning_batch([[7, 8, 9]], [[4, 2]], 0, 3)


CUTS = {"ffn": {"vision": 0.5, "text": 0.25}, "depth": {"vision": 0.5, "text": 0.5}, "heads": {"text": 0.5}}


@pytest.mark.parametrize("axis", CUTS)
def test_stock_transformers_reloads_a_cut_model(axis: Any, model: CompressedModel, tmp_path: Path) -> None:
    ratio = {**CUTS[axis], **({"vision": 0.6} if axis == "depth" and model.family.name == "llava" else {})}
    step = Prune(axis=axis, ratio=ratio)
    new = step.apply(model)
    new.save(tmp_path / "cut")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "cut").eval()
    align(again)
    assert type(again) is model.family.model_class()
    sizes = model.family.config_sizes(again.config)
    assert sizes == step.plan(model.family.config_sizes(model.module.config))
    batch = model.family.example_batch(model.module.config, 3, seed=3)
    with torch.no_grad():
        ours, theirs, old = (model.family.forward(m, batch).logits for m in (new.module, again, model.module))
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, old, atol=1e-3)
    text = again.config.text_config
    if axis == "heads":
        assert (text.num_key_value_heads, text.num_attention_heads, text.head_dim) == (1, 2, 8)
        assert again.get_decoder().layers[0].self_attn.q_proj.out_features == 16
    if getattr(text, "layer_types", None):
        assert len(text.layer_types) == text.num_hidden_layers
    answers_are_stock(new, TorchPredict(new)) if axis != "depth" else None


def test_cut_heads_are_those_whose_outputs_are_no_longer_read(model: CompressedModel) -> None:
    """Against the uncut model with the columns of the output projection at zero that read the heads that go."""
    groups = model.family.unit_groups(model.module, "text", "heads")
    keep = [[1], [0]]
    silenced = copy.deepcopy(model.module)
    for layer, kept in zip(model.family.layers(silenced, "text"), keep, strict=True):
        with torch.no_grad():  # two queries of 8 share a key and a value
            layer.self_attn.o_proj.weight[:, (1 - kept[0]) * 16 : (2 - kept[0]) * 16] = 0
    for group, kept in zip(groups, keep, strict=True):
        cut.couple(None, model.module, group)  # checks that every weight has the channels that are named
        cut.cut_units(None, group, kept)
    cut.rebuild(model, allow_custom=False)
    batch = model.family.example_batch(model.module.config, 2)
    with torch.no_grad():
        ours, theirs = model.family.forward(model.module, batch).logits, model.family.forward(silenced, batch).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_heads_that_no_stock_config_can_count(tmp_path: Path) -> None:
    """Llama's config wants heads that divide the width: 5 of 6 groups of one query leave 5 heads for a width of 48."""
    model = tiny_smolvlm.smolvlm()
    config = copy.deepcopy(model.module.config)
    config.text_config.num_attention_heads = config.text_config.num_key_value_heads = 6
    torch.manual_seed(0)
    model.module = tiny_smolvlm.wide_awake(model.family.model_class()(config))
    with pytest.raises(ModelError, match="no config of SmolVLMForConditionalGeneration has these shapes"):
        Prune(axis="heads", ratio={"text": 1 / 6}).apply(model)
    new = Prune(axis="heads", ratio={"text": 1 / 6}, allow_custom=True).apply(model)
    assert new.custom
    new.save(tmp_path / "custom")
    again = load(tmp_path / "custom")
    arrays = {n: v.numpy() for n, v in media(new).items()}
    said = [m.family.respond(TorchPredict(m), m.processor, arrays, PROMPTS, TOKENS) for m in (new, again)]
    assert said[0] == said[1]
    assert again.family.components(again.module)[DECODER].cache["past_key_values.0.key"] == (5, 8)


@pytest.mark.parametrize(
    ("number", "keep", "moved"),
    [(-2, [0, 1], -1), (-2, [0, 2], -2), (-2, [1], -1), (-1, [0, 2], -1), (2, [1, 2], 1), ([-2, 1], [0, 2], [-2, 1])],
)
def test_llava_reads_its_features_behind_the_same_layer(number: Any, keep: list[int], moved: Any) -> None:
    model = tiny_llava.llava()
    config = copy.deepcopy(model.module.config)
    config.vision_feature_layer = number
    torch.manual_seed(1)
    model.module = tiny_smolvlm.wide_awake(model.family.model_class()(config), 4.0)
    skipped = copy.deepcopy(model.module)
    for i, layer in enumerate(model.family.layers(skipped, "vision")):
        if i not in keep:  # as if it were not there: nothing is added to the residual stream
            for part in (layer.self_attn.out_proj, layer.mlp.fc2):
                nn.init.zeros_(part.weight)
                nn.init.zeros_(part.bias)
    model.family.drop_layers(model.module, "vision", keep)
    cut.rebuild(model, allow_custom=False)
    assert model.module.config.vision_feature_layer == moved
    assert model.module.config.vision_config.num_hidden_layers == len(keep)
    pixels = model.family.example_batch(config, 2)["pixel_values"]
    with torch.no_grad():
        stock = torch.stack(list(skipped.get_image_features(pixels).pooler_output))
        ours = torch.stack(list(model.module.get_image_features(pixels).pooler_output))
        part = model.family.components(model.module)["vision_encoder"].module(pixels)[0]
    assert torch.allclose(ours, stock, atol=1e-5)
    assert torch.allclose(part, stock, atol=1e-5)


def test_the_layer_that_llava_does_not_read_goes_for_free() -> None:
    model = tiny_llava.llava()
    batch = model.family.example_batch(model.module.config, 2)
    before = model.family.forward(model.module, batch).logits
    model.family.drop_layers(model.module, "vision", [0, 1])
    cut.rebuild(model, allow_custom=False)
    after = model.family.forward(model.module, batch).logits
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


def test_stock_processors_read_the_saved_folder(model: CompressedModel, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    stock = AutoProcessor.from_pretrained(tmp_path / "model")
    stock.tokenizer.padding_side = "left"
    texts = [
        stock.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": p}]}], add_generation_prompt=True
        )
        for p in PROMPTS
    ]
    found = stock(images=[[p] for p in pictures()], text=texts, padding=True, return_tensors="pt")
    given = stock_inputs(model)
    assert torch.equal(found["input_ids"], given["input_ids"])
    assert torch.equal(found["pixel_values"], given["pixel_values"])
    assert load(tmp_path / "model").family is model.family


def test_a_chat_template_in_a_file_of_its_own_is_read(model: CompressedModel) -> None:
    template = model.processor.tokenizer.chat_template
    asked = _vlm_text.chat(model.processor, "what is this?", "red", "unused {}")
    for name, text in (("chat_template.jinja", template), ("chat_template.json", json.dumps({"chat_template": template}))):
        held = copy.deepcopy(model.processor)
        held.tokenizer.chat_template = None
        held.files[name] = text
        assert _vlm_text.chat(held, "what is this?", "red", "unused {}") == asked
    held.files.clear()
    end = held.tokenizer.eos_token
    assert _vlm_text.chat(held, "what is this?", "red", "<image>{}") == ("<image>what is this?", f" red{end}")


def test_estimates_need_no_weights(model: CompressedModel) -> None:
    bare = without_weights(model.family, model.module.config)
    parts = model.family.components(bare)
    calls = model.family.calls(bare, 2)
    assert [(c.component, c.times) for c in calls] == [
        ("vision_encoder", 1), ("embed_tokens", 1), (DECODER, 1), ("embed_tokens", 15), (DECODER, 15),
    ]  # fmt: skip
    for call in calls:
        parts[call.component].module(*[call.inputs[i].to("meta") for i in parts[call.component].inputs])
    assert calls[2].inputs["past_key_values.0.key"].shape[2] == 0
    assert calls[4].inputs["past_key_values.0.key"].shape[2] == calls[2].inputs["inputs_embeds"].shape[1]


def test_what_is_refused() -> None:
    model = tiny_smolvlm.smolvlm()
    arrays = {n: v.numpy() for n, v in media(model).items()}
    with pytest.raises(ModelError, match=r"the prompt 'what is <image>\?' holds <image>"):
        model.family.respond(TorchPredict(model), model.processor, arrays, ["what is <image>?"] * 3, 2)
    with pytest.raises(ModelError, match="52 image tokens for 48 vectors"):
        _vlm_text.merge_images(np.zeros((1, 52, 4)), np.full((1, 52), 5), np.zeros((12, 4, 4)), 5)
    model.processor.image_processor.max_image_size = {"longest_edge": 32}
    with pytest.raises(ModelError, match=r"sub-images come out at 32 x 32; config.json says 16 x 16"):
        model.processor.media("image", pictures())


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("text_config", "model_type", "phi", "text_config.model_type: found 'phi'"),
        ("text_config", "sliding_window", 16, "decoders that forget tokens"),
        ("text_config", "rope_parameters", {"rope_type": "longrope"}, "changes with the text's length"),
        ("vision_config", "model_type", "pixtral", "vision_config.model_type: found 'pixtral'"),
        ("", "vision_feature_layer", -5, r"vision_feature_layer: found -5; allowed: -4 to 3"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(part: str, key: str, value: Any, said: str) -> None:
    config = copy.deepcopy(tiny_llava.llava().module.config)
    target = getattr(config, part) if part else config
    try:
        setattr(target, key, value)
    except AttributeError:  # model_type belongs to the class
        object.__setattr__(target, key, value)
    with pytest.raises(ModelError, match=said):
        llava.FAMILY.of(config)
