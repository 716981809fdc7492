"""One cut from scores to a rebuilt model: what the pass `prune` and the measuring of sensitivity share.

Shapes: U units of a group, L layers of a tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mmcompress import registry
from mmcompress.context import Context
from mmcompress.data.examples import Examples
from mmcompress.model import CompressedModel
from mmcompress.pruning import cut
from mmcompress.pruning.criteria.base import Criterion, Probe
from mmcompress.pruning.units import Axis, CoupledGroup, Heads, Scope, Shares
from mmcompress.training.device import pick_device


@dataclass(frozen=True)
class Cutting:
    """How a model is cut, all but how much.

    Attributes:
        criterion: its name.
        samples: how many examples the criterion reads at most.
        batch_size: how many of them at once.
        reconstruct: whether readers are fitted by least squares; see `pruning.reconstruct`.
    """

    axis: Axis
    criterion: str = "magnitude"
    round_to: int = 8
    scope: Scope = "layer"
    allow_custom: bool = False
    samples: int = 512
    batch_size: int = 64
    heads: Heads = "fewer"
    reconstruct: bool = False

    def shares(self, ratios: Mapping[str, float]) -> Shares:
        """How much is cut where."""
        return Shares(self.axis, ratios, self.round_to, self.scope, self.heads)

    def find(self) -> Criterion:
        """A new criterion of the name."""
        found: Criterion = registry.find("criteria", self.criterion).CRITERION()
        return found

    def cut(
        self,
        model: CompressedModel,
        shares: Shares,
        context: Context,
        criterion: Criterion | None = None,
        examples: Examples | None = None,
    ) -> dict[str, Any]:
        """Scores, cuts and rebuilds ``model`` in place.

        Args:
            criterion: a new one of the name where left out.
            examples: what the criterion reads; the context's training examples where left out.

        Returns:
            Facts for the history: for the axis ``depth`` under ``kept_layers``, for each tower that was cut, the numbers of the
            layers that stay; else what the criterion says.

        Raises:
            DataError: the criterion needs examples, and there are none.
            ModelError: the result would need a custom model.
            TrainingError: scores are not numbers.
        """
        judge = criterion if criterion is not None else self.find()
        probe = Probe(model, context.seed, samples=self.samples, batch_size=self.batch_size, reporter=context.reporter)
        if judge.needs_data or self.reconstruct:
            probe.task = context.need_task("prune")
            probe.examples = examples if examples is not None else context.need_train("prune")
            probe.device = pick_device(context.device)
        probe.warnings = context.warnings
        facts: dict[str, Any] = {}
        if self.axis == "depth":
            facts["kept_layers"] = cut.prune_layers(model, shares, judge, probe)
        else:
            facts |= cut.prune_units(model, shares, judge, probe, self.reconstruct)
        cut.rebuild(model, self.allow_custom)
        return facts


class Remembered(Criterion):
    """A criterion that is asked once for each group of units of one model, of which several copies are cut.

    Layers are scored anew each time: some criteria look at how many stay.
    """

    def __init__(self, inner: Criterion) -> None:
        self.inner = inner
        self.needs_data = inner.needs_data  # type: ignore[misc]  # what the inner one's class says
        self.one_scale = inner.one_scale  # type: ignore[misc]  # the same
        self._scores: dict[str, torch.Tensor] = {}

    def unit_scores(self, groups: Sequence[CoupledGroup], probe: Probe) -> list[torch.Tensor]:
        if any(g.group.name not in self._scores for g in groups):
            found = self.inner.unit_scores(groups, probe)
            self._scores |= {g.group.name: scores.detach().cpu() for g, scores in zip(groups, found, strict=True)}
        return [self._scores[g.group.name] for g in groups]

    def layer_scores(self, stacks: Mapping[str, Sequence[nn.Module]], probe: Probe) -> dict[str, torch.Tensor]:
        return self.inner.layer_scores(stacks, probe)


def remembered(criterion: Criterion) -> Criterion | None:
    """The criterion asked once for all cuts, or None where it may keep what it found for what it does to the weights at each."""
    return Remembered(criterion) if type(criterion).compensate is Criterion.compensate else None


def hold_out(examples: Examples, samples: int, seed: int) -> tuple[Examples, Examples]:
    """Two parts of the training examples, in the order of the data: what criteria read, and what losses are measured on.

    Args:
        samples: how many are measured on; at most half.
    """
    order = np.random.default_rng([seed, 1]).permutation(len(examples))
    count = max(1, min(samples, len(examples) // 2))
    held, rest = (sorted(int(i) for i in part) for part in (order[:count], order[count:]))
    return examples.take(rest), examples.take(held)
