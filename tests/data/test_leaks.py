"""Duplicates between splits: other bytes of the same pixels or samples, questions, texts; and what is none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from PIL import Image

from mmcompress.data import leaks as module
from mmcompress.data.examples import Examples
from mmcompress.data.leaks import find_leaks, normalised, refuse
from mmcompress.data.shapes import Shapes
from mmcompress.data.sources import load_source
from mmcompress.errors import DataError
from mmcompress.plan_text import render_plan
from mmcompress.progress import Reporter
from mmcompress.recipe import Source, make_recipe
from mmcompress.report.schema_data import Overlap
from tests import tiny


def picture(seed: int, kind: str = "PNG", size: int = 8, **how: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **how)
    return buffer.getvalue()


def recording(seed: int, kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    samples = np.random.default_rng(seed).integers(-3000, 3000, 400).astype(np.int16)
    soundfile.write(buffer, samples, 8000, format=kind, subtype="PCM_16")
    return buffer.getvalue()


def split(name: str, **columns: list[Any]) -> Examples:
    return Examples(datasets.Dataset.from_dict(columns), f"data.{name}", {column: column for column in columns})


def pair(train: Examples, test: Examples, **how: Any) -> Overlap:
    return find_leaks({"train": train, "eval": test}, **how).pairs[0]


def test_other_bytes_of_the_same_pixels_are_found() -> None:
    train = split("train", image=[picture(i) for i in range(6)])
    test = split("eval", image=[picture(9), picture(2), picture(3, "BMP"), picture(4, "PNG", compress_level=0), picture(8)])
    found = pair(train, test)
    assert (found.examples, found.n, found.reencoded) == (3, 5, 2)
    assert (found.first_rows, found.second_rows) == ([2, 3, 4], [1, 2, 3])
    # One pixel by one step is another picture, and so is a lossy copy.
    other = np.asarray(Image.open(io.BytesIO(picture(3)))).copy()
    other[0, 0, 0] ^= 1
    buffer = io.BytesIO()
    Image.fromarray(other).save(buffer, format="PNG")
    assert pair(train, split("eval", image=[buffer.getvalue(), picture(2, "JPEG")])).examples == 0
    assert pair(train, test, decode=False).examples == 1


def test_only_what_could_be_a_copy_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = module.decode_image
    monkeypatch.setattr(module, "decode_image", lambda value, *rest: asked.append(value) or real(value, *rest))
    train = split("train", image=[picture(i, size=8 + i) for i in range(6)])
    assert find_leaks({"train": train, "eval": split("eval", image=[picture(7, size=20), picture(1, size=9)])}).decoded == 0
    assert asked == []  # row 1 is the same bytes; no other picture has a size of the other split
    found = find_leaks({"train": train, "eval": split("eval", image=[picture(7, size=10), picture(1, size=9)])})
    assert (found.decoded, len(asked)) == (2, 2)


def test_recordings_are_compared_by_samples() -> None:
    train = split("train", audio=[recording(i) for i in range(4)])
    found = pair(train, split("eval", audio=[recording(7), recording(2, "FLAC"), recording(3)]))
    assert (found.examples, found.reencoded, found.second_rows, found.first_rows) == (2, 1, [1, 2], [2, 3])


def test_a_question_goes_with_its_picture() -> None:
    train = split("train", image=[picture(0), picture(1)], question=["What colour is it?", "How many?"])
    test = split(
        "eval",
        image=[picture(0, "BMP"), picture(0), picture(5)],
        question=["  what COLOUR is it", "Is it red?", "What colour is it?"],
    )
    found = pair(train, test)
    # Row 0 is the same question to the same picture; row 1 another one to it; row 2 the same question to another picture.
    assert (found.examples, found.same_media, found.second_rows) == (1, 1, [0])
    assert found.is_leak
    # Captions are no questions: the picture alone decides.
    captioned = pair(split("train", image=[picture(0)], text=["a cat"]), split("eval", image=[picture(0)], text=["a dog"]))
    assert (captioned.examples, captioned.same_media) == (1, 0)


def test_texts_alone_are_examples_where_there_is_nothing_else() -> None:
    found = pair(split("train", text=["A cat.", "two dogs"]), split("eval", text=["a  CAT", "no dogs", "Two dogs!"]))
    assert (found.examples, found.second_rows, found.first_rows) == (2, [0, 2], [0, 1])


def test_normalised_by_hand() -> None:
    assert normalised("  What's the\t\uff23\uff2f\uff2c\uff2f\uff35\uff32? ") == "what s the colour"
    assert normalised("STRASSE") == normalised("straße")
    assert normalised("?!") == "?!"
    assert normalised(["A.", "b"]) == "a\nb"
    assert normalised("3+4") != normalised("34")


def test_every_two_splits_are_compared_and_what_is_drawn_is_said() -> None:
    train, test = split("train", image=[picture(0), picture(1)]), split("eval", image=[picture(2), picture(2), picture(1, "BMP")])
    calibration = split("calibration", image=[picture(2, "BMP"), picture(1)])
    found = find_leaks({"train": train, "eval": test, "calibration": calibration}, drawn={"calibration": "train"})
    counts = {(p.first, p.second): (p.examples, p.is_leak, p.drawn) for p in found.pairs}
    assert counts == {
        ("train", "eval"): (1, True, False),
        ("calibration", "eval"): (3, True, False),
        ("train", "calibration"): (1, False, True),
    }
    assert found.repeated == 1
    with pytest.raises(DataError, match=r"1 of 3 pictures of T .* S .*; 3 of 3 pictures of T \w+ also in C \(3 of them") as error:
        refuse(found, {"train": "S", "eval": "T", "calibration": "C"})
    assert "rows 2 are rows 1 there" in str(error.value)
    refuse(find_leaks({"train": calibration.take([0]), "eval": train}), {})


def test_rows_are_numbered_as_in_the_file(tmp_path: Path) -> None:
    path = str(tiny.parquet(tmp_path / "a.parquet", 40, 0))
    some = load_source(Source.model_validate({"path": path, "samples": 5}), "eval", 3)
    found = pair(load_source(Source.model_validate({"path": path}), "train", 0), some)
    assert found.examples == 5
    assert found.second_rows == found.first_rows == sorted(found.first_rows)
    assert found.first_rows[-1] > 4
    assert some[1:3].place(1) == found.first_rows[2]


def test_what_does_not_decode_is_compared_by_its_bytes() -> None:
    torn = picture(1)[:-30]
    train = split("train", image=[torn, picture(2), b"junk"])
    assert pair(train, split("eval", image=[b"junk", torn, picture(3)])).examples == 2


def test_made_data_is_not_looked_through() -> None:
    made = {name: Examples(Shapes(name, 3), name, {"image": "image"}) for name in ("train", "test")}
    found = find_leaks({"train": made["train"], "eval": made["test"]})
    assert (found.looked, found.pairs) == (False, [])
    assert find_leaks({"eval": made["test"]}).looked  # one split has nothing to share


def test_a_long_search_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "MANY", 3)
    reporter = Reporter()
    monkeypatch.setattr(reporter, "say", said.append)
    splits = {
        which: split(which, image=[picture(10 * seed + i) for i in range(3)]) for seed, which in enumerate(("train", "eval"))
    }
    assert find_leaks(splits, reporter=reporter).decoded == 6
    assert said == ["looking for duplicates: 6 pictures have the size of another split's; decoding them once"]


def test_check_says_what_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, passes=[])
    (tmp_path / "test.parquet").write_bytes((tmp_path / "train.parquet").read_bytes())
    with pytest.raises(DataError, match="48 of 48 pictures"):
        render_plan(make_recipe(recipe))
    recipe["data"]["allow_leaks"] = True
    assert "data.eval: 48 examples" in render_plan(make_recipe(recipe))
