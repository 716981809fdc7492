"""Seeded changes of pictures and recordings, the same for teacher and student in every epoch, pass and run.

Shapes: H x W a picture, N samples of a recording.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mmcompress.data.audio import Audio
from mmcompress.training.augment_settings import Augment

RATIOS = (3 / 4, 4 / 3)
"""Of width to height of a crop, before it is brought to the picture's size (Szegedy et al. 2015, arXiv 1409.4842, section 6)."""


def augmented(item: Image.Image | Audio, settings: Augment, variant: int) -> Image.Image | Audio:
    """One variant of a picture (RGB) or recording; of the same size, and the same for the same content, seed and variant."""
    content = item.tobytes() if isinstance(item, Image.Image) else item.samples.tobytes()
    generator = np.random.default_rng([settings.seed, zlib.crc32(content), variant])
    if isinstance(item, Image.Image):
        return _picture(item, settings, generator)
    return _recording(item, settings, generator)


def _picture(image: Image.Image, settings: Augment, generator: np.random.Generator) -> Image.Image:
    if settings.crop is not None:
        image = image.resize(image.size, Image.Resampling.BICUBIC, box=crop_box(image.size, settings.crop, generator))
    if settings.flip and generator.random() < 0.5:
        image = ImageOps.mirror(image)
    for spread, kind in (
        (settings.brightness, ImageEnhance.Brightness),
        (settings.contrast, ImageEnhance.Contrast),
        (settings.saturation, ImageEnhance.Color),
    ):
        if spread > 0:
            image = kind(image).enhance(generator.uniform(1 - spread, 1 + spread))
    return image


def crop_box(size: tuple[int, int], least: float, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """A part of a picture: its share of the area drawn from ``least`` to 1, the logarithm of its ratio from `RATIOS`.

    As torchvision's RandomResizedCrop does it: the first of ten draws that fits, else the whole picture.

    Args:
        size: W and H.

    Returns:
        left, upper, right, lower, in pixels.
    """
    width, height = size
    for _ in range(10):
        area = width * height * generator.uniform(least, 1)
        ratio = math.exp(generator.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return left, upper, left + w, upper + h
    return 0, 0, width, height


def _recording(audio: Audio, settings: Augment, generator: np.random.Generator) -> Audio:
    samples = audio.samples
    if settings.shift_seconds > 0:
        most = min(round(settings.shift_seconds * audio.rate), len(samples) - 1)
        samples = shifted(samples, int(generator.integers(-most, most + 1)))
    if settings.noise_snr_db is not None:
        noise = generator.standard_normal(len(samples))
        samples = samples + math.sqrt(float(np.mean(np.square(audio.samples, dtype=np.float64)))) * (
            10 ** (-settings.noise_snr_db / 20) * noise
        )
    if settings.gain_db > 0:
        samples = samples * 10 ** (generator.uniform(-settings.gain_db, settings.gain_db) / 20)
    return Audio(np.asarray(samples, dtype=np.float32), audio.rate)


def shifted(samples: np.ndarray, places: int) -> np.ndarray:
    """The samples, (N,), later by so many places, or earlier where that is negative, with zeros in the gap."""
    found = np.zeros_like(samples)
    if places >= 0:
        found[places:] = samples[: len(samples) - places]
    else:
        found[:places] = samples[-places:]
    return found
