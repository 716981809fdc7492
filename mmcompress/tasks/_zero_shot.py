"""Zero-shot classification of pictures and recordings: the class whose prompts are nearest (Radford et al. 2021, section 3.1.4).

Shapes: B pictures or recordings, N of them, U distinct texts, C classes, D embedding width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import field_validator

from mmcompress.tasks.base import DUAL_ENCODER_LOSSES, TOWERS, Scores, Task

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mmcompress.data.examples import Examples
    from mmcompress.families.base import Outputs
    from mmcompress.processor import Processor
    from mmcompress.progress import Reporter
    from mmcompress.runtimes.base import Predict


class ZeroShotClassification(Task):
    """Needs media with labels; the class names are read as text. Subclasses say which media, and give ``templates``."""

    distillation: ClassVar = DUAL_ENCODER_LOSSES
    text_role: ClassVar = "classes"

    templates: list[str]

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: list[str]) -> list[str]:
        for text in templates:
            if text.count("{}") != 1:
                raise ValueError(f"the template {text!r} needs {{}} exactly once, where the class name goes")
        return templates

    def collate(self, rows: list[dict[str, Any]], processor: Processor, examples: Examples, draw: int) -> dict[str, torch.Tensor]:
        """All classes are the texts of a batch when they are no more than its examples, else those that occur in it."""
        from mmcompress.tasks._contrastive import batch_of  # needs torch

        template = self.templates[draw % len(self.templates)]
        classes = examples.classes or []
        labels = [int(row["label"]) for row in rows]
        used = list(range(len(classes))) if len(classes) <= max(len(rows), 16) else sorted(set(labels))
        place = {label: i for i, label in enumerate(used)}
        texts = [template.replace("{}", classes[i]) for i in used]
        return batch_of(rows, texts, [place[label] for label in labels], processor)

    def loss(self, outputs: Outputs, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The contrastive loss between media and class prompts; examples of one class are all positives of its prompt."""
        from mmcompress.tasks._contrastive import contrastive_loss  # needs torch

        return contrastive_loss(outputs, batch["target"])

    def evaluate(self, predict: Predict, processor: Processor, examples: Examples, reporter: Reporter) -> Scores:
        """Top-1 and top-5 over all examples, precision and recall for each class."""
        import numpy as np

        from mmcompress.tasks._embed import embed_media, unit_mean_texts
        from mmcompress.tasks._observed import Observed, alignment, kept_embeddings, kept_logits

        examples.need(self.roles, self.type)
        classes = examples.classes or []
        anchors = unit_mean_texts(predict, processor, self._prompts(classes))
        kept, media = embed_media(predict, processor, examples, reporter)
        labels = np.asarray(examples.labels())[kept]
        cosines = media @ anchors.T
        ranked = np.argsort(-cosines, axis=1, kind="stable")
        right = ranked == labels[:, None]
        logits, logit_rows = kept_logits(cosines)
        matched, unmatched = alignment(cosines, labels[:, None] == np.arange(len(classes)))
        seen = Observed(
            index=kept,
            right=right[:, 0],
            right_means="the nearest class is the true one",
            answers=ranked[:, 0],
            names=classes,
            truth=labels,
            logits=logits,
            logit_rows=logit_rows,
            embeddings=kept_embeddings({TOWERS[examples.kind]: media, "text": anchors}),
            matched=matched,
            unmatched=unmatched,
        )
        return Scores(
            per_example={
                "accuracy": right[:, 0].astype(np.float64),
                "accuracy_top5": right[:, :5].any(axis=1).astype(np.float64),
            },
            answers=ranked[:, 0],
            classes=per_class(labels, ranked[:, 0], classes),
            skipped=len(examples) - len(kept),
            kept=kept,
            seen=seen,
        )

    def candidates(self, examples: Examples) -> tuple[list[list[str]], np.ndarray]:
        """The prompts of each class."""
        import numpy as np

        classes = examples.classes or []
        return self._prompts(classes), np.asarray(examples.labels())[:, None] == np.arange(len(classes))

    def _prompts(self, classes: list[str]) -> list[list[str]]:
        return [[t.replace("{}", name) for t in self.templates] for name in classes]


def per_class(labels: np.ndarray, answers: np.ndarray, classes: list[str]) -> dict[str, dict[str, float | None]]:
    """Precision and recall of each class; None where the denominator is zero.

    Args:
        labels: shape (N,), the right classes.
        answers: shape (N,), the predicted classes.
    """
    import numpy as np

    table = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(table, (labels, answers), 1)
    found: dict[str, dict[str, float | None]] = {}
    for i, name in enumerate(classes):
        hit, predicted, there = int(table[i, i]), int(table[:, i].sum()), int(table[i].sum())
        found[name] = {
            "precision": hit / predicted if predicted else None,
            "recall": hit / there if there else None,
            "n": there,
        }
    return found


TEMPLATES = "Prompts with {} for the class name. The embeddings of all of a class's prompts are averaged."
