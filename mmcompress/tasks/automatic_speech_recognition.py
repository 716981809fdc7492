"""Automatic speech recognition: word and character error rates after the Whisper normaliser (Radford et al. 2022, appendix C).

Shapes: B examples, N that are scored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mmcompress.errors import DataError
from mmcompress.tasks.base import ANSWER_LOSSES, Scores, Task

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mmcompress.data.examples import Examples
    from mmcompress.families.base import Outputs
    from mmcompress.processor import Processor
    from mmcompress.progress import Reporter
    from mmcompress.runtimes.base import Predict

UNSPACED = ("zh", "yue", "ja", "th", "lo", "my")
"""Languages that write no spaces between words: there the Whisper paper counts letters (appendix C)."""


class AutomaticSpeechRecognition(Task):
    """Needs recordings with one transcript each. A column of speakers is used where there is one.

    The error rates are those of all recordings together, all errors over all words (or letters), so that long recordings count
    more than short ones; they may pass 100%. With at least 10 speakers their intervals are clustered by speaker: recordings of
    one speaker fail together, and other speakers are what matters. With fewer, or none named, they are by recording, and then
    hold for these speakers only. Recordings whose transcript has no words after normalisation are not scored.
    """

    metrics: ClassVar = MappingProxyType(
        {
            "wer": "word error rate: words put in, left out or wrong, over the words of all transcripts; lower is better",
            "cer": "character error rate: the same of letters and spaces; lower is better",
            "exact_match": "the share of recordings with every word right",
        }
    )
    lower_is_better: ClassVar = frozenset({"wer", "cer"})
    roles: ClassVar = MappingProxyType({"audio": "a recording", "text": "its transcript", "speaker": "who speaks"})
    optional: ClassVar = frozenset({"speaker"})
    needs: ClassVar = frozenset({"audio", "transcripts"})
    distillation: ClassVar = ANSWER_LOSSES

    type: Literal["automatic-speech-recognition"] = Field(description="The task's name.")
    normalizer: Literal["english", "basic", "none"] = Field(
        "english",
        description="What both texts go through before they are compared. english: the Whisper normaliser for English (case, "
        "punctuation, fillers, contractions, British spelling where the model has normalizer.json; spelled-out numbers become "
        "figures, so that `two three` is the one word 23: take basic for strings of digits). basic: the one for other languages "
        "(case, punctuation, marks). none: nothing.",
    )
    language: str | None = Field(
        None,
        pattern=r"^[a-z]{2,3}$",
        description="The language spoken, as a code such as `en`; the model's settings, or what it detects, where left out.",
    )
    max_new_tokens: int = Field(128, ge=1, le=1000, description="Where a transcript is cut off, in tokens (1 to 1000).")

    @model_validator(mode="after")
    def _normalizer_fits(self) -> Self:
        if self.normalizer == "english" and self.language not in (None, "en"):
            raise ValueError(f"normalizer: english is for English only; with language {self.language} take `basic`")
        return self

    def collate(self, rows: list[dict[str, Any]], processor: Processor, examples: Examples, draw: int) -> dict[str, torch.Tensor]:
        """The transcripts as they are written in the data."""
        from mmcompress.tasks._respond import batch_of  # needs torch

        languages = None if self.language is None else [self.language] * len(rows)
        return batch_of(rows, languages, [transcript(row, examples) for row in rows], processor)

    def loss(self, outputs: Outputs, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The cross-entropy of the transcripts' tokens."""
        from mmcompress.tasks._respond import answer_loss  # needs torch

        return answer_loss(outputs, batch)

    def evaluate(self, predict: Predict, processor: Processor, examples: Examples, reporter: Reporter) -> Scores:
        """Greedy transcripts of all recordings.

        Raises:
            DataError: a transcript is a list of several, or none has words left.
        """
        import numpy as np

        from mmcompress.data.groups import group_numbers
        from mmcompress.tasks._observed import of_answers
        from mmcompress.tasks._respond import answers, fingerprints
        from mmcompress.tasks._watch import Watched

        examples.need(self.roles, self.type, self.optional)
        language = self.language
        ask = None if language is None else (lambda row: language)
        watched = Watched(predict, len(examples))
        kept, said = answers(watched, processor, examples, reporter, ask, self.max_new_tokens)
        skipped = len(examples) - len(kept)
        rows = [examples.without_media(int(i)) for i in kept]
        clean = normaliser(self.normalizer, self.language, processor)
        wanted, found = [clean(transcript(row, examples)) for row in rows], [clean(text) for text in said]
        scored = [i for i, text in enumerate(wanted) if text]
        if not scored:
            raise DataError(f"{examples.name}: no transcript has words left after the normalizer {self.normalizer!r}")
        if len(scored) < len(wanted):
            reporter.say(f"{len(wanted) - len(scored)} transcripts have no words after normalisation and are not scored")
        wanted, found = [wanted[i] for i in scored], [found[i] for i in scored]
        word_errors, words, letter_errors, letters = edits(wanted, found)
        seen = of_answers(kept[scored], found, word_errors == 0, "every word right")
        seen.embeddings = watched.embeddings()
        return Scores(
            per_example={
                "wer": word_errors / words,
                "cer": letter_errors / letters,
                "exact_match": (word_errors == 0).astype(np.float64),
            },
            weights={"wer": words, "cer": letters},
            clusters=group_numbers([rows[i].get("speaker") for i in scored]),
            answers=fingerprints(found),
            skipped=skipped,
            kept=kept[scored],
            seen=seen,
        )


def transcript(row: dict[str, Any], examples: Examples) -> str:
    """The one transcript of a row.

    Raises:
        DataError: it has several.
    """
    text = row["text"]
    if isinstance(text, str):
        return text
    if len(text) != 1:
        where = f"{examples.name}, row {row['index']}, column {examples.columns['text']!r}"
        raise DataError(f"{where}: {len(text)} transcripts of one recording; allowed: one")
    return str(text[0])


def normaliser(kind: str, language: str | None, processor: Processor) -> Callable[[str], str]:
    """What transcripts go through before they are compared; white space is single afterwards, and ends are bare.

    Args:
        processor: its file ``normalizer.json``, if any, maps British spelling to American.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    change: Callable[[str], str] = str
    if kind == "english":
        change = EnglishTextNormalizer(json.loads(processor.files.get("normalizer.json", "{}")))
    elif kind == "basic":
        change = BasicTextNormalizer(split_letters=language in UNSPACED)
    return lambda text: " ".join(change(text).split())


def edits(wanted: Sequence[str], found: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Errors (the fewest substitutions, deletions and insertions) and lengths of transcripts.

    Args:
        wanted: the right ones; none is empty.
        found: the model's.

    Returns:
        Errors in words, words, errors in characters (spaces count), characters: each (N,).
    """
    import jiwer
    import numpy as np

    counts = []
    for right, guess in zip(wanted, found, strict=True):
        by_word, by_letter = jiwer.process_words(right, guess), jiwer.process_characters(right, guess)
        line: list[int] = []
        for kind in (by_word, by_letter):
            line += [kind.substitutions + kind.deletions + kind.insertions, kind.substitutions + kind.deletions + kind.hits]
        counts.append(line)
    word_errors, words, letter_errors, letters = np.array(counts, dtype=np.float64).T
    return word_errors, words, letter_errors, letters


TASK = AutomaticSpeechRecognition
