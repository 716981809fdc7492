"""Pseudo-labels: which recordings stay, what their transcripts become, and that the pass trains on them."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from pydantic import ValidationError

from mmcompress import passes
from mmcompress.context import Context
from mmcompress.data.examples import Examples
from mmcompress.errors import DataError, RecipeError
from mmcompress.model import CompressedModel
from mmcompress.progress import SILENT
from mmcompress.tasks.automatic_speech_recognition import TASK
from mmcompress.tasks.image_to_text import ImageToText
from mmcompress.tasks.visual_question_answering import VisualQuestionAnswering
from mmcompress.training.pseudo_labels import pseudo_labelled, relabel
from mmcompress.training.settings import PseudoLabels
from tests import tiny, tiny_data
from tests.families import tiny_blip
from tests.families.tiny_whisper import whisper
from tests.pruning.helpers import context as of_pictures

SPEECH = TASK.model_validate({"type": "automatic-speech-recognition"})


def examples(count: int = 6) -> Examples:
    found: Examples = tiny_data.examples(count)
    found.narrow(SPEECH.roles, SPEECH.type, SPEECH.optional)
    return found


class Saying:
    """Stands in for the teacher's answers."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __call__(self, predict: Any, processor: Any, given: Examples, *rest: Any) -> tuple[Any, list[str]]:
        import numpy as np

        return np.arange(len(given)), self.texts


@pytest.fixture
def teacher() -> CompressedModel:
    return whisper()


def test_far_transcripts_go_and_near_ones_are_the_teachers(teacher: CompressedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given = examples(5)
    own = [given.without_media(i)["text"] for i in range(5)]  # "a red square" and the like, three words each
    said = [own[0].upper() + ".", own[1].replace("square", "circle"), "", "no word of it", own[4]]
    monkeypatch.setattr("mmcompress.training.pseudo_labels.answers", Saying(said))
    kept, facts = relabel(teacher, SPEECH, given, 10, SILENT)
    assert [kept[i]["text"] for i in range(len(kept))] == [said[0], said[4]]
    assert kept[1]["audio"].samples.shape == given[4]["audio"].samples.shape
    # By hand: 0, 1, 4 (three substitutions, one insertion) and 0 errors over 4 x 3 words; the empty one is not counted.
    assert facts == {"examples": 5, "kept": 2, "teacher_wer": round(100 * 5 / 12, 3), "changed_texts": 0}
    kept, facts = relabel(teacher, SPEECH, given, 34, SILENT)
    assert [kept[i]["text"] for i in range(len(kept))] == [said[0], said[1], said[4]]
    assert facts["changed_texts"] == 1
    assert [given.without_media(i)["text"] for i in range(5)] == own, "the data itself was changed"


@pytest.mark.parametrize(("said", "why"), [([""] * 3, "has words in it"), (["x y z"] * 3, "differ by more than 10%")])
def test_a_teacher_that_is_of_no_use(
    said: list[str], why: str, teacher: CompressedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmcompress.training.pseudo_labels.answers", Saying(said))
    with pytest.raises(DataError, match=why):
        relabel(teacher, SPEECH, examples(3), 10, SILENT)


def test_tasks_without_transcripts_are_refused(teacher: CompressedModel) -> None:
    pictures = of_pictures()
    with pytest.raises(RecipeError, match="the task zero-shot-image-classification has none"):
        relabel(teacher, pictures.need_task("x"), pictures.need_train("x"), 10, SILENT)


def test_the_pass_trains_on_what_the_teacher_writes(teacher: CompressedModel) -> None:
    step = passes.Distill(pseudo_labels={"max_wer": 10_000}, max_steps=2, batch_size=3, freeze=["encoder"])
    new, facts = step.run(whisper(seed=1), Context(task=SPEECH, train=examples(6), baseline=lambda: teacher))
    assert facts["pseudo_labels"]["examples"] == 6
    assert 0 < facts["pseudo_labels"]["kept"] <= 6
    assert facts["pseudo_labels"]["changed_texts"] == facts["pseudo_labels"]["kept"]
    plain, _ = passes.Distill(max_steps=2, batch_size=3, freeze=["encoder"]).run(
        whisper(seed=1), Context(task=SPEECH, train=examples(6), baseline=lambda: teacher)
    )
    ours, theirs = new.module.state_dict(), plain.module.state_dict()
    assert any(not ours[name].equal(theirs[name]) for name in ours), "it trained on the data's own transcripts"
    before = whisper(seed=1).module.state_dict()
    assert all(ours[name].equal(before[name]) for name in ours if name.startswith("model.encoder"))


def test_settings() -> None:
    with pytest.raises(ValidationError, match="max_wer"):
        passes.Distill(pseudo_labels={"max_wer": -1})
    with pytest.raises(ValidationError, match="max_cer"):
        passes.Distill(pseudo_labels={"max_cer": 1})


def test_captions_and_answers_become_the_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"image": [{"bytes": tiny.png((200, 30, 30), i), "path": None} for i in range(3)]}
    captions = Dataset.from_dict({**columns, "text": [["a red square", "red"], ["a square"], ["a red"]]})
    said = ["red", "a green square", " "]
    monkeypatch.setattr("mmcompress.training.pseudo_labels.answers", Saying(said))
    task = ImageToText(type="image-to-text")
    given = Examples(captions, "captions", {"image": "image", "text": "text"})
    found, facts = pseudo_labelled(tiny_blip.captions(), task, given, PseudoLabels(), SILENT)
    assert [found[i]["text"] for i in range(len(found))] == ["red", "a green square"]
    assert facts == {"examples": 3, "kept": 2, "changed_texts": 1}
    with pytest.raises(RecipeError, match="max_wer is for transcripts"):
        pseudo_labelled(tiny_blip.captions(), task, given, PseudoLabels(max_wer=5), SILENT)
    asked = Dataset.from_dict({**columns, "question": ["what colour?"] * 3, "answers": [["red"], ["red", "green"], ["red"]]})
    given = Examples(asked, "questions", {"image": "image", "question": "question", "answers": "answers"})
    vqa = VisualQuestionAnswering(type="visual-question-answering")
    found, facts = pseudo_labelled(tiny_blip.answers(), vqa, given, PseudoLabels(), SILENT)
    assert [(found[i]["question"], found[i]["answers"]) for i in range(2)] == [
        ("what colour?", "red"),
        ("what colour?", "a green square"),
    ]
