"""The report in a browser: nothing is asked of the network, nothing fails, and it can be used with keys alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import PROGRAM, Tab, browser, check_accessible
from tests.ladders import write_evaluation, write_ladder
from vdiff.report.ladder import read_ladder
from vdiff.report.page import write_report

LOOKS = [(width, dark) for width in (1280, 390) for dark in (False, True)]

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="Chromium is not here: apt-get install chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ladder")
    write_ladder(root, name="a_teacher_whose_name_is_longer_than_a_telephone_is_wide_and_has_no_gaps")
    write_evaluation(root)
    return write_report(read_ladder(root))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_nothing_fails_and_nothing_is_asked_of_the_network(tab, page, width, dark):
    tab.requests.clear()
    tab.open(page, width=width, dark=dark)
    assert tab.run("document.fonts.ready.then(() => [...document.images].every(i => i.complete && i.naturalWidth > 0))")
    outside = [address for address in tab.requests if not address.startswith("data:")]
    assert outside == [page.resolve().as_uri()]
    assert tab.trouble == []
    assert tab.run("document.scrollingElement.scrollWidth") <= width
    ink, paper = tab.run("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    assert (light(ink) > light(paper)) == dark


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_everybody_can_use_it(tab, page, width, dark):
    tab.open(page, width=width, dark=dark)
    tab.run("for (const each of document.querySelectorAll('details')) each.open = true")
    check_accessible(tab)


def test_a_row_is_enlarged_and_left_with_keys_alone(tab, page):
    tab.open(page, width=1280)
    tab.run("document.querySelectorAll('.zoom')[1].focus()")
    tab.press("Enter")
    assert tab.run("document.getElementById('viewer').open")
    assert tab.run("document.getElementById('viewer-title').textContent") == "base_0, 4 steps"
    assert tab.run("document.querySelectorAll('.tiles div').length") == 3
    tab.press("ArrowRight")
    assert tab.run("document.getElementById('viewer-title').textContent") == "base_1, 2 steps"
    tab.press("Escape")
    assert not tab.run("document.getElementById('viewer').open")
    # the browser first gives the focus back to where it was; the page hears of the closing in a task of its own
    wanted, until = "[...document.querySelectorAll('.zoom')].indexOf(document.activeElement)", time.monotonic() + 10
    while tab.run(wanted) != 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert tab.run(wanted) == 2
    assert tab.trouble == []


def test_the_pairs_are_enlarged_alone(tab, page):
    tab.open(page, width=390)
    tab.run("document.querySelector('.zoom[data-view=picture]').click()")
    assert tab.run("document.querySelector('#viewer-body img').alt").startswith("Samples")
    assert tab.run("document.getElementById('viewer-on').hidden")
    tab.run("document.getElementById('viewer-close').click()")
    assert not tab.run("document.getElementById('viewer').open")


def test_colours_can_be_chosen(tab, page):
    tab.open(page, width=1280, dark=False)
    tab.run("localStorage.clear()")
    tab.open(page, width=1280, dark=False)
    looks = []
    for _ in range(3):
        tab.run("document.getElementById('theme').click()")
        paper = tab.run("getComputedStyle(document.body).backgroundColor")
        looks.append((tab.run("document.getElementById('theme').textContent"), light(paper) > 0.5))
    assert looks == [("Light", True), ("Dark", False), ("Auto", True)]


def test_commands_are_copied(tab, page):
    tab.open(page, width=1280)
    tab.run("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve(); }")
    tab.run("document.querySelector('.recipes .copy').click()")
    assert tab.run("copied").startswith("python prepare_data.py")
    assert tab.run("document.querySelector('.recipes .copy').textContent") == "Copied"


def light(colour: str) -> float:
    """How light `rgb(r, g, b)` is, from 0 to 1."""
    return sum(float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 765
