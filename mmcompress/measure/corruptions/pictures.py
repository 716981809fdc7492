"""Common corruptions of pictures at five severities (Hendrycks and Dietterich 2019, arXiv 1903.12261).

The formulas are the paper's, the strengths those of its authors' scripts (github.com/hendrycks/robustness, in
ImageNet-C/create_c), which have three sets of them: for CIFAR's pictures of 32 pixels, Tiny ImageNet's of 64, and ImageNet's of
224. Which set is taken depends on the shorter side of the picture (see `tier`). Lengths in pixels (of blurs) grow with it;
for pictures of 128 pixels and more they shrink as well. `darkness` and `rotation` are not in the paper: darkness is its
brightness with the sign turned round, rotation is by 5, 10, 15, 20 and 30 degrees. All severities of a picture's corruption
share their random numbers, so that they differ in strength alone.

Shapes: H x W a picture, C its 3 channels; arrays are float64 from 0 to 1.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from PIL import Image
from scipy import ndimage

Strength = float | tuple[float, float]


@dataclass(frozen=True)
class Tier:
    """One set of strengths.

    Attributes:
        side: the shorter side, in pixels, that it was made for.
        shrinks: whether lengths are scaled down for smaller pictures, and not only up for larger ones: a blur of less than a
            pixel cannot shrink.
        strengths: for each corruption that of severities 1 to 5. Noise: standard deviation, and photons at full white. Blurs:
            standard deviation; radius and blur of the disk's edge; length and standard deviation along the line. Brightness:
            what is added to the value of HSV. Contrast: the share that is left. JPEG: quality. Pixelate: the share of the side.
    """

    side: int
    shrinks: bool
    strengths: Mapping[str, tuple[Strength, ...]]


CIFAR = Tier(
    32,
    False,
    MappingProxyType(
        {
            "gaussian-noise": (0.04, 0.06, 0.08, 0.09, 0.10),
            "shot-noise": (500, 250, 100, 75, 50),
            "gaussian-blur": (0.4, 0.6, 0.7, 0.8, 1.0),
            "defocus-blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
            "motion-blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
            "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
            "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
            "jpeg": (80, 65, 58, 50, 40),
            "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
        }
    ),
)
TINY = Tier(
    64,
    False,
    MappingProxyType(
        {
            "gaussian-noise": (0.04, 0.08, 0.12, 0.15, 0.18),
            "shot-noise": (250, 100, 50, 30, 15),
            "gaussian-blur": (0.5, 0.75, 1.0, 1.25, 1.5),
            "defocus-blur": ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
            "motion-blur": ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
            "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
            "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
            "jpeg": (65, 58, 50, 40, 25),
            "pixelate": (0.9, 0.8, 0.7, 0.6, 0.5),
        }
    ),
)
IMAGENET = Tier(
    224,
    True,
    MappingProxyType(
        {
            "gaussian-noise": (0.08, 0.12, 0.18, 0.26, 0.38),
            "shot-noise": (60, 25, 12, 5, 3),
            "gaussian-blur": (1, 2, 3, 4, 6),
            "defocus-blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
            "motion-blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
            "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
            "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
            "jpeg": (25, 18, 15, 10, 7),
            "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
        }
    ),
)
DEGREES = (5.0, 10.0, 15.0, 20.0, 30.0)
SMALL, MIDDLE = 48, 128
"""Shorter sides below these take CIFAR's and Tiny ImageNet's strengths."""
WHITE = 255.0


def tier(size: tuple[int, int]) -> tuple[Tier, float]:
    """The strengths for a picture of a size (W, H), and the factor on lengths in pixels."""
    side = min(size)
    found = CIFAR if side < SMALL else TINY if side < MIDDLE else IMAGENET
    scale = side / found.side
    return found, scale if found.shrinks else max(1.0, scale)


def corrupt_picture(image: Image.Image, name: str, severity: int, rng: np.random.Generator) -> Image.Image:
    """One corruption of a picture (RGB), of the same size.

    Args:
        name: one of `robustness_settings.PICTURES`.
        severity: 1 to 5.
        rng: where noise, angles and directions come from.
    """
    strengths, scale = tier(image.size)
    key = "brightness" if name == "darkness" else name
    strength = DEGREES[severity - 1] if name == "rotation" else strengths.strengths[key][severity - 1]
    if name == "jpeg":
        return jpeg(image, _number(strength))
    if name == "pixelate":
        return pixelate(image, _number(strength))
    pixels = np.asarray(image, dtype=np.float64) / WHITE
    found = np.clip(_OVER_PIXELS[name](pixels, strength, scale, rng), 0.0, 1.0)
    return Image.fromarray(np.uint8(np.rint(found * WHITE)))


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The picture with a shorter side of ``side`` pixels where it is larger (bicubic), as it is where it is not.

    Strengths are stated for pictures of the size that models see: noise on a photo of 12 megapixels would be averaged away
    before the model sees it.
    """
    shorter = min(image.size)
    if shorter <= side:
        return image
    width, height = image.size
    return image.resize((round(width * side / shorter), round(height * side / shorter)), Image.Resampling.BICUBIC)


def _gaussian_noise(pixels: np.ndarray, strength: Strength, scale: float, rng: np.random.Generator) -> np.ndarray:
    return pixels + _number(strength) * rng.standard_normal(pixels.shape)


def _shot_noise(pixels: np.ndarray, strength: Strength, scale: float, rng: np.random.Generator) -> np.ndarray:
    photons = _number(strength)
    return np.asarray(rng.poisson(pixels * photons) / photons)


def _gaussian_blur(pixels: np.ndarray, strength: Strength, scale: float, rng: np.random.Generator) -> np.ndarray:
    sigma = _number(strength) * scale
    return np.asarray(ndimage.gaussian_filter(pixels, sigma=(sigma, sigma, 0), mode="nearest"))


def _defocus_blur(pixels: np.ndarray, strength: Strength, scale: float, rng: np.random.Generator) -> np.ndarray:
    radius, edge = _pair(strength)
    kernel = disk(radius * scale, edge)
    return np.stack([ndimage.convolve(pixels[..., c], kernel, mode="mirror") for c in range(pixels.shape[2])], axis=2)


def disk(radius: float, edge: float) -> np.ndarray:
    """A disk of pixels whose centres lie within the radius, its sum 1, with its edge blurred.

    Args:
        radius: pixels.
        edge: standard deviation of the blur, in pixels, over 3 x 3 pixels up to a radius of 8 and 5 x 5 above.
    """
    reach = math.ceil(radius) + 2
    at = np.arange(-reach, reach + 1)
    inside = (at[None, :] ** 2 + at[:, None] ** 2 <= radius**2).astype(np.float64)
    near = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    bell = np.exp(-(near**2) / (2 * edge**2))
    bell /= bell.sum()
    return np.asarray(ndimage.convolve(inside / inside.sum(), np.outer(bell, bell), mode="constant"))


def _motion_blur(pixels: np.ndarray, strength: Strength, scale: float, rng: np.random.Generator) -> np.ndarray:
    length, sigma = _pair(strength)
    angle = math.radians(rng.uniform(-45, 45))
    taps = np.arange(2 * round(length * scale) + 1)
    weights = np.exp(-(taps**2) / (2 * (sigma * scale) ** 2))
    weights /= weights.sum()
    rows, columns = np.arange(pixels.shape[0]), np.arange(pixels.shape[1])
    found = np.zeros_like(pixels)
    for tap, weight in zip(taps, weights, strict=True):
        # ImageMagick's motion blur: half a bell from the pixel on, along the line; the edge goes on outside.
        down, right = math.ceil(tap * math.sin(angle) - 0.5), math.ceil(tap * math.cos(angle) - 0.5)
        from_rows = np.clip(rows + down, 0, len(rows) - 1)
        found += weight * pixels[from_rows][:, np.clip(columns + right, 0, len(columns) - 1)]
    return found


def _brightness(pixels: np.ndarray, strength: Strength, scale: float, rng: np.random.Generator) -> np.ndarray:
    return value_changed(pixels, _number(strength))


def _darkness(pixels: np.ndarray, strength: Strength, scale: float, rng: np.random.Generator) -> np.ndarray:
    return value_changed(pixels, -_number(strength))


def value_changed(pixels: np.ndarray, added: float) -> np.ndarray:
    """Something added to HSV's value, the largest of a pixel's channels; hue and saturation stay. (H, W, C)."""
    value = pixels.max(axis=2, keepdims=True)
    new = np.clip(value + added, 0.0, 1.0)
    # At the same hue and saturation all channels are in proportion to the value; black has no hue and becomes grey.
    return np.asarray(np.where(value > 0, pixels * new / np.where(value > 0, value, 1.0), new))


def _contrast(pixels: np.ndarray, strength: Strength, scale: float, rng: np.random.Generator) -> np.ndarray:
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return np.asarray((pixels - mean) * _number(strength) + mean)


def _rotation(pixels: np.ndarray, strength: Strength, scale: float, rng: np.random.Generator) -> np.ndarray:
    degrees = _number(strength) * (1 if rng.random() < 0.5 else -1)
    return np.asarray(ndimage.rotate(pixels, degrees, axes=(1, 0), reshape=False, order=1, mode="reflect"))


def jpeg(image: Image.Image, quality: float) -> Image.Image:
    """The picture after JPEG compression at a quality of 1 to 100."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=round(quality))
    return Image.open(buffer).convert("RGB")


def pixelate(image: Image.Image, share: float) -> Image.Image:
    """The picture at a share of its sides, by means of areas, and back to its size."""
    width, height = (max(1, int(n * share)) for n in image.size)
    return image.resize((width, height), Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)


def _number(strength: Strength) -> float:
    return float(strength if isinstance(strength, int | float) else strength[0])


def _pair(strength: Strength) -> tuple[float, float]:
    return (strength, strength) if isinstance(strength, int | float) else strength


_OVER_PIXELS: Mapping[str, Callable[[np.ndarray, Strength, float, np.random.Generator], np.ndarray]] = MappingProxyType(
    {
        "gaussian-noise": _gaussian_noise,
        "shot-noise": _shot_noise,
        "gaussian-blur": _gaussian_blur,
        "defocus-blur": _defocus_blur,
        "motion-blur": _motion_blur,
        "brightness": _brightness,
        "darkness": _darkness,
        "contrast": _contrast,
        "rotation": _rotation,
    }
)
