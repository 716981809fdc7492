"""The one interface that evaluation and measurement see, whatever runs the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Predict(Protocol):
    """A loaded model whose components can be called by name."""

    runtime: str
    components: tuple[str, ...]

    def __call__(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one component.

        Args:
            component: such as ``vision_model``.
            inputs: arrays by input name, batch first.

        Returns:
            Arrays by output name, batch first.
        """
        ...
