"""A section is one file: found, in all views, linked from the table of contents, and its alerts on the first screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from markupsafe import Markup

from mmcompress.report import sections
from mmcompress.report.alerts import Alert
from mmcompress.report.compare import compare_reports
from mmcompress.report.compare_page import render_compare_html
from mmcompress.report.html import render_html
from mmcompress.report.markdown import render_markdown
from mmcompress.report.text import bad_news, render_text
from tests.report import examples
from tests.report.test_report_html import Page

TOY = """
from markupsafe import Markup
from mmcompress.report.alerts import Alert
from mmcompress.report.sections import Section

ORDER = {order}

def section(report, folder):
    html = Markup("<p>{name} of %s in %s</p>") % (report.name, folder)
    return Section("{name}", "A toy <{name}>", html, "md {name}", "txt {name}")

def alerts(report):
    return [Alert("bad", "{name} is on fire & out of hand.")]
"""
COMPARE = """
def compare(runs):
    return Section("{name}", "Toys", Markup("<p>%d toys</p>") % len(runs), "", "")
"""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two files in a second folder of the package's path; the one that is first by name is last in order."""
    (tmp_path / "toy_a.py").write_text(TOY.format(order=902, name="toy-a"))
    (tmp_path / "toy_b.py").write_text(TOY.format(order=901, name="toy-b") + COMPARE.format(name="toy-b"))
    (tmp_path / "_shared.py").write_text("raise RuntimeError('helpers are not sections')\n")
    monkeypatch.setattr(sections, "__path__", [*sections.__path__, str(tmp_path)])
    sections.modules.cache_clear()
    yield
    sections.modules.cache_clear()


@pytest.mark.usefixtures("toys")
def test_a_new_file_is_in_every_view() -> None:
    report = examples.full()
    page = render_html(report, Path("runs/x"))
    found = Page(page)
    assert page.index("toy-b of") < page.index("toy-a of")
    assert "<p>toy-a of clip-cpu-int8 in runs/x</p>" in page
    links = [attrs["href"] for tag, attrs in found.tags if tag == "a"]
    assert links.index("#toy-b") < links.index("#toy-a")
    assert {str(link).removeprefix("#") for link in links} <= set(found.ids)
    assert "A toy &lt;toy-a&gt;" in page
    assert page.index("toy-a is on fire &amp; out of hand.") < page.index("</header>")
    markdown = render_markdown(report, None)
    assert "<details><summary>A toy &lt;toy-b&gt;</summary>\n\nmd toy-b\n" in markdown
    text = render_text(report)
    assert "A toy <toy-b>\ntxt toy-b\n" in text
    assert Alert("bad", "toy-a is on fire & out of hand.") in bad_news(report)


@pytest.mark.usefixtures("toys")
def test_a_comparison_shows_the_sections_that_compare() -> None:
    page = render_compare_html(compare_reports([("a", examples.full()), ("b", examples.full())]))
    found = Page(page)
    assert "<p>2 toys</p>" in page
    assert "toy-a of" not in page
    assert {str(attrs["href"]).removeprefix("#") for tag, attrs in found.tags if tag == "a"} <= set(found.ids)


@pytest.mark.parametrize("make", [examples.full, examples.empty, examples.half_finished, examples.torch_only])
def test_the_contents_lead_somewhere(make: object) -> None:
    report = make()  # type: ignore[operator]
    found = Page(render_html(report))
    links = [str(attrs["href"]).removeprefix("#") for tag, attrs in found.tags if tag == "a"]
    assert links
    assert set(links) <= set(found.ids)


def test_sections_of_the_package_state_what_they_must() -> None:
    made: Sequence[object] = sections.modules()
    anchors = [s.anchor for s in sections.all_sections(examples.full(), None)]
    assert len(anchors) == len(set(anchors))
    assert all(callable(getattr(module, name)) for module in made for name in ("section", "alerts"))
    assert all(isinstance(s.html, Markup) for s in sections.all_sections(examples.full(), None))
