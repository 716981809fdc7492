"""Noise, reverberation and speed of recordings at five severities.

Shapes: N samples, T samples of a room's echo.
"""

from __future__ import annotations

import math

import numpy as np
import soxr
from scipy import signal

from mmcompress.data.audio import Audio

SNR_DB = (20.0, 15.0, 10.0, 5.0, 0.0)
"""Signal-to-noise ratios, in decibels."""
RT60_SECONDS = (0.2, 0.4, 0.6, 0.9, 1.2)
"""Reverberation times: after them the echo has fallen by 60 dB."""
SPEED_SHARE = (0.04, 0.08, 0.12, 0.16, 0.20)
"""How much faster or slower: 0.8 to 1.2 times the speed."""
PINK_FROM_HZ = 20.0
"""Below this pink noise is as strong as at it: towards 0 Hz it would grow without end."""


def corrupt_sound(audio: Audio, name: str, severity: int, rng: np.random.Generator) -> Audio:
    """One corruption of a recording.

    Args:
        name: one of `robustness_settings.SOUNDS`.
        severity: 1 to 5.
        rng: where noise and echoes come from.
    """
    at, samples = severity - 1, audio.samples.astype(np.float64)
    if name == "white-noise":
        return _audio(with_noise(samples, rng.standard_normal(len(samples)), SNR_DB[at]), audio.rate)
    if name == "pink-noise":
        return _audio(with_noise(samples, pink_noise(len(samples), audio.rate, rng), SNR_DB[at]), audio.rate)
    if name == "reverberation":
        return _audio(reverberated(samples, echo(RT60_SECONDS[at], audio.rate, rng)), audio.rate)
    return at_speed(audio, 1 + SPEED_SHARE[at] * (1 if name == "faster" else -1))


def power(samples: np.ndarray) -> float:
    """The mean square."""
    return float(np.mean(np.square(samples, dtype=np.float64)))


def with_noise(samples: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Samples with noise, scaled so that over the whole recording 10 log10(power / noise power) is ``snr_db``. (N,).

    A silent recording stays silent: no noise has a ratio to it.
    """
    own = power(noise)
    wanted = power(samples) / 10 ** (snr_db / 10)
    return np.asarray(samples + noise * math.sqrt(wanted / own) if own > 0 else samples)


def pink_noise(count: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Noise whose power falls as 1/f: white noise whose spectrum is divided by the root of the frequency. (N,)."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    frequencies = np.fft.rfftfreq(count, 1 / rate)
    return np.asarray(np.fft.irfft(spectrum / np.sqrt(np.maximum(frequencies, PINK_FROM_HZ)), count))


def echo(rt60_seconds: float, rate: int, rng: np.random.Generator) -> np.ndarray:
    """A room's impulse response: the direct sound, then normal noise that falls by 60 dB in the reverberation time (Moorer
    1979, "About this reverberation business"), with as much energy as the direct sound. (T,), T as long as that time.
    """
    count = max(2, round(rt60_seconds * rate))
    tail = rng.standard_normal(count) * 10 ** (-3 * np.arange(count) / (rt60_seconds * rate))
    tail[0] = 0.0
    tail /= math.sqrt(float(np.sum(tail**2)))
    tail[0] = 1.0
    return np.asarray(tail)


def reverberated(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Samples in a room, cut at their old length, as loud as before. (N,)."""
    found = signal.fftconvolve(samples, response)[: len(samples)]
    own = power(found)
    return np.asarray(found * math.sqrt(power(samples) / own) if own > 0 else samples)


def at_speed(audio: Audio, speed: float) -> Audio:
    """The recording played at another speed: shorter and higher above 1, longer and lower below."""
    if len(audio.samples) < 2:
        return audio
    samples = soxr.resample(audio.samples, audio.rate * speed, audio.rate, quality="HQ")
    return audio if not len(samples) else Audio(np.asarray(samples, dtype=np.float32), audio.rate)


def _audio(samples: np.ndarray, rate: int) -> Audio:
    return Audio(np.asarray(samples, dtype=np.float32), rate)
