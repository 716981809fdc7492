"""What a teacher said is found again by what it was given, whoever asks; and nothing else is found."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mmcompress.context import Context
from mmcompress.data.examples import as_examples
from mmcompress.model import CompressedModel, load
from mmcompress.passes.distill import Distill
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from mmcompress.training import stored
from mmcompress.training import teacher as teachers
from mmcompress.training.feed import Feed
from mmcompress.training.stored import Store, cache_folder, row_key, usage
from mmcompress.training.teacher import Teacher, identity
from tests import tiny

TASK = ZeroShotImageClassification(type="zero-shot-image-classification", templates=["a photo of a {}.", "a {} square"])
CPU = torch.device("cpu")
ROOM = 10**9
AUGMENT = {"variants": 3, "crop": 0.5, "brightness": 0.3}


pytestmark = pytest.mark.usefixtures("one_thread")


def distilled(
    model: CompressedModel, teacher: CompressedModel, data: datasets.Dataset | None = None, seed: int = 0, **changes: Any
) -> tuple[CompressedModel, dict[str, Any]]:
    train = as_examples(data if data is not None else tiny.dataset(32))
    where = Context(task=TASK, train=train, baseline=teacher.clone, device="cpu", seed=seed)
    settings = {"batch_size": 16, "learning_rate": 1e-3, "precision": "fp32", "epochs": 2, **changes}
    return Distill(**settings).apply(model, context=where), where.facts


def same(a: CompressedModel, b: CompressedModel) -> bool:
    theirs = b.module.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in a.module.state_dict().items())


def filled(name: str = "x", count: int = 5, limit: int = ROOM, start: int = 0, width: int = 4) -> Store:
    store = Store(name, width, limit)
    store.put([row_key(b"%d" % i) for i in range(start, start + count)], np.arange(count * width).reshape(count, width))
    store.flush()
    return store


def test_rows_are_there_for_who_opens_the_store_next() -> None:
    filled()
    again = Store("x", 4, ROOM)
    known, rows = again.get([row_key(b"3"), row_key(b"9"), row_key(b"0")])
    assert known.tolist() == [True, False, True]
    assert rows.tolist() == [[12, 13, 14, 15], [0, 1, 2, 3]]
    assert rows.dtype == np.float32
    assert all(isinstance(part, np.memmap) for part in again._maps)


def test_parts_of_a_key_do_not_run_together() -> None:
    assert row_key(b"ab", b"c") != row_key(b"a", b"bc")


def test_a_teacher_is_asked_once_over_epochs_passes_and_runs(model: CompressedModel, tmp_path: Path) -> None:
    teacher = tiny.clip(seed=5)
    cold, facts = distilled(model, teacher)
    assert (facts["teacher_examples"], facts["teacher_texts"]) == (32, 12)
    assert (facts["teacher_cache_hits"], facts["teacher_disk_hits"]) == (32, 0)
    assert facts["teacher_seconds_saved"] > 0
    # The same teacher from a folder, and the same pictures in another file, order and format.
    folder = tiny.clip_folder(tmp_path / "elsewhere", seed=5)
    warm, facts = distilled(model, load(folder))
    assert (facts["teacher_examples"], facts["teacher_texts"]) == (0, 0)
    assert (facts["teacher_cache_hits"], facts["teacher_disk_hits"]) == (64, 32)
    assert facts["teacher_seconds_saved"] > 0, "the rate is that of who asked"
    assert same(cold, warm)
    bmp = [{**row, "image": _as_bmp(row["image"])} for row in tiny.dataset(32).select(range(31, -1, -1))]
    other = datasets.Dataset.from_list(bmp, features=tiny.dataset(1).features)
    _, facts = distilled(model, teacher, other, seed=7)
    assert (facts["teacher_examples"], facts["teacher_disk_hits"]) == (0, 32)


def _as_bmp(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format="BMP")
    return {"bytes": buffer.getvalue(), "path": None}


def test_another_teacher_precision_or_preprocessing_is_never_answered(model: CompressedModel) -> None:
    teacher = tiny.clip(seed=5)
    distilled(model, teacher)
    other = teacher.clone()
    with torch.no_grad():
        next(other.module.vision_model.parameters()).view(-1)[0] += 1e-6
    _, facts = distilled(model, other)
    assert facts["teacher_examples"] == 32
    _, facts = distilled(model, teacher, precision="bf16")
    assert facts["teacher_examples"] == 32
    darker = model.clone()
    darker.processor = tiny.processor()
    darker.processor.image_processor.image_mean = [0.4, 0.4, 0.4]
    changed = teacher.clone()
    changed.processor = darker.processor
    _, facts = distilled(darker, changed)
    assert facts["teacher_examples"] == 32
    assert identity(teacher, "a") != identity(teacher, "b")


def test_without_room_on_disk_nothing_is_stored_and_nothing_else_changes(model: CompressedModel) -> None:
    teacher = tiny.clip(seed=5)
    plain, _ = distilled(model, teacher, teacher_cache_gb=0)
    assert not cache_folder().exists()
    stored_, _ = distilled(model, teacher)
    assert usage()[1] > 0
    assert same(plain, stored_)


def test_half_precision_would_change_the_student(model: CompressedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why rows are float32: rounded to float16, what is found again makes another student."""
    teacher = tiny.clip(seed=5)
    cold, _ = distilled(model, teacher)
    plain = Store.get

    def rounded(self: Store, keys: Any) -> Any:
        known, rows = plain(self, keys)
        return known, rows.astype(np.float16).astype(np.float32)

    monkeypatch.setattr(Store, "get", rounded)
    warm, _ = distilled(model, teacher)
    assert not same(cold, warm)


def test_what_damage_took_is_asked_for_again(model: CompressedModel) -> None:
    teacher = tiny.clip(seed=5)
    cold, _ = distilled(model, teacher)
    for path in cache_folder().glob("*vision/*.npy"):
        path.write_bytes(path.read_bytes()[:-10])
    warm, facts = distilled(model, teacher)
    assert (facts["teacher_examples"], facts["teacher_texts"]) == (32, 0)
    assert same(cold, warm)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_a_damaged_file_is_removed_with_a_word(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    filled(start=50)
    (good,) = (cache_folder() / "x").glob("*.npy")
    filled()
    (path,) = (p for p in (cache_folder() / "x").glob("*.npy") if p != good)
    found = bytearray(path.read_bytes())
    found[-5] ^= 1
    path.write_bytes({"truncated": path.read_bytes()[:-10], "flipped": found, "foreign": b"x" * 300, "empty": b""}[damage])
    again = Store("x", 4, ROOM)
    assert (len(again), path.exists()) == (5, False)
    assert again.get([row_key(b"51"), row_key(b"1")])[0].tolist() == [True, False]
    assert "damaged file of the teacher's cache" in caplog.text
    filled()
    assert len(Store("x", 4, ROOM)) == 10


def test_a_store_of_another_width_is_not_read() -> None:
    filled(width=4)
    assert len(Store("x", 5, ROOM)) == 0


def test_the_limit_holds_and_what_was_used_last_stays(caplog: pytest.LogCaptureFixture) -> None:
    one = 0
    for place, name in enumerate(("a", "b", "c")):
        filled(name, 1000)
        one = one or usage()[1]
        os.utime(cache_folder() / name, (1000 + place, 1000 + place))
    Store("a", 4, ROOM)  # now the last that was used
    filled("d", 1000, limit=round(3.7 * one))
    assert sorted(p.name for p in cache_folder().iterdir()) == ["a", "c", "d"]
    assert usage()[1] <= 3.7 * one
    big = filled("e", 2000, limit=one)
    assert not (cache_folder() / "e").exists()
    assert len(big) == 2000, "it is known in this process in any case"
    assert "the limit of the cache" in caplog.text


def test_a_folder_that_cannot_be_written_stops_nothing(
    model: CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMCOMPRESS_CACHE", str(tmp_path / "file"))
    _, facts = distilled(model, tiny.clip(seed=5))
    assert facts["teacher_examples"] == 32
    assert "cannot be stored" in caplog.text


WRITER = """
    import sys
    import numpy as np
    from mmcompress.training.stored import Store, row_key
    store = Store("x", 64, 10**9)
    start, count = int(sys.argv[1]), int(sys.argv[2])
    for i in range(start, start + count):
        keys = [row_key(b"%d %d" % (i, k)) for k in range(50)]
        store.put(keys, np.full((50, 64), i) + np.arange(50)[:, None] / 64)
        store.flush()
        print(i, flush=True)
"""


def writer(start: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(start), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def right(store: Store, i: int) -> bool:
    known, rows = store.get([row_key(b"%d %d" % (i, k)) for k in range(50)])
    truth = np.full((50, 64), i) + np.arange(50)[:, None] / 64
    return bool(known.all()) and np.array_equal(rows, truth)


def test_two_processes_write_at_once_and_one_is_killed() -> None:
    killed, other = writer(0, 100_000), writer(200_000, 40)
    assert killed.stdout is not None
    said = [int(killed.stdout.readline()) for _ in range(20)]
    killed.send_signal(signal.SIGKILL)
    said += [int(line) for line in killed.stdout.read().split("\n")[:-1] if line]
    killed.wait()
    assert other.wait() == 0
    store = Store("x", 64, ROOM)
    assert all(right(store, i) for i in said), "what was said to be written is there"
    assert all(right(store, i) for i in range(200_000, 200_040))
    assert len(store) % 50 == 0, "segments are whole or not there"


def test_what_a_killed_process_left_is_removed_after_a_while() -> None:
    filled()
    left = cache_folder() / "x" / "abc.partial"
    left.write_bytes(b"half")
    Store("x", 4, ROOM)
    assert left.exists(), "another process may be writing it"
    long_ago = time.time() - stored.ABANDONED_SECONDS - 10
    os.utime(left, (long_ago, long_ago))
    Store("x", 4, ROOM)
    assert not left.exists()


def test_deleting_the_folder_during_a_training_stops_nothing() -> None:
    store = filled()
    shutil.rmtree(cache_folder())
    store.put([row_key(b"new")], np.ones((1, 4)))
    store.flush()
    assert store.get([row_key(b"1")])[0].all(), "mapped files stay readable"
    assert Store("x", 4, ROOM).get([row_key(b"new")])[0].all()


def test_variants_are_asked_for_once_each(model: CompressedModel) -> None:
    teacher = tiny.clip(seed=5)
    cold, facts = distilled(model, teacher, epochs=8, augment=AUGMENT)
    assert 48 < facts["teacher_examples"] <= 96
    warm, again = distilled(model, teacher, epochs=8, augment=AUGMENT)
    assert again["teacher_examples"] == 0
    # Two variants may be the same picture: white stays white when it is made brighter.
    assert again["teacher_disk_hits"] == facts["teacher_examples"] + facts["teacher_disk_hits"]
    assert same(cold, warm)


@pytest.mark.parametrize("room", [0, ROOM])
def test_teacher_and_student_are_given_the_same_variant(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "CACHE_BYTES", room)
    teacher = tiny.clip(seed=5)
    settings = Distill(augment=AUGMENT)
    for _ in range(2):  # the second finds all on disk
        asked = Teacher(teacher.clone(), 24, 3, ROOM)
        asked.start(CPU, "fp32")
        feed = Feed(as_examples(tiny.dataset(24)), teacher.processor, TASK, 10, seed=0, augment=settings.augment)
        for batch in feed.batches(10):
            with torch.no_grad():
                truth = teacher.family.forward(teacher.module, batch)
            torch.testing.assert_close(asked(batch).embeds["vision"], truth.embeds["vision"], atol=1e-5, rtol=1e-5)
        asked.stop()
    assert asked.examples_asked == 0
