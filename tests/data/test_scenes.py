"""The scenes: the pictures of the shapes, captions and answers that agree with what they show, and answers that are balanced."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from mmcompress.data.scenes import COUNTS, SCENE_ANSWERS, Row, Scenes
from mmcompress.data.shapes import CLASSES, Shapes
from mmcompress.data.sources import load_source
from mmcompress.recipe import Source

ROWS = 1500


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return Scenes("train", ROWS)[:]


def things(row: Row) -> tuple[list[str], str, list[str]]:
    """Size, colour and shape of the outlined object, the relation, and those of the other one."""
    words = row["scene"].split()
    return words[:3], " ".join(words[3:-3]), words[-3:]


def expected(row: Row) -> str:
    """The answer, found by reading the question (and not by the code that made it)."""
    main, relation, second = things(row)
    question = row["question"].rstrip("?").split()
    asked = {"size": 0, "colour": 1, "shape": 2}
    about = second if "without an outline" in row["question"] else main
    if question[0] == "where":
        turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        return turned[relation] if about is second else relation
    if question[:2] == ["how", "many"]:
        wanted = question[2].removesuffix("es") if question[2] == "crosses" else question[2]
        wanted = wanted if wanted in (*main, *second) else wanted.removesuffix("s")
        return str((wanted in main) + (wanted in second))
    if question[:2] == ["is", "there"]:
        return "yes" if question[-2:] in (main[1:], second[1:]) else "no"
    if question[0] == "is":
        return "yes" if question[-1] in about else "no"
    if "outline" in row["question"] or "outlined" in row["question"]:
        return about[asked[question[1]]]
    named = [thing for thing in (main, second) if set(question[3:]) & set(thing)]
    assert len(named) == 1, f"{row['question']} is about two objects: {row['scene']}"
    return named[0][asked[question[1]]]


def test_pictures_and_labels_are_those_of_the_shapes() -> None:
    shapes, scenes = Shapes("test", 20, seed=3), Scenes("test", 20, seed=3)
    for i in range(20):
        assert scenes[i]["image"].tobytes() == shapes[i]["image"].tobytes()
        assert (scenes[i]["label"], scenes[i]["scene"]) == (shapes[i]["label"], shapes[i]["scene"])
    assert dict(scenes[4]) | {"image": 0} == dict(Scenes("test", 5, seed=3)[-1]) | {"image": 0}


def test_answers_are_right(rows: list[Row]) -> None:
    for row in rows:
        assert row["answers"] == [expected(row)], (row["question"], row["scene"])
    assert {row["answers"][0] for row in rows} == set(SCENE_ANSWERS)
    kinds = Counter(" ".join(row["question"].split()[:2]) for row in rows)
    assert set(kinds) == {"what colour", "what shape", "what size", "where is", "how many", "is the", "is there"}
    assert {row["answers"][0] for row in rows if row["question"].startswith("how many")} == set(COUNTS)


def test_captions_name_both_objects(rows: list[Row]) -> None:
    shapes = Shapes("train", ROWS)
    for i, row in enumerate(rows[:200]):
        main, _, second = things(row)
        assert len(set(row["text"])) == 4
        for text in row["text"]:
            said = [word for word in text.split() if word in (*main[1:], *second[1:])]
            assert said == [*main[1:], *second[1:]]
        assert shapes.scene(i) == row["scene"]
        assert CLASSES[row["label"]] == " ".join(main[1:])


def test_questions_alone_give_little_away(rows: list[Row]) -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for words in map(Scenes("train", 6000).words, range(6000)):
        counts[words["question"]][words["answers"][0]] += 1
    test = [Scenes("validation", 1000).words(i) for i in range(1000)]
    hits = [counts[row["question"]].most_common(1)[0][0] == row["answers"][0] for row in test if row["question"] in counts]
    assert len(hits) > 950
    assert 0.25 < sum(hits) / len(hits) < 0.42


def test_another_turn_asks_something_else_about_the_same_scene() -> None:
    data = Scenes("train", 50)
    assert [data.words(i, turn=0) for i in range(50)] == [data.words(i) for i in range(50)]
    turned = [data.words(i, turn=1) for i in range(50)]
    assert [row["scene"] for row in turned] == [data.words(i)["scene"] for i in range(50)]
    assert sum(row["question"] != data.words(i)["question"] for i, row in enumerate(turned)) > 30


def test_a_recipe_reads_them() -> None:
    found = load_source(Source(path="bundled:scenes", samples=8), "eval", 0)
    assert found.synthetic
    assert found.columns == {k: k for k in ("image", "text", "label", "question", "answers")}
    row = found[3]
    assert row["image"].size == (48, 48)
    assert (len(row["text"]), len(row["answers"])) == (4, 1)
    assert found.without_media(3)["question"] == row["question"]
