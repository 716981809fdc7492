"""Synthetic speech: recordings of made-up words, each a short sequence of tones.

Everything here is made up by this file: no voice, no recording and no downloaded data is involved. A score on this data
says whether a compression step works, and nothing about how a model does on real speech.

A sentence has one to four of 16 words. A word is three tones out of six pitches; many words differ from another one in a
single tone. A speaker has a key (all pitches higher or lower), a timbre (how strong the overtones are) and a tempo; from
row to row pitches waver, pauses differ, and there is noise.

The sentences (not the rows) are split 80/10/10 by a hash of their words, and every split has speakers of its own, so no
sentence and no speaker of one split is ever heard in another, while every word occurs in all three.
"""

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmcompress.data.audio import Audio
from mmcompress.data.synthetic import Synthetic, split_of

RATE = 16_000
"""Samples a second."""

LONGEST_SECONDS = 2.0
"""No recording is longer."""

PITCHES = tuple(400.0 * 2 ** (2.5 * k / 12) for k in range(6))
"""The six tones in hertz, two and a half semitones apart, before a speaker's key shifts them."""

WORDS: dict[str, tuple[int, int, int]] = {
    "alpha": (0, 2, 4),
    "bravo": (0, 2, 5),
    "charlie": (0, 4, 2),
    "delta": (1, 4, 2),
    "echo": (1, 3, 5),
    "foxtrot": (1, 3, 0),
    "golf": (2, 0, 3),
    "hotel": (2, 0, 5),
    "india": (2, 5, 1),
    "kilo": (3, 5, 1),
    "lima": (3, 1, 4),
    "mike": (4, 1, 3),
    "november": (4, 2, 0),
    "oscar": (5, 2, 0),
    "papa": (5, 3, 1),
    "quebec": (5, 0, 4),
}
"""Each word's tones, as numbers of pitches."""

SPEAKERS: dict[str, range] = {"train": range(200), "validation": range(200, 220), "test": range(220, 260)}
"""The speakers of each split, by number."""

_LENGTHS = (1, 2, 2, 3, 3, 3, 4, 4, 4, 4)
_RAMP_SECONDS = 0.008


@dataclass(frozen=True)
class Speaker:
    """What is the same in all recordings of one speaker.

    Attributes:
        key: a factor on all pitches, up to one semitone up or down.
        overtones: how strong the second and the third partial are against the first.
        tone_seconds: how long a tone is, before it varies.
    """

    key: float
    overtones: tuple[float, float]
    tone_seconds: float

    @staticmethod
    def number(n: int) -> "Speaker":
        """Speaker ``n``, who sounds the same whatever the seed of the data."""
        rng = random.Random(f"speaker {n}")
        key = 2 ** (rng.uniform(-1, 1) / 12)
        return Speaker(key, (rng.uniform(0.1, 0.7), rng.uniform(0.0, 0.4)), rng.uniform(0.075, 0.105))


class Tones(Synthetic[dict[str, Any]]):
    """A split of the synthetic tone speech; rows are rendered when they are asked for.

    Row `i` depends on `(seed, split, i)` alone: it is the same whatever `count` is and in whatever order rows are read.

    A row has `audio` (`Audio`, 16 kHz, at most 2 seconds), `text` (one to four of `WORDS`) and `speaker` (a number).

    Args:
        split: `train`, `validation` or `test`; they share no sentence and no speaker.
        count: Number of rows, at least 1.
        seed: Another seed gives other rows by the same speakers.

    Raises:
        ValueError: For an unknown split or a count below 1.
    """

    def _row(self, place: int) -> dict[str, Any]:
        text, speaker, rng = self._draw(place)
        return {"audio": _render(text, Speaker.number(speaker), rng), "text": text, "speaker": speaker}

    def text(self, index: int) -> str:
        """The sentence of a row, without rendering its recording."""
        return self._draw(self._place(index))[0]

    def _draw(self, place: int) -> tuple[str, int, random.Random]:
        """The row's sentence and speaker, and the generator that everything else about the row is drawn from."""
        # Seeding with a string goes through SHA-512, so rows are the same in every process and Python version.
        rng = random.Random(f"tones/{self.seed}/{self.split}/{place}")
        names, text = tuple(WORDS), ""
        while not text or split_of(text) != self.split:
            length = _LENGTHS[int(rng.random() * len(_LENGTHS))]
            text = " ".join(names[int(rng.random() * len(names))] for _ in range(length))
        speakers = SPEAKERS[self.split]
        return text, speakers[int(rng.random() * len(speakers))], rng


def _render(text: str, speaker: Speaker, rng: random.Random) -> Audio:
    """The sentence as sound: silence, words with pauses between them, silence; then noise over all of it."""
    words = text.split()
    # Four slow words must fit: three pauses, and silence at both ends.
    longest = (LONGEST_SECONDS - 0.5) / (3 * len(words))
    parts = [np.zeros(round(rng.uniform(0.02, 0.1) * RATE))]
    loud = rng.uniform(0.15, 0.5)
    for word in words:
        for k in WORDS[word]:
            seconds = min(speaker.tone_seconds * rng.uniform(0.85, 1.15), longest)
            hertz = PITCHES[k] * speaker.key * 2 ** (rng.gauss(0, 0.25) / 12)
            parts.append(_tone(hertz, seconds, speaker.overtones) * loud * rng.uniform(0.7, 1.0))
        parts.append(np.zeros(round(rng.uniform(0.04, 0.1) * RATE)))
    samples = np.concatenate(parts)
    decibels = rng.uniform(3, 25)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, loud / math.sqrt(2) * 10 ** (-decibels / 20), len(samples))
    return Audio((samples + noise).clip(-1, 1).astype(np.float32), RATE)


def _tone(hertz: float, seconds: float, overtones: tuple[float, float]) -> np.ndarray:
    """A tone with two overtones, shape (N,), whose ends rise and fall so that they do not click."""
    count = round(seconds * RATE)
    phase = 2 * math.pi * hertz * np.arange(count) / RATE
    wave = np.sin(phase) + overtones[0] * np.sin(2 * phase) + overtones[1] * np.sin(3 * phase)
    ramp = np.minimum(1.0, np.arange(1, count + 1) / (_RAMP_SECONDS * RATE))
    found: np.ndarray = wave / (1 + sum(overtones)) * ramp * ramp[::-1]
    return found
