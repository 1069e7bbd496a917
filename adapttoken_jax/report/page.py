"""From entries to the page: what the templates show, and the file."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.report import words
from adapttoken_jax.report.entries import ReportEntry
from adapttoken_jax.report.moments import HEAT_FROM, HEAT_FULL, Moment, moments
from adapttoken_jax.report.timeline import DENSITY_HEIGHT, ROW, WIDTH, Timeline, timeline, visited_order
from adapttoken_jax.result import GroupResult, atomic_file

# Frames are most of the file: together they stay below this, before base64 makes them a third larger.
_IMAGE_BYTES = 750_000
_MOST_MOMENTS, _FEWEST_MOMENTS, _ALL_MOMENTS = 8, 3, 48
# In a page of several methods these are unfolded, the first that a question has; on long pages only for one question.
_UNFOLDED = ("adapttoken", "lite", "flexselect", "full", "uniform")
_MOST_UNFOLDED = 3
# Beyond this many groups the table under the timeline shows those with the largest budgets.
_MOST_TABLE_ROWS = 100

_TEMPLATES = pathlib.Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Option:
    """One answer option: `share` of the first token's probability among the letters."""

    letter: str
    text: str
    share: float | None
    chosen: bool
    true: bool


@dataclasses.dataclass(frozen=True)
class Answered:
    """One entry, ready to be laid out. `groups` are the table's rows, `hidden` how many more there are.

    `unfolded` is whether its figures are in sight where several methods share a page.
    """

    id: str
    entry: ReportEntry
    name: str
    note: str
    options: tuple[Option, ...]
    answer: str
    timeline: Timeline
    moments: tuple[Moment, ...]
    groups: tuple[GroupResult, ...]
    hidden: int
    unfolded: bool

    @property
    def result(self):
        """The `Result` that is shown."""
        return self.entry.result


@dataclasses.dataclass(frozen=True)
class Question:
    """One question and its answers by one or several methods."""

    id: str
    text: str
    options: tuple[Option, ...]
    truth: str | None
    video: str
    answers: tuple[Answered, ...]


@dataclasses.dataclass(frozen=True)
class Score:
    """A method over all questions of the page: `right` of the `judged`, those of which it is known what is right."""

    name: str
    right: int
    judged: int
    entropy: float | None
    visited: float | None
    tokens: float
    seconds: float


def write(path, entries: Sequence[ReportEntry], title: str | None = None) -> None:
    """Writes the report of `entries` to `path`, whole or not at all.

    Args:
      path: the HTML file.
      entries: in the order in which they are shown; those of one question become one section.
      title: of the browser's tab and, over several questions, the page's heading. None: the question, or how many.

    Raises:
      UserError: no entries, or a video that cannot be read any more.
    """
    page = render(entries, title)
    with atomic_file(path) as file:
        file.write(page.encode("utf-8", "replace"))  # a video's name need not be UTF-8


def render(entries: Sequence[ReportEntry], title: str | None = None) -> str:
    """The page that `write` writes."""
    if not entries:
        raise UserError("report: nothing to show; give at least one answered question")
    if not (isinstance(entries, Sequence) and all(isinstance(each, ReportEntry) for each in entries)):
        raise UserError("report: give a list of what report.entry returns")
    questions = _questions(entries)
    return _environment().get_template("report.html").render(
        title=title or _title(questions),
        questions=questions,
        single=len(entries) == 1,
        scores=_scores(entries) if len(questions) > 1 else (),
        settings=_distinct(_setting_rows(entry) for entry in entries),
        models=_distinct(_model_rows(entry) for entry in entries),
        versions=_distinct(tuple(entry.result.versions.items()) for entry in entries),
    )  # fmt: skip


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in words.FILTERS:
        environment.filters[function.__name__] = function
    environment.globals.update(
        WIDTH=WIDTH, ROW=ROW, DENSITY_HEIGHT=DENSITY_HEIGHT, HEAT_FROM=HEAT_FROM, HEAT_FULL=HEAT_FULL
    )
    return environment


# ---------------------------------------------------------------------------------------------------------------------
# Questions and answers
# ---------------------------------------------------------------------------------------------------------------------


def _questions(entries: Sequence[ReportEntry]) -> tuple[Question, ...]:
    """Entries of one question together, in the order of their first appearance."""
    together: dict[Any, list[ReportEntry]] = {}
    for entry in entries:
        together.setdefault((entry.question, entry.options, _source(entry)), []).append(entry)
    most = min(_MOST_MOMENTS, max(_FEWEST_MOMENTS, _ALL_MOMENTS // len(entries)))
    image_bytes = _IMAGE_BYTES // (most * len(entries))
    return tuple(
        _question(number, group, most, image_bytes, unfold=number == 1 or len(together) <= _MOST_UNFOLDED)
        for number, group in enumerate(together.values(), 1)
    )


def _source(entry: ReportEntry):
    """What tells videos apart: the path, or the frames in memory themselves."""
    clip = entry.clip
    return entry.result.video.path or (None if clip is None else id(clip.info.frames))


def _question(number: int, entries: Sequence[ReportEntry], most: int, image_bytes: int, unfold: bool) -> Question:
    first, id = entries[0], f"question-{number}"
    shown = min((entry.result.method for entry in entries), key=_UNFOLDED.index) if unfold else ""
    return Question(
        id=id,
        text=first.question,
        options=_options(first),
        truth=_truth(first),
        video=_video_name(first),
        answers=tuple(
            _answered(f"{id}-{n}", entry, most, image_bytes, entry.result.method == shown)
            for n, entry in enumerate(entries, 1)
        ),
    )


def _answered(id: str, entry: ReportEntry, most: int, image_bytes: int, unfolded: bool) -> Answered:
    groups = visited_order(entry) if entry.result.groups else []
    options = _options(entry)
    chosen = next((option.text for option in options if option.chosen), "")
    shown = _table_groups(groups)
    return Answered(
        id=id,
        entry=entry,
        name=words.METHOD_NAMES[entry.result.method],
        note=words.METHOD_NOTES[entry.result.method],
        options=options,
        answer=chosen or entry.result.answer or "(an empty answer)",
        timeline=timeline(entry),
        moments=moments(entry, most, image_bytes),
        groups=tuple(shown),
        hidden=len(groups) - len(shown),
        unfolded=unfolded,
    )


def _table_groups(groups: Sequence[GroupResult]) -> Sequence[GroupResult]:
    """All of them, or those with the largest budgets; of equal ones those with the largest weights."""
    if len(groups) <= _MOST_TABLE_ROWS:
        return groups
    return sorted(groups, key=lambda g: (not g.visited, -g.budget, -(g.weight or 0), g.index))[:_MOST_TABLE_ROWS]


def _options(entry: ReportEntry) -> tuple[Option, ...]:
    """The options with what the model gave each; letters without texts where only the result is known."""
    shares = entry.result.option_probabilities or {}
    texts = dict(zip(shares or _letters(entry), entry.options or [""] * len(shares), strict=True))
    return tuple(
        Option(
            letter=letter,
            text=text,
            share=shares.get(letter),
            chosen=letter == entry.result.option,
            true=entry.truth is not None and entry.truth in (letter, text),
        )
        for letter, text in texts.items()
    )


def _letters(entry: ReportEntry) -> list[str]:
    return [chr(ord("A") + i) for i in range(len(entry.options))]


def _truth(entry: ReportEntry) -> str | None:
    """The right answer as text: a letter is looked up among the options."""
    if entry.truth is None:
        return None
    texts = {option.letter: option.text for option in _options(entry)}
    text = texts.get(entry.truth)
    return f"{entry.truth}, {text}" if text else entry.truth


def _video_name(entry: ReportEntry) -> str:
    path = entry.result.video.path
    return pathlib.PurePath(path).name if path else "a video in memory"


def _title(questions: Sequence[Question]) -> str:
    videos = {question.video for question in questions}
    if len(questions) == 1:
        return questions[0].text
    return f"{len(questions)} questions about {videos.pop() if len(videos) == 1 else f'{len(videos)} videos'}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def _scores(entries: Sequence[ReportEntry]) -> tuple[Score, ...]:
    """One row per method, in the order of appearance."""
    methods = dict.fromkeys(entry.result.method for entry in entries)
    return tuple(_score(method, [e for e in entries if e.result.method == method]) for method in methods)


def _score(method: str, entries: Sequence[ReportEntry]) -> Score:
    judged = [entry.correct for entry in entries if entry.correct is not None]
    results = [entry.result for entry in entries]
    total = sum(result.stop.groups_total for result in results)
    return Score(
        name=words.METHOD_NAMES[method],
        right=sum(judged),
        judged=len(judged),
        entropy=_mean(result.entropy for result in results if result.entropy is not None),
        visited=sum(result.stop.groups_visited for result in results) / total if total else None,
        tokens=_mean(result.selected.count for result in results),
        seconds=_mean(result.cost.seconds.total for result in results),
    )


def _mean(numbers: Iterable[float]) -> float | None:
    numbers = list(numbers)
    return sum(numbers) / len(numbers) if numbers else None


def _distinct(items: Iterable[Any]) -> tuple[Any, ...]:
    """Each item once, in the order of first appearance; the items need not be hashable."""
    found: list[Any] = []
    for item in items:
        if item not in found:
            found.append(item)
    return tuple(found)


def _setting_rows(entry: ReportEntry) -> tuple[tuple[str, str, str, bool], ...]:
    """(name, value, meaning, differs from the default) of every setting."""
    fields = {field.name: field for field in dataclasses.fields(AdaptTokenConfig)}
    return tuple(_setting_row(name, value, fields.get(name)) for name, value in entry.result.config.items())


def _setting_row(name: str, value, field: dataclasses.Field | None) -> tuple[str, str, str, bool]:
    """One row; a stored result may have a setting that this release does not know."""
    if field is None:
        return name, _shown(value), "", False
    # -1 stands for the model's preset, which the run has put in its place.
    return name, _shown(value), field.metadata["help"], field.default not in (value, -1)


def _model_rows(entry: ReportEntry) -> tuple[tuple[str, str], ...]:
    model = entry.result.model
    mesh = ", ".join(f"{axis} {size}" for axis, size in model.mesh.items()) if model.mesh else "one device"
    return (("checkpoint", model.path), ("type", model.type), ("number format", model.dtype), ("devices", mesh))


def _shown(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping | list | tuple):
        return str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
