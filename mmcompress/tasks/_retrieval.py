"""Retrieval of texts by pictures or recordings and the other way round: recall at 1, 5 and 10.

Shapes: B pictures or recordings, U distinct texts, N queries, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mmcompress.tasks.base import DUAL_ENCODER_LOSSES, TOWERS, Scores, Task

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mmcompress.data.examples import Examples
    from mmcompress.families.base import Outputs
    from mmcompress.processor import Processor
    from mmcompress.progress import Reporter
    from mmcompress.runtimes.base import Predict

RANKS = (1, 5, 10)


def recalls(kind: str, many: str, one: str) -> Mapping[str, str]:
    """The metrics, with a line for each, of ``image`` or ``audio``, said as (pictures, picture)."""
    to_text = {f"{kind}_to_text_r{k}": f"R@{k}: the share of {many} with a right text among the {k} nearest" for k in RANKS}
    to_media = {f"text_to_{kind}_r{k}": f"R@{k}: the share of texts with a right {one} among the {k} nearest" for k in RANKS}
    return MappingProxyType({**to_text, **to_media})


class Retrieval(Task):
    """Needs media with one text each, or with a list of texts. Equal texts are one candidate."""

    distillation: ClassVar = DUAL_ENCODER_LOSSES
    text_role: ClassVar = "text"

    template: str = Field(
        "{}", description="What the texts are put into before they are read, with {} for the text.", pattern=r"\{\}"
    )

    def collate(self, rows: list[dict[str, Any]], processor: Processor, examples: Examples, draw: int) -> dict[str, torch.Tensor]:
        """One text for each picture or recording (of several, one is drawn); equal texts in a batch are encoded once."""
        from mmcompress.tasks._contrastive import batch_of  # needs torch

        chosen = [self._texts(row)[(draw + i) % len(self._texts(row))] for i, row in enumerate(rows)]
        distinct = list(dict.fromkeys(chosen))
        place = {text: i for i, text in enumerate(distinct)}
        return batch_of(rows, distinct, [place[text] for text in chosen], processor)

    def loss(self, outputs: Outputs, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The symmetric contrastive loss; those that share a text are all positives of it."""
        from mmcompress.tasks._contrastive import contrastive_loss  # needs torch

        return contrastive_loss(outputs, batch["target"])

    def evaluate(self, predict: Predict, processor: Processor, examples: Examples, reporter: Reporter) -> Scores:
        """Recall at 1, 5 and 10 both ways, over all pictures or recordings and all distinct texts."""
        import numpy as np

        from mmcompress.tasks._embed import embed_media, unit_mean_texts
        from mmcompress.tasks._observed import Observed, alignment, kept_embeddings, nearest

        examples.need(self.roles, self.type)
        kept, media = embed_media(predict, processor, examples, reporter)
        groups, relevant = self._sought(examples, [int(i) for i in kept])
        texts_ = unit_mean_texts(predict, processor, groups)
        similarity = media @ texts_.T
        found: dict[str, np.ndarray] = {}
        # Texts of one picture stand or fall together; one that several share is counted with the first.
        owners = {f"text_to_{examples.kind}_r{k}": relevant.argmax(axis=0) for k in RANKS}
        ranked: dict[str, np.ndarray] = {}
        for name, scores, right in (
            (f"{examples.kind}_to_text", similarity, relevant),
            (f"text_to_{examples.kind}", similarity.T, relevant.T),
        ):
            rank = best_rank(scores, right)
            found |= {f"{name}_r{k}": (rank < k).astype(np.float64) for k in RANKS}
            ranked[name] = nearest(scores)
        matched, unmatched = alignment(similarity, relevant)
        first = ranked[f"{examples.kind}_to_text"][:, 0]
        seen = Observed(
            index=kept,
            right=found[f"{examples.kind}_to_text_r1"] == 1,
            right_means="a right text is nearest, and no wrong one is as near",
            answers=first,
            said=[groups[i][0] for i in first],
            ranked=ranked,
            embeddings=kept_embeddings({TOWERS[examples.kind]: media, "text": texts_}),
            matched=matched,
            unmatched=unmatched,
        )
        return Scores(per_example=found, skipped=len(examples) - len(kept), kept=kept, owners=owners, seen=seen)

    def candidates(self, examples: Examples) -> tuple[list[list[str]], np.ndarray]:
        """All distinct texts, each by itself."""
        return self._sought(examples, range(len(examples)))

    def _sought(self, examples: Examples, indices: Sequence[int]) -> tuple[list[list[str]], np.ndarray]:
        import numpy as np

        own = [self._texts(examples.without_media(i)) for i in indices]
        distinct = list(dict.fromkeys(text for texts in own for text in texts))
        place = {text: j for j, text in enumerate(distinct)}
        relevant = np.zeros((len(own), len(distinct)), dtype=bool)
        for i, texts in enumerate(own):
            relevant[i, [place[text] for text in texts]] = True
        return [[text] for text in distinct], relevant

    def _texts(self, row: dict[str, Any]) -> list[str]:
        texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
        return [self.template.replace("{}", text) for text in texts]


def best_rank(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """How many candidates stand before each query's best right one; ties count against the model.

    Args:
        scores: (N queries, M candidates).
        relevant: (N, M), which candidates are right.

    Returns:
        (N,), 0 where a right candidate is nearest.
    """
    import numpy as np

    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    before: np.ndarray = ((scores >= best) & ~relevant).sum(axis=1)
    return before
