# ruff: noqa: RUF001  the pages use real minus and multiplication signs
from __future__ import annotations

import re
from html.parser import HTMLParser

import jinja2
import pytest

from mmcompress.report.format import _templates
from mmcompress.report.html import render_html
from mmcompress.report.tables import Table
from mmcompress.report.views import html_table, nice
from tests.report import examples

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Fails on wrong nesting; collects ids, attributes, tags and the text outside of styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, found))
        self.ids += [found["id"]] if found.get("id") else []  # type: ignore[list-item]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.mark.parametrize("name", examples.ALL)
def test_page_is_well_formed_self_contained_and_the_same_each_time(name: str) -> None:
    report = examples.ALL[name]()
    page = render_html(report)
    assert page == render_html(examples.ALL[name]())
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    for tag, attributes in parsed.tags:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        assert not {"srcset", "xlink:href"} & set(attributes)
        assert str(attributes.get("src", "data:")).startswith("data:")
        assert str(attributes.get("href", "#")).startswith("#")
        assert not [key for key in attributes if key.startswith("on")]
        pointed = f"{attributes.get('aria-labelledby') or ''}".split()
        assert set(pointed) <= set(parsed.ids)
    assert "url(" not in page
    assert "@import" not in page
    assert "http:" not in page
    assert "https:" not in page
    assert "None" not in parsed.text
    assert "nan" not in parsed.text.split()


@pytest.mark.parametrize("name", ["full", "bad", "half_finished"])
def test_tables_and_pictures_can_be_read_aloud(name: str) -> None:
    parsed = Page(render_html(examples.ALL[name]()))
    tables = [t for t in parsed.tags if t[0] == "table" and t[1].get("class") != "bars"]
    assert len([t for t in parsed.tags if t[0] == "caption"]) == len(tables) > 0
    assert all(a.get("scope") in {"row", "col", "colgroup"} for tag, a in parsed.tags if tag == "th")
    for tag, attributes in parsed.tags:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or (
                attributes.get("role") == "img" and attributes.get("aria-labelledby")
            )


def test_all_facts_are_on_the_page() -> None:
    text = Page(render_html(examples.full())).text
    for fact in [
        "clip-vit-base-patch32 is 81% smaller",
        "26% fewer",
        "151 → 112 M",
        "605 → 115 MB",
        "4.92× faster",
        "41.3 → 8.4 ms",
        "−0.7 points",
        "86.9% → 86.2%",
        "−1.4 to +0.02",
        "no clear difference",
        "n = 2,000",
        "1.42× from ONNX Runtime without any compression",
        "2.79× from compression",
        "1.24× from running in OpenVINO",
        "14.8 GFLOPs",
        "1.45 GB",
        "p90 9.1",
        "p99 11.0",
        "32 won, 46 lost",
        "21 min 4 s",
        "int8",
        "By this step baseline PyTorch 86.9% 1-prune PyTorch 61.2% −25.7 points",
        "top5",
        "Share of pictures whose label is among",
        "vision",
        "87.7 M",
        "3.1e-06",
        "0.9871000",
        "tram",
        "48 of 61",
        "Right after the cut the model is not usable",
        "not shown: accuracy may drop by 1.0 points",
        "met: accuracy may drop by 2.0 points",
        "calibrated on 256 examples",
        "examples_per_second: 71.2",
        "criterion: taylor",
        "AMD EPYC 9R14",
        "1.31.0",
        "mmcompress run recipe.yaml",
        "bootstrap",
        "order statistics",
        "process of its own",
        "Evaluated on data/test.parquet",
    ]:
        assert fact in text, fact
    assert "Synthetic" not in text
    assert "not finished" not in text


def test_error_rates_are_read_the_right_way_round() -> None:
    page = render_html(examples.speech())
    text = Page(page).text
    for fact in [
        "Quality: wer (lower is better)",
        "+1.2 points",
        "better is down",
        "wer (lower is better) Step Bar",
        "wer, % (lower is better)",
        "123.0%",
    ]:
        assert fact in text, fact
    assert "better is up" not in text
    # The steps' bars: the cut is off the scale and bad, distillation lowered the rate, quantization raised it.
    tones = re.findall(r'class="(?:whisker|mean) (\w+)" (?:x1|d)=', page)
    assert tones == ["bad", "good", "bad"]
    assert "picture" not in text.lower()
    assert "better is down" not in render_html(examples.full())


def test_bad_news_stand_before_the_picture() -> None:
    text = Page(render_html(examples.bad())).text
    first_screen = text[: text.index("Size, speed and quality")]
    for fact in [
        "1-prune was rolled back",
        "not smaller on disk: 3% larger",
        "slower than the baseline at batch 1: 1.26× slower",
        "at batch 8: 1.26× slower",
        "accuracy is clearly worse",
        "Gate missed: accuracy may drop by 1.0 points; it drops by 25.7",
        "Synthetic: the model or the data are made up",
    ]:
        assert fact in first_screen, fact
    assert "0.56× (slower) from compression" in text
    assert text.count("rolled back") > 3


def test_half_finished_run_says_so_and_shows_what_there_is() -> None:
    text = Page(render_html(examples.half_finished())).text
    assert "The run is not finished: 1 step measured so far" in text
    assert "14.40 MB" in text
    assert "33% less" in text
    assert "last so far" in text
    assert "No picture: quality was not measured yet." in text
    assert "final" not in re.findall(r"[\w-]+", text[text.index("Every model") :][:400])


def test_untrusted_names_stay_text() -> None:
    page = render_html(examples.hostile())
    assert "<script" not in page
    text = Page(page).text
    assert text.count("<script>alert('x')</script>|a\"b&c") > 15
    assert "</pre><script>" in text


def test_no_onnx_rows_no_claims_about_runtimes() -> None:
    text = Page(render_html(examples.torch_only())).text
    assert "ONNX Runtime" not in text.replace("the components’ files in ONNX", "")
    assert "the runtime's share was not measured" in text
    assert "none was judged." in text


def test_numbers_of_the_runtime_that_the_totals_speak_of() -> None:
    """The final row is the ONNX one although OpenVINO is faster: chip, words and bars must agree on it."""
    report = examples.full()
    totals = report.totals.model_copy(
        update={
            "final_runtime": "onnxruntime",
            "speedup": {b: g.model_copy(update={"total": 41.3 / 10.4}) for b, g in report.totals.speedup.items()},
        }
    )
    text = Page(render_html(report.model_copy(update={"totals": totals}))).text
    assert "41.3 → 10.4 ms" in text
    assert "41.3 → 8.4 ms" not in text
    assert "1.42× from ONNX Runtime without any compression, times 2.79× from compression, is 3.97× in all" in text


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_aa_in_both_themes() -> None:
    """WCAG 2 AA: 4.5 for text, 3 for shapes."""
    style = render_html(examples.empty())
    themes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", block)) for block in style.split(":root {")[1:3]]
    assert len(themes) == 2
    for colours in themes:
        for paper in ("bg", "card", "soft"):
            for ink in ("ink", "muted", "good", "bad", "caution", "accent"):
                assert _contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
        for tone in ("good", "bad", "caution"):
            assert _contrast(colours[tone], colours[f"{tone}-bg"]) >= 4.5
            assert _contrast(colours["ink"], colours[f"{tone}-bg"]) >= 4.5
        for i in range(9):
            assert _contrast(colours[f"s{i}"], colours["card"]) >= 3


def test_signs_are_set_in_numbers_only() -> None:
    assert nice("-0.6 points (-1.1 to +0.1), 2.79x faster") == "−0.6 points (−1.1 to +0.1), 2.79× faster"
    assert nice("3-quantize 2024-01-02 v1.2-3 0x1f 48x48") == "3-quantize 2024-01-02 v1.2-3 0x1f 48x48"


def test_a_template_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_ = jinja2.Environment.compile

    def counted(environment: jinja2.Environment, source: str, name: str, filename: str) -> object:
        compiled.append(name)
        return compile_(environment, source, name, filename)

    monkeypatch.setattr(jinja2.Environment, "compile", counted)
    _templates.cache_clear()
    table = Table("a", "a", (("", "b"),), ())
    assert html_table(table) == html_table(table)
    assert compiled == ["table.html.j2", "macros.html.j2"]
