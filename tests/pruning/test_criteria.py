"""Each criterion against a case worked by hand and against an independent reference."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch_pruning as tp
from torch import nn

from mmcompress.errors import DataError, TrainingError
from mmcompress.families.base import UnitGroup
from mmcompress.pruning import cut
from mmcompress.pruning.criteria.activation import Activation
from mmcompress.pruning.criteria.base import Criterion
from mmcompress.pruning.criteria.influence import Influence
from mmcompress.pruning.criteria.magnitude import Magnitude
from mmcompress.pruning.criteria.magnitude_l1 import MagnitudeL1
from mmcompress.pruning.criteria.random import Random
from mmcompress.pruning.criteria.taylor import Taylor
from mmcompress.pruning.units import CoupledGroup, Tap
from tests import tiny
from tests.pruning.helpers import Batches, context, coupled, full, linear, probe, toy, two_units


def test_magnitude_by_hand() -> None:
    net, group = two_units()
    (scores,) = Magnitude().unit_scores([group], toy(net, []))
    assert scores.tolist() == [4 + 25, 9 + 49]


def test_magnitude_l1_by_hand() -> None:
    net, group = two_units()
    (scores,) = MagnitudeL1().unit_scores([group], toy(net, []))
    assert scores.tolist() == [2 + 5, 3 + 7]


@pytest.mark.parametrize(("criterion", "p"), [(Magnitude, 2), (MagnitudeL1, 1)])
@pytest.mark.parametrize("axis", ["ffn", "heads", "width"])
def test_magnitude_is_torch_prunings_group_magnitude_on_a_tower(axis: str, criterion: type[Criterion], p: int) -> None:
    model = full(tiny.clip())
    graph = cut.trace(model.family, model.module, "vision")
    group = model.family.unit_groups(model.module, "vision", axis)[0]
    part, inputs, unwrapped = model.family.tracing(model.module, "vision", model.family.example_batch(model.module.config, 2))
    theirs = tp.DependencyGraph().build_dependency(part, inputs, unwrapped_parameters=[(p, 0) for p in unwrapped], verbose=False)
    importance = tp.importance.GroupMagnitudeImportance(p=p, group_reduction="sum", normalizer=None, bias=True)
    channels = importance(theirs.get_pruning_group(group.root, tp.prune_linear_out_channels, list(range(group.size)))).double()
    if axis == "width":  # which Torch-Pruning does not count, and we do
        embeddings = model.module.vision_model.embeddings
        channels = channels + embeddings.position_embedding.weight.abs().pow(p).sum(0) + embeddings.class_embedding.abs().pow(p)
    expected = channels.view(-1, group.block).sum(1)
    (ours,) = criterion().unit_scores([cut.couple(graph, model.module, group)], probe(model))
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-5)


def test_magnitude_of_layers_is_the_mean_square_of_matrices() -> None:
    layers = [nn.Sequential(linear([[1.0, 2.0]]), nn.LayerNorm(1)), nn.Sequential(linear([[3.0], [1.0]]))]
    scores = Magnitude().layer_scores({"t": layers}, toy(nn.Identity(), []))
    assert scores["t"].tolist() == [2.5, 5.0]
    assert MagnitudeL1().layer_scores({"t": layers}, toy(nn.Identity(), []))["t"].tolist() == [1.5, 2.0]


def test_taylor_by_hand() -> None:
    # Unit 1: w g = 2 * 5x from either weight, so 20x; unit 2: 3 * -7x twice, so -42x. Batches x = 1 and x = -2.
    net, group = two_units()
    data = [{"x": torch.tensor([[1.0]])}, {"x": torch.tensor([[-2.0]])}]
    (scores,) = Taylor().unit_scores([group], toy(net, data))
    assert scores.tolist() == [(20 + 40) / 2, (42 + 84) / 2]
    layers = Taylor().layer_scores({"t": list(net)}, toy(net, data))
    assert layers["t"].tolist() == [(11 + 22) / 2, (11 + 22) / 2]  # 10x - 21x for either layer
    assert net[0].weight.grad is None


@pytest.mark.parametrize(("axis", "unit"), [("ffn", 5), ("heads", 1), ("width", 7)])
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_taylor_is_the_slope_of_the_loss_when_a_units_weights_are_scaled(tower: str, axis: str, unit: int) -> None:
    model = full(tiny.clip())
    model.module.double()
    group = coupled(model, tower, axis)
    # The task's own loss computes in float32, too coarse for a finite difference.
    task = SimpleNamespace(loss=lambda outputs, batch: (outputs.embeds["vision"] @ outputs.embeds["text"].T).sin().mean())
    made = Batches(model, task=task, examples=[0])  # type: ignore[arg-type]
    batch = model.family.example_batch(model.module.config, 3)
    made.given = [{**batch, "pixel_values": batch["pixel_values"].double()}]
    (scores,) = Taylor().unit_scores([group], made)
    losses = []
    for factor in (1 + 1e-6, 1 - 1e-6):
        scaled = copy.deepcopy(model)
        own = dict(scaled.module.named_parameters())
        with torch.no_grad():
            for part in group.slices:
                places = part.index[part.unit == unit]
                own[part.name].index_copy_(part.dim, places, own[part.name].index_select(part.dim, places) * factor)
            losses.append(float(task.loss(scaled.family.forward(scaled.module, made.given[0]), None)))
    slope = abs(losses[0] - losses[1]) / 2e-6
    assert slope > 1e-3
    assert float(scores[unit]) == pytest.approx(slope, rel=1e-4)


def test_taylor_reads_the_data_once_for_all_groups() -> None:
    model = tiny.clip()
    groups = [coupled(model, tower, axis) for tower in ("vision", "text") for axis in ("ffn", "heads")]
    calls = []
    forward = model.module.vision_model.register_forward_hook(lambda *_: calls.append(1))
    together = Taylor().unit_scores(groups, probe(model))
    forward.remove()
    assert len(calls) == 2  # 24 samples in batches of 12
    alone = [Taylor().unit_scores([g], probe(model))[0] for g in groups]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert all(float(s.sum()) > 0 for s in together)


def test_activation_by_hand() -> None:
    # Mean over tokens of |a|: the first sample (2, 1), the second (0, 4). L2 over both: (2, sqrt 17).
    x = torch.tensor([[[1.0, -2.0], [3.0, 0.0]], [[0.0, 4.0], [0.0, -4.0]]])
    net = linear([[1.0, 1.0]])
    both = torch.arange(2)
    single = CoupledGroup(UnitGroup("t", "ffn", "n", net, 2), (), (Tap(net, "input", both, both),))
    block = CoupledGroup(UnitGroup("t", "heads", "n", net, 2, 2), (), (Tap(net, "input", both, torch.tensor([0, 0])),))
    batches = [{"x": x[:1]}, {"x": x[1:]}]
    scores = Activation().unit_scores([single, block], toy(net, batches))
    assert scores[0].tolist() == pytest.approx([2, math.sqrt(17)])
    assert scores[1].tolist() == pytest.approx([2 + math.sqrt(17)])


def test_activation_leaves_padding_out() -> None:
    x = torch.tensor([[[1.0, -2.0], [100.0, 100.0]]])
    net = linear([[1.0, 1.0]])
    group = CoupledGroup(UnitGroup("t", "ffn", "n", net, 2), (), (Tap(net, "input", torch.arange(2), torch.arange(2)),))
    batch = {"x": x, "attention_mask": torch.tensor([[1, 0]])}
    (scores,) = Activation().unit_scores([group], toy(net, [batch], reads_mask=True))
    assert scores.tolist() == [1, 2]


def test_activation_sees_what_fc2_reads_and_what_layernorms_give() -> None:
    model = full(tiny.clip())
    seen: list[torch.Tensor] = []
    layer = model.module.vision_model.encoder.layers[1]
    hook = layer.mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    (scores,) = Activation().unit_scores([coupled(model, "vision", "ffn", 1)], probe(model))
    hook.remove()
    expected = torch.cat(seen[-2:]).double().abs().mean(1).square().sum(0).sqrt()  # earlier calls were the tracing's
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    taps = coupled(model, "vision", "width").taps
    assert all(isinstance(t.module, nn.LayerNorm) and t.side == "output" for t in taps)
    assert len(taps) == 2 + 2 * 3  # pre and post, and two in each of three layers


class Turn(nn.Module):
    """Turns (1, 0) into (0, 1) and leaves the rest."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.where(x[..., :1] == 1, x.flip(-1), x),)


@pytest.mark.parametrize("criterion", [Influence, Activation])
def test_block_influence_by_hand(criterion: type[Criterion]) -> None:
    # Cosines 0 and 1 in the first batch, 1 and 1 in the second: 1 - 3/4. The identity changes nothing: 0.
    turn, same = Turn(), nn.Identity()

    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = turn(same(x))[0]
            return out

    first = torch.tensor([[[1.0, 0.0], [2.0, 2.0]]])
    second = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    scores = criterion().layer_scores({"t": [same, turn]}, toy(Both(), [{"x": first}, {"x": second}]))
    assert scores["t"].tolist() == pytest.approx([0, 0.25], abs=1e-7)
    masked = {"x": first, "attention_mask": torch.tensor([[1, 0]])}
    scores = criterion().layer_scores({"t": [same, turn]}, toy(Both(), [masked], reads_mask=True))
    assert scores["t"].tolist() == pytest.approx([0, 1])


def test_random_follows_the_seed_and_leaves_torchs_alone() -> None:
    model = tiny.clip()
    groups = [coupled(model, "vision", "ffn", i) for i in range(2)]
    state = torch.get_rng_state()
    first, again, other = (Random().unit_scores(groups, probe(model, seed=s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
    assert Random().layer_scores({"t": [nn.Identity()] * 3}, probe(model))["t"].shape == (3,)


def test_batches_are_even_seeded_and_limited() -> None:
    model = tiny.clip()
    sizes = [len(b["target"]) for b in probe(model, samples=21, batch_size=10).batches()]
    assert sizes == [7, 7, 7]
    first, again, other = (torch.cat([b["target"] for b in probe(model, seed=s).batches()]) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_damaged_pictures_are_skipped_only_where_allowed() -> None:
    model = tiny.clip()
    given = context()
    columns = tiny.rows(8)
    columns["image"][2] = {"bytes": b"broken", "path": None}
    rows = [{k: columns[k][i] for k in columns} for i in range(8)]
    examples = type(given.train)(rows, "d", {"image": "image", "label": "label"}, list(tiny.COLOURS))  # type: ignore[misc]
    with pytest.raises(DataError, match="row 2"):
        list(probe(model, examples=examples).batches())
    examples.skip_damaged = True
    assert sum(len(b["target"]) for b in probe(model, examples=examples).batches()) == 7


def test_a_loss_that_is_no_number_is_an_error() -> None:
    model = tiny.clip()
    group = coupled(model, "vision", "ffn")
    with torch.no_grad():
        model.module.visual_projection.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="loss of batch 0 is nan"):
        Taylor().unit_scores([group], probe(model))
