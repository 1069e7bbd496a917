"""Loading: each layout gives the questions that it holds, and each flaw is named."""

import string

import pytest

from adapttoken_jax.benchmarks import BENCHMARKS, lvbench
from adapttoken_jax.benchmarks.options import letter_in, letter_of_text, split_options
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


def test_a_complete_directory_has_no_warning(tmp_path):
    lengths = ("short", "medium", "long")
    rows = [
        row | {"question_id": f"{video}-{number}", "videoID": f"v{video}", "duration": lengths[video % 3]}
        for video in range(900)
        for number, row in enumerate(layouts.videomme_rows()[:3])
    ]
    layouts.write_parquet(tmp_path / "videomme" / "test-00000-of-00001.parquet", rows)
    for video in range(900):
        layouts.write_video(tmp_path / "data" / f"v{video}.mp4")
    report = BENCHMARKS["videomme"].check(tmp_path)
    assert report.warnings == () and report.missing_videos == ()
    report.require_complete()
    assert report.table().splitlines()[1].split() == ["questions", "2700", "2700"]


# ---------------------------------------------------------------------------------------------------------------------
# LongVideoBench
# ---------------------------------------------------------------------------------------------------------------------


def test_longvideobench_json(tmp_path):
    items, report = BENCHMARKS["longvideobench"].load(layouts.longvideobench(tmp_path, videos=("a",)))
    assert [item.id for item in items] == ["a_0", "a_1", "b_2"]
    assert [item.answer for item in items] == ["B", "E", "A"]
    assert [len(item.options) for item in items] == [4, 5, 4]
    assert [item.video_id for item in items] == ["a", "a", "b"] and report.missing_videos == ("b",)
    assert items[0].video == tmp_path / "videos" / "a.mp4" and items[2].video is None
    assert items[0].duration_s == 11.5
    assert items[0].labels["duration_group"] == ("15",) and items[1].labels["question_category"] == ("T2O",)
    assert (items[0].subtitles.path.name, items[0].subtitles.offset_s) == ("a_en.json", 595.0)


def test_longvideobench_parquet_holds_the_same_questions_without_the_absent_options(tmp_path):
    from_json, _ = BENCHMARKS["longvideobench"].load(layouts.longvideobench(tmp_path))
    (tmp_path / "lvb_val.json").unlink()
    from_parquet, _ = BENCHMARKS["longvideobench"].load(layouts.longvideobench(tmp_path, layout="parquet"))
    assert from_parquet == from_json


def test_an_absent_option_before_the_right_one_moves_its_letter(tmp_path):
    row = layouts.longvideobench_rows()[0] | {"candidates": ["red", "N/A", "green", "white"], "correct_choice": 2}
    layouts.write_json(tmp_path / "lvb_val.json", [row])
    [item], _ = BENCHMARKS["longvideobench"].load(tmp_path)
    assert item.options == ("red", "green", "white") and item.answer == "B"


def test_no_candidates_at_all_are_refused(tmp_path):
    layouts.write_json(tmp_path / "lvb_val.json", [layouts.longvideobench_rows()[0] | {"candidates": []}])
    with pytest.raises(UserError, match=r"question a_0 has no option \d, its correct_choice"):
        BENCHMARKS["longvideobench"].load(tmp_path)


def test_a_candidate_without_text_is_refused(tmp_path):
    row = layouts.longvideobench_rows()[0] | {"candidates": ["", "red", "blue", "green"]}
    layouts.write_json(tmp_path / "lvb_val.json", [row])
    with pytest.raises(UserError, match=f"^--data={tmp_path}: the question a_0 has an option A without text;"):
        BENCHMARKS["longvideobench"].load(tmp_path)


def test_a_name_that_no_file_can_have_is_a_missing_video(tmp_path):
    names = ["x" * 300, "nul\0"]
    rows = [row | {"videoID": name} for row, name in zip(layouts.videomme_rows(), names, strict=False)]
    layouts.write_parquet(tmp_path / "test-0.parquet", rows)
    items, report = BENCHMARKS["videomme"].load(tmp_path)
    assert [item.video or item.subtitles for item in items] == [None] * 2 and report.missing_videos == (*names,)


@pytest.mark.parametrize("right", [3, 5, -1])
def test_a_right_choice_that_is_absent_is_refused(tmp_path, right):
    row = layouts.longvideobench_rows()[0] | {"candidates": ["red", "blue", "green", "N/A"], "correct_choice": right}
    path = layouts.write_json(tmp_path / "lvb_val.json", [row])
    with pytest.raises(UserError, match=f"{path}: question a_0 has no option {right}"):
        BENCHMARKS["longvideobench"].load(tmp_path)


def test_a_video_without_subtitles_has_none(tmp_path):
    layouts.longvideobench(tmp_path)
    (tmp_path / "subtitles" / "b.json").unlink()
    items, report = BENCHMARKS["longvideobench"].load(tmp_path)
    assert [item.subtitles is None for item in items] == [False, False, True]
    assert ("videos with subtitles", 1, None) in report.counts


@pytest.mark.parametrize("named", [None, "", "b.json"])
def test_missing_subtitles_are_a_warning_where_they_are_wanted(tmp_path, named):
    rows = layouts.longvideobench_rows()
    rows[2]["subtitle_path"] = named
    layouts.longvideobench(tmp_path)
    layouts.write_json(tmp_path / "lvb_val.json", rows)
    (tmp_path / "subtitles" / "b.json").unlink()
    warned = lambda wanted: [w for w in BENCHMARKS["longvideobench"].check(tmp_path, wanted).warnings if "subt" in w]
    expected = ["1 questions have subtitles that are missing, the first is b_2"] if named else []
    assert warned(False) == [] and warned(True) == expected


def test_fewer_subtitles_than_published_are_a_warning_where_they_are_wanted(tmp_path):
    layouts.videomme(tmp_path)
    for wanted in (False, True):
        report = BENCHMARKS["videomme"].check(tmp_path, wanted)
        assert report.counts.count(("videos with subtitles", 2, 744)) == 1
        assert ("2 videos with subtitles instead of the 744 published" in report.warnings) == wanted


# ---------------------------------------------------------------------------------------------------------------------
# LVBench
# ---------------------------------------------------------------------------------------------------------------------


def test_lvbench(tmp_path):
    items, report = BENCHMARKS["lvbench"].load(layouts.lvbench(tmp_path, videos=("second",)))
    assert [(item.id, item.answer) for item in items] == [("1", "A"), ("2", "B"), ("3", "C")]
    assert items[0].question == "What colour is it?"
    assert items[0].options == ("red", "blue", "a (B) flag", "green")
    assert items[0].labels == {"question_type": ("ER", "KIR"), "type": ("sport",)}
    assert items[2].labels["question_type"] == ("Sum", "EU", "Rea")
    assert [item.time_reference for item in items] == [(65.0, 90.0), (3600.0, 3610.0), (0.0, 1800.0)]
    assert items[0].duration_s == 1800.0
    assert report.missing_videos == ("first",) and items[2].video == tmp_path / "all_videos" / "second.mp4"
    assert ("questions with a time reference", 3, None) in report.counts


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:15-00:19", (15.0, 19.0)),
        ("99:59-100:01", (5999.0, 6001.0)),
        ("01:02:03-01:02:04", (3723.0, 3724.0)),
        ("00:15", (15.0, 15.0)),
        ("00:19-00:15", None),
        ("whole video", None),
        ("inf-inf", None),
        ("nan-00:15", None),
        ("", None),
    ],
)
def test_time_references(text, seconds):
    assert lvbench.parse_time_reference(text) == seconds


# ---------------------------------------------------------------------------------------------------------------------
# MLVU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", [".", "MLVU"])
def test_mlvu(tmp_path, root):
    items, report = BENCHMARKS["mlvu"].load(layouts.mlvu(tmp_path, root, missing=("order",)))
    assert len(items) == 14 and len({item.id for item in items}) == 14
    assert [item.answer for item in items] == ["A", "C"] * 7
    assert [item.labels["task"][0] for item in items[::2]] == list(layouts.MLVU_TASKS)
    assert items[0].video == tmp_path / root / "video" / "1_plotQA" / "plotQA_7.mp4"
    assert items[0].video_id == items[1].video_id == "1_plotQA/plotQA_7.mp4"
    assert items[0].duration_s == 480.5
    assert report.missing_videos == ("5_order/order_7.mp4",)
    assert ("questions of plotQA", 2, 539) in report.counts
    assert sum(published for what, _, published in report.counts if what.startswith("questions of")) == 2175


@pytest.mark.parametrize("style", ["({}) {}", "{}. {}", "{}) {}"])
def test_mlvu_repacked_holds_the_same_questions(tmp_path, style):
    published, _ = BENCHMARKS["mlvu"].load(layouts.mlvu(tmp_path / "published"))
    repacked, report = BENCHMARKS["mlvu"].load(layouts.mlvu_repacked(tmp_path / "repacked", style))
    asked = lambda items: [
        (i.id, i.video_id, i.question, i.options, i.answer, i.duration_s, dict(i.labels)) for i in items
    ]
    assert asked(repacked) == asked(published)
    assert report.missing_videos == () and repacked[0].video == tmp_path / "repacked" / "plotQA_7.mp4"


def test_a_file_that_serves_two_tasks_is_one_video(tmp_path):
    """Else its questions would count as clusters of their own, and a scan that serves both as two."""
    rows = layouts.mlvu_rows()
    for task in ("count", "ego"):
        same = [row | {"video": "shared.mp4"} for row in rows[task]]
        layouts.write_json(tmp_path / "json" / f"{layouts.MLVU_TASKS[task]}.json", same)
    layouts.write_video(tmp_path / "video" / "shared.mp4")
    items, report = BENCHMARKS["mlvu"].load(tmp_path)
    assert [item.video_id for item in items] == ["3_ego/shared.mp4"] * 4 and ("videos", 1, None) in report.counts
    layouts.write_video(tmp_path / "video" / "4_count" / "shared.mp4")
    items, report = BENCHMARKS["mlvu"].load(tmp_path)
    assert [item.video_id for item in items] == ["3_ego/shared.mp4"] * 2 + ["4_count/shared.mp4"] * 2


def test_an_answer_that_is_no_candidate_is_kept_and_warned_of(tmp_path):
    """Such a question can only be answered wrongly, as in the published scripts."""
    rows = layouts.mlvu_rows()["count"]
    rows[1]["answer"] = "many"
    layouts.write_json(tmp_path / "json" / "4_count.json", rows)
    items, report = BENCHMARKS["mlvu"].load(tmp_path)
    assert [item.answer for item in items] == ["A", ""]
    assert "1 questions have an answer that is none of their options, the first is 4_count_1" in report.warnings


# ---------------------------------------------------------------------------------------------------------------------
# Flaws
# ---------------------------------------------------------------------------------------------------------------------


def without(row: dict, column: str) -> dict:
    return {name: value for name, value in row.items() if name != column}


def one_video(row: dict, column: str) -> dict:
    """An LVBench line whose first question lacks a column."""
    first, *others = row["qa"]
    return row | {"qa": [without(first, column), *others]}


MISSING = [
    ("videomme", "videomme/test-0.parquet", without(layouts.videomme_rows()[0], "options"), "options"),
    ("videomme", "videomme/test-0.parquet", without(layouts.videomme_rows()[0], "videoID"), "videoID"),
    ("longvideobench", "lvb_val.json", without(layouts.longvideobench_rows()[0], "candidates"), "candidates"),
    ("longvideobench", "lvb_val.json", without(layouts.longvideobench_rows()[0], "subtitle_path"), "subtitle_path"),
    ("lvbench", "video_info.meta.jsonl", without(layouts.lvbench_rows()[0], "video_info"), "video_info"),
    ("lvbench", "video_info.meta.jsonl", one_video(layouts.lvbench_rows()[0], "answer"), "answer"),
    ("mlvu", "json/3_ego.json", without(layouts.mlvu_rows()["ego"][0], "candidates"), "candidates"),
]
WRITE = {".parquet": layouts.write_parquet, ".json": layouts.write_json, ".jsonl": layouts.write_jsonl}


def in_question(row: dict, **cells) -> dict:
    """An LVBench line with other cells in its first question."""
    return row | {"qa": [row["qa"][0] | cells, *row["qa"][1:]]}


def other(benchmark: str, name: str, **cells):
    """A file whose first row has one cell of the wrong kind."""
    rows = {"videomme": layouts.videomme_rows, "longvideobench": layouts.longvideobench_rows,
            "mlvu": lambda: layouts.mlvu_rows()["ego"], "lvbench": layouts.lvbench_rows}  # fmt: skip
    return benchmark, name, rows[benchmark]()[0] | cells


REPACKED = {
    "video_name": "a.mp4",
    "question": "Q?\n(A) x\n(B) y",
    "answer": "A",
    "task_type": "ego",
    "duration": "480.5",
}
WRONG_KINDS = [
    (*other("videomme", "test-0.parquet", options="A. x, B. y"), "'A. x, B. y' as its options, not a list of texts"),
    (*other("videomme", "test-0.parquet", answer=1), "1 as its answer, not a text"),
    (*other("videomme", "test-0.parquet", videoID=7.5), "7.5 as its videoID, not a text"),
    (*other("longvideobench", "lvb_val.json", duration="long"), "'long' as its duration, not a number"),
    (*other("longvideobench", "lvb_val.json", duration=True), "True as its duration, not a number"),
    (*other("longvideobench", "lvb_val.json", correct_choice="B"), "'B' as its correct_choice, not a whole number"),
    (*other("longvideobench", "lvb_val.json", candidates=["a", 2]), "['a', 2] as its candidates, not a list of texts"),
    (*other("longvideobench", "lvb_val.json", starting_timestamp_for_subtitles=[1]), "[1] as its starting_timestamp"),
    (*other("lvbench", "video_info.meta.jsonl", qa={"uid": 1}), "{'uid': 1} as its qa, not a list of rows"),
    (*other("lvbench", "video_info.meta.jsonl", video_info=30), "30 as its video_info, not named columns"),
    (
        *other("lvbench", "video_info.meta.jsonl", video_info={"duration_minutes": "half an hour"}),
        "first: row 0 has 'half an hour' as its duration_minutes, not a number",
    ),
    (
        "lvbench", "video_info.meta.jsonl", in_question(layouts.lvbench_rows()[0], question_type=3),
        "row 0 has 3 as its question_type, not a text or a list of texts",
    ),
    (*other("longvideobench", "lvb_val.json", duration=10**400), "as its duration, not a number"),
    (
        *other("longvideobench", "lvb_val.json", question="x" * 40 + "\ud83d"),
        "row 0 has half a character ('\\ud83d') in its question",
    ),
    (
        *other("longvideobench", "lvb_val.json", candidates=["a", "\ud83d"]),
        "row 0 has half a character ('\\ud83d') in its candidates",
    ),
    (
        "lvbench", "video_info.meta.jsonl", in_question(layouts.lvbench_rows()[0], question="\ud83d\n(A) x\n(B) y"),
        "first: row 0 has half a character ('\\ud83d') in its question",
    ),
    (*other("mlvu", "json/3_ego.json", candidates="yes or no"), "'yes or no' as its candidates, not a list of texts"),
    (*other("mlvu", "json/3_ego.json", duration=[1, 2]), "[1, 2] as its duration, not a number"),
    (*other("mlvu", "json/3_ego.json", video={"a": "x" * 99}), "as its video, not a text"),
    ("mlvu", "test-0.parquet", REPACKED | {"question": 1}, "row 0 has 1 as its question, not a text"),
    ("mlvu", "test-0.parquet", REPACKED | {"duration": "?"}, "row 0 has '?' as its duration, not a number"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("benchmark", "name", "row", "words"),
    [*((*file, f"row 0 has no {column};") for *file, column in MISSING), *WRONG_KINDS],
)
def test_a_missing_column_or_a_cell_of_the_wrong_kind_is_named_with_its_file(tmp_path, benchmark, name, row, words):
    path = tmp_path / name
    WRITE[path.suffix](path, [row])
    with pytest.raises(UserError) as error:
        BENCHMARKS[benchmark].load(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and words in message and "\n" not in message and len(message) < 300


@pytest.mark.parametrize("duration", ["480.5", 480.5, 480, None])
def test_a_length_may_be_written_as_a_text_where_it_was_passed_on(tmp_path, duration):
    layouts.write_parquet(tmp_path / "test-0.parquet", [REPACKED | {"duration": duration}])
    [item], _ = BENCHMARKS["mlvu"].load(tmp_path)
    assert item.duration_s == (None if duration is None else float(duration))


@pytest.mark.parametrize(
    ("benchmark", "name"),
    [
        ("videomme", "videomme/test-0.parquet"),
        ("longvideobench", "lvb_val.json"),
        ("lvbench", "video_info.meta.jsonl"),
        ("mlvu", "json/1_plotQA.json"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe{not json}\n[", b'"a text"', b"[" * 100_000])
def test_an_unreadable_file_is_named(tmp_path, benchmark, name, content):
    path = layouts.write_video(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        BENCHMARKS[benchmark].load(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_directory_without_the_files_is_named(tmp_path, benchmark):
    with pytest.raises(UserError, match=f"--data={tmp_path}: no .*; download"):
        BENCHMARKS[benchmark].load(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        BENCHMARKS[benchmark].load(tmp_path / "nowhere")


def test_a_question_that_stands_twice_is_refused(tmp_path):
    rows = layouts.videomme_rows()
    layouts.write_parquet(tmp_path / "test-0.parquet", [*rows, rows[1]])
    with pytest.raises(UserError, match="001-2 stands twice"):
        BENCHMARKS["videomme"].load(tmp_path)


def test_annotations_without_a_question_are_refused(tmp_path):
    layouts.write_jsonl(tmp_path / "video_info.meta.jsonl", [row | {"qa": []} for row in layouts.lvbench_rows()])
    with pytest.raises(UserError, match=f"^--data={tmp_path}: the annotations hold no question;"):
        BENCHMARKS["lvbench"].load(tmp_path)


def test_a_question_without_text_is_refused(tmp_path):
    row = in_question(layouts.lvbench_rows()[0], question="\n(A) x\n(B) y")
    layouts.write_jsonl(tmp_path / "video_info.meta.jsonl", [row])
    with pytest.raises(UserError, match=f"^--data={tmp_path}: the question {row['qa'][0]['uid']} has no text;"):
        BENCHMARKS["lvbench"].load(tmp_path)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ([], "0 options"),
        (["A. red"], "1 options"),
        (["A. red", " "], "an option B without text"),
        ([f"{letter}. red" for letter in (*string.ascii_uppercase, "AA")], "27 options"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(tmp_path, options, wrong):
    rows = layouts.videomme_rows()
    layouts.write_parquet(tmp_path / "test-0.parquet", [rows[0], rows[1] | {"options": options}])
    with pytest.raises(UserError, match=f"^--data={tmp_path}: the question 001-2 has {wrong};"):
        BENCHMARKS["videomme"].load(tmp_path)


@pytest.mark.parametrize("benchmark", ["longvideobench", "lvbench", "mlvu"])
def test_a_mark_before_the_first_byte_is_no_character(tmp_path, benchmark):
    directory = getattr(layouts, benchmark)(tmp_path)
    plain, _ = BENCHMARKS[benchmark].load(directory)
    for path in (file for file in directory.rglob("*") if file.suffix in (".json", ".jsonl")):
        path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert BENCHMARKS[benchmark].load(directory)[0] == plain


def test_a_question_without_options_is_refused(tmp_path):
    row = layouts.lvbench_rows()[0]
    row["qa"][1]["question"] = "Why does he stop?"
    path = layouts.write_jsonl(tmp_path / "video_info.meta.jsonl", [row])
    with pytest.raises(UserError, match=f"{path}: the question 2 has no"):
        BENCHMARKS["lvbench"].load(tmp_path)


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("Which?\n(A) x\n(B) y", "Which?", ("x", "y")),
        ("Which?\n(A)x\n(B)y\n", "Which?", ("x", "y")),
        ("Which?\nA. x\nB. B. Smith\nC. z", "Which?", ("x", "B. Smith", "z")),
        ("Which? (A) x (B) y", "Which?", ("x", "y")),
        ("Is (A) or (B) first?\n(A) x\n(B) y", "Is (A) or (B) first?", ("x", "y")),
        ("(B) comes when?\n(A) x\n(B) y", "(B) comes when?", ("x", "y")),
        ("Which of two\nlines?\n(A) first\nline\n(B) y", "Which of two\nlines?", ("first\nline", "y")),
        ("Who is (A)?", "Who is (A)?", ()),
        ("No options", "No options", ()),
    ],
)
def test_options_inside_a_question(text, question, options):
    assert split_options(text) == (question, options)


def test_an_answer_is_a_letter_of_an_option_or_the_text_of_one():
    options = ("red ", "blue", "blue")
    assert [letter_in(said, options) for said in ("B", "(C)", " A. ", "D", "AB", "")] == ["B", "C", "A", "", "", ""]
    assert [letter_of_text(said, options) for said in ("red", " blue", "green")] == ["A", "B", ""]
