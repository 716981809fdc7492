"""The one interface that evaluation and measurement see, whatever runs the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Predict(Protocol):
    """A loaded model whose components can be called by name."""

    @property
    def runtime(self) -> str:
        """``torch`` or ``onnxruntime``."""
        ...

    @property
    def components(self) -> tuple[str, ...]:
        """The components' names."""
        ...

    def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one component.

        Args:
            component: such as ``vision_model``.
            inputs: arrays by input name, batch first; those that the component does not read are ignored.

        Returns:
            Arrays by output name, batch first, in the component's order.
        """
        ...

    def cache(self, component: str) -> Mapping[str, tuple[int, int]]:
        """For each input that holds keys or values of past tokens its heads and their size; empty for all but decoders."""
        ...
