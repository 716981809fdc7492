"""Corruptions of pictures, recordings and texts: by hand, against other libraries' own, in order of severity, and repeatable."""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import signal

from mmcompress.data.audio import Audio
from mmcompress.errors import DataError
from mmcompress.measure.corruptions import cells
from mmcompress.measure.corruptions.cells import CLEAN, Cell, altered, damaged, others, planned
from mmcompress.measure.corruptions.pictures import CIFAR, IMAGENET, TINY, corrupt_picture, disk, fitted, tier, value_changed
from mmcompress.measure.corruptions.sounds import RT60_SECONDS, at_speed, echo, pink_noise, power, reverberated, with_noise
from mmcompress.measure.corruptions.texts import NEIGHBOURS, corrupt_text, with_typos
from mmcompress.robustness_settings import PICTURES, SEVERITIES, SOUNDS, Robustness
from mmcompress.tasks.image_text_matching import ImageTextMatching
from mmcompress.tasks.image_text_retrieval import ImageTextRetrieval
from mmcompress.tasks.visual_question_answering import VisualQuestionAnswering
from mmcompress.tasks.zero_shot_image_classification import ZeroShotImageClassification
from tests import tiny_data

ZERO_SHOT = ZeroShotImageClassification(type="zero-shot-image-classification", templates=["a {}"])
RATE = 16_000


def picture(side: int = 32, seed: int = 0) -> Image.Image:
    """Noise with the spectrum of photos: amplitudes that fall as 1/f."""
    spectrum = np.fft.rfft2(np.random.default_rng(seed).standard_normal((side, side, 3)), axes=(0, 1))
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    f[0, 0] = 1 / side
    field = np.fft.irfft2(spectrum / f[..., None], s=(side, side), axes=(0, 1))
    return Image.fromarray(np.uint8(np.clip(128 + 45 * field / field.std(), 30, 225)))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64) / 255


def tone(seconds: float = 1.0) -> Audio:
    time = np.arange(int(RATE * seconds)) / RATE
    return Audio((0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32), RATE)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("side", [28, 64, 224])
@pytest.mark.parametrize("name", PICTURES)
def test_the_distance_to_the_picture_grows_with_severity(name: str, side: int) -> None:
    far = []
    for severity in SEVERITIES:
        gaps = []
        for seed in range(4 if side < 224 else 1):
            image = picture(side, seed)
            found = damaged(image, Cell("media", name, severity), 0)
            assert isinstance(found, Image.Image)
            assert found.size == image.size
            gaps.append(np.mean((pixels(found) - pixels(image)) ** 2))
        far.append(np.mean(gaps))
    assert far[0] > 0
    assert far == sorted(far)
    # CIFAR's motion blurs of severities 3 and 4 differ in where the bell is cut off, by less than a step of 1/255.
    assert len(set(far)) >= (4 if (name, side) == ("motion-blur", 28) else 5)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_damaged_in_the_same_way_each_time(name: str) -> None:
    image, cell = picture(), Cell("media", name, 3)
    assert damaged(image, cell, 0).tobytes() == damaged(image.copy(), cell, 0).tobytes()  # type: ignore[union-attr]
    if name in ("gaussian-noise", "shot-noise", "motion-blur"):
        assert damaged(image, cell, 0).tobytes() != damaged(image, cell, 1).tobytes()  # type: ignore[union-attr]


def test_strengths_are_those_made_for_the_pictures_size() -> None:
    assert tier((32, 500)) == (CIFAR, 1.0)
    assert tier((28, 28)) == (CIFAR, 1.0)
    assert tier((64, 64)) == (TINY, 1.0)
    assert tier((500, 96)) == (TINY, 1.5)
    assert tier((448, 900)) == (IMAGENET, 2.0)
    assert tier((128, 128)) == (IMAGENET, 128 / 224)


def test_large_pictures_are_brought_to_the_models_size_and_small_ones_left_alone() -> None:
    assert fitted(Image.new("RGB", (400, 300)), 100).size == (133, 100)
    small = Image.new("RGB", (40, 30))
    assert fitted(small, 100) is small


def test_noise_has_the_stated_strength() -> None:
    grey = Image.new("RGB", (224, 224), (128, 128, 128))
    normal = pixels(corrupt_picture(grey, "gaussian-noise", 1, rng()))
    assert normal.std() == pytest.approx(0.08, rel=0.02)
    shot = pixels(corrupt_picture(grey, "shot-noise", 1, rng()))
    # Of n photons the share of white has variance p / n.
    assert shot.std() == pytest.approx(math.sqrt(128 / 255 / 60), rel=0.02)
    assert shot.mean() == pytest.approx(128 / 255, abs=0.002)


def test_gaussian_blur_is_near_pillows() -> None:
    image = picture(224)
    ours = pixels(corrupt_picture(image, "gaussian-blur", 2, rng()))
    theirs = pixels(image.filter(ImageFilter.GaussianBlur(2)))
    assert np.abs(ours - theirs)[10:-10, 10:-10].max() < 0.03
    assert np.abs(ours - pixels(image)).max() > 0.1


def test_a_disk_by_hand() -> None:
    # Radius 1 holds the middle and its four neighbours; with next to no blur each has a fifth.
    kernel = disk(1, 0.01)
    middle = kernel.shape[0] // 2
    assert kernel.sum() == pytest.approx(1)
    assert kernel[middle, middle] == pytest.approx(0.2)
    assert kernel[middle, middle + 1] == pytest.approx(0.2)
    assert kernel[middle + 1, middle + 1] == pytest.approx(0)
    white = Image.new("RGB", (32, 32), (0, 0, 0))
    white.putpixel((16, 16), (255, 255, 255))
    seen = pixels(corrupt_picture(white, "defocus-blur", 4, rng()))[..., 0]
    assert seen[16, 16] == pytest.approx(0.2, abs=0.01)
    assert seen[15, 16] == pytest.approx(0.2, abs=0.01)


def test_motion_blur_smears_along_one_line_and_keeps_the_light() -> None:
    dot = Image.new("RGB", (224, 224), (0, 0, 0))
    for x in range(110, 114):
        for y in range(110, 114):
            dot.putpixel((x, y), (255, 255, 255))
    before, after = pixels(dot)[..., 0], pixels(corrupt_picture(dot, "motion-blur", 1, rng(1)))[..., 0]
    assert after.sum() == pytest.approx(before.sum(), rel=0.05)
    ys, xs = np.nonzero(after > 0)
    angle = math.radians(rng(1).uniform(-45, 45))
    spread = np.cov(np.stack([xs, ys]), aweights=after[ys, xs])
    values, vectors = np.linalg.eigh(spread)
    along = vectors[:, 1]
    assert values[1] > 3 * values[0]
    assert abs(along[0] * math.cos(angle) + along[1] * math.sin(angle)) > 0.98


def test_brightness_changes_the_value_of_hsv_alone() -> None:
    image = pixels(picture(6))
    for added in (0.2, -0.2):
        found = value_changed(image, added)
        for before, after in zip(image.reshape(-1, 3), found.reshape(-1, 3), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*before)
            assert after == pytest.approx(colorsys.hsv_to_rgb(h, s, min(max(v + added, 0), 1)), abs=1e-9)
    black = value_changed(np.zeros((1, 1, 3)), 0.3)
    assert black == pytest.approx(np.full((1, 1, 3), 0.3))


def test_darkness_makes_pictures_darker_and_brightness_brighter() -> None:
    image = picture()
    assert pixels(corrupt_picture(image, "darkness", 5, rng())).mean() < pixels(image).mean() - 0.1
    assert pixels(corrupt_picture(image, "brightness", 5, rng())).mean() > pixels(image).mean() + 0.1


def test_contrast_by_hand() -> None:
    image = Image.new("RGB", (2, 1), (100, 100, 100))
    image.putpixel((1, 0), (200, 200, 200))
    found = corrupt_picture(image, "contrast", 2, rng())  # half of it is left
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(125, 125, 125), (175, 175, 175)]


def test_jpeg_and_pixelate_are_pillows() -> None:
    image = picture(64)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=25)
    assert corrupt_picture(image, "jpeg", 5, rng()).tobytes() == Image.open(buffer).convert("RGB").tobytes()
    coarse = corrupt_picture(image, "pixelate", 5, rng())
    assert pixels(coarse)[::2, ::2].tobytes() == pixels(coarse)[1::2, 1::2].tobytes()
    by_hand = pixels(image)[:2, :2].mean(axis=(0, 1))
    assert pixels(coarse)[0, 0] == pytest.approx(by_hand, abs=0.004)


def test_rotation_is_pillows_in_the_middle() -> None:
    image = picture(64)
    ours = pixels(corrupt_picture(image, "rotation", 5, rng()))
    turns = [pixels(image.rotate(degrees, resample=Image.Resampling.BILINEAR)) for degrees in (30, -30)]
    y, x = np.mgrid[:64, :64] - 31.5
    middle = np.hypot(y, x) < 25
    gaps = [np.abs(ours - turn)[middle].max() for turn in turns]
    assert min(gaps) < 0.02
    assert max(gaps) > 0.2


# Recordings.


@pytest.mark.parametrize("snr", [20.0, 0.0])
@pytest.mark.parametrize("pink", [False, True])
def test_noise_has_the_stated_ratio_to_the_signal(snr: float, pink: bool) -> None:
    samples = tone().samples.astype(np.float64)
    noise = pink_noise(len(samples), RATE, rng()) if pink else rng().standard_normal(len(samples))
    added = with_noise(samples, noise, snr) - samples
    assert 10 * math.log10(power(samples) / power(added)) == pytest.approx(snr)


def test_pink_noise_falls_by_three_decibels_an_octave() -> None:
    frequencies, density = signal.welch(pink_noise(16 * RATE, RATE, rng()), RATE, nperseg=4096)
    band = (frequencies > 100) & (frequencies < 6000)
    slope = np.polyfit(np.log2(frequencies[band]), 10 * np.log10(density[band]), 1)[0]
    assert slope == pytest.approx(-3.01, abs=0.15)


@pytest.mark.parametrize("rt60", RT60_SECONDS)
def test_an_echo_dies_in_the_stated_time(rt60: float) -> None:
    response = echo(rt60, RATE, rng())
    # Schroeder's backward integration (1965): the energy that is yet to come, in decibels, falls on a line.
    tail = response[1:]
    assert np.sum(tail**2) == pytest.approx(1)
    left = 10 * np.log10(np.cumsum(tail[::-1] ** 2)[::-1])
    part = (left < -5) & (left > -25)
    slope = np.polyfit(np.arange(len(tail))[part] / RATE, left[part], 1)[0]
    assert -60 / slope == pytest.approx(rt60, rel=0.1)


def test_reverberation_by_hand() -> None:
    samples = np.array([1.0, 0.0, 0.0, 0.0])
    found = reverberated(samples, np.array([1.0, 0.0, 0.5]))
    loud = math.sqrt(1 / 1.25)
    assert found == pytest.approx(np.array([1.0, 0.0, 0.5, 0.0]) * loud)


@pytest.mark.parametrize("speed", [0.8, 1.2])
def test_speed_changes_length_and_pitch(speed: float) -> None:
    found = at_speed(tone(), speed)
    assert len(found.samples) == pytest.approx(RATE / speed, abs=2)
    spectrum = np.abs(np.fft.rfft(found.samples))
    assert np.fft.rfftfreq(len(found.samples), 1 / RATE)[spectrum.argmax()] == pytest.approx(440 * speed, abs=2)


@pytest.mark.parametrize("name", SOUNDS)
def test_recordings_are_damaged_more_and_more_and_in_the_same_way_each_time(name: str) -> None:
    own, far = tone(0.5), []
    for severity in SEVERITIES:
        found, again = (damaged(own, Cell("media", name, severity), 0) for _ in range(2))
        assert isinstance(found, Audio)
        assert isinstance(again, Audio)
        assert found.samples.tobytes() == again.samples.tobytes()
        if name in ("faster", "slower"):
            far.append(abs(len(found.samples) - len(own.samples)))
        else:
            # What of the sound is no multiple of the clean one.
            far.append(1 - abs(np.corrcoef(found.samples, own.samples)[0, 1]))
    assert far[0] > 0
    if name != "reverberation":  # to a steady tone an echo is no more than a change of phase
        assert far == sorted(far)


def test_silence_stays_silence() -> None:
    quiet = Audio(np.zeros(800, dtype=np.float32), 8000)
    for name in SOUNDS:
        found = damaged(quiet, Cell("media", name, 5), 0)
        assert isinstance(found, Audio)
        assert not found.samples.any()


# Texts.


def test_keys_have_the_neighbours_of_the_keyboard() -> None:
    assert set(NEIGHBOURS["g"]) == set("fhtyvb")
    assert set(NEIGHBOURS["q"]) == set("wa")
    assert all(key in NEIGHBOURS[other] for key, near in NEIGHBOURS.items() for other in near)


def test_every_kind_of_typo_occurs_by_hand() -> None:
    class Draws:
        """Numbers that are said instead of drawn."""

        def __init__(self, *rows: tuple[float, float, float]) -> None:
            self.rows = np.array(rows)

        def random(self, shape: tuple[int, int]) -> np.ndarray:
            assert shape == self.rows.shape
            return self.rows

    never, swap, hit, drop = (1.0, 0.0, 0.0), (0.0, 0.1, 0.0), (0.0, 0.5, 0.0), (0.0, 0.9, 0.0)
    assert with_typos("Cat", 0.1, Draws(swap, never, never)) == "aCt"  # type: ignore[arg-type]
    assert with_typos("Cat", 0.1, Draws(never, drop, never)) == "Ct"  # type: ignore[arg-type]
    assert with_typos("Cat", 0.1, Draws(hit, never, never)) == NEIGHBOURS["c"][0].upper() + "at"  # type: ignore[arg-type]
    assert with_typos("c 4", 0.1, Draws(never, drop, drop)) == "c 4"  # type: ignore[arg-type]


def test_typos_come_at_the_stated_rate_and_never_leave_nothing() -> None:
    text = "the quick brown fox jumps over the lazy dog " * 100
    for severity, rate in zip(SEVERITIES, (0.02, 0.05, 0.10, 0.15, 0.20), strict=True):
        found = corrupt_text(text, "typos", severity, rng())
        letters = sum(letter.isalpha() for letter in text)
        # A third of the typos drop a letter.
        assert (len(text) - len(found)) / letters == pytest.approx(rate / 3, rel=0.35)
        assert found == corrupt_text(text, "typos", severity, rng())
    assert all(corrupt_text("a", "typos", 5, rng(seed)).strip() for seed in range(50))


def test_casing() -> None:
    assert corrupt_text("A small Dog", "upper-case", 0, rng()) == "A SMALL DOG"
    assert corrupt_text("A small Dog", "lower-case", 0, rng()) == "a small dog"


# Examples under a condition.


def test_both_models_see_the_same_pictures_and_labels_stay() -> None:
    examples = tiny_data.examples(12)
    cell = Cell("media", "gaussian-noise", 3)
    one, two = (altered(examples, cell, ZERO_SHOT, 0, 224) for _ in range(2))
    assert [one.media(i).tobytes() for i in range(12)] == [two.media(i).tobytes() for i in range(12)]  # type: ignore[union-attr]
    assert one.labels() == examples.labels()
    assert one.media(0).tobytes() != examples.media(0).tobytes()  # type: ignore[union-attr]
    assert one[2]["text"] == examples[2]["text"]
    assert one.take([5, 3]).media(0).tobytes() == one.media(5).tobytes()  # type: ignore[union-attr]
    assert one.take([5, 3]).labels() == [examples.labels()[i] for i in (5, 3)]
    assert list(one.take([5, 3]).values("label")) == [examples.labels()[i] for i in (5, 3)]


def test_the_clean_condition_changes_nothing_but_the_size_of_large_pictures() -> None:
    examples = tiny_data.examples(3)
    examples.columns.pop("audio")
    assert altered(examples, CLEAN, ZERO_SHOT, 0, 224)[1] == examples[1]
    assert altered(examples, CLEAN, ZERO_SHOT, 0, 10).media(1).size == (10, 10)  # type: ignore[union-attr]


def test_class_names_are_mistyped_and_labels_stay() -> None:
    examples = tiny_data.examples(12)
    shouted = altered(examples, Cell("text", "upper-case"), ZERO_SHOT, 0, 224)
    assert shouted.classes == [name.upper() for name in tiny_data.CLASSES]
    assert shouted.labels() == examples.labels()
    assert [row["label"] for row in shouted] == [row["label"] for row in examples]


def test_equal_texts_stay_equal() -> None:
    task = ImageTextRetrieval(type="image-text-retrieval")
    examples = tiny_data.examples(24)
    mistyped = altered(examples, Cell("text", "typos", 5), task, 0, 224)
    pairs = {(examples[i]["text"], mistyped[i]["text"]) for i in range(24)}
    assert len(pairs) == len({text for text, _ in pairs})
    assert any(a != b for a, b in pairs)


def test_shuffling_gives_every_example_the_picture_of_another() -> None:
    examples = tiny_data.examples(12)
    shuffled = altered(examples, Cell("modality", "shuffled-media"), ZERO_SHOT, 0, 224)
    before = [examples.media(i).tobytes() for i in range(12)]  # type: ignore[union-attr]
    after = [shuffled.media(i).tobytes() for i in range(12)]  # type: ignore[union-attr]
    assert sorted(before) == sorted(after)
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert shuffled.labels() == examples.labels()
    assert sorted(others(50, 3, "x")) == list(range(50))
    assert all(i != j for i, j in enumerate(others(50, 3, "x")))
    with pytest.raises(DataError, match="has 1 example; shuffling needs at least 2"):
        others(1, 0, "x")


def test_missing_modalities() -> None:
    task = VisualQuestionAnswering(type="visual-question-answering")
    examples = tiny_data.examples(4)
    grey = altered(examples, Cell("modality", "missing-media"), task, 0, 224)
    assert set(np.asarray(grey.media(0)).ravel()) == {128}
    assert grey[0]["question"] == examples[0]["question"]
    assert altered(examples, Cell("modality", "missing-text"), task, 0, 224)[0]["question"] == ""
    asked = altered(examples, Cell("modality", "shuffled-text"), task, 0, 224)
    assert sorted(row["question"] for row in asked) == sorted(row["question"] for row in examples)
    silent = cells.blank(tone())
    assert isinstance(silent, Audio)
    assert not silent.samples.any()


def test_what_is_planned_follows_the_task() -> None:
    settings = Robustness(severities=[3, 1])
    names = [c.key for c in planned(settings, ZERO_SHOT)]
    assert len(names) == 2 * len(PICTURES) + 2 + 2 + 1
    assert names[:2] == ["gaussian-noise-1", "gaussian-noise-3"]
    assert names[-1] == "shuffled-media-0"
    asked = [
        c.name for c in planned(settings, VisualQuestionAnswering(type="visual-question-answering")) if c.group == "modality"
    ]
    assert asked == ["missing-media", "shuffled-media", "missing-text", "shuffled-text"]
    matched = [c.name for c in planned(settings, ImageTextMatching(type="image-text-matching")) if c.group == "modality"]
    assert matched == ["missing-media", "shuffled-media"]
    few = Robustness(corruptions=["jpeg"], severities=[5], text=False, modality=False)
    assert [c.key for c in planned(few, ZERO_SHOT)] == ["jpeg-5"]
