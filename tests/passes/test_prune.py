"""The pass as a user sees it: settings, results that stock transformers loads, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mmcompress import model as models
from mmcompress.errors import DataError, ModelError, RecipeError, TrainingError
from mmcompress.families.clip import FAMILY, Clip
from mmcompress.model import CompressedModel
from mmcompress.passes.prune import PASS, Prune
from tests import tiny
from tests.pruning.helpers import context, embeds, full, stock_reload_is_equal

SIZES = {"vision": {"ffn": 96, "depth": 3, "width": 48, "heads": 3}, "text": {"ffn": 64, "depth": 2, "width": 32, "heads": 2}}


@pytest.fixture
def ready() -> CompressedModel:
    return full(tiny.clip())


def after(model: CompressedModel) -> dict[str, Any]:
    sizes = model.history[-1]["result"]["sizes"]
    return {tower: sizes[tower]["after"] for tower in sizes}


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "activation", "random"])
@pytest.mark.parametrize("axis", ["ffn", "depth", "width"])
def test_stock_transformers_reloads_bit_equal(axis: Any, criterion: str, ready: CompressedModel, tmp_path: Path) -> None:
    step = Prune(axis=axis, ratio=0.5, criterion=criterion, samples=16, batch_size=8)
    before = embeds(ready)
    new = step.apply(ready, context=context(16))
    assert not new.custom
    config = stock_reload_is_equal(new, tmp_path).config
    read = new.family.config_sizes(config)
    assert read == step.plan(SIZES) == after(new)
    assert not torch.equal(embeds(new)["vision"], before["vision"])
    assert all(torch.equal(before[t], embeds(ready)[t]) for t in before)  # the model that was given stays
    assert new.module.config._attn_implementation == ready.module.config._attn_implementation
    assert not new.module.training


def test_config_keys_and_facts(ready: CompressedModel) -> None:
    new = Prune(axis="width", ratio={"vision": 1 / 3}).apply(ready)
    vision = new.module.config.vision_config
    assert (vision.hidden_size, vision.num_attention_heads, vision.intermediate_size) == (32, 2, 96)
    assert new.module.config.text_config.hidden_size == 32
    attention = new.module.vision_model.encoder.layers[0].self_attn
    assert (attention.num_heads, attention.embed_dim, attention.head_dim) == (2, 32, 16)
    result = new.history[-1]["result"]
    assert json.loads(json.dumps(result)) == result
    assert result["sizes"]["vision"]["before"] == SIZES["vision"]
    counts = result["parameters"]
    assert counts["text"]["before"] == counts["text"]["after"]
    assert counts["vision"]["after"] + counts["text"]["after"] + 1 == new.parameters()
    assert new.history[-1]["settings"]["criterion"] == "magnitude"


def test_passes_chain_and_the_folder_saves(ready: CompressedModel, tmp_path: Path) -> None:
    new = ready
    for step in (Prune(ratio=0.5), Prune(axis="width", ratio={"vision": 0.3}), Prune(axis="depth", ratio={"vision": 0.3})):
        new = step.apply(new)
    assert after(new) == {
        "vision": {"ffn": 48, "depth": 2, "width": 32, "heads": 2},
        "text": {"ffn": 32, "depth": 2, "width": 32, "heads": 2},
    }
    again = models.load(new.save(tmp_path / "m"))
    assert [h["pass"] for h in again.history] == ["prune"] * 3


def test_round_to_and_towers_left_alone(ready: CompressedModel) -> None:
    new = Prune(ratio={"vision": 0.4, "text": 0}, round_to=16).apply(ready)
    assert after(new)["vision"]["ffn"] == 64  # 57.6 is nearest to 64
    assert after(new)["text"]["ffn"] == 64
    assert all(
        torch.equal(a, b) for a, b in zip(ready.module.text_model.parameters(), new.module.text_model.parameters(), strict=True)
    )


def test_the_units_that_matter_stay(ready: CompressedModel) -> None:
    with torch.no_grad():
        for layer in ready.module.vision_model.encoder.layers:
            for part in (layer.mlp.fc1.weight, layer.mlp.fc1.bias):
                part[::2] *= 0.01
            layer.mlp.fc2.weight[:, ::2] = 0
    before = embeds(ready)["vision"]
    new = Prune(ratio={"vision": 0.5}).apply(ready)
    torch.testing.assert_close(embeds(new)["vision"], before, rtol=1e-5, atol=1e-5)
    kept = new.module.vision_model.encoder.layers[1].mlp.fc1.weight
    assert torch.equal(kept, ready.module.vision_model.encoder.layers[1].mlp.fc1.weight[1::2])


def test_depth_drops_the_layer_that_does_nothing(ready: CompressedModel) -> None:
    layer = ready.module.vision_model.encoder.layers[1]
    with torch.no_grad():
        for part in (layer.self_attn.out_proj, layer.mlp.fc2):
            part.weight.zero_()
            part.bias.zero_()
    before = embeds(ready)["vision"]
    new = Prune(axis="depth", ratio={"vision": 1 / 3}, criterion="activation", samples=16).apply(ready, context=context(16))
    assert new.history[-1]["result"]["kept_layers"] == {"vision": [0, 2]}
    assert torch.equal(embeds(new)["vision"], before)


@pytest.mark.parametrize("criterion", ["random", "taylor"])
def test_the_seed_decides(criterion: str, ready: CompressedModel) -> None:
    step = Prune(ratio=0.5, criterion=criterion, samples=16, batch_size=8)
    first, again, other = (step.apply(ready, context=context(40, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), again.module.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.module.parameters(), other.module.parameters(), strict=True))


def test_torchs_random_state_is_left_alone(ready: CompressedModel) -> None:
    state = torch.get_rng_state()
    Prune(ratio=0.5).apply(ready)
    assert torch.equal(torch.get_rng_state(), state)


CUSTOM = [{"axis": "heads", "ratio": 0.5}, {"axis": "ffn", "scope": "tower", "ratio": 0.4, "criterion": "random"}]


@pytest.mark.parametrize("settings", CUSTOM)
def test_custom_shapes_are_refused_unless_allowed(settings: dict[str, Any], ready: CompressedModel) -> None:
    # What no family can say is refused with the recipe; what this family cannot say, once the model is known.
    with pytest.raises((ValidationError, RecipeError), match="allow_custom: true"):
        Prune(**settings).apply(ready)


@pytest.mark.parametrize("settings", CUSTOM)
def test_custom_models_save_and_load_bit_equal(settings: dict[str, Any], ready: CompressedModel, tmp_path: Path) -> None:
    new = Prune(**settings, allow_custom=True).apply(ready)
    assert new.custom
    again = models.load(new.save(tmp_path / "m"))
    assert again.custom
    assert all(torch.equal(a, b) for a, b in zip(embeds(new).values(), embeds(again).values(), strict=True))
    if settings["axis"] == "ffn":
        assert len(set(after(new)["vision"]["ffn"])) > 1
        assert sum(after(new)["vision"]["ffn"]) == pytest.approx(3 * 96 * 0.6, abs=8)
        assert all(width % 8 == 0 for width in after(new)["vision"]["ffn"])


def test_a_custom_model_can_be_cut_on(ready: CompressedModel, tmp_path: Path) -> None:
    custom = Prune(**CUSTOM[1], allow_custom=True).apply(ready)
    with pytest.raises(ModelError, match="allow_custom"):
        Prune(axis="depth", ratio=0.5).apply(custom)
    new = custom
    for axis in ("depth", "width", "ffn"):
        new = Prune(axis=axis, ratio={"vision": 0.34}, allow_custom=True).apply(new)
    assert after(new)["vision"]["depth"] == 2
    assert after(new)["vision"]["width"] == 32
    again = models.load(new.save(tmp_path / "m"))
    assert all(torch.equal(a, b) for a, b in zip(embeds(new).values(), embeds(again).values(), strict=True))
    whole = Prune(axis="depth", ratio={"vision": 0.5, "text": 0.5}, allow_custom=True).apply(new)
    assert not whole.custom  # with one layer left no layers differ
    stock_reload_is_equal(whole, tmp_path / "stock")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratio": 0}, "cut nothing"),
        ({"ratio": {"vision": 0.0}}, "cut nothing"),
        ({"ratio": 1.0}, "less than 1"),
        ({"ratio": {"vision": -0.1}}, "greater than or equal to 0"),
        ({"ratio": float("nan")}, "finite|less than 1|greater"),
        ({"ratio": 0.5, "criterion": "tailor"}, "did you mean 'taylor'"),
        ({"ratio": 0.5, "axis": "depth", "scope": "tower"}, "leave scope out"),
        ({"ratio": 0.5, "heads": "narrower"}, "heads: narrower is for axis: width; with axis: ffn leave it out"),
        ({"ratio": 0.5, "samples": 4}, "greater than or equal to 8"),
        ({"ratio": 0.5, "rate": 1}, "Extra inputs"),
    ],
)
def test_bad_settings_say_why(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Prune(**settings)


class Joined(Clip):
    """As if both towers read one config key."""

    def cut_together(self, axis: str) -> tuple[str, ...]:
        return self.towers


def test_one_number_is_for_the_towers_that_have_the_axis() -> None:
    sizes = {"vision": {"ffn": 96}, "text": {"ffn": 64, "depth": 2}}
    step = Prune(axis="depth", ratio=0.5)
    assert step.check_against(FAMILY, sizes) == []
    assert step.plan(sizes) == {"vision": {"ffn": 96}, "text": {"ffn": 64, "depth": 1}}
    (said,) = Prune(axis="depth", ratio={"vision": 0.5}).check_against(FAMILY, sizes)
    assert "depth cannot be cut in the vision tower; it has: ffn" in said


def test_check_and_plan_need_sizes_only() -> None:
    step = Prune.model_validate({"pass": "prune", "axis": "ffn", "ratio": {"vision": 0.5, "txt": 0.5}})
    assert PASS is Prune
    (said,) = step.check_against(FAMILY, SIZES)
    assert "unknown tower 'txt'" in said
    assert "did you mean 'text'" in said
    assert Prune(ratio=0.5).check_against(FAMILY, SIZES) == []
    (said,) = Prune(ratio=0.5, axis="heads").check_against(FAMILY, SIZES)
    assert "use axis: width" in said
    (said,) = Prune(ratio={"vision": 0.5}).check_against(Joined(), SIZES)
    assert "vision and text share their ffn" in said
    assert Prune(ratio=0.5).check_against(Joined(), SIZES) == []
    assert Prune(axis="depth", ratio=0.5).plan(SIZES)["text"]["depth"] == 1


def test_what_a_recipe_check_would_say_is_said_when_run_too(ready: CompressedModel) -> None:
    with pytest.raises(RecipeError, match="would cut nothing"):
        Prune(ratio=0.01).apply(ready)


def test_data_is_asked_for_only_where_it_is_read(ready: CompressedModel) -> None:
    assert Prune(ratio=0.5).uses == ()
    assert Prune(ratio=0.5, criterion="taylor").uses == ("train",)
    with pytest.raises(DataError, match="task"):
        Prune(ratio=0.5, criterion="taylor").apply(ready)


def test_scores_that_are_no_numbers_are_an_error(ready: CompressedModel) -> None:
    with torch.no_grad():
        ready.module.vision_model.encoder.layers[1].mlp.fc2.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"layers\.1\.mlp\.fc1 are not numbers"):
        Prune(ratio=0.5).apply(ready)
