"""What the tests of pruning share: models without zeros and ones in them, toys to work by hand, data, outputs of both towers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import CLIPModel

from mmcompress.context import Context
from mmcompress.data.examples import as_examples
from mmcompress.families.base import UnitGroup
from mmcompress.model import CompressedModel
from mmcompress.pruning import cut
from mmcompress.pruning.criteria.base import Probe
from mmcompress.pruning.units import CoupledGroup, Slice, Tap
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from tests import tiny


def full(model: CompressedModel) -> CompressedModel:
    """Gives every parameter random values: fresh biases are 0 and LayerNorm scales 1, which would hide a wrong cut."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.module.named_parameters():
            if name != "logit_scale":
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1.0 if "norm" in name else 0.0))
    return model


def context(count: int = 24, seed: int = 0) -> Context:
    """A task with training examples."""
    task = ZeroShotImageClassification(type="zero-shot-image-classification")
    return Context(task=task, train=as_examples(tiny.dataset(count)), seed=seed, device="cpu")


def embeds(model: CompressedModel, module: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Both towers' embeddings for random inputs."""
    batch = model.family.example_batch(model.module.config, 3, seed=5)
    with torch.no_grad():
        return model.family.forward(module if module is not None else model.module, batch).embeds


def stock_reload_is_equal(model: CompressedModel, folder: Path) -> CLIPModel:
    """Saves with transformers, loads with transformers alone, and compares outputs bit by bit."""
    model.module.save_pretrained(folder)
    again, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, theirs = embeds(model), embeds(model, again.eval())
    assert all(torch.equal(ours[t], theirs[t]) for t in ours)
    return again


def coupled(model: CompressedModel, tower: str, axis: str, place: int = 0) -> CoupledGroup:
    """One group of a tower with what goes with it."""
    spelled_out = all(group.explicit for group in model.family.unit_groups(model.module, tower, axis))
    graph = None if spelled_out else cut.trace(model.family, model.module, tower)
    return cut.couple(graph, model.module, model.family.unit_groups(model.module, tower, axis)[place])


def probe(model: CompressedModel, **changes: Any) -> Probe:
    """A probe with a task and 24 examples in two batches."""
    given = context()
    return Probe(model, **{"task": given.task, "examples": given.train, "samples": 24, "batch_size": 12, **changes})


class Batches(Probe):
    """A probe whose batches are given."""

    given: list[dict[str, torch.Tensor]]

    def batches(self, most: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        yield from self.given


def toy(module: nn.Module, batches: list[dict[str, torch.Tensor]], reads_mask: bool = False) -> Batches:
    """A probe over any module that maps ``batch["x"]``; its output is the loss's input."""
    part = SimpleNamespace(tower="t", inputs=("x", "attention_mask") if reads_mask else ("x",))
    family = SimpleNamespace(forward=lambda m, batch: m(batch["x"]), components=lambda m: {"t": part})
    task = SimpleNamespace(loss=lambda outputs, batch: outputs.sum(), needs=frozenset())
    made = Batches(SimpleNamespace(module=module, family=family), task=task, examples=[0])  # type: ignore[arg-type]
    made.given = batches
    return made


def linear(weight: list[list[float]]) -> nn.Linear:
    """A Linear with this weight and no bias."""
    values = torch.tensor(weight)
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
    layer.weight = nn.Parameter(values)
    return layer


def two_units() -> tuple[nn.Sequential, CoupledGroup]:
    """x -> (2x, 3x) -> 5 * 2x - 7 * 3x."""
    net = nn.Sequential(linear([[2.0], [3.0]]), linear([[5.0, -7.0]]))
    both = torch.arange(2)
    slices = (Slice("0", net[0].weight, 0, both, both), Slice("1", net[1].weight, 1, both, both))
    return net, CoupledGroup(UnitGroup("t", "ffn", "net", net[0], 2), slices, (Tap(net[1], "input", both, both),))
