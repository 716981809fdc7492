"""VQA accuracy and the normalisation of answers, against hand-worked cases and the definition; models of both kinds."""

from __future__ import annotations

import itertools
import logging
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from mmcompress.data.answers import agreement, is_most_frequent, normalise, weights
from mmcompress.data.examples import Examples
from mmcompress.errors import DataError
from mmcompress.progress import Reporter
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.visual_question_answering import TASK, VisualQuestionAnswering
from tests import tiny_data
from tests.families import tiny_blip, tiny_vilt

# What the official code (VQAEval.processPunctuation, then processDigitArticle) gives, run once on these texts.
OFFICIAL = {
    "Yes.": "yes",
    "the Two  dogs": "2 dogs",
    "a t-shirt": "t shirt",
    "t- shirt": "t shirt",
    "1,000 (about)": "1000 about",
    "2.5": "2.5",
    "none": "0",
    "dont know": "don't know",
    "couldnt've": "couldn't've",
    "he'dve": "he'd've",
    "left / right": "left right",
    "black&white": "black&white",
    "what?!": "what",
    "10:30": "10:30",
    "An apple,a pear": "apple pear",
    "it's": "it's",
    "Im": "im",
    "\tno\n": "no",
    "ten-four": "10 4",
    ".5 mile.": ".5 mile",
    "a": "",
}


def task(**settings: Any) -> VisualQuestionAnswering:
    return TASK.model_validate({"type": "visual-question-answering", **settings})


@pytest.mark.parametrize(("text", "read"), OFFICIAL.items())
def test_normalise_as_the_official_evaluation_does(text: str, read: str) -> None:
    assert normalise(text) == read


def test_accuracy_by_hand() -> None:
    # Two of ten say blue. Without one of the two, one is left: 1/3. Without one of the other eight, two: 2/3.
    people = ["blue", "Blue."] + ["red"] * 8
    assert agreement("blue", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert agreement("red", people) == 1
    assert agreement("green", people) == 0
    # Three: without one of them 2/3, else 1.
    assert agreement("Blue", ["blue"] * 3 + ["red"] * 7) == pytest.approx(0.9)
    # A single answer counts as everybody's, and so does each of a list that is no list of ten people.
    assert agreement("2", ["two"]) == 1
    assert agreement("sofa", ["couch", "sofa", "settee"]) == 1
    assert agreement("chair", ["couch", "sofa"]) == 0


def test_accuracy_is_the_mean_over_all_groups_of_nine() -> None:
    """Independently: every subset of nine people, with fractions."""
    for same in range(11):
        people = ["yes"] * same + [f"other {i}" for i in range(10 - same)]
        groups = itertools.combinations(people, 9)
        wanted = [min(Fraction(group.count("yes"), 3), Fraction(1)) for group in groups]
        assert agreement("yes", people) == pytest.approx(float(sum(wanted) / len(wanted)))


def test_exact_match_wants_the_most_frequent_answer() -> None:
    people = ["red"] * 5 + ["blue"] * 4 + ["green"]
    assert [is_most_frequent(a, people) for a in ("Red", "blue", "green", "pink")] == [True, False, False, False]
    assert is_most_frequent("sofa", ["couch", "sofa"])


def test_weights_are_votes() -> None:
    people = ["no", "yes", "Yes", "yes."] + ["no"] * 5 + ["maybe"]
    assert weights(people) == {"no": 1.0, "yes": 1.0, "maybe": pytest.approx(1 / 3)}
    assert next(iter(weights(people))) == "no"
    assert weights(["couch", "sofa"]) == {"couch": 1.0, "sofa": 1.0}


def rows(answers: list[Any]) -> Examples:
    """Pictures with a question each and these answers."""
    base = tiny_data.rows(len(answers))
    data = [{**row, "question": "is it red ?", "answers": a} for row, a in zip(base, answers, strict=True)]
    return Examples(data, "tiny", {"image": "image", "question": "question", "answers": "answers"})


@pytest.mark.parametrize("make", [tiny_vilt.vilt, tiny_blip.answers], ids=["chooses", "writes"])
def test_models_of_both_kinds_are_scored_alike(make: Any) -> None:
    model = make()
    predict, reporter = TorchPredict(model), Reporter()
    blank = task().evaluate(predict, model.processor, rows(["nothing like it"] * 6), reporter)
    assert blank.per_example["vqa_accuracy"].tolist() == [0.0] * 6
    media = model.processor.stack(model.processor.media("image", [rows(["x"] * 6).media(i) for i in range(6)]))
    arrays = {name: values.numpy() for name, values in media.items()}
    said = model.family.respond(predict, model.processor, arrays, ["is it red ?"] * 6, 10)
    wrong = "something else"  # a random model may also say nothing at all, which no reference can be
    people = [[text or wrong] * 2 + [wrong] * 8 for text in said]
    found = task().evaluate(predict, model.processor, rows(people), reporter)
    assert found.per_example["vqa_accuracy"] == pytest.approx([0.6 if text else 0.0 for text in said])
    assert found.per_example["exact_match"].tolist() == [0.0] * 6
    right = task().evaluate(predict, model.processor, rows([text or wrong for text in said]), reporter)
    assert right.per_example["exact_match"].tolist() == [float(bool(text)) for text in said]
    assert any(said)
    assert found.answers is not None
    np.testing.assert_array_equal(found.answers, right.answers)


def test_the_template_reaches_the_model() -> None:
    model = tiny_vilt.vilt()
    asked: list[np.ndarray] = []

    class Watch(TorchPredict):
        def __call__(self, component: str, inputs: Any) -> Any:
            asked.append(inputs["input_ids"])
            return super().__call__(component, inputs)

    task(template="the {}").evaluate(Watch(model), model.processor, rows(["red"] * 2), Reporter())
    assert asked[0][0, :3].tolist() == [2, tiny_vilt.WORDS.index("the"), tiny_vilt.WORDS.index("is")]


def test_training_targets_are_the_votes_and_what_has_none_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_vilt.vilt()
    data = rows([["red"] * 2 + ["blue"] * 8, "a pink one", "2"])
    with caplog.at_level(logging.WARNING):
        batch = task().collate([data[i] for i in range(3)], model.processor, data, 0)
        task().collate([data[i] for i in range(3)], model.processor, data, 1)
    names = list(tiny_vilt.ANSWERS)
    assert batch["labels"][0, names.index("red")] == pytest.approx(2 / 3)
    assert batch["labels"][0, names.index("blue")] == 1
    assert batch["labels"][1].sum() == 0
    assert batch["labels"][2, names.index("2")] == 1
    said = [r.getMessage() for r in caplog.records if "no answer among" in r.getMessage()]
    assert said == [
        "tiny: of its questions, 1 of 3 looked at have no answer among the model's 9, such as 'a pink one': "
        "they are scored as wrong and teach nothing"
    ]
    loss = task().loss(model.family.forward(model.module, batch), batch)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(model.module(**{
        k: v for k, v in batch.items() if k != "labels"
    }).logits, batch["labels"]) * len(names)  # fmt: skip
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_answers_as_vqa_v2_records_them() -> None:
    people = [{"answer": "yes", "answer_confidence": "maybe", "answer_id": i} for i in range(10)]
    columns = {"answer": ["yes"] * 10, "answer_id": list(range(10))}
    data = rows([people, columns])
    assert data.without_media(0)["answers"] == data.without_media(1)["answers"] == ["yes"] * 10
    with pytest.raises(DataError, match="row 0, column 'answers': list; allowed"):
        rows([[{"reply": "yes"}]]).without_media(0)


def test_data_without_questions_is_refused() -> None:
    model = tiny_vilt.vilt()
    data = Examples(tiny_data.rows(2), "tiny", {"image": "image"})
    with pytest.raises(DataError, match="needs a column for 'question'"):
        task().evaluate(TorchPredict(model), model.processor, data, Reporter())
