"""What a model family tells the rest of mmcompress.

Shapes: B examples, D embedding width, S sequence length, H hidden width of a tower.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Component:
    """A part of the model that runs by itself: one ONNX file, one entry of a latency table.

    Attributes:
        name: the name that ONNX clients expect, without suffix: ``vision_model``.
        tower: the tower it belongs to: ``vision``.
        module: takes ``inputs`` by position and returns a tuple in the order of ``outputs``.
        dynamic_axes: for each input and output, its dynamic axes by number, with their names.
    """

    name: str
    tower: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_axes: Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class UnitGroup:
    """A set of units of one kind in one place that can be cut one by one (or in blocks), such as one layer's FFN neurons.

    Attributes:
        tower: the tower it lies in.
        axis: ``ffn``, ``heads`` or ``width``.
        name: the dotted name of the root module, for messages and custom histories.
        root: the module whose output channels are the units; Torch-Pruning finds what is coupled to it.
        size: how many output channels the root has.
        block: channels that stand or fall together (a head's size), 1 for single neurons.
        also: further modules whose output channels are cut at the same indices (query, key, value).
    """

    tower: str
    axis: str
    name: str
    root: nn.Module
    size: int
    block: int = 1
    also: tuple[nn.Module, ...] = ()


@dataclass
class Outputs:
    """What a training step or a distillation loss sees of one forward pass.

    Attributes:
        embeds: for each tower the projected, *not* normalised embedding, shape (B, D).
        logit_scale: the factor on cosine similarities (already exponentiated), shape ().
        hidden: for each tower the hidden states after each layer, each (B, S, H); empty unless asked for.
    """

    embeds: dict[str, torch.Tensor]
    logit_scale: torch.Tensor
    hidden: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)


class Family(ABC):
    """A model family. Stateless: every method is given the module it is asked about."""

    name: str
    model_types: tuple[str, ...]
    towers: tuple[str, ...]
    axes: Mapping[str, str]
    """For each axis a line that says what is cut and which config keys follow."""
    stock_axes: tuple[str, ...]
    """The axes whose result stock transformers reloads when the cut is the same in every layer of a tower."""

    @abstractmethod
    def model_class(self) -> type[PreTrainedModel]:
        """The stock class that the folder of a compressed model must load with."""

    @abstractmethod
    def tower_modules(self, module: PreTrainedModel) -> dict[str, list[nn.Module]]:
        """For each tower the modules that belong to it; every parameter is in at most one tower."""

    @abstractmethod
    def layers(self, module: PreTrainedModel, tower: str) -> nn.ModuleList:
        """The tower's stack of layers, which depth pruning shortens."""

    @abstractmethod
    def unit_groups(self, module: PreTrainedModel, tower: str, axis: str) -> list[UnitGroup]:
        """The groups of units that an axis cuts in a tower, in the order of the layers."""

    @abstractmethod
    def tracing(self, module: PreTrainedModel, tower: str, batch: Batch) -> tuple[nn.Module, Any, list[nn.Parameter]]:
        """For Torch-Pruning's graph: a module to trace, its example inputs, and its unwrapped parameters."""

    @abstractmethod
    def shrunk_config(self, module: PreTrainedModel) -> PretrainedConfig | None:
        """The stock config that describes the module as it is now cut, or None where no stock config can."""

    @abstractmethod
    def components(self, module: PreTrainedModel) -> dict[str, Component]:
        """The parts that run by themselves, by name."""

    @abstractmethod
    def example_batch(self, config: PretrainedConfig, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Random inputs of the right shape for all components, made from the config alone."""

    @abstractmethod
    def forward(self, module: PreTrainedModel, batch: Batch, *, hidden: bool = False) -> Outputs:
        """One differentiable forward pass over the inputs that the batch holds (a tower without inputs is left out)."""

    @abstractmethod
    def config_sizes(self, config: PretrainedConfig) -> dict[str, dict[str, int]]:
        """For each tower its sizes by axis (``ffn``, ``depth``, ``width``, ``heads``), read from a config alone."""

    @abstractmethod
    def resized_config(self, config: PretrainedConfig, sizes: Mapping[str, Mapping[str, int]]) -> PretrainedConfig:
        """A copy of a config with other sizes, as ``config_sizes`` gives them."""


def tower_parameters(family: Family, module: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """Each tower's parameters, and under ``shared`` those that belong to none (a logit scale)."""
    found: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for tower, modules in family.tower_modules(module).items():
        found[tower] = [p for m in modules for p in m.parameters() if id(p) not in seen]
        seen.update(id(p) for p in found[tower])
    rest = [p for p in module.parameters() if id(p) not in seen]
    if rest:
        found["shared"] = rest
    return found


def count(parameters: Sequence[nn.Parameter]) -> int:
    """How many numbers the parameters hold."""
    return sum(p.numel() for p in parameters)
