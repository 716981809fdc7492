"""Calibration on nothing, on one picture or on noise is refused with the reason; real data is not."""

import numpy as np
import pytest

from mmcompress.quantization.calibration_data import CalibrationJudge, _correlation


def judged(*batches):
    judge = CalibrationJudge("vision_model")
    assert len(list(judge.watch(batches))) == len(batches)
    return judge.problem()


def smooth_pictures(count: int, seed: int = 0) -> np.ndarray:
    """Random walks along both axes: neighbours are alike, as in photographs."""
    return np.random.default_rng(seed).normal(size=(count, 3, 16, 16)).cumsum(-1).cumsum(-2).astype(np.float32)


def pixels(values):
    return {"pixel_values": np.asarray(values, dtype=np.float32)}


def plain(count: int) -> np.ndarray:
    """Plain colours with a little noise."""
    draw = np.random.default_rng(0)
    return draw.normal(size=(count, 3, 1, 1)) + 0.05 * draw.normal(size=(count, 3, 16, 16))


def test_pictures_are_taken():
    assert judged(pixels(smooth_pictures(8)), pixels(smooth_pictures(8, 1))) is None
    assert judged(pixels(plain(16))) is None


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "has nothing for vision_model"),
        ([pixels(np.full((16, 3, 8, 8), 0.5))], "is one constant in all 16 examples"),
        ([pixels(np.random.default_rng(0).normal(size=(16, 3, 16, 16)))], "is white noise"),
        ([pixels(np.random.default_rng(0).uniform(size=(8, 3, 16, 16)))] * 3, "is white noise"),
        ([pixels(smooth_pictures(4))] * 5, "has 4 different examples among 20"),
        ([{"input_ids": np.array([[1, 9]] * 4), "attention_mask": np.ones((4, 2))}], "all 4 texts are empty"),
        ([{"input_ids": np.array([[1, 9, 0]] * 4), "attention_mask": np.array([[1, 1, 0]] * 4)}], "all 4 texts are empty"),
    ],
)
def test_what_tells_nothing_is_refused(batches, words):
    assert words in judged(*batches)


def test_texts_are_taken():
    assert judged({"input_ids": np.array([[1, 5, 9], [1, 6, 9]]), "attention_mask": np.ones((2, 3))}) is None
    assert judged({"input_ids": np.array([[1, 5, 9]]), "attention_mask": np.ones((1, 3))}) is None


def test_correlation_is_numpys():
    values = smooth_pictures(5)[:, :1]
    rows = values[..., :-1].ravel(), values[..., 1:].ravel()
    judge = CalibrationJudge("vision_model")
    list(judge.watch([pixels(values[:2]), pixels(values[2:])]))
    assert _correlation(judge._inputs["pixel_values"].sums) == pytest.approx(np.corrcoef(*rows)[0, 1], rel=1e-6)
