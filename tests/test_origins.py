"""Licences and sources: the recipe before the card, the card before the data set, and unknown where nobody says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import DatasetInfo
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.repocard_data import model_index_to_eval_results

import mmcompress as mm
from mmcompress import origins as module
from mmcompress.data.examples import Examples
from mmcompress.origins import origins
from mmcompress.recipe import make_recipe
from mmcompress.report.card import metadata, render_card
from mmcompress.report.licences import HUB_LICENCES, card_datasets, card_licence, hub_id_of, licence_words
from mmcompress.report.markdown import render_markdown
from mmcompress.report.schema_data import Leaks, Origin, Overlap
from mmcompress.report.sections import all_sections
from mmcompress.report.sections import data as section
from tests import tiny
from tests.report import examples


def readme(folder: Path, **header: Any) -> None:
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(header)}---\n# Something\n")


def by_role(recipe: dict[str, Any], data: dict[str, Examples] | None = None) -> dict[str, Origin]:
    return {origin.role: origin for origin in origins(make_recipe(recipe), data or {})}


def test_cards_beside_model_and_data_are_read_and_the_recipe_has_the_last_word(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, passes=[])
    assert {(o.license, o.license_from) for o in by_role(recipe).values()} == {("unknown", "unknown")}
    readme(Path(recipe["model"]), license="mit", base_model="someone/else")
    readme(tmp_path, license=["cc-by-4.0", "odbl"])
    found = by_role(recipe)
    assert (found["model"].license, found["model"].license_from) == ("mit", "card")
    assert found["model"].source == "made from https://huggingface.co/someone/else"
    assert (found["eval"].license, found["eval"].license_from) == ("cc-by-4.0, odbl", "card")
    recipe["data"]["eval"] |= {"license": "cc0-1.0", "origin": "https://huggingface.co/datasets/us/pictures"}
    recipe |= {"model_license": "Our Own 2", "model_origin": "https://huggingface.co/us/model"}
    found = by_role(recipe)
    assert (found["eval"].license, found["eval"].hub_id, found["train"].license) == ("cc0-1.0", "us/pictures", "cc-by-4.0, odbl")
    assert (found["model"].license, found["model"].license_from, found["model"].hub_id) == ("Our Own 2", "recipe", "us/model")


def test_what_a_data_set_says_of_itself(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, passes=[])
    rows = tiny.dataset(4)
    rows._info = DatasetInfo(license="CC BY 4.0\n\nYou are free to ...", homepage="https://example.org", features=rows.features)
    found = by_role(recipe, {"eval": Examples(rows, "eval", {"image": "image"})})["eval"]
    assert (found.license, found.license_from, found.examples) == ("CC BY 4.0", "data set", 4)
    assert found.source == "https://example.org"


def test_damaged_cards_are_no_cards(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, passes=[])
    for text in (b"---\nlicense: [mit\n---\n", b"---\n- a\n---\n", b"\xff\xfe\x00", b"no header"):
        (Path(recipe["model"]) / "README.md").write_bytes(text)
        assert by_role(recipe)["model"].license == "unknown"


def test_cards_of_the_hub_are_asked_for_and_may_be_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(tmp_path, passes=[{"pass": "distill", "student": "us/small", "teacher": "us/large", "epochs": 1}])
    recipe["model"] = "openai/clip-vit-base-patch32"
    recipe["data"]["train"] = {"path": "uoft-cs/cifar10"}
    recipe["data"]["calibration"] = {"from": "train", "samples": 4}
    asked = []

    def stored(name: str, file: str, *, repo_type: str, etag_timeout: float) -> str:
        asked.append((name, repo_type))
        if name == "uoft-cs/cifar10":
            raise LocalEntryNotFoundError("offline")
        readme(tmp_path / "cards", license="other", license_name="own-terms", license_link="https://example.org/terms")
        return str(tmp_path / "cards" / file)

    (tmp_path / "cards").mkdir()
    monkeypatch.setattr(module, "hf_hub_download", stored)
    found = by_role(recipe)
    assert ("openai/clip-vit-base-patch32", "model") in asked
    assert ("uoft-cs/cifar10", "dataset") in asked
    assert (found["model"].license, found["model"].license_link) == ("own-terms", "https://example.org/terms")
    assert found["model"].source == "https://huggingface.co/openai/clip-vit-base-patch32"
    assert (found["train"].license, found["train"].hub_id) == ("unknown", "uoft-cs/cifar10")
    assert found["calibration"].hub_id == "uoft-cs/cifar10"
    assert (found["student"].name, found["teacher"].name) == ("us/small", "us/large")


def test_the_header_says_what_the_hub_knows() -> None:
    model = Origin(role="model", name="m", license="MIT", license_from="card")
    assert card_licence([model]) == {"license": "mit"}
    own = model.model_copy(update={"license": "Our Own, version 2", "license_link": "https://example.org"})
    assert card_licence([own]) == {"license": "other", "license_name": "our-own-version-2", "license_link": "https://example.org"}
    # The weights that stay are the student's.
    student = Origin(role="student", name="s", license="apache-2.0", license_from="card")
    assert card_licence([own, student]) == {"license": "apache-2.0"}
    assert card_licence([]) == {"license": "unknown"}
    assert "unknown" in licence_words([])
    assert "mit (as its card says)" in licence_words([model]).lower()
    assert {"apache-2.0", "cc-by-nc-sa-4.0", "other"} <= HUB_LICENCES
    assert hub_id_of("https://huggingface.co/datasets/a/b", "dataset") == "a/b"
    assert hub_id_of("https://huggingface.co/datasets/a/b", "model") is None
    assert hub_id_of("https://huggingface.co/a/b/", "model") == "a/b"
    assert hub_id_of("https://example.org/a/b", "model") is None
    train = Origin(role="train", name="t", hub_id="a/b")
    assert card_datasets([train, train.model_copy(update={"role": "eval", "hub_id": "c/d"})]) == ["a/b"]


def known() -> list[Origin]:
    return [
        Origin(role="model", name="openai/clip-vit-base-patch32", hub_id="openai/clip-vit-base-patch32", license="mit",
               license_from="card", source="https://huggingface.co/openai/clip-vit-base-patch32"),
        Origin(role="train", name="a/b", hub_id="a/b", license="cc-by-4.0", license_from="recipe", examples=90_000),
        Origin(role="eval", name="data/test.parquet", examples=2_000),
    ]  # fmt: skip


def test_the_hub_reads_the_model_card(tmp_path: Path) -> None:
    """Parsed by huggingface_hub itself, which refuses results that lack what it needs."""
    report = examples.full().model_copy(update={"origins": known()})
    (tmp_path / "README.md").write_text(render_card(report))
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data
    assert (data.license, data.base_model, data.datasets, data.library_name) == (
        "mit", "openai/clip-vit-base-patch32", ["a/b"], "transformers",
    )  # fmt: skip
    assert (data.pipeline_tag, data.model_name) == ("zero-shot-image-classification", "clip-cpu-int8")
    assert data.eval_results is not None
    accuracy = data.eval_results[0]
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.dataset_name) == ("accuracy", 0.862, "data/test.parquet")
    assert accuracy.metric_args["low"] < 0.862 < accuracy.metric_args["high"]
    assert accuracy.dataset_type == "test"
    # What it writes is what it read.
    name, again = model_index_to_eval_results(data.to_dict()["model-index"])
    assert (name, again) == ("clip-cpu-int8", data.eval_results)
    assert "| data.eval | data/test.parquet | 2,000 | unknown |" in card.text
    assert "that of the base model, mit (as its card says)" in card.text
    # Where data lies on a machine is not for the header of a card.
    report.recipe["data"]["eval"]["path"] = "/home/ann/secret/Test Set.parquet"
    own = metadata(report)["model-index"][0]["results"][0]["dataset"]
    assert own == {"name": "Test Set.parquet", "type": "Test-Set"}


def test_the_report_has_a_table_of_licences_and_overlaps() -> None:
    pair = Overlap(first="train", second="eval", examples=30, n=200, reencoded=28, first_rows=[1, 2], second_rows=[7, 9])
    found = Leaks(looked=True, allowed=True, pairs=[pair], decoded=230, seconds=1.5, repeated=4)
    report = examples.full().model_copy(update={"origins": known(), "leaks": found})
    part = section.section(report, None)
    assert part is not None
    assert part in all_sections(report, None)
    for text in (part.html, part.markdown, part.text):
        for words in ("cc-by-4.0", "unknown", "30 of 200", "4 evaluation examples"):
            assert words in text
    assert all(len(line) <= 110 for line in part.text.splitlines() if not line.startswith("Pictures of"))
    assert "7, 9, ... are 1, 2, ... there" in part.markdown
    assert "<summary>Data and licences</summary>" in render_markdown(report)
    assert section.section(examples.full(), None) is None


def test_questions_to_known_pictures_are_an_alert() -> None:
    pair = Overlap(first="train", second="eval", examples=0, n=200, same_media=12)
    report = examples.full().model_copy(update={"leaks": Leaks(looked=True, pairs=[pair])})
    assert [a.tone for a in section.alerts(report)] == ["caution"]
    assert "12 of 200 evaluation questions are about pictures that data.train has" in section.alerts(report)[0].text


def test_a_run_carries_them(tmp_path: Path, timed_here: None) -> None:
    recipe = tiny.recipe(tmp_path, passes=[]) | {"model_license": "apache-2.0"}
    report = mm.run(recipe, tmp_path / "run").report
    assert {o.role: o.license for o in report.origins} == {"model": "apache-2.0", "train": "unknown", "eval": "unknown"}
    assert report.leaks is not None
    assert (report.leaks.looked, report.leaks.found) == (True, [])
    assert ModelCard.load(tmp_path / "run" / "README.md").data.license == "apache-2.0"
    assert "No evaluation example is in training or calibration data" in (tmp_path / "run" / "report.md").read_text()
