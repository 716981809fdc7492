"""What the graph couples, what is chosen, and that what stays is what it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

from mmcompress.errors import ModelError
from mmcompress.families.base import UnitGroup
from mmcompress.pruning import cut
from mmcompress.pruning.units import Shares
from tests import tiny
from tests.families import tiny_clap
from tests.pruning.helpers import coupled, embeds, full


def test_best_keeps_the_order_and_the_first_of_equals() -> None:
    assert cut.best(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2) == [1, 3]
    assert cut.best(torch.tensor([5.0, 5.0, 5.0, 9.0]), 2) == [0, 3]


def test_choose_over_tower_by_hand() -> None:
    # Divided by their means (5 and 40): (2, 1.8, .2, 0) and (1, .9, 1.5, .6). In pairs: 1.9, .1 and 1.25, .75.
    scores = [torch.tensor([10.0, 9.0, 1.0, 0.0]), torch.tensor([40.0, 36.0, 60.0, 24.0])]
    assert cut.choose_over_tower(scores, 4, 1) == [[0, 1], [0, 2]]
    assert cut.choose_over_tower(scores, 6, 2) == [[0, 1], [0, 1, 2, 3]]
    assert cut.choose_over_tower(scores, 1, 1) == [[0], [2]]  # no group is emptied
    assert cut.choose_over_tower([torch.zeros(4), torch.ones(4)], 4, 1) == [[0], [0, 1, 2]]


def test_the_graph_couples_all_of_a_residual_width() -> None:
    model = full(tiny.clip())
    graph = cut.trace(model.family, model.module, "vision")
    (group,) = model.family.unit_groups(model.module, "vision", "width")
    found = {(s.name, s.dim) for s in cut.couple(graph, model.module, group).slices}
    expected = set()
    for name, p in model.module.named_parameters():
        if not name.startswith("vis") or name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "fc1.bias")):
            continue
        writes = any(part in name for part in ("out_proj", "fc2", "norm", "patch", "class")) or p.dim() == 1
        expected.add((name, 0 if writes else 1))
    assert found == expected


def test_the_graph_couples_query_key_value_and_output() -> None:
    model = full(tiny.clip())
    graph = cut.trace(model.family, model.module, "text")
    group = model.family.unit_groups(model.module, "text", "heads")[1]
    found = {
        (s.name.removeprefix("text_model.encoder.layers.1.self_attn."), s.dim)
        for s in cut.couple(graph, model.module, group).slices
    }
    projections = {(f"{p}_proj.{kind}", 0) for p in "qkv" for kind in ("weight", "bias")}
    assert found == projections | {("out_proj.weight", 1)}


def test_a_deep_cut_keeps_layernorms_in_order() -> None:
    # With 64 of 192 channels left Torch-Pruning's own LayerNorm pruner permutes them.
    model = full(tiny.clip(hidden_size=192, num_attention_heads=12))
    old = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    graph = cut.trace(model.family, model.module, "vision")
    (group,) = model.family.unit_groups(model.module, "vision", "width")
    keep = cut.best(torch.rand(192, generator=torch.Generator().manual_seed(0)), 64)
    cut.cut_units(graph, group, keep)
    for s in cut.couple(graph, model.module, group_again(model)).slices:
        expected = old[s.name].index_select(s.dim, torch.tensor(keep))
        assert torch.equal(s.parameter.detach(), expected), s.name


def group_again(model: object) -> UnitGroup:
    (group,) = model.family.unit_groups(model.module, "vision", "width")  # type: ignore[attr-defined]
    return group  # type: ignore[no-any-return]


def test_cutting_units_that_give_nothing_changes_nothing() -> None:
    model = full(tiny.clip())
    with torch.no_grad():
        for layer in model.module.vision_model.encoder.layers:
            layer.mlp.fc2.weight[:, 10:40] = 0
            layer.self_attn.out_proj.weight[:, 16:32] = 0
    before = embeds(model)
    graph = cut.trace(model.family, model.module, "vision")
    for axis, keep in (("ffn", [u for u in range(96) if not 10 <= u < 40]), ("heads", [0, 2])):
        for group in model.family.unit_groups(model.module, "vision", axis):
            cut.cut_units(graph, group, keep)
    assert model.module.vision_model.encoder.layers[2].mlp.fc1.weight.shape == (66, 48)
    assert model.module.vision_model.encoder.layers[2].self_attn.k_proj.weight.shape == (32, 48)
    torch.testing.assert_close(embeds(model)["vision"], before["vision"], rtol=1e-5, atol=1e-5)


def test_narrower_heads_give_what_they_gave_without_the_channels_that_gave_nothing() -> None:
    model = full(tiny.clip())
    with torch.no_grad():
        for layer in model.module.vision_model.encoder.layers:
            at = layer.self_attn  # 3 heads of 16: of each the channels 5 to 12 match nothing and are not read
            for channels in (slice(5, 13), slice(21, 29), slice(37, 45)):
                at.k_proj.weight[channels] = 0
                at.k_proj.bias[channels] = 0
                at.out_proj.weight[:, channels] = 0
    before = embeds(model)
    shares = Shares("width", {"vision": 0.5}, heads="narrower")
    heads = [group for group in cut.groups_of(model, "vision", shares) if group.axis == "heads"]
    assert [(group.units, list(group.channels(5))) for group in heads] == [(16, [5, 21, 37])] * 3
    graph = cut.trace(model.family, model.module, "vision")
    for group in heads:
        cut.cut_units(graph, group, [u for u in range(16) if not 5 <= u < 13])
    for layer in model.module.vision_model.encoder.layers:
        assert layer.self_attn.v_proj.weight.shape == (24, 48)
        assert (layer.self_attn.num_heads, layer.self_attn.head_dim) == (3, 8)
        layer.self_attn.scale = 8**-0.5  # as a stock module of this size has it, which `rebuild` makes
    torch.testing.assert_close(embeds(model)["vision"], before["vision"], rtol=1e-5, atol=1e-5)


def test_a_unit_of_narrower_heads_is_scored_by_its_channels_in_all_heads() -> None:
    model = full(tiny.clip())
    graph = cut.trace(model.family, model.module, "vision")
    heads = cut.groups_of(model, "vision", Shares("width", {"vision": 0.5}, heads="narrower"))[0]
    by_hand = torch.zeros(16, dtype=torch.float64)
    at = heads.head_size[0] if heads.head_size is not None else None
    for name in ("q_proj", "k_proj", "v_proj"):
        part = at.get_submodule(name)  # type: ignore[union-attr] # an attention has them
        for values in (part.weight, part.bias):
            by_hand += values.double().reshape(3, 16, -1).square().sum((0, 2))
    by_hand += at.out_proj.weight.double().reshape(48, 3, 16).square().sum((0, 1))  # type: ignore[union-attr] # the same
    couplings = cut.couple(graph, model.module, heads)
    found = sum((s.per_unit(s.parameter.square(), couplings.units) for s in couplings.slices), torch.zeros(()))
    torch.testing.assert_close(found, by_hand)


def test_a_family_that_does_not_say_how_wide_heads_are_cannot_narrow_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = full(tiny.clip())
    plain = type(model.family).unit_groups

    def silent(family: Any, module: Any, tower: str, axis: str) -> list[UnitGroup]:
        return [replace(group, head_size=None) for group in plain(family, module, tower, axis)]

    monkeypatch.setattr(type(model.family), "unit_groups", silent)
    with pytest.raises(ModelError, match="the family clip cannot make heads narrower; use heads: fewer"):
        cut.groups_of(model, "vision", Shares("width", {"vision": 0.5}, heads="narrower"))


def test_a_root_that_the_graph_does_not_reach_is_cut_too() -> None:
    first, second, last = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(4, 1)
    net = nn.Sequential(first, last)
    group = UnitGroup("t", "heads", "net", first, 4, 2, (second,))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.second = net, second

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.net(x), self.second(x)

    kept = second.weight.detach()[2:]
    graph = tp.DependencyGraph().build_dependency(Two(), torch.randn(3, 2), verbose=False)
    cut.cut_units(graph, group, [1])
    assert (first.out_features, second.out_features, last.in_features) == (2, 2, 2)
    assert torch.equal(second.weight.detach(), kept)


def test_a_coupling_of_half_a_weight_is_refused() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.c(torch.cat([self.a(x), self.b(x)], 1))
            return out

    net = Halves()
    graph = tp.DependencyGraph().build_dependency(net, torch.randn(3, 2), verbose=False)
    with pytest.raises(ModelError, match=r"only 4 of 8 channels of c\.weight"):
        cut.couple(graph, net, UnitGroup("t", "ffn", "a", net.a, 4))  # type: ignore[arg-type]


def test_a_units_shape_is_that_of_its_weights_whatever_the_group_has_left() -> None:
    clip, clap = full(tiny.clip()), tiny_clap.clap()
    shapes = {axis: cut.unit_shape(coupled(clip, "vision", axis)) for axis in ("ffn", "heads", "width")}
    assert len(set(shapes.values())) == 3
    assert shapes["ffn"] == cut.unit_shape(coupled(clip, "vision", "ffn", 2))
    assert shapes["ffn"] != cut.unit_shape(coupled(clip, "text", "ffn"))
    graph = cut.trace(clip.family, clip.module, "vision")
    cut.cut_units(graph, clip.family.unit_groups(clip.module, "vision", "ffn")[2], range(40))
    assert coupled(clip, "vision", "ffn", 2).units == 40
    assert shapes["ffn"] == cut.unit_shape(coupled(clip, "vision", "ffn", 2))
    stages = [cut.unit_shape(coupled(clap, "audio", "ffn", i)) for i in (0, -1)]
    assert stages[0] != stages[1]


def test_only_units_of_one_shape_are_ranked_together() -> None:
    model = tiny_clap.clap()
    graph = cut.trace(model.family, model.module, "audio")
    groups = [cut.couple(graph, model.module, g) for g in model.family.unit_groups(model.module, "audio", "ffn")]
    # Scores of one scale that would empty the first stage if all were ranked together.
    scores = [torch.arange(g.units, dtype=torch.float64) + (1000 if g.units == 128 else 0) for g in groups]
    shares = Shares("ffn", {"audio": 0.5}, 8, "tower")
    chosen = cut._choose(list(zip(groups, scores, strict=True)), "audio", shares, one_scale=True)
    kept: dict[int, int] = {}
    for group, keep in zip(groups, chosen, strict=True):
        kept[group.units] = kept.get(group.units, 0) + len(keep)
    there = {size: sum(g.units for g in groups if g.units == size) for size in (64, 128)}
    assert kept == {size: there[size] // 2 for size in (64, 128)}


def test_within_a_shape_units_of_all_layers_are_ranked() -> None:
    model = tiny.clip()
    groups = [coupled(model, "vision", "ffn", i) for i in range(3)]
    scores = [torch.linspace(low, low + 1, 96, dtype=torch.float64) for low in (0, 5, 10)]
    shares = Shares("ffn", {"vision": 0.5}, 8, "tower")
    chosen = cut._choose(list(zip(groups, scores, strict=True)), "vision", shares, one_scale=True)
    assert [len(keep) for keep in chosen] == [8, 40, 96]  # no group is emptied


def test_scores_of_one_scale_are_not_divided() -> None:
    scores = [torch.tensor([10.0, 9.0, 1.0, 0.0]), torch.tensor([40.0, 36.0, 60.0, 24.0])]
    assert cut.choose_over_tower(scores, 4, 1, one_scale=True) == [[0], [0, 1, 2]]
    assert cut.choose_over_tower(scores, 4, 1) == [[0, 1], [0, 2]]
