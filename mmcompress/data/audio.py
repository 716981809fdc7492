"""Recordings: decoding with soundfile, resampling with soxr.

Shapes: N samples, K channels.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from mmcompress.errors import DataError

RATES = (1_000, 768_000)
"""Sampling rates outside of these, in hertz, are a damaged header: telephones have 8,000, studios up to 384,000."""
MOST_SAMPLES = 1 << 29
"""Samples over all channels that a file may unpack to (2 GB as float32): compressed silence takes next to no bytes."""
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")


@dataclass(frozen=True, eq=False)
class Audio:
    """A recording.

    Attributes:
        samples: mono, float32, shape (N,); full scale is -1 to 1.
        rate: samples a second.
    """

    samples: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.samples) / self.rate


def decode_audio(value: Any, where: str, folder: Path | None = None) -> Audio:
    """A recording from Audio, WAV/FLAC/OGG/MP3 bytes, a path, a ``{"bytes", "path"}`` or ``{"array", "sampling_rate"}`` record.

    Several channels are mixed to one by their mean.

    Raises:
        DataError: it does not decode, is empty, holds values that are not finite, or has an absurd sampling rate.
    """
    try:
        if isinstance(value, Audio):
            samples, rate = value.samples, value.rate
        elif isinstance(value, dict) and value.get("array") is not None:
            samples, rate = _from_array(value["array"]), value["sampling_rate"]
        else:
            samples, rate = _from_file(value, where, folder)
    except soundfile.LibsndfileError as e:
        raise DataError(f"{where}: the recording does not decode: {_said(e.error_string)}") from e
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, OverflowError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{where}: the recording does not decode: {_said(str(e))}") from e
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not math.isfinite(rate) or rate != int(rate):
        raise DataError(f"{where}: the sampling rate is {rate!r}; allowed: a whole number of hertz")
    if not RATES[0] <= rate <= RATES[1]:
        raise DataError(f"{where}: the sampling rate is {rate:,} Hz; allowed: {RATES[0]:,} to {RATES[1]:,}")
    if samples.ndim != 1:
        raise DataError(
            f"{where}: an array of {samples.ndim} dimensions is no recording; allowed: (samples,) or (channels, samples)"
        )
    if not len(samples):
        raise DataError(f"{where}: the recording is empty")
    if not np.isfinite(samples).all():
        bad = int((~np.isfinite(samples)).sum())
        raise DataError(f"{where}: the recording holds {bad:,} samples that are NaN or infinite (of {len(samples):,})")
    return Audio(np.ascontiguousarray(samples, dtype=np.float32), int(rate))


def _from_file(value: Any, where: str, folder: Path | None) -> tuple[np.ndarray, int]:
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else str(value["path"])
    if isinstance(value, bytes):
        value = io.BytesIO(value)
    elif isinstance(value, str | Path):
        value = (folder or Path()) / value
        if not value.is_file():
            raise DataError(f"{where}: the recording does not decode: there is no file {_said(str(value))}")
    else:
        raise DataError(
            f"{where}: {type(value).__name__} is no recording; allowed: WAV, FLAC, OGG or MP3 bytes, a path, "
            "or a record with array and sampling_rate"
        )
    with soundfile.SoundFile(value) as file:
        total = file.frames * file.channels
        if total > MOST_SAMPLES:
            raise DataError(f"{where}: the recording unpacks to {total:,} samples; allowed: up to {MOST_SAMPLES:,}")
        found: np.ndarray = file.read(dtype="float32", always_2d=True)
        return found.mean(axis=1), int(file.samplerate)


def _from_array(value: Any) -> np.ndarray:
    """Floats as they are, integers by their full scale; of (channels, samples) and (samples, channels) the short axis goes."""
    found = np.asarray(value)
    if np.issubdtype(found.dtype, np.integer):
        if found.dtype != np.int16:
            # Lists of Python integers are int64 whatever they were recorded as: there is no full scale to go by.
            raise ValueError(f"an array of {found.dtype} has no full scale; allowed: floats between -1 and 1, or int16")
        found = found.astype(np.float32) / 32_768
    elif not np.issubdtype(found.dtype, np.floating):
        raise ValueError(f"an array of {found.dtype}; allowed: numbers")
    if found.ndim == 2:
        found = found.mean(axis=int(np.argmin(found.shape)))
    return found


def _said(text: str) -> str:
    """On one line, and short."""
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-60:]}"


def resample(audio: Audio, rate: int) -> Audio:
    """The recording at another sampling rate (band-limited, soxr's high quality).

    Raises:
        DataError: nothing is left of it, because it is shorter than one sample at the new rate.
    """
    if audio.rate == rate:
        return audio
    samples = soxr.resample(audio.samples, audio.rate, rate, quality="HQ")
    if not len(samples):
        raise DataError(f"a recording of {len(audio.samples)} samples at {audio.rate:,} Hz has none at {rate:,} Hz")
    return Audio(np.asarray(samples, dtype=np.float32), rate)
