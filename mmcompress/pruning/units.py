"""How many units stay, and which weights belong to a unit. Importable without torch, so that recipes are checked fast.

Shapes: U units of a group, C channels of its root (C = U * block), K channels of a coupled parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mmcompress.errors import one_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mmcompress.families.base import UnitGroup

Axis = Literal["ffn", "depth", "width", "heads"]
Heads = Literal["fewer", "narrower"]
Scope = Literal["layer", "tower"]
Sizes = Mapping[str, Mapping[str, int]]

UNIT_NAMES: Mapping[str, str] = {
    "ffn": "hidden units",
    "depth": "layers",
    "width": "channels",
    "heads": "heads",
    "head size": "channels of a head",
}


def kept_count(size: int, ratio: float, step: int = 1) -> int:
    """The multiple of ``step`` nearest to ``size * (1 - ratio)``, a half rounded up, at most ``size``; 0 where none is left.

    Args:
        size: units there are.
        ratio: share to cut, 0 <= ratio < 1.
        step: what the count must be a multiple of.
    """
    return min(size, step * int(size * (1 - ratio) / step + 0.5))


def axis_mistake(name: str, axis: str, axes: Sequence[str]) -> str:
    """Why a criterion cannot be used along an axis."""
    does = "chooses whole layers" if tuple(axes) == ("depth",) else f"does not say what is lost along the axis {axis}"
    return f"{name} {does}; use it with axis: {' or '.join(axes)}, or another criterion"


@dataclass(frozen=True)
class Shares:
    """How much is cut where.

    Attributes:
        axis: what is cut.
        ratios: for each tower the share of its units to cut, 0 <= r < 1; a tower that is missing stays as it is.
        round_to: kept FFN widths and sizes of narrower heads are multiples of this; layers and heads go one by one.
        scope: ``layer`` cuts the same share in every layer, ``tower`` ranks the units over all layers of a tower.
        heads: what goes with the residual width: ``fewer`` heads of the same size, or as many ``narrower`` ones.
    """

    axis: Axis
    ratios: Mapping[str, float]
    round_to: int = 8
    scope: Scope = "layer"
    heads: Heads = "fewer"

    @property
    def step(self) -> int:
        """What the count of kept units must be a multiple of."""
        return self.round_to if self.axis == "ffn" or self.narrows else 1

    @property
    def narrows(self) -> bool:
        """Whether units are channels of every head."""
        return self.axis == "width" and self.heads == "narrower"

    def counted(self, own: Mapping[str, int]) -> str:
        """Which of a tower's sizes is counted: heads where the residual width follows them, whole ones or what they are wide."""
        if self.axis != "width" or "heads" not in own:
            return self.axis
        return "head size" if self.narrows else "heads"

    def units(self, own: Mapping[str, int]) -> int:
        """How many units a tower of these sizes has."""
        counted = self.counted(own)
        return own["width"] // own["heads"] if counted == "head size" else own[counted]

    def towers(self) -> list[str]:
        """The towers that are cut."""
        return [tower for tower, ratio in self.ratios.items() if ratio > 0]

    def kept(self, tower: str, size: int) -> int:
        """How many of ``size`` units of a tower stay."""
        return kept_count(size, self.ratios.get(tower, 0.0), self.step)

    def plan(self, sizes: Sizes) -> dict[str, dict[str, int]]:
        """The sizes after the cut; for the scope ``tower`` the FFN width and the heads are means over the layers."""
        after = {tower: dict(axes) for tower, axes in sizes.items()}
        for tower in self.towers():
            own = after.get(tower, {})
            if self.axis not in own:
                continue
            counted, old = self.counted(own), self.units(own)
            new = self.kept(tower, old)
            if counted == "head size":
                own["width"] = own["heads"] * new
                continue
            own[counted] = new
            if counted == "heads" and self.axis == "width":
                own["width"] = own["width"] // old * new
        return after

    def mistakes(self, towers: Sequence[str], sizes: Sizes) -> list[str]:
        """What cannot be cut as it is asked for, a sentence each; see `mmcompress.passes.prune.Prune.check_against`."""
        found = ["ratio: " + one_of("tower", tower, towers) for tower in self.ratios if tower not in towers]
        for tower in self.towers():
            if tower not in towers or tower not in sizes:
                continue
            if self.axis not in sizes[tower]:
                found.append(f"axis: {self.axis} cannot be cut in the {tower} tower; it has: {', '.join(sizes[tower])}")
                continue
            counted = self.counted(sizes[tower])
            found.extend(self._rounding(tower, self.units(sizes[tower]), UNIT_NAMES[counted]))
        return found

    def _rounding(self, tower: str, size: int, what: str) -> list[str]:
        kept, ratio = self.kept(tower, size), self.ratios[tower]
        rounded = f", kept in multiples of {self.step}" if self.step > 1 else ""
        said = f"ratio: {ratio:g} of the {tower} tower's {size} {what}{rounded}, "
        if kept < 1:
            return [f"{said}would leave none; lower the ratio" + (" or round_to" if self.step > 1 else "")]
        if kept >= size:
            return [f"{said}would cut nothing; raise the ratio" + (" or lower round_to" if self.step > 1 else "")]
        return []


@dataclass(frozen=True)
class Slice:
    """The part of one parameter that goes when units go.

    Attributes:
        name: the parameter's dotted name in the model.
        parameter: the parameter itself.
        dim: the dimension along which it is cut.
        index: shape (K,), positions along ``dim``.
        unit: shape (K,), the unit that each position belongs to.
    """

    name: str
    parameter: torch.Tensor
    dim: int
    index: torch.Tensor
    unit: torch.Tensor

    def per_unit(self, values: torch.Tensor, units: int) -> torch.Tensor:
        """Sums values, one for each weight of the parameter, into one number a unit.

        Args:
            values: of the parameter's shape, such as ``weight * gradient``.
            units: how many units the group has.

        Returns:
            Shape (U,), float64 on the CPU: sums over millions of weights should not depend on their order.
        """
        rest = [d for d in range(values.dim()) if d != self.dim]
        sums = (values.sum(rest) if rest else values).detach().cpu().double()
        return sums.new_zeros(units).index_add(0, self.unit, sums[self.index])


@dataclass(frozen=True)
class Tap:
    """Where the activations of a group's units can be seen.

    Attributes:
        module: a Linear that reads them, or a LayerNorm on the residual stream.
        side: whether the units are the module's inputs or its outputs.
        index: shape (K,), channels there.
        unit: shape (K,), the unit that each channel belongs to.
    """

    module: nn.Module
    side: Literal["input", "output"]
    index: torch.Tensor
    unit: torch.Tensor


@dataclass(frozen=True)
class CoupledGroup:
    """A group of units with everything that Torch-Pruning's graph found to go with them.

    Attributes:
        group: what the family says: tower, axis, name, size and block.
        slices: the parameters that shrink, such as rows of fc1, its bias and columns of fc2.
        taps: where the units' activations can be seen.
    """

    group: UnitGroup
    slices: tuple[Slice, ...]
    taps: tuple[Tap, ...]

    @property
    def units(self) -> int:
        """U: how many units there are."""
        return self.group.units
