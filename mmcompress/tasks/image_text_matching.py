"""Whether a text fits a picture, judged pair by pair: accuracy and the area under the ROC curve.

Shapes: B pairs in a batch, N pictures or pairs that are scored.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmcompress.errors import DataError, ModelError
from mmcompress.tasks.base import ANSWER_LOSSES, Scores, Task

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mmcompress.data.examples import Examples
    from mmcompress.families.base import Outputs
    from mmcompress.processor import Processor
    from mmcompress.progress import Reporter
    from mmcompress.runtimes.base import Predict
    from mmcompress.tasks._observed import Observed


class ImageTextMatching(Task):
    """Needs pictures with texts that fit them, or pairs with a label that says whether they fit."""

    metrics: ClassVar = MappingProxyType(
        {
            "accuracy": "the share of pairs that are judged rightly, at a probability of one half",
            "auroc": "area under the ROC curve: how often a pair that fits is held more probable than one that does not",
        }
    )
    roles: ClassVar = MappingProxyType(
        {"image": "a picture", "text": "a text or a list of texts", "label": "two classes: the second for a text that fits"}
    )
    optional: ClassVar = frozenset({"label"})
    needs: ClassVar = frozenset({"image", "matching"})
    distillation: ClassVar = ANSWER_LOSSES
    text_role: ClassVar = "text"

    type: Literal["image-text-matching"] = Field(description="The task's name.")
    pairs: Literal["drawn", "labelled"] = Field(
        "drawn",
        description="drawn: every text fits its picture, and texts that do not are drawn from other examples. labelled: a column "
        "of labels says which fit.",
    )
    seed: int = Field(0, ge=0, description="What drawing texts that do not fit starts from; all steps see the same.")

    def collate(self, rows: list[dict[str, Any]], processor: Processor, examples: Examples, draw: int) -> dict[str, torch.Tensor]:
        """One pair for each picture. Where pairs are drawn, every other picture gets the text of another one in the batch."""
        import torch

        from mmcompress.tasks._contrastive import media_of

        texts, labels = [], []
        if self.pairs == "labelled":
            self._check_labels(examples)
            labels = [int(row["label"]) for row in rows]
            texts = [(own := _texts(row))[draw % len(own)] for row in rows]
        else:
            for i, row in enumerate(rows):
                own = _texts(row)
                others = [t for j, other in enumerate(rows) if j != i for t in _texts(other) if t not in own]
                fits = (draw + i) % 2 == 0 or not others
                labels.append(int(fits))
                texts.append(own[draw % len(own)] if fits else others[draw % len(others)])
        media = processor.stack(media_of(rows, processor))
        return {**media, **processor.tokens(texts), "labels": torch.tensor(labels)}

    def loss(self, outputs: Outputs, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The cross-entropy of fitting or not."""
        from mmcompress.tasks._respond import answer_loss  # needs torch

        return answer_loss(outputs, batch)

    def evaluate(self, predict: Predict, processor: Processor, examples: Examples, reporter: Reporter) -> Scores:
        """Every labelled pair; or every picture with a text of its own and with one that is drawn, which count together."""
        import numpy as np

        from mmcompress.data.prepare import prepared
        from mmcompress.measure.matching import accuracy, auroc
        from mmcompress.tasks._respond import AT_ONCE, family_of
        from mmcompress.tasks._watch import Watched

        if self.pairs == "labelled":
            self._check_labels(examples)
        examples.need({role: what for role, what in self.roles.items() if role != "label"}, self.type)
        rows = [examples.without_media(i) for i in range(len(examples))]
        columns = self._columns(rows, examples.name)
        kept: list[np.ndarray] = []
        found: list[list[np.ndarray]] = [[] for _ in columns]
        watched = Watched(predict, len(examples))
        blocks = reporter.track(prepared(examples, processor), f"scoring ({predict.runtime})", prepared.total(examples))
        for indices, media in blocks:
            kept.append(indices)
            for start in range(0, len(indices), AT_ONCE):
                part = slice(start, start + AT_ONCE)
                inputs = {name: values[part] for name, values in media.items()}
                watched.batch(indices[part].tolist())
                for texts, said in zip(columns, found, strict=True):
                    own = [texts[i] for i in indices[part]]
                    said.append(family_of(processor).match(watched, processor, inputs, own))
        used = np.concatenate(kept)
        if self.pairs == "labelled":
            labels = np.array([int(rows[i]["label"]) for i in used])
        else:
            labels = np.concatenate([np.ones(len(used)), np.zeros(len(used))])
        chance = np.concatenate([part for said in found for part in said])
        if not np.isfinite(chance).all():
            raise ModelError("the model gives probabilities that are not finite; it cannot be scored")
        if labels.min() == labels.max():
            raise DataError(
                f"{examples.name}: all pairs have the same label; {self.type} needs some that fit and some that do not"
            )
        # A picture's two pairs stand or fall together: their mean is one value of the sample.
        scores = {
            name: values.reshape(len(columns), len(used)).mean(axis=0)
            for name, values in (("accuracy", accuracy(chance, labels)), ("auroc", auroc(chance, labels)))
        }
        asked = [texts[i] for texts in columns for i in used]
        seen = judged(np.tile(used, len(columns)), chance, labels, asked)
        seen.embeddings = watched.embeddings()
        return Scores(scores, skipped=len(examples) - len(used), kept=used, seen=seen)

    def _check_labels(self, examples: Examples) -> None:
        examples.need(self.roles, self.type)
        if len(examples.classes or []) != 2:
            have = ", ".join((examples.classes or [])[:5])
            raise DataError(
                f"{examples.name}: the labels have {len(examples.classes or [])} classes ({have}); {self.type} with pairs: "
                "labelled needs two, the second for a text that fits"
            )

    def _columns(self, rows: list[dict[str, Any]], name: str) -> list[list[str]]:
        """For each row the text that is judged, and where pairs are drawn, in a second list one that does not fit."""
        import numpy as np

        own = [_texts(row) for row in rows]
        fitting = [texts[0] for texts in own]
        if self.pairs == "labelled":
            return [fitting]
        distinct = list(dict.fromkeys(text for texts in own for text in texts))
        drawn = []
        for i, texts in enumerate(own):
            if set(distinct) <= set(texts):
                raise DataError(
                    f"{name}, row {i}: no other example has a text that is not this one's; none can be drawn that does not fit"
                )
            order = np.random.default_rng([self.seed, i])
            while (other := distinct[int(order.integers(len(distinct)))]) in texts:
                pass
            drawn.append(other)
        return [fitting, drawn]


def judged(index: np.ndarray, chance: np.ndarray, labels: np.ndarray, asked: list[str]) -> Observed:
    """What a model said of pairs, from the probability that they fit, 0 to 1.

    Args:
        index: (N pairs,), the example of each.
        chance: (N pairs,).
        labels: (N pairs,), 1 for a pair that fits.
        asked: the text of each.
    """
    import numpy as np

    from mmcompress.tasks._observed import Observed, kept_logits

    answers, truth = (chance >= 0.5).astype(np.int64), labels.astype(np.int64)
    # A probability of exactly 0 or 1 is one that float32 rounded.
    certain = np.clip(chance.astype(np.float64), 1e-7, 1 - 1e-7)
    logits, rows = kept_logits(np.log(np.stack([1 - certain, certain], axis=1)))
    return Observed(
        index=index,
        right=answers == truth,
        right_means="the probability of a fit is on the right side of one half",
        answers=answers,
        names=["does not fit", "fits"],
        truth=truth,
        asked=asked,
        logits=logits,
        logit_rows=rows,
        scale=1.0,
    )


def _texts(row: dict[str, Any]) -> list[str]:
    return list(row["text"]) if isinstance(row["text"], list) else [row["text"]]


TASK = ImageTextMatching
