"""Every kind of source that a recipe can name, and what is wrong with the broken ones."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmcompress.data.examples import as_examples, decode_image
from mmcompress.data.sources import load_data, load_source
from mmcompress.errors import DataError
from mmcompress.recipe import Data, Source
from tests import tiny


def source(**given: object) -> Source:
    return Source.model_validate(given)


def test_parquet(tmp_path: Path) -> None:
    found = load_source(source(path=str(tiny.parquet(tmp_path / "a.parquet", 12))), "eval", 0)
    assert len(found) == 12
    assert found.classes == list(tiny.COLOURS)
    assert found[3]["image"].size == (20, 20)
    assert found[3]["text"].startswith("a ")
    assert found.labels() == tiny.rows(12)["label"]


def test_several_files_and_samples_are_seeded(tmp_path: Path) -> None:
    paths = [str(tiny.parquet(tmp_path / f"{i}.parquet", 12, i)) for i in range(2)]
    assert len(load_source(source(path=paths), "train", 0)) == 24
    a, b, c = (load_source(source(path=paths, samples=10), "train", seed).labels() for seed in (0, 0, 1))
    assert len(a) == 10
    assert a == b
    assert a != c


def test_jsonl_with_paths_beside_it(tmp_path: Path) -> None:
    lines = []
    for i, colour in enumerate(("red", "blue")):
        (tmp_path / f"{i}.png").write_bytes(tiny.png(tiny.COLOURS[colour], i))
        lines.append(json.dumps({"file": f"{i}.png", "caption": f"a {colour} square", "label": colour}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = load_source(source(path=str(tmp_path / "a.jsonl"), columns={"image": "file"}), "eval", 0)
    assert found.classes == ["blue", "red"]
    assert found.labels() == [1, 0]
    assert found[1]["image"].getpixel((5, 5))[2] > 150


def test_a_folder_of_images_by_class(tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        (tmp_path / "pictures" / colour).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "pictures" / colour / f"{i}.png").write_bytes(tiny.png(tiny.COLOURS[colour], i))
    found = load_source(source(path=str(tmp_path / "pictures")), "eval", 0)
    assert (len(found), found.classes) == (6, ["blue", "red"])
    for i in range(6):
        r, _, b = found[i]["image"].getpixel((5, 5))
        assert (b > r) == (found.labels()[i] == 0)


def test_webdataset(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for i, colour in enumerate(("red", "green", "blue")):
            parts = {"png": tiny.png(tiny.COLOURS[colour], i), "txt": f"a {colour} square".encode(), "cls": str(i).encode()}
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    found = load_source(source(path=str(tmp_path / "shard-0.tar"), classes=["red", "green", "blue"]), "eval", 0)
    assert [found[i]["text"] for i in range(3)] == ["a red square", "a green square", "a blue square"]
    assert found.labels() == [0, 1, 2]
    assert found[2]["image"].size == (20, 20)


def test_bundled() -> None:
    found = load_source(source(path="bundled:shapes", samples=5), "eval", 0)
    assert found.synthetic
    assert found[0]["image"].mode == "RGB"
    assert found.classes is not None
    assert 0 <= found[0]["label"] < len(found.classes)


def test_from_another_split(tmp_path: Path) -> None:
    path = str(tiny.parquet(tmp_path / "a.parquet", 12))
    found = load_data(
        Data.model_validate({"train": {"path": path}, "eval": {"path": path}, "calibration": {"from": "train", "samples": 4}}), 0
    )
    assert {k: len(v) for k, v in found.items()} == {"train": 12, "eval": 12, "calibration": 4}


def test_classes_that_are_inferred_are_shared(tmp_path: Path) -> None:
    for name, labels in (("train", ["red", "blue"]), ("test", ["red", "green"])):
        rows = [{"image": {"bytes": tiny.png(tiny.COLOURS[v], 0), "path": None}, "label": v} for v in labels]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    data = {"train": {"path": str(tmp_path / "train.parquet")}, "eval": {"path": str(tmp_path / "test.parquet")}}
    found = load_data(Data.model_validate(data), 0)
    assert found["train"].classes == found["eval"].classes == ["blue", "green", "red"]


def test_declared_classes_must_agree(tmp_path: Path) -> None:
    tiny.parquet(tmp_path / "a.parquet", 6)
    rows = {"path": str(tmp_path / "a.parquet")}
    with pytest.raises(DataError, match="different classes"):
        load_data(Data.model_validate({"train": rows, "eval": {**rows, "classes": ["a", "b", "c", "d", "e", "f"]}}), 0)


def broken(tmp_path: Path, what: str) -> Source:
    path = tmp_path / "a.parquet"
    rows = tiny.rows(6)
    if what == "cut short":
        tiny.parquet(path, 6)
        path.write_bytes(path.read_bytes()[:200])
    elif what == "empty":
        tiny.dataset(6).select([]).to_parquet(str(path))
    elif what == "not there":
        pass
    elif what == "column":
        tiny.parquet(path, 6)
        return source(path=str(path), columns={"label": "lable"})
    elif what == "kind":
        path = tmp_path / "a.xlsx"
        path.write_text("x")
    elif what == "folder without pictures":
        path = tmp_path / "nothing"
        path.mkdir()
    elif what == "bundled":
        return source(path="bundled:shape")
    elif what == "no jsonl":
        path = tmp_path / "a.jsonl"
        path.write_text("{not json}\n{")
    del rows
    return source(path=str(path))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("cut short", "damaged|cannot be read"),
        ("empty", "is empty"),
        ("not there", "does not exist"),
        ("column", "columns.label: unknown column 'lable'; allowed: image, label, caption; did you mean 'label'"),
        ("kind", "unknown kind of file '.xlsx'"),
        ("folder without pictures", "holds neither"),
        ("bundled", "did you mean 'shapes'"),
        ("no jsonl", "damaged|cannot be read"),
    ],
)
def test_broken_sources_are_named(tmp_path: Path, what: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as found:
        load_source(broken(tmp_path, what), "eval", 0)
    assert "data.eval" in str(found.value)


@pytest.mark.parametrize(
    ("value", "said"), [(6, "outside the classes 0 to 5"), (-1, "outside"), ("rde", "did you mean 'red'"), (None, "neither")]
)
def test_a_label_outside_the_classes_is_named(value: object, said: str) -> None:
    data = as_examples([{"image": tiny.png((1, 2, 3), 0), "label": value}])
    data.classes = list(tiny.COLOURS)
    with pytest.raises(DataError, match=f"row 0, column 'label': .*{said}"):
        data.labels()


def test_transparent_pixels_are_laid_on_white() -> None:
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    assert decode_image(buffer.getvalue(), "here").getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("value", [b"", b"junk", 7, None, "no/such/file.png", {"bytes": None, "path": "nope.png"}])
def test_what_does_not_decode_is_an_error(value: object) -> None:
    with pytest.raises(DataError, match="here: "):
        decode_image(value, "here")
