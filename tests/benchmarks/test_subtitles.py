"""Subtitles: each shape on the video's clock, and only what the sampled frames see."""

import pytest

from adapttoken_jax.benchmarks import BENCHMARKS, SubtitleFile, subtitles
from adapttoken_jax.benchmarks.subtitles import Subtitle
from adapttoken_jax.errors import UserError
from tests.benchmarks import layouts


def written(directory, name, text):
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def test_subrip(tmp_path):
    lines = subtitles.read(SubtitleFile(written(tmp_path, "a.srt", layouts.SRT)))
    assert lines == (
        Subtitle(1.0, 3.5, "Good morning."),
        Subtitle(4.0, 6.0, "It is 12"),
        Subtitle(60.25, 62.0, "Good night."),
    )


@pytest.mark.parametrize("change", [lambda s: s.replace("\n", "\r\n"), lambda s: "\ufeff" + s, lambda s: s.strip()])
def test_subrip_from_other_systems(tmp_path, change):
    path = tmp_path / "a.srt"
    path.write_bytes(change(layouts.SRT).encode())
    assert subtitles.read(SubtitleFile(path))[2] == Subtitle(60.25, 62.0, "Good night.")


def test_subrip_after_an_hour_without_numbers(tmp_path):
    text = "01:00:00.500 --> 01:00:01.000 X1:40\nLate.\n\n01:00:02,000 --> 01:00:03,000\n{\\an8}<i>Later.</i>\n"
    lines = subtitles.read(SubtitleFile(written(tmp_path, "a.srt", text)))
    assert lines == (Subtitle(3600.5, 3601.0, "Late."), Subtitle(3602.0, 3603.0, "Later."))


def test_numbers_that_are_said_stay_where_entries_have_none(tmp_path):
    entry = "00:00:0{0},000 --> 00:00:0{0},500\n{1}"
    text = "\n\n".join(entry.format(second, said) for second, said in enumerate(["42", "In\n1984", "Oh."]))
    said = lambda text: [line.text for line in subtitles.read(SubtitleFile(written(tmp_path, "a.srt", text)))]
    assert said(text) == ["42", "In 1984", "Oh."]
    numbered = "7\n" + text.replace("\n\n", "\n\n8\n")
    assert said(numbered) == ["42", "In 1984", "Oh."]
    assert said(numbered.replace("\n\n", "\n")) == ["42", "In 1984", "Oh."]


def test_subrip_with_odd_times(tmp_path):
    text = (
        "1\n-00:00:01,000 --> 00:00:02,500\nOne.\n\n2\n00:00:03,000. --> 00:00:04,000.\nTwo,\n12:30 --> 13:00 by train"
    )
    lines = subtitles.read(SubtitleFile(written(tmp_path, "a.srt", text)))
    assert lines == (Subtitle(0.0, 2.5, "One."), Subtitle(3.0, 4.0, "Two, 12:30 --> 13:00 by train"))


def test_another_encoding_is_named(tmp_path):
    path = tmp_path / "a.srt"
    path.write_bytes("1\n00:00:01,000 --> 00:00:02,000\n你好\n".encode("gbk"))
    with pytest.raises(UserError, match=rf"^{path}: no readable subtitles \(UnicodeDecodeError"):
        subtitles.read(SubtitleFile(path))


def test_both_json_shapes_on_the_videos_clock(tmp_path):
    """The clip begins at 595 s of the file and lasts 11.5 s: 600.5 … 602 is 5.5 … 7, and what is long before is out."""
    first, _, last = BENCHMARKS["longvideobench"].load(layouts.longvideobench(tmp_path))[0]
    assert subtitles.read(first.subtitles, first.duration_s) == (Subtitle(5.5, 7.0, "Before the clip ends."),)
    assert subtitles.read(last.subtitles, last.duration_s) == (
        Subtitle(1.0, 2.5, "First."),
        Subtitle(4.0, 420.0, "To the end."),
    )


def test_lines_are_cut_at_the_videos_ends(tmp_path):
    lines = [
        {"timestamp": [9.0, 11.0], "text": "over the beginning"},
        {"timestamp": [19.0, 25.0], "text": "over the end"},
        {"timestamp": [2.0, 10.0], "text": "before"},
        {"timestamp": [20.0, 21.0], "text": "after"},
        {"timestamp": [15.0, 14.0], "text": "over before it begins"},
        {"timestamp": [12.0, None], "text": "to the end"},
    ]
    file = SubtitleFile(layouts.write_json(tmp_path / "a.json", lines), offset_s=10.0)
    assert subtitles.read(file, 10.0) == (
        Subtitle(0.0, 1.0, "over the beginning"),
        Subtitle(2.0, 10.0, "to the end"),
        Subtitle(9.0, 10.0, "over the end"),
    )
    assert subtitles.read(file)[-1] == Subtitle(10.0, 11.0, "after")
    assert Subtitle(2.0, None, "to the end") in subtitles.read(file)


LINES = (Subtitle(1, 3, "one"), Subtitle(2, 4, "two"), Subtitle(10, 11, "three"), Subtitle(20, None, "four"))


@pytest.mark.parametrize(
    ("times", "text"),
    [
        ([0.5], ""),
        ([1], "one"),
        ([3], "two"),
        ([2.5], "one\ntwo"),
        ([25, 2.5, 0], "one\ntwo\nfour"),
        ([4, 9.99, 11, 19.9], ""),
        ([], ""),
        (range(100), "one\ntwo\nthree\nfour"),
    ],
)
def test_only_lines_at_the_frames_times_are_said(times, text):
    assert subtitles.text_at(LINES, times) == text


def test_an_entry_without_text_is_no_line(tmp_path):
    lines = [{"timestamp": [1.0, 2.0], "text": "a"}, {"timestamp": [2.0, 3.0], "text": " "}]
    file = SubtitleFile(layouts.write_json(tmp_path / "a.json", lines))
    assert subtitles.read(file) == (Subtitle(1.0, 2.0, "a"),)


def test_a_text_that_goes_on_is_said_once():
    lines = [Subtitle(0, 1, "Hm."), Subtitle(1, 2, "Hm."), Subtitle(2, 3, "Yes."), Subtitle(3, 4, "Hm.")]
    assert subtitles.text_at(lines, [0, 1, 2, 3]) == "Hm.\nYes.\nHm."


@pytest.mark.parametrize("content", ["", "\ufeff", " \n\n", "1\n00:00:01,000 --> 00:00:02,000\n\n"])
def test_a_subrip_file_may_have_no_lines(tmp_path, content):
    assert subtitles.read(SubtitleFile(written(tmp_path, "a.srt", content))) == ()


def test_a_subrip_file_without_times_says_what_it_lacks(tmp_path):
    path = written(tmp_path, "a.srt", "<html>404: not found</html>")
    with pytest.raises(UserError, match=rf"^{path}: no readable subtitles \(no line as 00:00:01,000 --> "):
        subtitles.read(SubtitleFile(path))


BROKEN = (
    "{", '{"a": 1}', '[{"text": "no time"}]', '[{"timestamp": [1], "text": "x"}]', "[" * 100_000,
    '[{"timestamp": [1, 2], "text": "\\ud800"}]', '[{"start": "1", "end": "2", "line": "a \\ud83d"}]',
    f'[{{"timestamp": [1, {10**400}], "text": "x"}}]',
)  # fmt: skip


@pytest.mark.parametrize("content", BROKEN)
def test_unreadable_subtitles_are_named(tmp_path, content):
    path = written(tmp_path, "a.json", content)
    with pytest.raises(UserError, match=f"{path}: no readable subtitles"):
        subtitles.read(SubtitleFile(path))
