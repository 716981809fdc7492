"""What a task tells the rest of mmcompress. Importable without torch, so that recipes are checked fast.

Shapes: B examples in a batch, U distinct texts in it, N examples that are scored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmcompress.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mmcompress.data.examples import Examples
    from mmcompress.families.base import Outputs
    from mmcompress.processor import Processor
    from mmcompress.progress import Reporter
    from mmcompress.runtimes.base import Predict
    from mmcompress.tasks._observed import Observed


TOWERS: Mapping[str, str] = MappingProxyType({"image": "vision", "audio": "audio"})
"""For each kind of media the tower of a dual encoder that takes it."""
# CLIP-KD's weight of features is 2000 on a mean over D numbers, which is 4 on our sum at its D of 512.
DUAL_ENCODER_LOSSES: Mapping[str, float] = MappingProxyType({"task": 1.0, "affinity": 1.0, "feature": 4.0})
# Distil-Whisper's weights (Gandhi et al. 2023, arXiv 2311.00430, section 4): cross-entropy 1, KL 0.8.
ANSWER_LOSSES: Mapping[str, float] = MappingProxyType({"task": 1.0, "logit": 0.8})


@dataclass(frozen=True, eq=False)
class CorpusMetric:
    """A metric over all examples together that is no mean of theirs, such as BLEU, as a function of sums over the examples.

    Attributes:
        statistics: shape (N, K), what each example adds to the sums.
        value: sums of shape (R, K) to values of shape (R,); it must also take the statistics of one example. None in scores that
            were read from a file.
    """

    statistics: np.ndarray
    value: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass
class Scores:
    """What an evaluation found, example by example, so that intervals and paired differences can be computed.

    Attributes:
        per_example: for each metric an array of shape (N,): what each example contributes; the metric is its mean.
        clusters: shape (N,), which examples stand or fall together (the same picture); None where all stand alone or where the
            task does not know (`measure.clusters` then looks at the data).
        owners: for metrics that are not over the examples but over something that belongs to them (the texts of retrieval), shape
            (M,): the number, below N, of the example that each belongs to.
        answers: shape (N,), the prediction as an index, where the task has one (for flips).
        classes: for each class name ``{"precision", "recall", "n"}``.
        skipped: examples that could not be used, where the recipe allows to skip them.
        kept: shape (N,), the indices of the examples that were used.
        weights: for metrics that are no plain mean, such as WER over a corpus, how much each example counts, shape (N,): the
            metric is the weighted mean of what the examples contribute.
        corpus: metrics that are no mean at all.
        seen: what the model said of each example, for what compression changes underneath.
    """

    per_example: dict[str, np.ndarray]
    clusters: np.ndarray | None = None
    answers: np.ndarray | None = None
    classes: dict[str, dict[str, float | None]] = field(default_factory=dict)
    skipped: int = 0
    kept: np.ndarray | None = None
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    corpus: dict[str, CorpusMetric] = field(default_factory=dict)
    owners: dict[str, np.ndarray] = field(default_factory=dict)
    seen: Observed | None = None

    def clusters_of(self, metric: str) -> np.ndarray | None:
        """What stands or falls together among the values of a metric; None where all stand alone."""
        owners = self.owners.get(metric)
        if owners is None:
            return self.clusters
        return owners if self.clusters is None else self.clusters[owners]


class Task(BaseModel, ABC):
    """A task with its settings. Subclasses set ``type`` and the class variables."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metrics: ClassVar[Mapping[str, str]]
    """For each metric a line that says what it is; the first one is the headline."""
    roles: ClassVar[Mapping[str, str]]
    """For each role of a data column that the task reads, what it must hold."""
    needs: ClassVar[frozenset[str]]
    """The abilities that a model's family must have; see `families.base.Family.abilities`."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Roles that the task reads where the data has them."""
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    """Metrics that count mistakes."""
    units: ClassVar[Mapping[str, Literal["percent", "points"]]] = MappingProxyType({})
    """How reports write a metric: as percent where nothing is said, or times 100 without the sign (CIDEr)."""
    text_role: ClassVar[Literal["classes", "text", "question"] | None] = None
    """Which texts the model reads beside the media: the names of the classes, or those of a role. None where it reads none that
    could be mistyped."""
    distillation: ClassVar[Mapping[str, float]]
    """The losses, with their weights, that `distill` and `qat` take where the recipe names none."""

    type: str = Field(description="The task's name, a Hugging Face pipeline tag where one exists.")

    @abstractmethod
    def collate(self, rows: list[dict[str, Any]], processor: Processor, examples: Examples, draw: int) -> dict[str, torch.Tensor]:
        """Rows of ``examples`` to one training batch.

        Args:
            rows: each with its prepared media as ``inputs``, a dict of tensors without batch axis, or as it is in the data.
            draw: a number that varies from step to step, for choices such as which template to use.

        Returns:
            The media's tensors (B, ...), what the family's ``forward`` reads beside them, and what the loss reads. Tasks over
            embeddings: ``input_ids`` and ``attention_mask`` (U, S) of the *distinct* texts, and ``target`` (B,), for each
            picture the row of its text. Tasks over answers: ``labels``.
        """

    @abstractmethod
    def loss(self, outputs: Outputs, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The task's own training loss, shape ()."""

    @abstractmethod
    def evaluate(self, predict: Predict, processor: Processor, examples: Examples, reporter: Reporter) -> Scores:
        """Scores a model that is only seen through ``predict``."""

    def candidates(self, examples: Examples) -> tuple[list[list[str]], np.ndarray] | None:
        """Where embeddings are compared, the texts among which each example's is sought; None for tasks of another kind.

        Returns:
            M groups of texts whose embeddings are averaged, and (N, M), which of them are right for each example.
        """
        return None

    def fits(self, abilities: frozenset[str], family: str) -> None:
        """Checks that a family can do what the task asks for.

        Raises:
            RecipeError: it cannot.
        """
        lacking = sorted(self.needs - abilities)
        if lacking:
            raise RecipeError(
                f"task.type: {self.type} needs a model with {', '.join(sorted(self.needs))}; this one, of the family {family}, "
                f"has no {', '.join(lacking)} (it has: {', '.join(sorted(abilities))})"
            )
