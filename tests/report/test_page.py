"""The page as a document: its structure, its words, what it must not contain, its size."""

import collections
import dataclasses
import html
import html.parser
import itertools
import pathlib
import re

import numpy as np
import pytest

from adapttoken_jax import report
from adapttoken_jax.config import SIZES
from adapttoken_jax.errors import UserError
from adapttoken_jax.prompt import Ask
from adapttoken_jax.result import Result
from adapttoken_jax.video import Frames, plan_clip, probe
from tests import media
from tests.report import samples

OPTIONS = ("the boy", "the judge", "nobody")
HOSTILE = """"><script>alert(1)</script><img src=x onerror='alert(2)'>{{ 7 * 7 }}&amp;"""
CSS = pathlib.Path(report.__file__).parent / "templates" / "report.css"
EMPTY = {"meta", "link", "img", "input", "br", "path", "rect", "image"}


class Page(html.parser.HTMLParser):
    """The elements of a page as (name, attributes, text inside), and whether its tags match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.elements.append((tag, dict(attrs), []))
        if tag not in EMPTY:
            self.open.append((tag, self.elements[-1]))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, f"{tag} closes nothing"

    def handle_data(self, data):
        for _, element in self.open:
            element[2].append(data)

    def all(self, *tags):
        return [(tag, attrs, " ".join("".join(text).split())) for tag, attrs, text in self.elements if tag in tags]

    def texts(self, *tags):
        return [text for _, _, text in self.all(*tags)]


@pytest.fixture(scope="module")
def clip():
    return samples.clip_of(samples.film(128, 112, 168))


@pytest.fixture(scope="module")
def settings():
    return samples.config(slots_per_group=8, budget=120, temperature=0.5)


def several(clip, settings):
    """Two questions, three methods each, one method wrong."""
    direct = samples.clip_of(samples.film(128, 112, 168), 10)
    entries = []
    for number, question in enumerate(("Who opens it?", "Who reads it?")):
        needle = (10 + 8 * number,)
        results = [
            (samples.direct(direct, settings, options=OPTIONS, path="/films/a.mp4"), direct, False),
            (samples.grouped(clip, settings, options=OPTIONS, needle_s=needle, path="/films/a.mp4"), clip, True),
            (samples.grouped(clip, settings, options=OPTIONS, needle_s=needle, visited=3, method="lite",
                             path="/films/a.mp4"), clip, True),
        ]  # fmt: skip
        entries += [
            samples.entry(r, c, question, OPTIONS, truth="B", correct=right, evidence=(report.Evidence(10, 12),))
            for r, c, right in results
        ]
    return entries


def entries_of(name, clip, settings):
    """The entries of each kind of page."""
    grouped = samples.grouped(clip, settings, options=OPTIONS, needle_s=(12,))
    lite = samples.grouped(clip, settings, options=OPTIONS, needle_s=(12,), visited=3, method="lite")
    saved = Result.from_json(lite.to_json())
    direct = samples.direct(clip, settings, options=OPTIONS)
    abstained = dataclasses.replace(grouped, answer="not found in the video", option=None, entropy=1.2)
    return {
        "choice": lambda: [samples.entry(grouped, clip, options=OPTIONS, truth="the judge", correct=True)],
        "open": lambda: [samples.entry(samples.grouped(clip, settings, needle_s=(12,)), clip, truth="a red star")],
        "lite": lambda: [samples.entry(lite, clip, options=OPTIONS)],
        "saved": lambda: [samples.entry(saved, None, options=OPTIONS)],
        "direct": lambda: [samples.entry(direct, clip, options=OPTIONS)],
        "abstained": lambda: [samples.entry(abstained, clip, options=OPTIONS)],
        "letters": lambda: [samples.entry(grouped, clip)],
        "methods": lambda: several(clip, settings)[:3],
        "several": lambda: several(clip, settings),
    }[name]()


KINDS = ("choice", "open", "lite", "saved", "direct", "abstained", "letters", "methods", "several")


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_is_well_built(kind, clip, settings):
    text = report.render(entries_of(kind, clip, settings))
    page = Page(text)
    assert len(page.all("h1")) == len(page.all("main")) == 1 and page.elements[0][0] == "html"
    ranks = [int(tag[1]) for tag, _, _ in page.all("h1", "h2", "h3", "h4")]
    assert ranks[0] == 1 and all(after <= before + 1 for before, after in itertools.pairwise(ranks))
    assert all(page.texts("h1", "h2", "h3", "h4", "title"))
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs, _ in page.elements:
        named = attrs.get("aria-labelledby", "").split()
        assert set(named) <= set(ids) and attrs.get("href", "data:")[:1] in "#d"
        assert attrs.get("href", "")[:1] != "#" or attrs["href"][1:] in ids
    assert all(attrs.get("alt") for _, attrs, _ in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table")) and all(page.texts("caption"))
    assert all(attrs.get("scope") in ("row", "col") for _, attrs, _ in page.all("th"))
    for tag in ("svg", "figure", "details"):
        assert text.count(f"<{tag}") == text.count(f"</{tag}>")
    assert len([1 for _, attrs, _ in page.all("svg") if attrs.get("role") == "img"]) == len(page.all("desc"))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_fetched_and_nothing_runs(kind, clip, settings):
    text = report.render(entries_of(kind, clip, settings))
    page = Page(text)
    assert not page.all("script", "iframe", "object", "embed", "form", "base", "audio", "video")
    assert not [attrs for _, attrs, _ in page.elements if any(name.startswith("on") for name in attrs)]
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"base64,[\w+/=]+", "", text))
    policy = next(attrs for _, attrs, _ in page.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'; img-src data:;")
    sources = [attrs.get("src") or attrs.get("href") for _, attrs, _ in page.all("img", "image")]
    assert all(source.startswith("data:image/") for source in sources)


def test_the_answer_and_its_certainty_are_said(clip, settings):
    page = Page(report.render(entries_of("choice", clip, settings)))
    text = " ".join(page.texts("body"))
    assert page.texts("h1") == ["Who opens the letter?"]
    assert "B the judge ✓ right" in text and "Certain. Entropy 0.31 nats" in text
    assert "as if choosing from 1.4 equally likely words" in text
    bars = [attrs["style"] for _, attrs, _ in page.all("span") if attrs.get("style", "").startswith("width")]
    assert bars == ["width:4.50%", "width:91.00%", "width:4.50%"]
    assert "The scan visited all 8 groups." in text and "a group takes every 8th slot" in text


def test_lite_says_where_it_stopped(clip, settings):
    page = Page(report.render(entries_of("lite", clip, settings)))
    text = " ".join(page.texts("body"))
    assert "The scan stopped after 3 of 8 groups: certain groups agree." in text
    assert "stopped after 3 of 8" in text and text.count("not visited") == 5 + 1  # table rows and the legend


def group_rows(text):
    """The cells of the table of groups."""
    table = text[text.index("The groups as a table") :].partition("</table>")[0]
    rows = table.partition("<tbody>")[2].split("<tr")[1:]
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)] for row in rows]


def test_the_table_of_groups_holds_their_numbers(clip, settings):
    entry = entries_of("lite", clip, settings)[0]
    for cells, group in zip(group_rows(report.render([entry])), entry.result.groups, strict=True):
        numbers = ["not visited"]
        if group.visited:
            numbers = [f"{group.entropy:.3f}", group.option, f"{group.weight:.4f}", f"{group.budget}"]
            numbers.append(f"{group.selected}")
        first = "0:00" if group.index == 0 else f"0:0{group.times_s[0]:g}".replace(".0", "")
        assert cells == [str(group.index), *numbers, first]


def test_an_open_question_has_text_and_no_options(clip, settings):
    page = Page(report.render(entries_of("open", clip, settings)))
    assert not [attrs for _, attrs, _ in page.elements if attrs.get("class") == "options"]
    assert "Right answer: a red star" in page.texts("p")


def test_an_answer_withheld_has_no_option_chosen(clip, settings):
    text = " ".join(Page(report.render(entries_of("abstained", clip, settings))).texts("body"))
    assert "not found in the video" in text and "The answer was withheld. Entropy" in text
    assert "(the model’s answer)" not in text


def test_a_direct_answer_shows_frames_and_no_groups(clip, settings):
    page = Page(report.render(entries_of("direct", clip, settings)))
    text = " ".join(page.texts("body"))
    assert "there are no groups to tell apart" in text and "The groups as a table" not in text
    assert len(page.all("img")) == 8 and "A sample of what the model saw" in page.texts("h2")


def test_several_questions_and_methods_are_compared(clip, settings):
    page = Page(report.render(entries_of("several", clip, settings)))
    assert page.texts("h1") == ["2 questions about a.mp4"]
    assert [text for text in page.texts("h2") if text.startswith("Who")] == ["Who opens it?", "Who reads it?"]
    assert page.texts("h3").count("AdaptToken-Lite") == 2
    rows = page.texts("tr")
    assert sum("0 of 2" in row for row in rows) == 1 and sum("2 of 2" in row for row in rows) == 2
    assert [attrs.get("href") for _, attrs, _ in page.all("a")][1:] == ["#question-1", "#question-2"]
    unfolded = [attrs for _, attrs, _ in page.all("details") if attrs.get("class") == "method" and "open" in attrs]
    assert len(unfolded) == 2
    assert report.render(entries_of("several", clip, settings), "A night").count(">A night<") == 1


def test_a_long_question_is_set_smaller(clip, settings):
    result = samples.direct(clip, settings)
    for question, style in (("Who? " * 40, "asked"), ("Who? " * 41, "asked long")):
        page = Page(report.render([samples.entry(result, clip, question)]))
        assert [attrs["class"] for _, attrs, _ in page.all("h1")] == [style]


def test_the_legend_tells_what_the_numbers_under_the_curve_are(clip, settings):
    page = Page(report.render([samples.entry(samples.direct(clip, settings), clip)]))
    assert page.texts("li").count("1, 2 …number of a moment below") == 1


def test_settings_say_what_differs_from_the_default(clip, settings):
    rows = Page(report.render(entries_of("choice", clip, settings))).texts("tr")
    assert next(row for row in rows if row.startswith("budget ")).endswith("120 changed")
    assert next(row for row in rows if row.startswith("fps ")).endswith("4")
    assert next(row for row in rows if row.startswith("reference_layer ")).endswith("20")  # the model's own
    assert "3 differ from the defaults" in report.render(entries_of("choice", clip, settings))


def test_text_from_outside_stays_text(clip, settings):
    result = samples.grouped(clip, settings, options=(HOSTILE, "b"), needle_s=(12,), path=f"/films/{HOSTILE}.mp4")
    result = dataclasses.replace(
        result,
        answer=HOSTILE,
        model=dataclasses.replace(result.model, path=HOSTILE),
        versions={HOSTILE: HOSTILE},
        stop=dataclasses.replace(result.stop, reason=HOSTILE, early=True),
        groups=[dataclasses.replace(group, answer=HOSTILE, option=None) for group in result.groups],
    )
    evidence = (report.Evidence(1, 2, HOSTILE),)
    known = {"truth": HOSTILE, "evidence": evidence}
    entries = [
        samples.entry(result, clip, HOSTILE, (HOSTILE, "b"), **known),
        samples.entry(result, clip, HOSTILE, (), **known),
    ]
    for text in (report.render(entries[:1]), report.render(entries), report.render(entries[:1], HOSTILE)):
        page = Page(text)
        assert not page.all("script") and all(attrs["src"].startswith("data:") for _, attrs, _ in page.all("img"))
        assert "<script" not in text and html.escape(HOSTILE, quote=False) != HOSTILE
        assert HOSTILE in page.texts("h1") + page.texts("h2") and "{{ 7 * 7 }}" in text


@pytest.mark.parametrize("size", [(308, 560), (140, 140)])
@pytest.mark.parametrize("questions", [1, 12])
def test_the_largest_pages_stay_below_two_megabytes(size, questions):
    noise = np.random.default_rng(0).integers(0, 256, (64, *size, 3), dtype=np.uint8)
    clip = samples.clip_of(Frames(noise, 4.0))
    settings = samples.config(slots_per_group=8, budget=300)
    result = samples.grouped(clip, settings, options=OPTIONS, needle_s=(5,))
    entries = [samples.entry(result, clip, f"Question {i}?", OPTIONS) for i in range(questions)]
    assert 50_000 < len(report.render(entries).encode()) < 2_000_000


@pytest.mark.parametrize("slots_per_group", [8, 64])
def test_ten_thousand_frames_stay_small(slots_per_group):
    clip = samples.clip_of(samples.film(10000, 56, 56))
    settings = samples.config(slots_per_group=slots_per_group, budget=1500)
    result = samples.grouped(clip, settings, options=OPTIONS, needle_s=(620,))
    text = report.render([samples.entry(result, clip, options=OPTIONS)])
    assert len(text.encode()) < 200_000
    rows, largest = group_rows(text), sorted(group.budget for group in result.groups)[-100:]
    assert [int(row[4]) for row in rows] == ([group.budget for group in result.groups] if len(rows) < 100 else
                                             largest[::-1])  # fmt: skip
    assert ("525 more are not shown" in text) == (slots_per_group == 8)


def test_groups_that_were_not_visited_are_shown_last():
    clip = samples.clip_of(samples.film(10000, 56, 56))
    settings = samples.config(slots_per_group=8, budget=30)
    result = samples.grouped(clip, settings, options=OPTIONS, needle_s=(620,), visited=90, method="lite")
    rows = group_rows(report.render([samples.entry(result, clip, options=OPTIONS)]))
    assert [len(row) == 7 for row in rows] == [True] * 90 + [False] * 10


def test_a_file_is_written_whole_or_not_at_all(clip, settings, tmp_path):
    path, video = tmp_path / "report.html", media.write(tmp_path / "v.mp4", 50)
    filmed = plan_clip(probe(video), samples.VISION, max_pixels=4704)
    entry = samples.entry(samples.direct(filmed, settings), filmed)
    report.write(path, [entry])
    before = path.read_bytes()
    assert before.startswith(b"<!doctype html>") and before.endswith(b"</html>\n")
    video.unlink()
    with pytest.raises((UserError, OSError)):
        report.write(path, [samples.entry(samples.direct(clip, settings), clip), entry])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_no_entries_are_a_mistake(tmp_path):
    with pytest.raises(UserError, match="nothing to show"):
        report.write(tmp_path / "r.html", [])


def test_an_entry_finds_the_frames_that_were_sampled():
    film = samples.film(40, 56, 84)
    clip = samples.clip_of(film)
    settings = samples.config(slots_per_group=5, budget=20, max_pixels=56 * 84, max_frames=40)
    result = samples.grouped(clip, settings, options=OPTIONS)
    model = SIZES["qwen2.5-vl-7b"]
    entry = report.entry(model, film, result, "Who?", OPTIONS, truth="B", correct=False)
    assert entry.clip.grid == clip.grid and (entry.clip.frame_indices == clip.frame_indices).all()
    assert (entry.options, entry.truth, entry.correct) == (OPTIONS, "B", False)
    asked = report.entry(model, film, result, Ask("Who?", before="Look. ", options=OPTIONS))
    assert (asked.question, asked.options) == ("Who?", OPTIONS)
    assert report.entry(model, film, result, "Who?", np.array(OPTIONS)).options == OPTIONS
    with pytest.raises(UserError, match=r"^options: 1 are given, and the result is of "):
        report.entry(model, film, result, "Who?", OPTIONS[:1])
    with pytest.raises(UserError, match="changed since it was answered about"):
        report.entry(model, samples.film(30, 56, 84), result, "Who?", OPTIONS)


@pytest.mark.parametrize("stretch", [(float("nan"), 5), (50, 5), (-1, 5), (1, float("inf"))])
def test_evidence_is_a_stretch_of_time(stretch):
    with pytest.raises(UserError, match=r"^evidence: from "):
        report.Evidence(*stretch)


def test_only_entries_are_shown(tmp_path):
    film = samples.film(40, 56, 84)
    entry = samples.entry(samples.direct(samples.clip_of(film), samples.config()), samples.clip_of(film))
    for entries in (entry, [entry.result]):
        with pytest.raises(UserError, match=r"^report: give a list of what report.entry returns$"):
            report.write(tmp_path / "r.html", entries)


# Colours


def palettes():
    """The colours of `report.css`, light and dark."""
    blocks = re.findall(r":root \{(.*?)\}", CSS.read_text(), re.S)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in blocks[:2])
    return {"light": light, "dark": {**light, **dark}}


def contrast(one, other):
    """The contrast ratio of WCAG 2."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_black_and_white_is_21():
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart(scheme):
    colours = palettes()[scheme]
    for text in ("ink", "quiet", "tokens", "right", "wrong"):
        for ground in ("paper", "card"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for mark in ("tokens", "tokens-soft", "entropy", "evidence", "focus"):
        assert contrast(colours[mark], colours["paper"]) >= 3, mark
    assert contrast(colours["paper"], colours["tokens"]) >= 4.5  # the letter on its badge


def test_every_colour_is_used_and_named():
    css = CSS.read_text()
    named = set(palettes()["light"])
    used = collections.Counter(re.findall(r"var\(--([\w-]+)\)", css))
    assert named <= set(used) and set(used) - named == {"serif", "sans", "row"}
    rest = re.sub(r":root \{.*?\}", "", css, flags=re.S)
    # Beside the names: what lies on pictures, which look the same in light and dark, and paper in print.
    assert set(re.findall(r"#[0-9a-f]{3,6}\b", rest)) <= {"#000", "#fff", "#ffc400", "#ff2a00"}
