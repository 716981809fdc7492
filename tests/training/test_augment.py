"""Changes of pictures and recordings: by hand, seeded, and of the same size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from mmcompress.data.audio import Audio
from mmcompress.training.augment import RATIOS, augmented, crop_box, shifted
from mmcompress.training.augment_settings import Augment


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(60, 190, (20, 30, 3), dtype=np.uint8))


def array(item: Image.Image | Audio) -> np.ndarray:
    return np.asarray(item, dtype=np.int64) if isinstance(item, Image.Image) else item.samples


SOUND = Audio(np.sin(np.arange(8000) / 9).astype(np.float32) / 2, 8000)


@pytest.mark.parametrize(
    ("item", "settings"),
    [
        (picture(), Augment(crop=0.3, flip=True, brightness=0.3, contrast=0.3, saturation=0.3)),
        (SOUND, Augment(gain_db=6, shift_seconds=0.2, noise_snr_db=20)),
    ],
)
def test_a_variant_is_the_same_wherever_it_is_made_and_others_differ(item: Image.Image | Audio, settings: Augment) -> None:
    first = [array(augmented(item, settings, k)) for k in range(4)]
    again = [array(augmented(item, settings, k)) for k in range(4)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(a.shape == array(item).shape for a in first)
    assert not any(np.array_equal(first[0], other) for other in [array(item), *first[1:]])
    reseeded = settings.model_copy(update={"seed": 1})
    assert not np.array_equal(array(augmented(item, reseeded, 0)), first[0])


def test_brightness_is_one_factor() -> None:
    before, after = array(picture()), array(augmented(picture(), Augment(brightness=0.3), 0))
    factor = (after / before).mean()
    assert 0.7 <= factor <= 1.3
    assert np.abs(after - before * factor).max() <= 1.5, "rounding"


def test_flips_are_mirrored_and_about_half() -> None:
    mirrored = [np.array_equal(array(augmented(picture(), Augment(flip=True), k)), array(picture())[:, ::-1]) for k in range(100)]
    plain = [np.array_equal(array(augmented(picture(), Augment(flip=True), k)), array(picture())) for k in range(100)]
    assert all(a != b for a, b in zip(mirrored, plain, strict=True))
    assert 30 < sum(mirrored) < 70


def test_crops_have_the_asked_area_and_ratio() -> None:
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(500):
        left, upper, right, lower = crop_box((300, 200), 0.25, generator)
        assert 0 <= left < right <= 300
        assert 0 <= upper < lower <= 200
        w, h = right - left, lower - upper
        shares.append(w * h / 60_000)
        assert (w, h) == (300, 200) or RATIOS[0] * 0.98 <= w / h <= RATIOS[1] * 1.02
    assert min(shares) >= 0.24
    assert max(shares) > 0.85


def test_shift_by_hand() -> None:
    assert shifted(np.array([1, 2, 3, 4]), 1).tolist() == [0, 1, 2, 3]
    assert shifted(np.array([1, 2, 3, 4]), -3).tolist() == [4, 0, 0, 0]
    assert shifted(np.array([1, 2, 3, 4]), 0).tolist() == [1, 2, 3, 4]


def test_noise_lies_so_many_decibels_below() -> None:
    noise = augmented(SOUND, Augment(noise_snr_db=20), 0).samples - SOUND.samples
    ratio = 10 * math.log10(float(np.square(SOUND.samples).mean() / np.square(noise).mean()))
    assert ratio == pytest.approx(20, abs=0.5)


def test_gain_is_within_its_decibels() -> None:
    gains = []
    for k in range(50):
        factor = augmented(SOUND, Augment(gain_db=6), k).samples[1:] / SOUND.samples[1:]
        assert factor.std() < 1e-4
        gains.append(20 * math.log10(float(factor.mean())))
    assert -6.001 <= min(gains) < -3
    assert 3 < max(gains) <= 6.001


def test_settings_that_change_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="nothing is changed; set one of crop, flip"):
        Augment(variants=4)
    assert Augment(noise_snr_db=0).changes("audio")
    assert not Augment(noise_snr_db=0).changes("image")
