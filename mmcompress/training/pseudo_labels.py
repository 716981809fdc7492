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
from mmcompress.tasks.image_to_text import ImageToText
from mmcompress.tasks.visual_question_answering import VisualQuestionAnswering
from mmcompress.training.settings import PseudoLabels


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


ROLES = {"image-to-text": "text", "visual-question-answering": "answers"}
"""For each task with answers about pictures what the teacher's take the place of."""


def pseudo_labelled(
    teacher: CompressedModel, task: Task, examples: Examples, settings: PseudoLabels, reporter: Reporter, device: str = "auto"
) -> tuple[Examples, dict[str, Any]]:
    """The examples with the teacher's answers: as `relabel` for transcripts, as `reworded` for captions and answers.

    Raises:
        RecipeError: the task has none of these, or `max_wer` is set and it has no transcripts.
        DataError: no example is left.
    """
    if task.type not in ROLES:
        return relabel(teacher, task, examples, settings.max_wer, reporter, device)
    if "max_wer" in settings.model_fields_set:
        raise RecipeError(f"pseudo_labels: max_wer is for transcripts, and the task {task.type} has none; leave it out")
    return reworded(teacher, task, examples, reporter, device)


def reworded(
    teacher: CompressedModel, task: Task, examples: Examples, reporter: Reporter, device: str = "auto"
) -> tuple[Examples, dict[str, Any]]:
    """Has the teacher caption all pictures, or answer all questions, once and greedily; its answers take the data's place.

    Sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947, section 3.2), with greedy answers for those of a beam.

    Returns:
        The K examples that the teacher has words for, and numbers for the history.

    Raises:
        DataError: no example is left.
    """
    examples.need(task.roles, task.type, task.optional)
    ask = None
    if isinstance(task, VisualQuestionAnswering):
        ask = task.asked
    elif isinstance(task, ImageToText) and task.prompt:
        ask = lambda row: task.prompt  # noqa: E731  (a def would need the type said again)
    most = task.max_new_tokens if isinstance(task, (ImageToText, VisualQuestionAnswering)) else 0
    kept, said = answers(TorchPredict(teacher, device), teacher.processor, examples[:], reporter, ask, most)
    texts = {int(place): text for place, text in zip(kept, said, strict=True) if text.strip()}
    if not texts:
        raise DataError(f"pseudo_labels: {examples.name}: not one answer of the teacher has words in it")
    role = ROLES[task.type]
    known = [examples.without_media(i)[role] for i in texts]
    same = sum(text in (own if isinstance(own, list) else [own]) for text, own in zip(texts.values(), known, strict=True))
    facts = {"examples": len(examples), "kept": len(texts), "changed_texts": len(texts) - same}
    return _with_texts(examples, role, texts), facts


def _with_texts(examples: Examples, role: str, texts: Mapping[int, str]) -> Examples:
    """Some of the examples, with other texts in a role's column."""
    rows = _Relabelled(examples.rows, examples.columns[role], texts)
    name, classes = f"{examples.name}, as the teacher writes it", examples.classes
    return Examples(rows, name, examples.columns, classes, examples.skip_damaged, examples.synthetic, examples.folder)


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
    facts = {
        "examples": len(examples),
        "kept": len(good),
        "teacher_wer": round(100 * float(errors.sum() / words.sum()), 3),
        "changed_texts": sum(found[k] != wanted[k] for k in good),
    }
    return _with_texts(examples, "text", {places[k]: said[k] for k in good}), facts
