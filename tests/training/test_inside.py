"""Losses that look inside: hidden states, attention maps, masked pictures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr

from mmcompress.context import Context
from mmcompress.data.examples import as_examples
from mmcompress.errors import RecipeError
from mmcompress.families.base import Outputs
from mmcompress.model import CompressedModel
from mmcompress.passes.distill import Distill
from mmcompress.pruning.criteria.spacing import spaced
from mmcompress.quantization.onnx_export import eager_attention
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from mmcompress.training.inside import look, patch_embeddings, shapes_of
from mmcompress.training.losses.attention import Attention
from mmcompress.training.losses.base import Shapes
from mmcompress.training.losses.feature import Feature
from mmcompress.training.losses.hidden import Hidden, matched
from mmcompress.training.losses.masked_feature import MaskedFeature
from mmcompress.training.teacher import Teacher
from tests import tiny
from tests.families import tiny_blip, tiny_clap, tiny_siglip, tiny_vilt, tiny_whisper

TASK = ZeroShotImageClassification(type="zero-shot-image-classification")
MAPLESS = [("vilt", "fused"), ("clap", "audio")]
"""Towers whose maps stock transformers hands out only to those who ask its own way."""
BOTH = frozenset({"hidden", "attentions"})


def context(teacher: CompressedModel) -> Context:
    return Context(task=TASK, train=as_examples(tiny.dataset(32)), baseline=teacher.clone, seed=3)


def states(*layers: list[list[float]], masks: list[int] | None = None) -> Outputs:
    """One example's states in a text tower: before the first layer (never looked at), then after each."""
    found = tuple(torch.tensor([layer], requires_grad=True) for layer in ([[9.0] * len(layers[0][0])] * len(layers[0]), *layers))
    return Outputs(hidden={"text": found}, masks={} if masks is None else {"text": torch.tensor([masks])})


def test_hidden_by_hand() -> None:
    # The first layer is at right angles in one token (2) and equal in the other (0); the last is opposite in both (4, 4).
    student = states([[1.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, 1.0]])
    teacher = states([[0.0, 2.0], [0.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]], [[-2.0, 0.0], [0.0, -4.0]])
    loss = Hidden({"text": [2, 2]}, {"text": [2, 2, 2]})
    value = loss(student, teacher, {})
    assert value.item() == pytest.approx((1 + 4) / 2)
    # Without the second token, which is padding.
    student.masks = {"text": torch.tensor([[1, 0]])}
    assert loss(student, teacher, {}).item() == pytest.approx((2 + 4) / 2)
    assert loss.shares(student, teacher, {})["text"].item() == pytest.approx(3)


def test_hidden_against_numpy_with_projections() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = tuple(torch.randn(3, 5, 4, generator=generator).requires_grad_() for _ in range(3))
    theirs = tuple(torch.randn(3, 5, 6, generator=generator) for _ in range(5))
    torch.manual_seed(0)
    shapes = [
        Shapes(name, {}, {"vision": [(5, w)] * n}, {}, ("vision",)) for name, w, n in (("student", 4, 3), ("teacher", 6, 5))
    ]
    loss = Hidden.build(*shapes)
    expected = []
    for i, j in ((0, 0), (1, 3)):
        weight = loss.maps[f"vision_{i}"].weight.detach().numpy()
        a, b = ours[i + 1].detach().numpy() @ weight.T, theirs[j + 1].numpy()
        expected.append((2 - 2 * (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean())
    value = loss(Outputs(hidden={"vision": ours}), Outputs(hidden={"vision": theirs}), {})
    assert value.item() == pytest.approx(float(np.mean(expected)), rel=1e-5)
    value.backward()
    assert ours[0].grad is None
    assert all(layer.grad is not None and layer.grad.abs().max() > 0 for layer in ours[1:])
    assert all(p.grad is not None for p in loss.parameters())


def test_layers_are_matched_as_spacing_leaves_them() -> None:
    assert matched(4, 12) == [0, 3, 7, 11]
    for kept in range(1, 13):
        assert matched(kept, 12) == spaced(12, kept)


def maps(values: Any) -> Outputs:
    return Outputs(attentions={"text": (torch.tensor(values, requires_grad=True),)})


def test_attention_by_hand() -> None:
    # One head, two tokens. The first: (3/4, 1/4) against (1/2, 1/2); the second looks at itself alone in both.
    teacher, student = maps([[[[0.75, 0.25], [0.0, 1.0]]]]), maps([[[[0.5, 0.5], [0.0, 1.0]]]])
    kl = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    loss = Attention(["text"], {"text": False})
    assert loss(student, teacher, {}).item() == pytest.approx(kl / 2, abs=1e-6)
    student.masks = {"text": torch.tensor([[1, 0]])}
    assert loss(student, teacher, {}).item() == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("heads", [(3, 3), (2, 4)])
def test_attention_against_scipy(heads: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, count, 5, 5, generator=generator).softmax(-1) for count in heads)
    ours.requires_grad_()
    shapes = [
        Shapes(name, {}, {}, {"text": [(count, 5)]}, ("text",)) for name, count in zip(("student", "teacher"), heads, strict=True)
    ]
    loss = Attention.build(*shapes)
    a, b = ours.detach().double().numpy(), theirs.double().numpy()
    if heads[0] != heads[1]:
        a, b = a.mean(1), b.mean(1)
    value = loss(Outputs(attentions={"text": (ours,)}), Outputs(attentions={"text": (theirs,)}), {})
    assert value.item() == pytest.approx(float(rel_entr(b, a).sum(-1).mean()), rel=1e-5)
    value.backward()
    assert ours.grad is not None
    assert ours.grad.abs().max() > 0


def test_masked_feature_by_hand() -> None:
    # The masked picture is at right angles to the teacher's (2); the whole one would be equal. The texts are opposite (4).
    unit = torch.tensor([[1.0, 0.0]])
    student = Outputs({"vision": unit, "text": unit}, masked={"vision": torch.tensor([[0.0, 3.0]])})
    teacher = Outputs({"vision": unit, "text": -unit})
    sizes = {"vision": 2, "text": 2}
    assert MaskedFeature(sizes, sizes)(student, teacher, {}).item() == pytest.approx(6)
    assert Feature(sizes, sizes)(student, teacher, {}).item() == pytest.approx(4)


def test_a_quarter_of_the_patches_is_read() -> None:
    model = tiny.clip(image_size=32)
    batch = model.family.example_batch(model.module.config, 2)
    seen: list[int] = []
    layer = model.module.vision_model.encoder.layers[0]
    handle = layer.register_forward_hook(lambda part, given, made: seen.append(given[0].shape[1]))
    torch.manual_seed(0)
    with torch.no_grad():
        found = look(model.family, model.module, batch, frozenset({"masked"}))
        torch.manual_seed(0)
        again = look(model.family, model.module, batch, frozenset({"masked"}))
        other = look(model.family, model.module, batch, frozenset({"masked"}))
    handle.remove()
    assert seen == [17, 5] * 3
    assert torch.equal(found.masked["vision"], again.masked["vision"])
    assert not torch.equal(found.masked["vision"], other.masked["vision"])
    assert not torch.allclose(found.masked["vision"], found.embeds["vision"])


@pytest.mark.parametrize("kind", ["siglip", "clap"])
def test_masked_pictures_and_sounds_of_other_families(kind: str) -> None:
    model = tiny_siglip.siglip() if kind == "siglip" else tiny_clap.clap()
    batch = model.family.example_batch(model.module.config, 2)
    with torch.no_grad():
        found = look(model.family, model.module, batch, frozenset({"masked"}))
    (tower,) = found.masked
    assert found.masked[tower].shape == found.embeds[tower].shape
    assert not torch.allclose(found.masked[tower], found.embeds[tower])
    assert (patch_embeddings(model.family, model.module) is not None) == (kind == "siglip")


@pytest.mark.parametrize("kind", ["clip", "siglip", "whisper", "captions", "answers", "clap", "vilt"])
def test_every_family_gives_states_and_maps_of_its_towers(kind: str) -> None:
    made = {
        "clip": tiny.clip,
        "siglip": tiny_siglip.siglip,
        "whisper": tiny_whisper.whisper,
        "captions": tiny_blip.captions,
        "answers": tiny_blip.answers,
        "clap": tiny_clap.clap,
        "vilt": tiny_vilt.vilt,
    }
    model = made[kind]()
    before = model.module.config._attn_implementation
    shapes = shapes_of(model, "student", {}, BOTH)
    assert model.module.config._attn_implementation == before
    for tower in model.family.towers:
        depth = len(model.family.layers(model.module, tower))
        # Of a Swin transformer stock gives the states between stages.
        assert len(shapes.hidden[tower]) == (3 if (kind, tower) == ("clap", "audio") else depth + 1)
        assert len(shapes.attentions.get(tower, ())) == (0 if (kind, tower) in MAPLESS else depth)
    lacking = [tower for own, tower in MAPLESS if own == kind]
    if lacking:
        with pytest.raises(RecipeError, match=rf"the student \({kind}\) gives none of the {lacking[0]} tower"):
            Attention.build(shapes, shapes)
    batch = model.family.example_batch(model.module.config, 2)
    with torch.no_grad(), eager_attention(model.module):
        found = look(model.family, model.module, batch, BOTH)
        plain = model.family.forward(model.module, batch)
    for own in found.attentions.values():
        for each in own:
            torch.testing.assert_close(each.sum(-1), torch.ones_like(each.sum(-1)), atol=1e-4, rtol=1e-4)
    for tower, embeds in plain.embeds.items():
        assert torch.equal(embeds, found.embeds[tower])
    for tower, mask in model.family.token_masks(batch).items():
        assert mask.shape == found.hidden[tower][-1].shape[:2]


def test_training_with_all_of_them(tmp_path: Any) -> None:
    teacher, model = tiny.clip(seed=5), tiny.clip(num_hidden_layers=2, hidden_size=32, num_attention_heads=2)
    losses = {"hidden": {"vision": 1.0}, "attention": 1.0, "masked-feature": {"vision": 2.0, "text": 1.0}, "gradient": 1.0}
    settings: dict[str, Any] = {"max_steps": 2, "batch_size": 16, "precision": "fp32", "losses": losses}
    made = [Distill(**settings).apply(model, context=context(teacher)) for _ in range(2)]
    assert set(made[0].history[0]["result"]["final_losses"]) == {*losses, "task"}
    assert all(torch.equal(a, b) for a, b in zip(*(m.module.parameters() for m in made), strict=True))
    assert made[0].module.config._attn_implementation == model.module.config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in teacher.module.parameters())
    made[0].save(tmp_path / "model")


def test_the_same_model_is_at_no_distance_inside() -> None:
    model = tiny.clip()
    losses = {"task": 0.0, "hidden": 1.0, "attention": 1.0}
    new = Distill(max_steps=1, batch_size=16, precision="fp32", losses=losses).apply(model, context=context(model))
    assert new.history[0]["result"]["first_loss"] == pytest.approx(0, abs=1e-5)


def test_the_teacher_stays_without_gradient_and_as_it_was() -> None:
    model = tiny.clip()
    asked = Teacher(model, 4)
    batch = {**model.family.example_batch(model.module.config, 2), "index": torch.arange(2), "target": torch.arange(2)}
    found = asked.look_inside(batch, BOTH)
    assert not any(v.requires_grad for own in (found.hidden, found.attentions) for layers in own.values() for v in layers)
    assert model.module.config._attn_implementation == "sdpa"


def test_what_a_model_lacks_is_named() -> None:
    none = Shapes("student (resnet)", {}, towers=("text",))
    some = Shapes("teacher (clip)", {}, {"text": [(4, 8)] * 3}, {"text": [(2, 4)] * 2}, ("text",))
    with pytest.raises(RecipeError, match=r"hidden states, and the student \(resnet\) gives none of the text tower"):
        Hidden.build(none, some)
    with pytest.raises(RecipeError, match=r"attention maps, and the student \(resnet\) gives none of the text tower"):
        Attention.build(none, some)
    longer = Shapes("student", {}, {"text": [(5, 8)] * 3}, {"text": [(2, 5)] * 2}, ("text",))
    with pytest.raises(RecipeError, match="have 5 tokens in the student's layer 0 and 4 in the teacher's layer 0"):
        Hidden.build(longer, some)
    with pytest.raises(RecipeError, match="over 5 tokens in the student and 4 in the teacher"):
        Attention.build(longer, some)
    vision = Shapes("student", {}, {"vision": [(4, 8)] * 3}, {"vision": [(2, 4)] * 2}, ("vision",))
    for loss in (Hidden, Attention):
        with pytest.raises(RecipeError, match=r"teacher \(clip\) gives none of the vision tower"):
            loss.build(vision, some)
