"""How much worse the model does without a module, measured by leaving it out (MoPE-CLIP): heads, layers, chunks of units.

metric(full) - metric(without the module) (Lin et al. 2024, MoPE-CLIP, arXiv 2403.07839). The metric here is the task's own loss
with its sign turned, so loss(without) - loss(full): every task has one, it is cross-modal where the task is, and it moves where
an accuracy over N examples stands still between steps of 1 / N. It is taken over `samples` examples drawn from data.train by the
seed, never from data.eval; they are held in memory while modules are left out.

One evaluation for each module: a layer is left out by passing its input on, a head or a unit by zeroing all weights that go with
it. That is what cutting it does, but for the residual width, where normalisations still count a channel of zeros. Heads are left
out one by one. FFN units and residual channels are too many: those of a group are put in order by `taylor`, and left out in up
to 16 chunks of neighbours in that order; each unit of a chunk is worth its part of the chunk, with `taylor` deciding among them.
In a dual encoder the embeddings of the other tower are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mmcompress.errors import ModelError
from mmcompress.families.base import Outputs
from mmcompress.pruning.criteria.base import Criterion, Probe, inputs_of
from mmcompress.pruning.criteria.taylor import Taylor
from mmcompress.pruning.units import CoupledGroup, Slice

CHUNKS = 16
"""How many parts of a group are left out one after the other, where its units are single neurons or channels."""


class Mope(Criterion):
    """Forward passes: one over all samples for each layer, head and chunk, and for chunks one backward pass before."""

    needs_data = True
    one_scale = True

    def unit_scores(self, groups: Sequence[CoupledGroup], probe: Probe) -> list[torch.Tensor]:
        many = [g for g in groups if g.group.block == 1]
        order = iter(Taylor().unit_scores(many, probe) if many else [])
        chunks = [_chunks(next(order)) if g.group.block == 1 else list(torch.arange(g.units).split(1)) for g in groups]
        scores = [torch.zeros(group.units, dtype=torch.float64) for group in groups]
        bench = _Bench(probe)
        todo = [(number, chunk) for number, own in enumerate(chunks) for chunk in own]
        for number, chunk in probe.reporter.track(todo, "leaving modules out", len(todo)):
            group = groups[number]
            with _without_units(group, chunk):
                lost = bench.loss(group.group.tower) - bench.full
            scores[number][chunk] = lost / len(chunk)
        return [_in_order(own, parts) for own, parts in zip(scores, chunks, strict=True)]

    def layer_scores(self, stacks: Mapping[str, Sequence[nn.Module]], probe: Probe) -> dict[str, torch.Tensor]:
        scores = {tower: torch.zeros(len(layers), dtype=torch.float64) for tower, layers in stacks.items()}
        bench = _Bench(probe)
        todo = [(tower, place, layer) for tower, layers in stacks.items() for place, layer in enumerate(layers)]
        for tower, place, layer in probe.reporter.track(todo, "leaving modules out", len(todo)):
            hook = layer.register_forward_hook(_pass_on, with_kwargs=True)
            try:
                scores[tower][place] = bench.loss(tower) - bench.full
            finally:
                hook.remove()
        return scores


class _Bench:
    """Evaluates the model as it is at the moment of the call, over the same batches every time.

    Attributes:
        full: the loss of the whole model.
    """

    def __init__(self, probe: Probe) -> None:
        self._task, _ = probe.need()
        self._module, self._family = probe.model.module, probe.model.family
        self._batches = list(probe.batches())
        self._embeds: list[dict[str, torch.Tensor]] = []
        self._inputs: dict[str, tuple[str, ...]] = {}
        self.full = self.loss(None)
        if "embeddings" in self._task.needs:
            self._inputs = {part.tower: part.inputs for part in self._family.components(self._module).values()}
            with torch.no_grad():
                self._embeds = [self._family.forward(self._module, inputs_of(batch)).embeds for batch in self._batches]

    def loss(self, tower: str | None) -> float:
        """The mean over the batches of the task's loss; only this tower is run where the others' embeddings are known."""
        total = 0.0
        with torch.no_grad():
            for number, batch in enumerate(self._batches):
                total += float(self._task.loss(self._outputs(number, batch, tower), batch))
        return total / len(self._batches)

    def _outputs(self, number: int, batch: dict[str, torch.Tensor], tower: str | None) -> Outputs:
        if tower is None or tower not in self._inputs:
            return self._family.forward(self._module, inputs_of(batch))
        found = self._family.forward(self._module, {name: batch[name] for name in self._inputs[tower]})
        if tower not in found.embeds:
            raise ModelError(f"prune: mope: the {tower} tower gave no embeddings out of {', '.join(self._inputs[tower])}")
        found.embeds = {**self._embeds[number], tower: found.embeds[tower]}
        return found


@contextmanager
def _without_units(group: CoupledGroup, units: torch.Tensor) -> Iterator[None]:
    """Zeroes all weights that go with these units, and puts them back, bit by bit."""
    saved: list[tuple[Slice, torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for part in group.slices:
            places = part.index[torch.isin(part.unit, units)].to(part.parameter.device)
            saved.append((part, places, part.parameter.index_select(part.dim, places)))
            part.parameter.index_fill_(part.dim, places, 0)
    try:
        yield
    finally:
        with torch.no_grad():
            # A weight can be cut along both dimensions: what was taken last goes back first.
            for part, places, values in reversed(saved):
                part.parameter.index_copy_(part.dim, places, values)


def _pass_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A hook that gives a layer's input for its output; what else it gives (attention maps) stays."""
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


def _chunks(order: torch.Tensor) -> list[torch.Tensor]:
    """Units with rising scores, in up to `CHUNKS` parts of nearly equal size."""
    ranked = torch.sort(order, stable=True).indices
    return list(ranked.tensor_split(min(CHUNKS, len(ranked))))


def _in_order(scores: torch.Tensor, chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Adds too little to change the order of two chunks whose scores differ, and enough to keep the order within each."""
    step = 1e-9 * max(float(scores.abs().max()), 1e-9) / max(1, len(scores))
    for chunk in chunks:
        scores[chunk] += step * torch.arange(len(chunk), dtype=torch.float64)
    return scores


CRITERION = Mope
