"""The parts on behaviour and calibration: in all views, escaped, with media in the page or a word in their place."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest

from mmcompress.measure.calibration import calibration as measured
from mmcompress.report.html import render_html
from mmcompress.report.markdown import render_markdown
from mmcompress.report.reliability import reliability
from mmcompress.report.schema import Change, Report
from mmcompress.report.schema_behaviour import (
    Agreement,
    Alignment,
    AlignmentChange,
    Answer,
    Behaviour,
    Drift,
    Estimate,
    ExchangedAnswers,
    Flips,
    GalleryEntry,
    Slice,
    Slices,
)
from mmcompress.report.sections import Run, _gallery, behaviour, calibration
from mmcompress.report.text import bad_news, render_text
from tests.report import examples
from tests.report.test_report_html import Page

PNG = b"\x89PNG made up"


def estimate(value: float, half: float = 0.01, n: int = 500) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def entries(media: str | None = "measurements/media/0000007.png") -> list[GalleryEntry]:
    before, after = Answer(text="cat", confidence=0.9, right=True), Answer(text=examples.HOSTILE, confidence=None, right=False)
    return [
        GalleryEntry(index=7, kind="right to wrong", media=media, text="what is it?", truth="cat", before=before, after=after),
        GalleryEntry(index=8, kind="other answer", media=None, truth=examples.HOSTILE, before=after, after=after),
    ]


def changed(**parts: object) -> Behaviour:
    alignment = Alignment(matched=estimate(0.3), unmatched=estimate(0.1), margin=estimate(0.2), gap=0.8)
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((300, 4)), rng.integers(0, 4, 300)
    found = Behaviour(
        flips=Flips(
            n=500, right_means="so", right_to_wrong=9, wrong_to_right=4, wrong_to_other=2, share=estimate(0.03),
        ),
        gallery=entries(),
        slices=Slices(metric="accuracy", looked_at=9, tested=8, worst=[
            a_slice("dark pictures (brightness up to 0.20)", "brightness"), a_slice("class cat", "class", small=True),
        ]),
        exchanged=[ExchangedAnswers(one="cat", two="dog", one_as_two=3, n_one=50, two_as_one=2, n_two=60, swapped=False)],
        agreement=Agreement(kl=estimate(0.02), top1=estimate(0.97), top5=estimate(0.98), ranked={"image_to_text": estimate(0.9)}),
        drift={"vision": Drift(cosine=None, cka=estimate(0.95), width=64), examples.HOSTILE: Drift(width=3)},
        alignment=alignment,
        alignment_change=AlignmentChange(before=alignment, margin=estimate(0.0)),
        calibration=measured(logits, labels, baseline=logits / 3),
        left_out=[f"Left out: {examples.HOSTILE}"],
    )  # fmt: skip
    return found.model_copy(update=parts)


def a_slice(name: str, by: str, small: bool = False, worse: bool = False) -> Slice:
    return Slice(
        by=by, name=name, n=12 if small else 120, before=0.9, after=0.7, change=estimate(-0.2, 0.05), rest=0.01,
        p_value=None if small else 0.0001, p_adjusted=None if small else 0.0004, small=small, worse_than_rest=worse,
    )  # fmt: skip


def report(found: Behaviour, before: Behaviour | None = None) -> Report:
    full = examples.full()
    rows = [r.model_copy(update={"behaviour": found if r.runtime == "openvino" else before}) for r in full.rows]
    return full.model_copy(update={"rows": rows})


def test_the_parts_are_in_every_view_and_escaped(tmp_path: Path) -> None:
    made = report(changed())
    page = render_html(made, tmp_path)
    Page(page)
    assert examples.HOSTILE not in page
    assert "<script" not in page
    for view in (page, render_markdown(made, tmp_path), render_text(made)):
        for words in (
            "What changed underneath",
            "went from right to wrong",
            "dark pictures (brightness up to 0.20)",
            "too few to say",
        ):
            assert words in view
        assert "Calibration" in view
        assert "mean confidence" in view
    assert all(len(line) <= 110 for line in render_text(made).splitlines())
    assert "modality" not in page


def test_without_behaviour_there_is_no_part() -> None:
    for name, make in examples.ALL.items():
        assert behaviour.section(make(), None) is None, name
        assert calibration.section(make(), None) is None, name
        assert behaviour.alerts(make()) == calibration.alerts(make()) == []


def test_media_lie_in_the_page_where_they_are_there(tmp_path: Path) -> None:
    place = tmp_path / "measurements" / "media"
    place.mkdir(parents=True)
    (place / "0000007.png").write_bytes(PNG)
    (place / "0000009.flac").write_bytes(b"fLaC made up")
    found = _gallery.gallery_html(entries(), tmp_path, "x")
    assert f'src="data:image/png;base64,{base64.b64encode(PNG).decode()}"' in found
    assert 'alt="Row 7: cat"' in found
    heard = _gallery.gallery_html(entries("measurements/media/0000009.flac"), tmp_path, "x")
    assert '<audio controls preload="none" src="data:audio/flac;base64,' in heard
    assert 'aria-label="Recording of row 7"' in heard


@pytest.mark.parametrize("folder", [None, Path("not/there")])
def test_without_the_folder_a_word_stands_for_them(folder: Path | None) -> None:
    assert "The picture is not kept here." in _gallery.gallery_html(entries(), folder, "x")


def test_what_is_too_large_is_left_out_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "measurements" / "media"
    place.mkdir(parents=True)
    (place / "0000007.png").write_bytes(PNG * 10_000)
    assert "too large for this page" in _gallery.gallery_html(entries(), tmp_path, "x")
    (place / "0000007.png").write_bytes(PNG)
    monkeypatch.setattr(_gallery, "ROOM", 3)
    assert "too large for this page" in _gallery.gallery_html(entries(), tmp_path, "x")


def test_a_report_from_elsewhere_reads_no_file_outside_of_its_media(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    found = _gallery.gallery_html(entries("../../secret.png"), tmp_path / "run", "x")
    assert "base64" not in found


def test_failing_slices_and_swaps_are_told_and_a_swapped_class_not_twice() -> None:
    worst = [a_slice(f"slice {i}", "city", worse=True) for i in range(5)] + [a_slice("class cat", "class", worse=True)]
    swap = ExchangedAnswers(one="cat", two="dog", one_as_two=45, n_one=50, two_as_one=50, n_two=60, swapped=True)
    found = changed(slices=Slices(metric="accuracy", looked_at=9, tested=8, worst=worst), exchanged=[swap])
    texts = [a.text for a in behaviour.alerts(report(found))]
    assert texts[0].startswith("“cat” and “dog” look swapped: of 50 that the baseline calls cat this model calls 45 dog")
    assert [t.split(":")[0] for t in texts[1:4]] == [f"Clearly worse on slice {i}" for i in range(3)]
    assert texts[4] == "2 more slices lost clearly more than the rest; see the table."
    assert "changed by -20.0 points (95% interval -25.0 to -15.0), all others by +1.0 points" in texts[1]
    assert set(texts) <= {a.text for a in bad_news(report(found))}


def test_flips_behind_an_unchanged_metric_are_told() -> None:
    flips = Flips(n=500, right_means="so", right_to_wrong=40, wrong_to_right=38, share=estimate(0.2))
    found = changed(flips=flips)
    assert any("16% of the answers turned" in a.text for a in behaviour.alerts(report(found)))
    made = report(found)
    final = next(r for r in made.rows if r.runtime == "openvino")
    final.change["accuracy"] = Change.model_validate(final.change["accuracy"].model_dump() | {"verdict": "worse"})
    assert not any("of the answers turned" in a.text for a in behaviour.alerts(made))


def test_over_confidence_is_told_by_interval_only() -> None:
    over = changed()
    assert [a.tone for a in calibration.alerts(report(over))] == ["bad"]
    assert over.calibration is not None
    change = over.calibration.changes["over_confidence"]
    unsure = change.model_copy(update={"low": -0.01})
    weak = over.calibration.model_copy(update={"changes": {"over_confidence": unsure}})
    assert calibration.alerts(report(changed(calibration=weak))) == []


def test_the_diagram_says_its_numbers() -> None:
    found = changed().calibration
    assert found is not None
    picture = reliability(found.as_it_is.bins, "A <title>", "key", 0)
    assert 'id="key-title">A &lt;title&gt;<' in picture
    full = [b for b in found.as_it_is.bins if b.n]
    assert picture.count("answers</title>") == len(full)
    assert f"right of {full[-1].n:,}" in picture


def test_runs_side_by_side() -> None:
    runs = [Run("one", report(changed()), None), Run("two", examples.full(), None)]
    for part in (behaviour, calibration):
        section = part.compare(runs)
        assert section is not None
        assert "one" in section.text
        assert "two" not in section.text
        assert part.compare(runs[1:]) is None
