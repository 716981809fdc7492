"""Which examples stand together: by column, by speaker, by picture; and the metrics of texts that belong to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np

from mmcompress.data.examples import Examples
from mmcompress.data.groups import FEWEST_GROUPS, group_numbers
from mmcompress.measure.clusters import clustered, clusters_note
from mmcompress.measure.quality import changes, load_scores, qualities, save_scores
from mmcompress.tasks.base import Scores

ROLES = {"image": "a picture", "question": "a question"}


def questions(columns: dict[str, str], **more: list[Any]) -> Examples:
    """60 questions to 20 pictures, three to each."""
    rows = {"image": [b"%d" % (i // 3) for i in range(60)], "question": ["what?"] * 60, **more}
    return Examples(datasets.Dataset.from_dict(rows), "made", {"image": "image", "question": "question", **columns})


def scores(**more: Any) -> Scores:
    hard = np.repeat(np.random.default_rng(0).random(20) < 0.4, 3)
    return Scores({"exact_match": (~hard).astype(float)}, kept=np.arange(60), **more)


def test_questions_about_one_picture_stand_together() -> None:
    alone, found = scores(), clustered(scores(), questions({}))
    assert found.clusters is not None
    assert len(set(found.clusters.tolist())) == 20
    assert found.clusters[3] == found.clusters[5] != found.clusters[6]
    wide, narrow = qualities(found)["exact_match"], qualities(alone)["exact_match"]
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    assert "over 20 groups by image, not over 60 single examples" in clusters_note(found, questions({}))
    assert clusters_note(alone, questions({})) == ""


def test_a_column_says_more_than_the_pictures() -> None:
    patients = [f"p{i // 5}" for i in range(60)]
    examples = questions({"cluster": "patient"}, patient=patients)
    assert examples.columns["cluster"] == "patient"
    examples.narrow(ROLES, "visual-question-answering")
    found = clustered(scores(), examples)
    assert found.clusters is not None
    assert len(set(found.clusters.tolist())) == 12
    # A task's own clusters give way to the column, and stay without it.
    own = scores(clusters=np.arange(60) // 2)
    assert len(set(clustered(own, examples).clusters.tolist())) == 12  # type: ignore[union-attr]
    assert clustered(own, questions({})) is own


def test_too_few_groups_or_an_unnamed_one_are_not_resampled() -> None:
    assert group_numbers(["a", None] * 30) is None
    assert group_numbers([i % (FEWEST_GROUPS - 1) for i in range(60)]) is None
    assert group_numbers([i % FEWEST_GROUPS for i in range(60)]) is not None
    # A column without use leaves it to the pictures.
    found = clustered(scores(), questions({"speaker": "who"}, who=["ann"] * 60))
    assert found.clusters is not None
    assert len(set(found.clusters.tolist())) == 20


def test_only_the_examples_that_were_scored_count() -> None:
    some = Scores({"exact_match": np.ones(20)}, kept=np.arange(0, 60, 3))
    assert clustered(some, questions({})) is some  # one question of each picture is left
    assert clustered(Scores({"exact_match": np.ones(60)}), questions({})).clusters is None


def test_texts_stand_with_their_picture(tmp_path: Path) -> None:
    """Retrieval by text has as many examples as there are texts, not pictures."""
    hard = np.random.default_rng(0).random(20) < 0.4
    texts = np.repeat(~hard, 5).astype(float)
    found = Scores(
        {"image_to_text_r1": (~hard).astype(float), "text_to_image_r1": texts},
        owners={"text_to_image_r1": np.repeat(np.arange(20), 5)},
    )
    naive = qualities(Scores({"text_to_image_r1": texts}))["text_to_image_r1"]
    ours = qualities(found)["text_to_image_r1"]
    assert ours.n == 100
    assert ours.high - ours.low > 1.7 * (naive.high - naive.low)
    save_scores(found, tmp_path / "scores.safetensors")
    worse = Scores({**found.per_example, "text_to_image_r1": texts * 0}, owners=found.owners)
    assert changes(worse, load_scores(tmp_path / "scores.safetensors")) == changes(worse, found)
    assert changes(load_scores(tmp_path / "scores.safetensors"), worse) == changes(found, worse)
    # Where pictures stand together themselves, so do their texts.
    pairs = Scores(found.per_example, clusters=np.arange(20) // 2, owners=found.owners)
    assert len(set(pairs.clusters_of("text_to_image_r1").tolist())) == 10  # type: ignore[union-attr]
