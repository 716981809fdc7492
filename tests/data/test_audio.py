"""Decoding and resampling of recordings, against scipy and against what was written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from scipy import signal

from mmcompress.data.audio import MOST_SAMPLES, Audio, decode_audio, resample
from mmcompress.errors import DataError

RATE = 16_000


def tone(hertz: float, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, kind: str = "WAV", subtype: str | None = None, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "subtype", "gap"), [
    ("WAV", "FLOAT", 0.0), ("WAV", "PCM_16", 1e-4), ("FLAC", "PCM_24", 1e-6), ("OGG", "VORBIS", 0.05), ("OGG", "OPUS", 0.05),
])  # fmt: skip
def test_formats_give_back_what_was_written(kind: str, subtype: str, gap: float) -> None:
    samples = tone(440)
    found = decode_audio(encoded(samples, kind, subtype), "row 0")
    assert found.rate == RATE
    assert found.samples.dtype == np.float32
    assert found.samples.shape == samples.shape
    assert np.abs(found.samples - samples)[1000:-1000].max() <= gap


def test_mp3_decodes() -> None:
    # An encoder's delay shifts the samples, so the pitch is compared: the strongest frequency of the middle.
    found = decode_audio(encoded(tone(440, 1.0), "MP3"), "row 0")
    middle = found.samples[4000:12_000]
    assert np.argmax(np.abs(np.fft.rfft(middle))) * found.rate / len(middle) == pytest.approx(440, abs=3)


def test_channels_are_mixed_by_their_mean() -> None:
    left, right = tone(300), tone(700)
    found = decode_audio(encoded(np.stack([left, right], axis=1), subtype="FLOAT"), "row 0")
    np.testing.assert_allclose(found.samples, (left + right) / 2, atol=1e-7)


def test_all_kinds_of_records(tmp_path: Path) -> None:
    samples = tone(440)
    data = encoded(samples, subtype="FLOAT")
    (tmp_path / "a.wav").write_bytes(data)
    values: list[Any] = [
        data, "a.wav", Path("a.wav"), {"bytes": data, "path": None}, {"bytes": None, "path": "a.wav"}, Audio(samples, RATE),
        {"array": samples, "sampling_rate": RATE}, {"array": samples.tolist(), "sampling_rate": float(RATE)},
        {"array": np.stack([samples, samples]), "sampling_rate": RATE},
        {"array": np.stack([samples, samples], axis=1), "sampling_rate": RATE},
    ]  # fmt: skip
    for value in values:
        found = decode_audio(value, "row 0", tmp_path)
        assert found.rate == RATE
        np.testing.assert_allclose(found.samples, samples, atol=1e-7)


def test_sixteen_bit_arrays_are_brought_to_full_scale() -> None:
    found = decode_audio({"array": np.array([-32_768, 16_384], dtype=np.int16), "sampling_rate": 8_000}, "row 0")
    assert found.samples.tolist() == [-1.0, 0.5]


def str_or_value(value: Any) -> str:
    """A name for a parameter that is the same in every process: a float WAV holds the time it was made at."""
    return value if isinstance(value, str) else "value"


NAN = np.array([0.0, np.nan, 0.1, np.inf], dtype=np.float32)


@pytest.mark.parametrize(("value", "said"), [
    (b"RIFF and then nothing of use", "does not decode"),
    (b"", "does not decode"),
    ("gone.wav", "there is no file"),
    ({"bytes": None}, "does not decode"),
    (7, "int is no recording; allowed: WAV, FLAC"),
    (None, "NoneType is no recording"),
    (encoded(np.zeros(0, dtype=np.float32)), "is empty"),
    (encoded(NAN, subtype="FLOAT"), "holds 2 samples that are NaN or infinite"),
    ({"array": NAN, "sampling_rate": RATE}, "holds 2 samples that are NaN or infinite"),
    ({"array": tone(9)}, "does not decode"),
    ({"array": tone(9), "sampling_rate": 0}, "allowed: 1,000 to 768,000"),
    ({"array": tone(9), "sampling_rate": 16_000.5}, "whole number of hertz"),
    ({"array": tone(9), "sampling_rate": float("nan")}, "whole number of hertz"),
    ({"array": tone(9), "sampling_rate": "16000"}, "whole number of hertz"),
    (encoded(tone(9), rate=7), "is 7 Hz; allowed: 1,000"),
    ({"array": [1, 2, 3], "sampling_rate": RATE}, "has no full scale"),
    ({"array": ["a"], "sampling_rate": RATE}, "allowed: numbers"),
    ({"array": np.zeros((2, 2, 2)), "sampling_rate": RATE}, "3 dimensions"),
    ({"array": [[1.0], [1.0, 2.0]], "sampling_rate": RATE}, "does not decode"),
], ids=str_or_value)  # fmt: skip
def test_what_is_no_recording_is_refused_with_its_place(value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as e:
        decode_audio(value, "data.eval (x.parquet), row 3, column 'audio'", tmp_path)
    assert str(e.value).startswith("data.eval (x.parquet), row 3, column 'audio': ")
    assert said in str(e.value)
    assert "object at 0x" not in str(e.value)


def test_a_header_that_promises_too_much_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(np.zeros(5_000, dtype=np.float32), "FLAC")
    monkeypatch.setattr("mmcompress.data.audio.MOST_SAMPLES", 4_999)
    assert MOST_SAMPLES > 4_999
    with pytest.raises(DataError, match="unpacks to 5,000 samples"):
        decode_audio(data, "row 0")


def test_resampling_against_scipy() -> None:
    # A chirp up to 2 kHz lies well below both band limits, so two good filters agree.
    seconds = np.arange(44_100) / 44_100
    chirp = (signal.chirp(seconds, 100, 1.0, 2_000) * signal.windows.tukey(44_100, 0.2)).astype(np.float32)
    ours = resample(Audio(chirp, 44_100), 16_000)
    theirs = signal.resample_poly(chirp, 160, 441, window=("kaiser", 12.0))
    assert ours.rate == 16_000
    assert len(ours.samples) == 16_000
    assert ours.samples.dtype == np.float32
    assert np.abs(ours.samples - theirs).max() < 2e-3


def test_resampling_leaves_out_what_the_new_rate_cannot_hold() -> None:
    # 7 kHz would fold to 1 kHz at 8 kHz if samples were just dropped.
    assert np.abs(tone(7_000)[::2]).max() > 0.4
    assert np.abs(resample(Audio(tone(7_000), RATE), 8_000).samples[200:-200]).max() < 1e-3


def test_resampling_to_the_same_rate_changes_nothing() -> None:
    audio = Audio(tone(440), RATE)
    assert resample(audio, RATE) is audio


def test_resampling_to_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="has none at 1,000 Hz"):
        resample(Audio(np.zeros(1, dtype=np.float32), 96_000), 1_000)
