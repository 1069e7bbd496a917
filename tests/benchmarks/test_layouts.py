"""Loading: each layout gives the questions that it holds, and each flaw is named."""

import pytest

from adapttoken_jax.benchmarks import BENCHMARKS
from adapttoken_jax.errors import UserError
from tests.benchmarks import layouts


def test_videomme(tmp_path):
    items, report = BENCHMARKS["videomme"].load(layouts.videomme(tmp_path))
    assert [item.id for item in items] == ["001-1", "001-2", "002-1", "003-1", "003-2"]
    first, last = items[0], items[-1]
    assert (first.video_id, first.video) == ("video-1", tmp_path / "data" / "video-1.mp4")
    assert first.question == "What is in video 1, question 1?"
    assert first.options == ("Apples.", "Candles.", "Berries.", "A (B) sign.") and first.letters == tuple("ABCD")
    assert first.answer == "A" and items[3].answer == "D"
    assert first.labels["task_type"] == ("Counting Problem",)
    assert first.labels["duration × domain"] == ("short / Knowledge",)
    assert first.subtitles.path == tmp_path / "subtitle" / "video-1.srt" and last.subtitles is None
    assert first.extra["url"] == "https://example.org/1"
    assert report.missing_videos == ()
    assert report.warnings[:2] == ("5 questions instead of the 2700 published", "3 videos instead of the 900 published")


@pytest.mark.parametrize("folder", ["data", "video"])
@pytest.mark.parametrize("suffixes", [(".mp4", ".MP4", ".mkv"), (".mkv", ".mp4", ".MP4")])
def test_videomme_videos_under_each_name(tmp_path, folder, suffixes):
    items, _ = BENCHMARKS["videomme"].load(layouts.videomme(tmp_path, folder, suffixes))
    expected = {f"video-{i}": tmp_path / folder / f"video-{i}{suffix}" for i, suffix in enumerate(suffixes, 1)}
    assert {item.video_id: item.video for item in items} == expected


def test_missing_videos_are_listed_and_refused_only_when_strict(tmp_path):
    items, report = BENCHMARKS["videomme"].load(layouts.videomme(tmp_path, suffixes=(".mp4", None, None)))
    assert [item.video is None for item in items] == [False, False, True, True, True]
    assert report.missing_videos == ("video-2", "video-3")
    assert "2 of 3 videos are missing, the first is video-2" in report.warnings
    assert "missing: video-3" in report.table().splitlines()
    with pytest.raises(UserError, match=r"5 questions instead of the 2700 published \(and \d more\)"):
        report.require_complete()
