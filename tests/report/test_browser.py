"""The page in a real browser: widths, light and dark, keyboard, screen reader, and text that tries to run."""

import pytest

from adapttoken_jax import report
from tests.report import chromium, samples
from tests.report.test_page import HOSTILE, OPTIONS, several

pytestmark = pytest.mark.skipif(
    chromium.find() is None, reason="no Chromium on this machine (apt-get install chromium); the page is not displayed"
)

PAGES = ("choice", "several", "direct", "many", "hostile")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files of every kind of page."""
    folder = tmp_path_factory.mktemp("pages")
    film = samples.film(128, 112, 168)
    clip, long = samples.clip_of(film), samples.clip_of(samples.film(10000, 56, 56))
    settings = samples.config(slots_per_group=8, budget=120, temperature=0.5)
    lite = samples.grouped(clip, settings, options=OPTIONS, needle_s=(12,), visited=3, method="lite")
    many = samples.grouped(long, samples.config(slots_per_group=8, budget=900), options=OPTIONS, needle_s=(620,))
    hostile = samples.grouped(clip, settings, options=(HOSTILE, "b"), needle_s=(12,), path=f"/films/{HOSTILE}")
    entries = {
        "choice": [samples.entry(lite, clip, options=OPTIONS, truth="B", correct=True)],
        "several": several(clip, settings),
        "direct": [samples.entry(samples.direct(clip, settings), clip)],
        "many": [samples.entry(many, long, options=OPTIONS)],
        "hostile": [samples.entry(hostile, clip, HOSTILE, (HOSTILE, "b"), truth=HOSTILE)],
    }
    for name in PAGES:
        report.write(folder / f"{name}.html", entries[name])
    return {name: folder / f"{name}.html" for name in PAGES}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def unfold(browser):
    browser.value("document.querySelectorAll('details').forEach(part => part.open = true)")


OVERFLOWING = """[...document.querySelectorAll('body *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest('.scroll') && !e.closest('svg'))
  .map(e => e.outerHTML.slice(0, 100))"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 375, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_it_shows_without_errors_requests_or_sideways_scrolling(browser, pages, name, width, dark):
    browser.open(pages[name], width, dark)
    unfold(browser)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(OVERFLOWING) == []
    assert browser.named("Runtime.exceptionThrown") == browser.named("Runtime.consoleAPICalled") == []
    assert browser.named("Log.entryAdded") == browser.named("Page.javascriptDialogOpening") == []
    urls = [event["request"]["url"] for event in browser.named("Network.requestWillBeSent")]
    assert [url for url in urls if not url.startswith("data:")] == [pages[name].as_uri()]
    shade = browser.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(shade) < 60) if dark else (min(shade) > 200)


def test_text_that_is_a_script_is_shown_and_does_not_run(browser, pages):
    browser.open(pages["hostile"])
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.querySelector('h1').textContent") == HOSTILE
    assert browser.value("document.querySelectorAll('img[src=x], [onerror]').length") == 0
    assert browser.named("Page.javascriptDialogOpening") == []


def test_the_policy_stops_a_script_that_got_in(browser, pages, tmp_path):
    """Not even markup that is in the file itself may run or fetch."""
    broken = tmp_path / "broken.html"
    added = "<script>document.title = 'ran'</script><img src='file:///x.png'></main>"
    broken.write_text(pages["choice"].read_text(encoding="utf-8").replace("</main>", added), encoding="utf-8")
    browser.open(broken)
    assert browser.value("document.title") != "ran"
    assert any("Content Security Policy" in event["entry"]["text"] for event in browser.named("Log.entryAdded"))


def heard(browser):
    """(role, name) of what a screen reader is given, in order."""
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")]


@pytest.mark.parametrize("name", PAGES)
def test_a_screen_reader_finds_its_way(browser, pages, name):
    browser.open(pages[name])
    unfold(browser)
    nodes = heard(browser)
    roles = [role for role, _ in nodes]
    for landmark in ("banner", "main", "contentinfo"):
        assert roles.count(landmark) == 1, landmark
    assert "heading" in roles and all(said for role, said in nodes if role in ("heading", "image", "img", "table"))
    assert sum(role in ("image", "img") for role in roles) >= 1
    tables = browser.value("document.querySelectorAll('table').length")
    assert roles.count("table") == tables > 0
    assert "rowheader" in roles
    if name != "direct":
        assert roles.count("list") >= 1 and "columnheader" in roles


def focused(browser, what="outerHTML.slice(0, 60)"):
    return browser.value(f"document.activeElement.{what}")


def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser, pages):
    browser.open(pages["choice"])
    browser.press("Tab", 9)
    assert focused(browser, "className") == "skip"
    assert browser.value("document.activeElement.getBoundingClientRect().top >= 0")
    browser.press("Enter", 13, "\r")
    assert browser.value("location.hash") == "#main"
    seen = {}
    for _ in range(12):
        browser.press("Tab", 9)
        place = browser.value("[...document.querySelectorAll('*')].indexOf(document.activeElement)")
        # Behind the last one the browser begins again, or rests on the page first.
        if place in seen or focused(browser, "tagName") == "BODY" or focused(browser, "className") == "skip":
            break
        seen[place] = focused(browser, "tagName")
        style = browser.value(
            "(s => [s.outlineStyle, parseFloat(s.outlineWidth)])(getComputedStyle(document.activeElement))"
        )
        assert style[0] != "none" and style[1] >= 2, focused(browser)
    tags = [*seen.values()]
    assert tags.count("SUMMARY") == 3 and tags.count("INPUT") == 2


def test_the_switches_hide_what_lies_over_the_frames(browser, pages):
    browser.open(pages["choice"])
    visible = "getComputedStyle(document.querySelector('{}')).visibility"
    assert browser.value(visible.format(".heat")) == browser.value(visible.format(".cells")) == "visible"
    browser.value("document.querySelector('.show-heat').focus()")
    browser.press(" ", 32, " ")
    assert browser.value(visible.format(".heat")) == "hidden" and browser.value(visible.format(".cells")) == "visible"


def test_folded_parts_open_by_key_and_in_print(browser, pages):
    browser.open(pages["choice"])
    browser.value("document.querySelector('.numbers summary').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.value("document.querySelector('.numbers').open") is True
    settings = "document.querySelector('footer .settings td').checkVisibility()"
    assert browser.value(settings) is False
    browser.open(pages["choice"], media="print")
    assert browser.value(settings) is True


@pytest.mark.parametrize("width", [320, 1280])
def test_every_frame_is_drawn(browser, pages, width):
    browser.open(pages["choice"], width)
    sizes = browser.value("[...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width])")
    assert len(sizes) >= 4 and all(natural > 0 and shown > 100 for natural, shown in sizes)
    cells = browser.value("[...document.querySelectorAll('.cells')].map(e => e.getBoundingClientRect().width)")
    assert len(cells) == len(sizes) and min(cells) > 10


def test_the_lines_around_cells_at_the_edge_of_a_frame_are_not_cut(browser, pages):
    """Of a line that is 1.5 pixels wide half of that must fit between its middle and the edge."""
    browser.open(pages["choice"])
    gaps = browser.value(
        """[...document.querySelectorAll('.cells')].flatMap(cells => {
          const frame = cells.closest('.frame').getBoundingClientRect();
          const path = cells.querySelector('.line'), box = path.getBBox(), to = path.getScreenCTM();
          const from = new DOMPoint(box.x, box.y).matrixTransform(to);
          const end = new DOMPoint(box.x + box.width, box.y + box.height).matrixTransform(to);
          return [from.x - frame.left, from.y - frame.top, frame.right - end.x, frame.bottom - end.y];
        })"""
    )
    assert len(gaps) >= 4 and min(gaps) >= 0.75
