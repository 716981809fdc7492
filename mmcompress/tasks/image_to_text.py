"""Captions for pictures, scored against references by CIDEr-D, BLEU-4 and exact match.

Shapes: B examples, N that are scored.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmcompress.tasks.base import ANSWER_LOSSES, CorpusMetric, Scores, Task

if TYPE_CHECKING:
    import torch

    from mmcompress.data.examples import Examples
    from mmcompress.families.base import Outputs
    from mmcompress.processor import Processor
    from mmcompress.progress import Reporter
    from mmcompress.runtimes.base import Predict


class ImageToText(Task):
    """Needs pictures with one caption each, or with a list of captions, all of which are references."""

    metrics: ClassVar = MappingProxyType(
        {
            "cider": "CIDEr-D: likeness to the references in groups of 1 to 4 words, rare ones counting more; 0 to 10",
            "bleu4": "corpus BLEU-4: shares of right groups of 1 to 4 words over all captions together; 0 to 1",
            "exact_match": "the share of captions with the same words as one of their references",
        }
    )
    roles: ClassVar = MappingProxyType({"image": "a picture", "text": "a caption or a list of captions"})
    units: ClassVar = MappingProxyType({"cider": "points", "bleu4": "points"})
    needs: ClassVar = frozenset({"image", "captions"})
    distillation: ClassVar = ANSWER_LOSSES

    type: Literal["image-to-text"] = Field(description="The task's name.")
    prompt: str = Field(
        "",
        max_length=1000,
        description="What the model reads before its caption, such as 'a picture of'; references do not hold it. Empty: none.",
    )
    max_new_tokens: int = Field(30, ge=1, le=1000, description="Where a caption is cut off, in tokens (1 to 1000).")

    def collate(self, rows: list[dict[str, Any]], processor: Processor, examples: Examples, draw: int) -> dict[str, torch.Tensor]:
        """One caption for each picture; of several, one is drawn."""
        from mmcompress.tasks._respond import batch_of  # needs torch

        chosen = [(texts := references(row))[(draw + i) % len(texts)] for i, row in enumerate(rows)]
        return batch_of(rows, self._prompts(len(rows)), chosen, processor)

    def loss(self, outputs: Outputs, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The cross-entropy of the captions' tokens."""
        from mmcompress.tasks._respond import answer_loss  # needs torch

        return answer_loss(outputs, batch)

    def evaluate(self, predict: Predict, processor: Processor, examples: Examples, reporter: Reporter) -> Scores:
        """Greedy captions of all pictures against all of their references."""
        from mmcompress.measure.captioning import bleu_of_sums, bleu_statistics, cider, exact_match
        from mmcompress.tasks._observed import of_answers
        from mmcompress.tasks._respond import answers, fingerprints
        from mmcompress.tasks._watch import Watched

        examples.need(self.roles, self.type)
        ask = (lambda row: self.prompt) if self.prompt else None
        watched = Watched(predict, len(examples))
        kept, said = answers(watched, processor, examples, reporter, ask, self.max_new_tokens)
        right = [references(examples.without_media(int(i))) for i in kept]
        same = exact_match(said, right)
        seen = of_answers(kept, said, same == 1, "the words of one of the references")
        seen.embeddings = watched.embeddings()
        return Scores(
            {"cider": cider(said, right), "exact_match": same},
            corpus={"bleu4": CorpusMetric(bleu_statistics(said, right), bleu_of_sums)},
            answers=fingerprints(said),
            skipped=len(examples) - len(kept),
            kept=kept,
            seen=seen,
        )

    def _prompts(self, count: int) -> list[str] | None:
        return [self.prompt] * count if self.prompt else None


def references(row: dict[str, Any]) -> list[str]:
    """A row's captions."""
    return list(row["text"]) if isinstance(row["text"], list) else [row["text"]]


TASK = ImageToText
