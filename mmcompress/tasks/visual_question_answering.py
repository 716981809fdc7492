"""Questions about pictures, scored by the accuracy of the VQA evaluation and by exact match.

Models that choose among fixed answers (ViLT) and models that write them (BLIP, SmolVLM, LLaVA) are scored alike.

Shapes: B examples, N that are scored.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmcompress.tasks.base import ANSWER_LOSSES, Scores, Task

if TYPE_CHECKING:
    import torch

    from mmcompress.data.examples import Examples
    from mmcompress.families.base import Outputs
    from mmcompress.processor import Processor
    from mmcompress.progress import Reporter
    from mmcompress.runtimes.base import Predict

LOOKED_AT = 1000
"""How many training examples are looked through for answers that the model cannot give."""

HALF = 0.5
"""The VQA accuracy from which on an answer counts as right where answers are either right or wrong."""

_told: weakref.WeakSet[Examples] = weakref.WeakSet()
log = logging.getLogger(__name__)


class VisualQuestionAnswering(Task):
    """Needs pictures with a question each, and one answer, the answers of ten people, or a list of answers that are all right."""

    metrics: ClassVar = MappingProxyType(
        {
            "vqa_accuracy": "VQA accuracy: min(people who gave the answer / 3, 1), averaged over leaving out each of the ten; "
            "with other than ten reference answers, the share of answers that are one of them",
            "exact_match": "the share of answers that are the most frequent reference answer (of several as frequent, any)",
        }
    )
    roles: ClassVar = MappingProxyType(
        {"image": "a picture", "question": "a question", "answers": "an answer, ten people's answers, or a list of right answers"}
    )
    needs: ClassVar = frozenset({"image", "answers"})
    distillation: ClassVar = ANSWER_LOSSES
    text_role: ClassVar = "question"

    type: Literal["visual-question-answering"] = Field(description="The task's name.")
    template: str = Field(
        "{}",
        pattern=r"\{\}",
        description="What questions are put into before they are read, with {} for the question: 'Answer in one word: {}'.",
    )
    max_new_tokens: int = Field(
        10, ge=1, le=1000, description="Where an answer is cut off, in tokens (1 to 1000); without meaning for classifiers."
    )

    def collate(self, rows: list[dict[str, Any]], processor: Processor, examples: Examples, draw: int) -> dict[str, torch.Tensor]:
        """The questions, and all their answers with weights; what becomes of these is the family's choice."""
        from mmcompress.data.answers import weights
        from mmcompress.tasks._respond import batch_of  # needs torch

        if examples not in _told:
            _told.add(examples)
            some = range(0, len(examples), max(1, len(examples) // LOOKED_AT))
            _tell([references(examples.without_media(i)) for i in some], processor, f"{examples.name}: of its questions")
        questions = [self.asked(row) for row in rows]
        return batch_of(rows, questions, [weights(references(row)) for row in rows], processor)

    def loss(self, outputs: Outputs, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The cross-entropy of the answer's tokens, or the binary cross-entropy over fixed answers."""
        from mmcompress.tasks._respond import answer_loss  # needs torch

        return answer_loss(outputs, batch)

    def evaluate(self, predict: Predict, processor: Processor, examples: Examples, reporter: Reporter) -> Scores:
        """Greedy answers to all questions, compared as the VQA evaluation does (`data.answers.normalise`)."""
        import numpy as np

        from mmcompress.data.answers import agreement, is_most_frequent, normalise
        from mmcompress.tasks._observed import of_answers
        from mmcompress.tasks._respond import answers, fingerprints
        from mmcompress.tasks._watch import Watched

        examples.need(self.roles, self.type)
        watched = Watched(predict, len(examples))
        kept, said = answers(watched, processor, examples, reporter, self.asked, self.max_new_tokens)
        right = [references(examples.without_media(int(i))) for i in kept]
        if examples not in _told:
            _told.add(examples)
            _tell(right, processor, f"{examples.name}: of its questions")
        pairs = list(zip(said, right, strict=True))
        found = {
            "vqa_accuracy": np.array([agreement(answer, known) for answer, known in pairs]),
            "exact_match": np.array([is_most_frequent(answer, known) for answer, known in pairs], dtype=np.float64),
        }
        clean = [normalise(answer) for answer in said]
        seen = of_answers(kept, clean, found["vqa_accuracy"] >= HALF, "at least half of the VQA accuracy")
        seen.embeddings = watched.embeddings()
        # Questions about one picture stand or fall together, but which are is not known here: rows hold no picture's id.
        return Scores(found, answers=fingerprints(clean), skipped=len(examples) - len(kept), kept=kept, seen=seen)

    def asked(self, row: dict[str, Any]) -> str:
        """What the model reads for a row."""
        question = row["question"][0] if isinstance(row["question"], list) else row["question"]
        return self.template.replace("{}", question)


def references(row: dict[str, Any]) -> list[str]:
    """A row's answers."""
    return list(row["answers"]) if isinstance(row["answers"], list) else [row["answers"]]


def _tell(known: Sequence[Sequence[str]], processor: Processor, where: str) -> None:
    """Warns of questions that a model with fixed answers cannot answer rightly: they have no target in training."""
    from mmcompress.data.answers import normalise
    from mmcompress.tasks._respond import family_of

    fixed = family_of(processor).fixed_answers(processor)
    if fixed is None:
        return
    lost = [answers for answers in known if not any(normalise(answer) in fixed for answer in answers)]
    if lost:
        log.warning(
            "%s, %s of %s looked at have no answer among the model's %s, such as %r: they are scored as wrong and teach nothing",
            where, f"{len(lost):,}", f"{len(known):,}", f"{len(fixed):,}", lost[0][0],
        )  # fmt: skip


TASK = VisualQuestionAnswering
