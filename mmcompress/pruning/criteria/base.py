"""What a criterion is, and what it may look at. A new criterion is one file beside this one that sets ``CRITERION``.

The smallest one, ``criteria/first.py``, under the name ``first``::

    class First(Criterion):
        def unit_scores(self, groups, probe):
            return [-torch.arange(g.units) for g in groups]

        def layer_scores(self, stacks, probe):
            return {tower: -torch.arange(len(layers)) for tower, layers in stacks.items()}

    CRITERION = First

Shapes: U units of a group, L layers of a tower, B examples, T tokens, C channels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from mmcompress.data.examples import Examples
from mmcompress.errors import DataError, ModelError, RecipeError, TrainingError
from mmcompress.families.base import BESIDE_INPUTS
from mmcompress.model import CompressedModel
from mmcompress.progress import SILENT, Reporter
from mmcompress.pruning.units import CoupledGroup, Tap, axis_mistake
from mmcompress.tasks.base import Task

Reduce = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Criterion(ABC):
    """Says what units and layers are worth: those with the lowest scores are cut. Scores must be finite.

    A recipe check reads the class variables from the file without importing it: set them to literals, in the class itself.
    One instance sees one cut: what it found while scoring it may keep for `compensate`.
    """

    needs_data: ClassVar[bool] = False
    """True when it reads training examples through the probe."""
    axes: ClassVar[tuple[str, ...]] = ("ffn", "heads", "width", "depth")
    """The axes along which it can say what a unit is worth."""
    one_scale: ClassVar[bool] = False
    """True when scores of different groups can be compared as they are. Otherwise they are divided by their group's mean before
    units are ranked over a tower."""

    @abstractmethod
    def unit_scores(self, groups: Sequence[CoupledGroup], probe: Probe) -> list[torch.Tensor]:
        """Scores the units of all groups of all towers, so that one pass over the data is enough.

        Returns:
            For each group a tensor of shape (U,).
        """

    @abstractmethod
    def layer_scores(self, stacks: Mapping[str, Sequence[nn.Module]], probe: Probe) -> dict[str, torch.Tensor]:
        """Scores whole layers.

        Args:
            stacks: for each tower its layers in order.
            probe: gives data, gradients and activations.

        Returns:
            For each tower a tensor of shape (L,).
        """

    def compensate(self, cuts: Sequence[Cut], probe: Probe) -> dict[str, Any]:
        """Called once between the choice of units and the cut, on the CPU: changes in place what makes up for what goes.

        Only weights that stay may be changed (a reader's bias); mostly nothing is.

        Returns:
            Facts for the report.
        """
        return {}

    def refuse(self, axis: str) -> RecipeError:
        """The error of a criterion that is asked about an axis that it does not know."""
        return RecipeError(f"criterion: {axis_mistake(type(self).__name__.lower(), axis, self.axes)}")


@dataclass(frozen=True)
class Cut:
    """What will be cut of a group.

    Attributes:
        group: the group with everything that goes with its units.
        keep: the units that stay, rising.
    """

    group: CoupledGroup
    keep: tuple[int, ...]

    @property
    def drop(self) -> list[int]:
        """The units that go, rising."""
        kept = set(self.keep)
        return [unit for unit in range(self.group.units) if unit not in kept]


@dataclass(frozen=True)
class Watch:
    """A module to look at in a forward pass.

    Attributes:
        tower: the tower it lies in; decides which tokens are padding.
        module: the module.
        reduce: makes of its first input and output, each (B, T, C), and the mask (B, T) of real tokens (None where all
            are) what is wanted. Called inside the forward pass, so that activations need not be held.
    """

    tower: str
    module: nn.Module
    reduce: Reduce


@dataclass
class Probe:
    """What a criterion may ask about the model: batches, gradients, activations, a seed.

    Attributes:
        model: the model that is to be cut, its module on ``device`` and in eval mode.
        seed: for everything random.
        task: makes batches and the loss; None where the pass was given no data.
        examples: where samples are drawn from.
        samples: how many are drawn at most.
        batch_size: how many make a batch at most.
        device: where the module runs.
        keep: for each tower whose layers are scored, how many of them will stay.
        warnings: sentences for the report are added to it.
    """

    model: CompressedModel
    seed: int = 0
    task: Task | None = None
    examples: Examples | None = None
    samples: int = 512
    batch_size: int = 64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    reporter: Reporter = SILENT
    keep: Mapping[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def batches(self, most: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Training batches of nearly equal size on the device; the same ones at every call.

        Args:
            most: how many examples make a batch at most; ``batch_size`` where nothing is said.

        Raises:
            DataError: there is no data, or none of it can be used.
        """
        task, examples = self.need()
        task.fits(self.model.family.abilities, self.model.family.name)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(self.seed))[: self.samples]
        # Even parts: a rest of one example would have a contrastive loss of zero and still count as a whole batch.
        parts = order.tensor_split(max(1, math.ceil(len(order) / (most or self.batch_size))))
        used = 0
        for draw, part in enumerate(self.reporter.track(parts, "scoring units", len(parts))):
            rows = self._rows(examples, part.tolist())
            if not rows:
                continue
            used += len(rows)
            batch = task.collate(rows, self.model.processor, examples, draw)
            yield {name: values.to(self.device) for name, values in batch.items()}
        if used == 0:
            raise DataError(f"{examples.name}: none of {len(order)} examples can be used to score units")

    def need(self) -> tuple[Task, Examples]:
        """The task and the examples.

        Raises:
            DataError: the pass was given none.
        """
        if self.task is None or self.examples is None:
            raise DataError("prune: the criterion reads examples and the task's loss; give data with a train split")
        return self.task, self.examples

    def _rows(self, examples: Examples, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = []
        for index in indices:
            try:
                rows.append(examples[index])
            except DataError:
                if not examples.skip_damaged:
                    raise
        return rows

    def gradients(self, most: int | None = None) -> Iterator[float]:
        """For each batch the task's loss, with its gradient in every parameter's ``grad`` (None where it has no part).

        Args:
            most: how many examples make a batch at most; ``batch_size`` where nothing is said.

        Raises:
            TrainingError: the loss is not a number.
        """
        module, family, (task, _) = self.model.module, self.model.family, self.need()
        for number, batch in enumerate(self.batches(most)):
            module.zero_grad(set_to_none=True)
            loss = task.loss(family.forward(module, inputs_of(batch)), batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError(f"prune: the loss of batch {number} is {value}; units cannot be scored by its gradient")
            loss.backward()
            yield value
        module.zero_grad(set_to_none=True)

    def observe(self, watched: Sequence[Watch]) -> Iterator[list[torch.Tensor]]:
        """For each batch what each watch made of its module's input and output, in the order of the watches.

        Raises:
            ModelError: a watched module did not run.
        """
        found: list[torch.Tensor | None] = [None] * len(watched)
        masks: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            for i, watch in enumerate(watched):
                hook = _hook(watch, i, found, masks)
                stack.callback(watch.module.register_forward_hook(hook, with_kwargs=True).remove)
            for batch in self.batches():
                masks.update(self._masks(batch))
                with torch.no_grad():
                    self.model.family.forward(self.model.module, inputs_of(batch))
                if any(f is None for f in found):
                    raise ModelError("prune: a part whose activations are asked for did not run in the forward pass")
                yield [f for f in found if f is not None]
                found[:] = [None] * len(watched)

    def _masks(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """For each tower that reads an attention mask, which of its tokens are real."""
        if "attention_mask" not in batch:
            return {}
        parts = self.model.family.components(self.model.module).values()
        return {part.tower: batch["attention_mask"].bool() for part in parts if "attention_mask" in part.inputs}


def linear_reader(group: CoupledGroup, tap: Tap, who: str) -> nn.Linear:
    """The Linear layer that a tap looks at from its input side.

    Args:
        who: asks, for the error.

    Raises:
        ModelError: it is something else.
    """
    if tap.side != "input" or not isinstance(tap.module, nn.Linear):
        raise ModelError(f"prune: {who}: what reads {group.group.name} is a {type(tap.module).__name__}; allowed: Linear")
    return tap.module


def inputs_of(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a family's ``forward`` takes of a task's batch."""
    return {name: values for name, values in batch.items() if name not in BESIDE_INPUTS}


def _hook(watch: Watch, place: int, found: list[torch.Tensor | None], masks: Mapping[str, torch.Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        conv = isinstance(module, (nn.Conv1d, nn.Conv2d))
        given = _as_tokens(args[0] if args else kwargs["hidden_states"], conv)
        made = _as_tokens(output[0] if isinstance(output, tuple) else output, conv)
        mask = masks.get(watch.tower)
        fits = mask is not None and mask.shape == given.shape[:2]
        found[place] = watch.reduce(given, made, mask if fits else None)

    return hook


def _as_tokens(values: torch.Tensor, conv: bool = False) -> torch.Tensor:
    """A pooled vector (B, C) as a sequence of one token, and a convolution's (B, C, height, width) as one of its places."""
    if conv:
        return values.flatten(2).transpose(1, 2)
    return values.unsqueeze(1) if values.dim() == 2 else values


def token_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over the real tokens: (B, T, C), (B, T) -> (B, C)."""
    if mask is None:
        return values.mean(1)
    weight = mask.to(values.dtype).unsqueeze(-1)
    return (values * weight).sum(1) / weight.sum(1).clamp_min(1)
