"""The synthetic tone speech: determinism, disjoint splits, and tones that are the words'."""

import subprocess
import sys
from typing import get_args

import numpy as np
import pytest

from mmcompress.data.examples import Examples
from mmcompress.data.sources import load_source
from mmcompress.data.synthetic import Split, split_of
from mmcompress.data.tones import LONGEST_SECONDS, PITCHES, RATE, SPEAKERS, WORDS, Speaker, Tones
from mmcompress.errors import DataError
from mmcompress.recipe import Source

SPLITS: tuple[Split, ...] = get_args(Split)


def test_a_row_depends_on_seed_split_and_index_alone() -> None:
    few, many = Tones("train", 4, seed=3), Tones("train", 4000, seed=3)
    for i in (3, 0):
        assert few[i]["text"] == many[i]["text"] == many.text(i)
        assert few[i]["speaker"] == many[i]["speaker"]
        np.testing.assert_array_equal(few[i]["audio"].samples, many[i]["audio"].samples)
    assert [row["text"] for row in few[:]] == [many.text(i) for i in range(4)]
    np.testing.assert_array_equal(few[-1]["audio"].samples, few[3]["audio"].samples)
    assert [Tones("train", 4, seed=4).text(i) for i in range(4)] != [few.text(i) for i in range(4)]


def test_rows_are_the_same_in_another_process() -> None:
    code = "from mmcompress.data.tones import Tones; r = Tones('test', 9)[5]; print(r['text'], float(r['audio'].samples.sum()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    row = Tones("test", 9)[5]
    assert found == [*row["text"].split(), str(float(row["audio"].samples.sum()))]


def test_rows_are_the_published_ones() -> None:
    """Scores in model cards and docs rest on these rows, so a change of the generator must be a deliberate one."""
    row = Tones("test", 1)[0]
    assert (row["text"], row["speaker"], len(row["audio"].samples)) == ("golf alpha quebec foxtrot", 239, 20_734)
    assert row["audio"].samples[:3] == pytest.approx([0.00290643, -0.03664442, -0.03899059], abs=1e-6)


def test_splits_share_no_sentence_and_no_speaker_and_each_has_every_word() -> None:
    texts, speakers = {}, {}
    for split in SPLITS:
        data = Tones(split, 1500)
        texts[split] = {data.text(i) for i in range(1500)}
        speakers[split] = {row["speaker"] for row in data[:60]}
        assert {word for text in texts[split] for word in text.split()} == set(WORDS)
        assert {len(text.split()) for text in texts[split]} == {1, 2, 3, 4}
        assert all(split_of(text) == split for text in texts[split])
        assert speakers[split] <= set(SPEAKERS[split])
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not texts[one] & texts[other]
        assert not set(SPEAKERS[one]) & set(SPEAKERS[other])
    assert len(SPEAKERS["test"]) >= 20  # enough to cluster intervals by speaker


def test_words_differ() -> None:
    assert len(set(WORDS.values())) == len(WORDS) == 16
    # Neighbouring tones of a word differ, or they would be one long tone.
    assert all(a != b and b != c for a, b, c in WORDS.values())
    nearest = [min(sum(x != y for x, y in zip(a, b, strict=True)) for b in WORDS.values() if b != a) for a in WORDS.values()]
    assert nearest.count(1) >= 6


def test_recordings_fit_their_window_and_full_scale() -> None:
    for row in Tones("train", 200)[:]:
        assert row["audio"].rate == RATE
        assert 0.2 < row["audio"].seconds <= LONGEST_SECONDS
        assert row["audio"].samples.dtype == np.float32
        assert 0.1 < np.abs(row["audio"].samples).max() <= 1


def test_the_tones_are_the_words() -> None:
    """In single-word rows, the strongest frequency of each third of the loud part is the word's tone in the speaker's key."""
    data, right, total = Tones("train", 400), 0, 0
    for i in range(400):
        if " " in data.text(i):
            continue
        row = data[i]
        samples = row["audio"].samples
        power = np.convolve(samples**2, np.ones(400) / 400, "same")
        loud = np.flatnonzero(power > 0.4 * np.quantile(power, 0.95))
        thirds = np.array_split(samples[loud[0] : loud[-1]], 3)
        key = Speaker.number(row["speaker"]).key
        for part, k in zip(thirds, WORDS[row["text"]], strict=True):
            middle = part[len(part) // 5 : -len(part) // 5] * np.hanning(len(part[len(part) // 5 : -len(part) // 5]))
            spectrum = np.abs(np.fft.rfft(middle, 32_768))
            hertz = np.arange(len(spectrum)) * RATE / 32_768
            band = (hertz > 330) & (hertz < 950)
            heard = hertz[band][spectrum[band].argmax()] / key
            right += int(np.abs(np.log(np.array(PITCHES) / heard)).argmin() == k)
            total += 1
    assert total >= 60
    assert right / total > 0.9


@pytest.mark.parametrize(("split", "count"), [("dev", 5), ("train", 0)])
def test_wrong_arguments(split: Split, count: int) -> None:
    with pytest.raises(ValueError, match="tones: "):
        Tones(split, count)
    with pytest.raises(IndexError):
        Tones("train", 3)[3]


def test_as_a_data_source() -> None:
    found = load_source(Source(path="bundled:tones", samples=5), "eval", 0)
    assert isinstance(found, Examples)
    assert (len(found), found.synthetic, found.kind, found.classes) == (5, True, "audio", None)
    assert found.columns == {"audio": "audio", "text": "text", "speaker": "speaker"}
    row = found[2]
    assert (row["text"], row["audio"].rate) == (Tones("test", 5).text(2), RATE)
    with pytest.raises(DataError, match="did you mean 'tones'"):
        load_source(Source(path="bundled:tone"), "eval", 0)
