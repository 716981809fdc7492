"""What changed underneath, for every kind of task on tiny models: what each can say, what it leaves out, and the files beside."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from torch.nn import functional as F

from mmcompress.data.audio import Audio
from mmcompress.data.examples import Examples
from mmcompress.data.sources import load_source
from mmcompress.data.traits import traits, traits_of
from mmcompress.errors import DataError
from mmcompress.measure import gallery
from mmcompress.measure.behaviour import behaviour, know_scale
from mmcompress.measure.quality import load_scores, save_scores
from mmcompress.measure.slicing import check_columns, groups
from mmcompress.model import CompressedModel
from mmcompress.progress import SILENT
from mmcompress.recipe import Source, make_recipe
from mmcompress.report.schema_behaviour import Answer, Behaviour, GalleryEntry
from mmcompress.runtimes.torch_predict import TorchPredict
from mmcompress.tasks.base import Scores, Task
from tests import tiny, tiny_data
from tests.families import tiny_blip, tiny_clap, tiny_whisper

COUNT = 24
CASES = {
    "zero-shot-image-classification": (lambda seed: tiny.clip(seed), {"calibration", "alignment"}, {"vision", "text"}),
    "image-text-retrieval": (lambda seed: tiny.clip(seed), {"alignment"}, {"vision", "text"}),
    "zero-shot-audio-classification": (lambda seed: tiny_clap.clap(seed), {"calibration", "alignment"}, {"audio", "text"}),
    "image-text-matching": (
        lambda seed: tiny_blip.blip("BlipForImageTextRetrieval", seed), {"calibration"}, {"vision_model"},
    ),
    "visual-question-answering": (
        lambda seed: tiny_blip.blip("BlipForQuestionAnswering", seed), set(), {"vision_model"},
    ),
    "image-to-text": (lambda seed: tiny_blip.blip("BlipForConditionalGeneration", seed), set(), {"vision_model"}),
    "automatic-speech-recognition": (lambda seed: tiny_whisper.whisper(seed), set(), {"encoder_model"}),
}  # fmt: skip


def task_of(name: str) -> Task:
    settings = {"max_new_tokens": 4} if name in ("image-to-text", "automatic-speech-recognition") else {}
    return make_recipe({"name": "x", "model": "x", "task": {"type": name, **settings}, "data": {"eval": {"path": "x"}}}).task  # type: ignore[no-any-return]


def scored(name: str, model: CompressedModel, data: Examples) -> Scores:
    scores = task_of(name).evaluate(TorchPredict(model), model.processor, data, SILENT)
    know_scale(scores, model)
    return scores


@pytest.mark.parametrize("name", CASES)
def test_every_task_says_what_it_can(name: str, tmp_path: Path) -> None:
    make, parts, towers = CASES[name]
    task, data = task_of(name), tiny_data.examples(COUNT)
    data.narrow(task.roles, name, task.optional)
    before, after = scored(name, make(0), data), scored(name, make(1), data)
    save_scores(before, tmp_path / "scores.safetensors")
    found = behaviour(after, load_scores(tmp_path / "scores.safetensors"), task, data)
    assert found is not None
    assert found == behaviour(after, before, task, data)  # a resumed run says the same
    assert Behaviour.model_validate_json(found.model_dump_json()) == found
    assert found.flips is not None
    assert (found.calibration is not None) == ("calibration" in parts)
    assert (found.alignment_change is not None) == ("alignment" in parts)
    assert towers <= set(found.drift)
    assert found.slices is not None
    assert found.slices.looked_at >= 3
    assert len(found.left_out) >= 2 - len(parts)
    assert found.flips.right_to_wrong == sum(
        one and not two
        for one, two in zip(before.seen.right, after.seen.right, strict=True)  # type: ignore[union-attr]
    )
    for entry in found.gallery:
        assert entry.before.right == (entry.kind == "right to wrong")
        assert entry.media is not None
    # Against itself nothing changed.
    same = behaviour(before, before, task, data)
    assert same is not None
    assert same.flips is not None
    assert same.flips.share.value == 0
    assert same.gallery == []
    assert same.slices is not None
    assert same.slices.worst == []
    for drift in same.drift.values():
        assert drift.cosine is not None
        assert drift.cosine.value == pytest.approx(1)


def test_retrieval_compares_rankings() -> None:
    task, data = task_of("image-text-retrieval"), tiny_data.examples(COUNT)
    model = tiny.clip(0)
    scores = scored("image-text-retrieval", model, data)
    found = behaviour(scores, scores, task, data)
    assert found is not None
    assert found.agreement is not None
    assert {name: e.value for name, e in found.agreement.ranked.items()} == {"image_to_text": 1, "text_to_image": 1}
    assert found.agreement.kl is not None
    assert found.agreement.kl.value == pytest.approx(0, abs=1e-12)


def test_kl_of_retrieval_is_that_of_the_similarities_that_rank() -> None:
    task, data = task_of("image-text-retrieval"), tiny_data.examples(COUNT)
    before, after = (scored("image-text-retrieval", tiny.clip(seed), data) for seed in (0, 1))
    found = behaviour(after, before, task, data)
    assert found is not None
    assert found.agreement is not None
    assert found.agreement.kl is not None
    logs = []
    for scores in (before, after):
        assert scores.seen is not None
        assert scores.seen.scale is not None
        images, texts = (F.normalize(torch.from_numpy(scores.seen.embeddings[t]).double()) for t in ("vision", "text"))
        logs.append(F.log_softmax(scores.seen.scale * images @ texts.T, dim=1))
    expected = F.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean")
    assert found.agreement.kl.value == pytest.approx(float(expected), rel=1e-9)
    assert found.agreement.kl.n == len(before.seen.index)  # type: ignore[union-attr]


def test_the_baseline_alone_has_calibration_and_no_comparison() -> None:
    name = "zero-shot-image-classification"
    data = tiny_data.examples(COUNT)
    found = behaviour(scored(name, tiny.clip(0), data), None, task_of(name), data)
    assert found is not None
    assert found.calibration is not None
    assert found.calibration.changes == {}
    assert found.flips is None


def test_other_examples_are_not_compared() -> None:
    name = "zero-shot-image-classification"
    data = tiny_data.examples(COUNT)
    one, two = scored(name, tiny.clip(0), data), scored(name, tiny.clip(0), data[:12])
    found = behaviour(one, two, task_of(name), data)
    assert found is not None
    assert found.flips is None
    assert any("different examples" in text for text in found.left_out)


def test_traits_by_hand() -> None:
    picture = Image.new("RGB", (4, 2), (255, 255, 255))
    assert traits_of(picture) == {"brightness": 1.0, "pixels": 8.0}
    assert traits_of(Image.new("RGB", (1, 1))) == {"brightness": 0.0, "pixels": 1.0}
    square = Audio(np.tile(np.array([0.5, -0.5], dtype=np.float32), 50), 100)
    assert traits_of(square)["loudness"] == pytest.approx(20 * np.log10(0.5))
    assert traits_of(square)["seconds"] == 1
    assert traits_of(Audio(np.zeros(10, dtype=np.float32), 10))["loudness"] == -100


def test_what_does_not_decode_has_no_traits() -> None:
    rows = [*tiny_data.rows(3), {**tiny_data.rows(3)[0], "image": {"bytes": b"no picture", "path": None}}]
    data = Examples(rows, "damaged", {"image": "image"}, skip_damaged=True)
    found = traits(data, np.arange(4))["brightness"]
    assert np.isfinite(found).tolist() == [True, True, True, False]


def sliced() -> Examples:
    rows = tiny.rows(12)
    more = {"city": ["b", "a"] * 6, "number": list(range(12)), "speaker": [f"s{i // 4}" for i in range(12)], "weight": [0.5] * 12}
    features = {"city": Value("string"), "number": Value("int64"), "speaker": Value("string"), "weight": Value("float64")}
    kinds = {"image": {"bytes": Value("binary"), "path": Value("string")}, "label": ClassLabel(names=list(tiny.COLOURS))}
    data = Dataset.from_dict({**rows, **more}, features=Features({**kinds, "caption": Value("string"), **features}))
    return Examples(data, "sliced", {"image": "image", "label": "label", "speaker": "speaker"}, list(tiny.COLOURS))


def test_slices_come_from_fitting_columns_and_from_those_that_are_named() -> None:
    data = sliced()
    found = {g.by for g in groups(data, np.arange(12))}
    assert {"class", "city", "number", "speaker", "brightness"} <= found
    assert not {"weight", "image"} & found
    named = {g.by for g in groups(data, np.arange(12), ["city"])}
    assert "city" in named
    assert "number" not in named
    assert {g.name for g in groups(data, np.arange(6)) if g.by == "speaker"} == {"speaker s0", "speaker s1"}


def test_rows_that_are_made_when_asked_for_have_speakers_too() -> None:
    data = load_source(Source.model_validate({"path": "bundled:tones", "samples": 30}), "eval", 0)
    kept = np.arange(3, 27)
    found = {g.name: g.members for g in groups(data, kept) if g.by == "speaker"}
    speakers = [data.without_media(int(i))["speaker"] for i in kept]
    assert set(found) == {f"speaker {one}" for one in speakers}
    assert all(members.tolist() == [f"speaker {one}" == name for one in speakers] for name, members in found.items())


@pytest.mark.parametrize(("column", "said"), [("town", "town"), ("weight", "media or lists"), ("image", "media or lists")])
def test_a_column_that_makes_no_slices_is_a_clear_error(column: str, said: str) -> None:
    with pytest.raises(DataError, match=r"report\.slices") as caught:
        check_columns(sliced(), [column])
    assert said in str(caught.value)
    check_columns(sliced(), ["city", "number"])


def test_the_gallery_shows_each_example_once_and_is_bounded() -> None:
    index = np.repeat(np.arange(40), 2)
    weight = np.arange(80.0)
    found = gallery.chosen(np.ones(80, dtype=bool), weight, index, 12)
    assert len({int(index[i]) for i in found}) == 12
    assert found[:6] == [79, 77, 75, 73, 71, 69]
    assert found == gallery.chosen(np.ones(80, dtype=bool), weight, index, 12)
    assert gallery.chosen(np.zeros(80, dtype=bool), weight, index, 12) == []


def entry(data: Examples, index: int) -> GalleryEntry:
    answer = Answer(text="a", confidence=0.5, right=True)
    media = gallery.media_path(data, index)
    return GalleryEntry(index=index, kind="right to wrong", media=media, truth="b", before=answer, after=answer)


def test_media_of_the_gallery_are_kept_and_those_of_other_rows_go(tmp_path: Path) -> None:
    data = Examples(tiny_data.rows(8), "x", {"image": "image"})
    gallery.keep_media(Behaviour(gallery=[entry(data, i) for i in (1, 2)]), data, tmp_path)
    place = tmp_path / gallery.MEDIA
    assert sorted(p.name for p in place.iterdir()) == ["0000001.png", "0000002.png"]
    assert Image.open(place / "0000001.png").convert("RGB").tobytes() == data.media(1).tobytes()  # type: ignore[union-attr]
    gallery.keep_media(Behaviour(gallery=[entry(data, i) for i in (2, 3)]), data, tmp_path)
    assert sorted(p.name for p in place.iterdir()) == ["0000002.png", "0000003.png"]
    gallery.keep_media(None, data, tmp_path)
    assert not place.exists()


def test_large_pictures_and_long_recordings_are_made_small() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8))
    small = gallery.small_copy(noise, ".jpg")
    assert Image.open(io.BytesIO(small)).size == (128, 85)
    long = Audio(np.random.default_rng(0).uniform(-1, 1, 48_000 * 30).astype(np.float32), 48_000)
    clip = gallery.small_copy(long, ".flac")
    assert len(clip) <= gallery.CLIP_BYTES
    samples, rate = soundfile.read(io.BytesIO(clip))
    assert rate == 16_000
    assert 0.4 < len(samples) / rate <= 5
