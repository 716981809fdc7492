"""What a task tells the rest of mmcompress. Importable without torch, so that recipes are checked fast.

Shapes: B pictures in a batch, U distinct texts in it, N examples that are scored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mmcompress.data.examples import Examples
    from mmcompress.families.base import Outputs
    from mmcompress.processor import Processor
    from mmcompress.progress import Reporter
    from mmcompress.runtimes.base import Predict


@dataclass
class Scores:
    """What an evaluation found, example by example, so that intervals and paired differences can be computed.

    Attributes:
        per_example: for each metric an array of shape (N,): what each example contributes; the metric is its mean.
        clusters: shape (N,), which examples stand or fall together (the same picture); None where all stand alone.
        answers: shape (N,), the prediction as an index, where the task has one (for flips).
        classes: for each class name ``{"precision", "recall", "n"}``.
        skipped: examples that could not be used, where the recipe allows to skip them.
        kept: shape (N,), the indices of the examples that were used.
    """

    per_example: dict[str, np.ndarray]
    clusters: np.ndarray | None = None
    answers: np.ndarray | None = None
    classes: dict[str, dict[str, float | None]] = field(default_factory=dict)
    skipped: int = 0
    kept: np.ndarray | None = None


class Task(BaseModel, ABC):
    """A task with its settings. Subclasses set ``type`` and the class variables."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metrics: ClassVar[Mapping[str, str]]
    """For each metric a line that says what it is; the first one is the headline."""
    roles: ClassVar[Mapping[str, str]]
    """For each role of a data column that the task reads, what it must hold."""

    type: str = Field(description="The task's name, a Hugging Face pipeline tag where one exists.")

    @abstractmethod
    def collate(self, rows: list[dict[str, Any]], processor: Processor, examples: Examples, draw: int) -> dict[str, torch.Tensor]:
        """Rows of ``examples`` to one training batch.

        Args:
            draw: a number that varies from step to step, for choices such as which template to use.

        Returns:
            ``pixel_values`` (B, C, H, W), ``input_ids`` and ``attention_mask`` (U, S) of the *distinct* texts,
            ``target`` (B,): for each picture the row of its text.
        """

    @abstractmethod
    def loss(self, outputs: Outputs, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The task's own training loss, shape ()."""

    @abstractmethod
    def evaluate(self, predict: Predict, processor: Processor, examples: Examples, reporter: Reporter) -> Scores:
        """Scores a model that is only seen through ``predict``."""
