"""The formulas behind what changed underneath: agreement, exchanges, drift, slices."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax, rel_entr

from mmcompress.measure import agreement, drift, slices, slicing
from mmcompress.measure.slicing import Group
from mmcompress.tasks._observed import Observed, alignment, from_arrays, nearest, some, to_arrays
from mmcompress.tasks._watch import Watched
from mmcompress.tasks.base import Scores


def test_kl_by_hand_and_against_scipy() -> None:
    p, q = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
    assert agreement.kl(np.log(p), np.log(q))[0] == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1))
    rng = np.random.default_rng(0)
    a, b = (log_softmax(rng.standard_normal((20, 6)), axis=1) for _ in range(2))
    assert np.allclose(agreement.kl(a, b), rel_entr(np.exp(a), np.exp(b)).sum(axis=1))
    assert agreement.kl(a, a).max() == 0


def test_shared_candidates_by_hand() -> None:
    a, b = np.array([[3, 1, 2], [0, 1, 2]]), np.array([[1, 3, 9], [7, 8, 9]])
    assert agreement.shared(a, b) == pytest.approx([2 / 3, 0])
    scores = np.array([[0.1, 0.9, 0.5]])
    assert nearest(scores, 2).tolist() == [[1, 2]]
    assert agreement.top_k_overlap(scores, -scores, 2)[0] == pytest.approx(0.5)


def test_swapped_answers_are_found_and_confused_ones_are_not() -> None:
    names = ["cat", "dog", "fox"]
    before = np.repeat([0, 1, 2], 20)
    after = before.copy()
    after[:18], after[20:39] = 1, 0
    found = agreement.exchanges(before, after, names)[0]
    assert (found.one, found.two, found.one_as_two, found.two_as_one, found.swapped) == ("cat", "dog", 18, 19, True)
    after = before.copy()
    after[:20] = 1  # all cats are dogs, but dogs stay dogs: a class lost, not two swapped
    assert agreement.exchanges(before, after, names) == []
    after[20:26] = 0
    assert [e.swapped for e in agreement.exchanges(before, after, names)] == [False]


def test_three_examples_are_too_few_for_a_swap() -> None:
    before = np.array([0, 0, 1, 1, 2, 2, 2, 2])
    after = np.array([1, 0, 0, 1, 2, 2, 2, 2])
    assert not any(e.swapped for e in agreement.exchanges(before, after, ["a", "b", "c"]))


def test_cosines_by_hand() -> None:
    a, b = np.array([[1.0, 0], [1, 1], [0, 0]]), np.array([[0.0, 2], [3, 3], [1, 0]])
    assert drift.cosines(a, b) == pytest.approx([0, 1, 0])


def test_cka_by_hand() -> None:
    # Centred x = (-1, 1), y = (-2, 2): one is the other scaled. Against (1, 1), which does not vary, there is nothing.
    x = np.array([[0.0], [2.0]])
    assert drift.linear_cka(x, 2 * x)[0] == pytest.approx(1)
    assert np.isnan(drift.linear_cka(x, np.ones((2, 1)))[0])


def test_cka_against_its_gram_form() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((80, 7))
    y = np.concatenate([x[:, :3], rng.standard_normal((80, 2))], axis=1)
    centring = np.eye(80) - 1 / 80
    k, l = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring  # noqa: E741  (Kornblith's letters)
    value, low, high = drift.linear_cka(x, y)
    assert value == pytest.approx((k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()))
    assert low < value < high
    turn = np.linalg.qr(rng.standard_normal((7, 7)))[0]
    assert drift.linear_cka(x, 3 * x @ turn)[0] == pytest.approx(1)


def test_the_modality_gap_by_hand() -> None:
    assert drift.modality_gap(np.array([[2.0, 0]]), np.array([[0.0, 5]])) == pytest.approx(np.sqrt(2))


def test_alignment_by_hand() -> None:
    similarity = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.6]])
    matched, unmatched = alignment(similarity, np.array([[True, False, False], [False, True, True]]))
    assert matched == pytest.approx([0.9, 0.7])
    assert unmatched == pytest.approx([0.2, 0.2])


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .04 times 3, 2, 1 is .03 .04 .04; the order of the input stays.
    assert slices.holm(np.array([0.04, 0.01, 0.02])) == pytest.approx([0.04, 0.03, 0.04])
    assert slices.holm(np.array([0.6, 0.9])) == pytest.approx([1.0, 1.0])
    assert len(slices.holm(np.zeros(0))) == 0


def test_the_permutation_test_is_fishers_exact_test() -> None:
    # Gains of -1 and 0 only: the one-sided permutation test is Fisher's on the 2 x 2 table.
    gain, members = np.zeros(100), np.arange(100) < 30
    gain[:9] = gain[50:56] = -1
    exact = stats.fisher_exact([[9, 21], [6, 64]], alternative="greater").pvalue
    assert slices.p_lost_more(gain, members, np.ones(100)) == pytest.approx(exact, rel=0.15)


def test_the_other_test_is_welchs() -> None:
    rng = np.random.default_rng(2)
    gain, members = rng.standard_normal(200), np.arange(200) < 60
    gain[members] -= 0.4
    found = slices.p_lost_more(gain, members, np.ones(200))
    theirs = stats.ttest_ind(gain[members], gain[~members], equal_var=False, alternative="less").pvalue
    assert found == pytest.approx(theirs, rel=0.25)


def test_false_alarms_are_as_rare_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that lose at random: of 150 with 12 slices each, hardly one has a slice below an adjusted 0.01."""
    monkeypatch.setattr(slices, "DRAWS", 1_999)
    monkeypatch.setattr(slices, "MORE_DRAWS", 9_999)
    rng = np.random.default_rng(3)
    alarms = 0
    for _ in range(150):
        old = (rng.random(400) < 0.8).astype(float)
        new = np.where(rng.random(400) < 0.08, 1 - old, old)
        members = [np.arange(400) % 12 == i for i in range(12)]
        p = np.array([slices.p_lost_more(new - old, m, np.ones(400)) for m in members])
        alarms += slices.holm(p).min() < slices.SURE
    assert alarms <= 5


def test_clusters_make_a_slice_less_sure() -> None:
    rng = np.random.default_rng(4)
    speakers = np.repeat(np.arange(10), 20)
    gain = np.array([-1.5, 0.2, -0.6, 0, 1, -1, 0.5, -0.3, 0.8, 0])[speakers] + 0.05 * rng.standard_normal(200)
    members = speakers < 3
    alone, together = (slices.p_lost_more(gain, members, np.ones(200), c) for c in (None, speakers))
    assert alone < 1e-6
    assert 0.02 < together < 0.5


def _scores(values: np.ndarray, **more: np.ndarray) -> Scores:
    return Scores({"accuracy": values}, **more)  # type: ignore[arg-type]


def test_the_slice_that_fails_is_named_and_the_others_are_not() -> None:
    rng = np.random.default_rng(5)
    brightness = rng.random(400)
    old = np.ones(400)
    new = np.where(brightness < np.quantile(brightness, 0.25), (rng.random(400) < 0.4).astype(float), old)
    found = slicing.by_measure("brightness", brightness)
    assert [int(g.members.sum()) for g in found] == [100] * 4
    told = slices.worst_slices(_scores(new), _scores(old), "accuracy", False, found)
    assert told is not None
    assert [s.name.startswith("dark pictures (brightness up to 0.") for s in told.worst] == [True]
    worst = told.worst[0]
    assert worst.worse_than_rest
    assert worst.change.value == pytest.approx(new[found[0].members].mean() - 1)
    assert worst.rest == 0
    assert (told.looked_at, told.tested) == (4, 4)


def test_slices_of_error_rates_turn_the_sign_and_weigh_words() -> None:
    words = np.tile([2.0, 8.0], 50)
    old, new = np.zeros(100), np.zeros(100)
    group = Group("speaker", "speaker ann", np.arange(100) < 40)
    new[:40] = 0.5
    one = Scores({"wer": new}, weights={"wer": words})
    two = Scores({"wer": old}, weights={"wer": words})
    told = slices.worst_slices(one, two, "wer", True, [group, Group("speaker", "speaker bob", np.arange(100) >= 40)])
    assert told is not None
    assert [s.name for s in told.worst] == ["speaker ann"]
    assert told.worst[0].after == pytest.approx(0.5)
    assert told.worst[0].change.low is not None
    assert told.worst[0].change.low > 0


def test_small_slices_are_listed_with_a_caveat_and_never_tested() -> None:
    old, new = np.ones(100), np.ones(100)
    new[:10] = 0
    told = slices.worst_slices(_scores(new), _scores(old), "accuracy", False, [Group("class", "class a", np.arange(100) < 10)])
    assert told is not None
    assert (told.worst[0].small, told.worst[0].p_adjusted, told.tested) == (True, None, 0)


def test_equal_measures_make_no_slices_and_ties_stay_together() -> None:
    assert slicing.by_measure("pixels", np.full(50, 784.0)) == []
    found = slicing.by_measure("pixels", np.repeat([1.0, 2.0], [80, 20]))
    assert [int(g.members.sum()) for g in found] == [80, 20]
    assert slicing.by_value("city", ["x"] * 9, np.arange(9)) == []
    assert [g.name for g in slicing.by_value("city", ["b", None, "a"], np.arange(3))] == ["city a", "city b", "city missing"]


def test_what_was_observed_survives_a_file() -> None:
    seen = Observed(
        index=np.arange(3), right=np.array([True, False, True]), right_means="so", answers=np.array([1, 0, 1]),
        names=["a", "ü"], said=["x", "y", "z"], logits=np.eye(3, 2, dtype=np.float32), logit_rows=np.arange(3), scale=2.5,
        ranked={"image_to_text": np.array([[1, 0]])}, embeddings={"vision": np.ones((3, 4), dtype=np.float32)},
        matched=np.array([0.5, np.nan, 0.1]),
    )  # fmt: skip
    found = from_arrays(to_arrays(seen))
    assert found is not None
    for name, value in vars(seen).items():
        np.testing.assert_equal(getattr(found, name), value)
    assert from_arrays({"metric.accuracy": np.ones(3)}) is None


def test_what_is_kept_is_bounded_and_the_same_for_all() -> None:
    assert some(5, 10).tolist() == [0, 1, 2, 3, 4]
    rows = some(10_000, 100)
    assert len(set(rows.tolist())) == 100
    assert np.array_equal(rows, some(10_000, 100))


class _Encoder:
    runtime, components = "torch", ("vision_encoder", "decoder")

    def __call__(self, component: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"states": np.repeat(inputs["x"][:, None, :], 2, axis=1) + np.array([[[0.0], [2.0]]])}

    def cache(self, component: str) -> dict[str, tuple[int, int]]:
        return {"past": (1, 1)} if component == "decoder" else {}


def test_encoders_are_watched_and_decoders_are_not() -> None:
    watched = Watched(_Encoder(), 4)  # type: ignore[arg-type]
    for rows in ([0, 1], [2, 3]):
        watched.batch(rows)
        watched("vision_encoder", {"x": np.array(rows)[:, None].astype(float)})
        watched("decoder", {"x": np.ones((2, 1))})
        watched("vision_encoder", {"x": np.full((5, 1), 9.0)})  # tiles of pictures: no examples
    assert list(watched.embeddings()) == ["vision_encoder"]
    assert watched.embeddings()["vision_encoder"].ravel().tolist() == [1, 2, 3, 4]
