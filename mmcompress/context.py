"""What a pass may use besides the model. Importable without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcompress.errors import DataError
from mmcompress.progress import SILENT, Reporter

if TYPE_CHECKING:
    from mmcompress.data.examples import Examples
    from mmcompress.model import CompressedModel
    from mmcompress.tasks.base import Task


@dataclass
class Context:
    """What a run gives its passes.

    Attributes:
        task: gives training batches and the loss.
        train: training examples.
        calibration: examples for ranges and statistics; the training examples where the recipe names none.
        baseline: loads the model that the run began with, for use as a teacher; a new one at every call.
        seed: differs from step to step of a run and is the same in every repetition.
        device: ``auto``, ``cuda``, ``mps`` or ``cpu``.
        workdir: a scratch folder that is gone when the step ends.
        checkpoints: a folder for the states of trainings that are under way; None where none are kept.
        trainings: how many trainings the step has begun: each has a folder of its own in ``checkpoints``.
        warnings: sentences for the report.
        facts: numbers for the report that may differ between repetitions (seconds, rates); never part of the model.
        consume: whether a pass may change the model that it is given, because nobody else holds it.
    """

    task: Task | None = None
    train: Examples | None = None
    calibration: Examples | None = None
    baseline: Callable[[], CompressedModel] | None = None
    seed: int = 0
    device: str = "auto"
    workdir: Path | None = None
    checkpoints: Path | None = None
    trainings: int = 0
    reporter: Reporter = SILENT
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    consume: bool = False

    def copy_of(self, model: CompressedModel) -> CompressedModel:
        """A model that a pass may change: a copy, or the model itself where nobody else holds it (a copy costs its memory)."""
        return model if self.consume else model.clone()

    def need_task(self, who: str) -> Task:
        """The task, or a clear error."""
        if self.task is None:
            raise DataError(f"{who}: needs a task to know its loss; give data with image and label or text columns")
        return self.task

    def need_train(self, who: str) -> Examples:
        """The training examples, or a clear error."""
        if self.train is None or len(self.train) == 0:
            raise DataError(f"{who}: needs training examples; the recipe's data has no train split")
        return self.train

    def need_calibration(self, who: str) -> Examples:
        """The calibration examples (or the training ones), or a clear error."""
        found = self.calibration if self.calibration is not None else self.train
        if found is None or len(found) == 0:
            raise DataError(f"{who}: needs calibration examples; the recipe's data has neither calibration nor train")
        return found
