"""A model's forward pass in the precision of its training, and its outputs cut into tensors and put together again.

Shapes: B examples, U distinct texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedModel

from mmcompress.families.base import BESIDE_INPUTS, Batch, Family, Outputs
from mmcompress.training.autocast import computing
from mmcompress.training.inside import look

Path = tuple[str | int, ...]


class Forward:
    """The family's forward pass; its outputs are float32 whatever the precision."""

    def __init__(
        self,
        family: Family,
        module: PreTrainedModel,
        device: torch.device,
        precision: str,
        needs: frozenset[str] = frozenset(),
    ) -> None:
        """Takes among others what losses need besides the outputs, as `training.inside.look`."""
        self.family, self.module, self.device, self.precision = family, module, device, precision
        self.needs = needs

    def __call__(self, batch: Batch) -> Outputs:
        """The outputs for what a batch holds, with gradients where they are on."""
        with computing(self.device, self.precision):
            outputs = look(self.family, self.module, {n: v for n, v in batch.items() if n not in BESIDE_INPUTS}, self.needs)
        return outputs if self.precision == "fp32" else together({path: v.float() for path, v in apart(outputs).items()})


def apart(outputs: Outputs) -> dict[Path, torch.Tensor]:
    """Every tensor of the outputs by its path: field, then tower, then number of the layer, as deep as they go."""
    found: dict[Path, torch.Tensor] = {}
    for field in fields(outputs):
        _collect(getattr(outputs, field.name), (field.name,), found)
    return found


def _collect(value: Any, path: Path, found: dict[Path, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[path] = value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            _collect(part, (*path, name), found)
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            _collect(part, (*path, i), found)


def together(tensors: Mapping[Path, torch.Tensor]) -> Outputs:
    """The outputs that `apart` took apart."""
    tree: dict[str | int, Any] = {}
    for path, value in tensors.items():
        place = tree
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = value
    return Outputs(**{str(name): _tuples(value) for name, value in tree.items()})


def _tuples(value: Any) -> Any:
    """Dicts whose keys are numbers were tuples."""
    if not isinstance(value, dict):
        return value
    parts = {name: _tuples(part) for name, part in value.items()}
    return tuple(parts.values()) if parts and all(isinstance(name, int) for name in parts) else parts


def of_texts(path: Path) -> bool:
    """Whether an output has a row for each text (U) rather than for each example (B), in models that embed."""
    return "text" in path
