"""The pages as a reader's browser shows them. Skipped where there is no Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mmcompress.report.compare import compare_reports
from mmcompress.report.compare_page import render_compare_html
from mmcompress.report.html import render_html
from tests.report import examples
from tests.report.browser import Browser, browser_path

PATH = browser_path()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PATH is None, reason="no Chromium")]
SCREENS = {"phone": (360, 800), "desktop": (1280, 900)}
OUTSIDE = """[...document.querySelectorAll('body *')].filter(e => {
  if (e.closest('.unseen, .skip') || e.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let p = e.parentElement; p; p = p.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return false;
  return true;
}).map(e => e.outerHTML.slice(0, 120))"""
SMALLEST = """Math.min(...[...document.querySelectorAll('svg.plot text')].map(t => {
  const svg = t.closest('svg');
  return parseFloat(getComputedStyle(t).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
}))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert PATH is not None
    with Browser(PATH) as found:
        yield found


def _pages() -> dict[str, str]:
    pages = {name: render_html(make()) for name, make in examples.ALL.items()}
    runs = [(name, make()) for name, make in examples.ALL.items()]
    return pages | {"compare": render_compare_html(compare_reports(runs))}


@pytest.mark.parametrize("name", [*examples.ALL, "compare"])
def test_no_request_no_complaint_nothing_outside_of_the_screen(browser: Browser, tmp_path: Path, name: str) -> None:
    page = tmp_path / "page.html"
    page.write_text(_pages()[name], encoding="utf-8")
    assert page.stat().st_size < 5_000_000
    for width, height in SCREENS.values():
        browser.console.clear()
        browser.requests.clear()
        browser.look(width, height)
        browser.open(page)
        assert browser.console == []
        assert browser.requests == [page.resolve().as_uri()]
        assert browser.ask(OUTSIDE) == []
        assert browser.ask("document.documentElement.scrollWidth") <= width
        if browser.ask("document.querySelectorAll('svg.plot').length"):
            assert browser.ask(SMALLEST) >= 10


def test_a_request_would_be_seen_and_is_forbidden(browser: Browser, tmp_path: Path) -> None:
    """What the test above looks for does happen where a page asks for something."""
    page = tmp_path / "page.html"
    page.write_text(render_html(examples.full()).replace("</footer>", '<img src="http://127.0.0.1:9/x.png"></footer>'))
    browser.console.clear()
    browser.look(*SCREENS["desktop"])
    browser.open(page)
    assert any("Content Security Policy" in line for line in browser.console)


def test_light_dark_and_the_keyboard(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_html(examples.full()), encoding="utf-8")
    colours = []
    for dark in (False, True):
        browser.look(*SCREENS["phone"], dark=dark)
        browser.open(page)
        colours.append(browser.ask("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]
    browser.key("Tab", 9)
    assert browser.ask("document.activeElement.className") == "skip"
    browser.key("Tab", 9)
    assert browser.ask("document.activeElement.tagName") == "SUMMARY"
    assert browser.ask("document.querySelectorAll('h1').length") == 1
    assert browser.ask("document.querySelectorAll('main, header, nav, footer').length") == 4


def test_print_shows_what_is_folded_away(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_html(examples.full()), encoding="utf-8")
    browser.look(*SCREENS["desktop"])
    browser.open(page)
    heights = "[...document.querySelectorAll('#recipe ~ details pre')].map(e => e.parentElement.clientHeight > 100)"
    assert browser.ask(heights) == [False]
    browser.look(*SCREENS["desktop"], media="print")
    assert browser.ask(heights) == [True]
    assert browser.paper().startswith(b"%PDF")
