"""Pseudo-labels: training transcripts as the teacher writes them, where they are not too far from those of the data.

After Distil-Whisper (Gandhi et al. 2023, arXiv 2311.00430, section 3.2): a student learns the teacher's spelling and punctuation
more easily than those of many sources, and recordings whose own transcript is wrong show by a high error rate of the teacher's.

Shapes: N examples, K of them kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmcompress.data.examples import Examples
from mmcompress.errors import DataError, RecipeError
from mmcompress.model import CompressedModel
from mmcompress.progress import Reporter
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks._respond import answers
from mmcompress.tasks.automatic_speech_recognition import AutomaticSpeechRecognition, edits, normaliser, transcript
from mmcompress.tasks.base import Task


class _Relabelled(Sequence[Mapping[str, Any]]):
    """Some rows of a source, with other texts in one column."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], column: str, texts: Mapping[int, str]) -> None:
        self.rows, self.column = rows, column
        self.texts = list(texts.items())

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        place, text = self.texts[index]
        return {**self.rows[place], self.column: text}


def relabel(
    teacher: CompressedModel, task: Task, examples: Examples, max_wer: float, reporter: Reporter, device: str = "auto"
) -> tuple[Examples, dict[str, Any]]:
    """Has the teacher transcribe all examples once, greedily, and keeps those that it reads nearly as the data does.

    Args:
        max_wer: the largest word error rate of the teacher's transcript against the data's, in percent, after the task's
            normaliser. Examples whose transcripts are empty after it are left out.
        device: where the teacher runs.

    Returns:
        The K examples with the teacher's transcripts, and numbers for the history.

    Raises:
        RecipeError: the task is not about transcripts.
        DataError: no example is left.
    """
    if not isinstance(task, AutomaticSpeechRecognition):
        raise RecipeError(f"pseudo_labels: are transcripts of recordings; the task {task.type} has none")
    examples.need(task.roles, task.type, task.optional)
    language = task.language
    ask = None if language is None else (lambda row: language)
    # A view of its own: what was prepared for the teacher is not kept for as long as the examples are.
    view = examples[:]
    kept, said = answers(TorchPredict(teacher, device), teacher.processor, view, reporter, ask, task.max_new_tokens)
    clean = normaliser(task.normalizer, task.language, teacher.processor)
    places = [int(i) for i in kept]
    wanted = [clean(transcript(examples.without_media(i), examples)) for i in places]
    found = [clean(text) for text in said]
    usable = [k for k in range(len(places)) if wanted[k] and found[k]]
    if not usable:
        raise DataError(f"pseudo_labels: {examples.name}: not one transcript of the teacher has words in it")
    errors, words, _, _ = edits([wanted[k] for k in usable], [found[k] for k in usable])
    good = [k for k, rate in zip(usable, 100 * errors / words, strict=True) if rate <= max_wer]
    if not good:
        raise DataError(
            f"pseudo_labels: {examples.name}: the teacher's transcripts all differ by more than {max_wer:g}% of the words; "
            "raise max_wer, or take another teacher"
        )
    rows = _Relabelled(examples.rows, examples.columns["text"], {places[k]: said[k] for k in good})
    facts = {
        "examples": len(examples),
        "kept": len(good),
        "teacher_wer": round(100 * float(errors.sum() / words.sum()), 3),
        "changed_texts": sum(found[k] != wanted[k] for k in good),
    }
    name, classes = f"{examples.name}, as the teacher writes it", examples.classes
    return Examples(rows, name, examples.columns, classes, examples.skip_damaged, examples.synthetic, examples.folder), facts
