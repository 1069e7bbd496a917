"""Small directories in each layout in which the four benchmarks are published or passed on.

Videos are empty files unless the caller gives something else: loading looks at their names alone.
"""

import json
import pathlib

import pyarrow as pa
from pyarrow import parquet


def write_json(path: pathlib.Path, content) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_jsonl(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_video(path: pathlib.Path, content: bytes = b"") -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Video-MME
# ---------------------------------------------------------------------------------------------------------------------

SRT = """1
00:00:01,000 --> 00:00:03,500
<font color="white" size=".72c">Good morning.</font>

2
00:00:04,000 --> 00:00:06,000
It is
12

3
00:01:00,250 --> 00:01:02,000
Good night.
"""


def videomme_rows() -> list[dict]:
    """Five questions about three videos, one of each length."""

    def row(video, number, duration, domain, sub_category, task_type, options, answer):
        return {
            "video_id": f"{video:03}", "duration": duration, "domain": domain, "sub_category": sub_category,
            "url": f"https://example.org/{video}", "videoID": f"video-{video}", "question_id": f"{video:03}-{number}",
            "task_type": task_type, "question": f"What is in video {video}, question {number}?",
            "options": [f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=True)], "answer": answer,
        }  # fmt: skip

    fruit = ("Apples.", "Candles.", "Berries.", "A (B) sign.")
    return [
        row(1, 1, "short", "Knowledge", "Law", "Counting Problem", fruit, "A"),
        row(1, 2, "short", "Knowledge", "Law", "OCR Problems", fruit, "B"),
        row(2, 1, "medium", "Life Record", "Food", "Counting Problem", fruit, "C"),
        row(3, 1, "long", "Multilingual", "Multilingual", "OCR Problems", fruit, "D"),
        row(3, 2, "long", "Multilingual", "Multilingual", "OCR Problems", fruit, "A"),
    ]


def videomme(directory: pathlib.Path, folder: str = "data", suffixes=(".mp4", ".MP4", ".mkv")) -> pathlib.Path:
    """`suffixes`: one per video; None leaves the video out. The first two videos have subtitles."""
    write_parquet(directory / "videomme" / "test-00000-of-00001.parquet", videomme_rows())
    for number, suffix in enumerate(suffixes, 1):
        if suffix:
            write_video(directory / folder / f"video-{number}{suffix}")
    for number in (1, 2):
        path = directory / "subtitle" / f"video-{number}.srt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(SRT, encoding="utf-8")
    return directory


# ---------------------------------------------------------------------------------------------------------------------
# LongVideoBench
# ---------------------------------------------------------------------------------------------------------------------

LINES = [
    {"start": "00:10:00.500", "end": "00:10:02.000", "line": "Before the clip ends."},
    {"start": "00:00:01.000", "end": "00:00:02.000", "line": "Long before it."},
]
TIMESTAMPS = [
    {"timestamp": [1.0, 2.5], "text": "First."},
    {"timestamp": [4.0, None], "text": "To the end."},
]


def longvideobench_rows() -> list[dict]:
    def row(number, video, candidates, right, group, duration, category, subtitles, starting):
        return {
            "video_id": video, "question": f"Which is number {number}?", "candidates": candidates,
            "correct_choice": right, "id": f"{video}_{number}", "video_path": f"{video}.mp4",
            "subtitle_path": subtitles, "starting_timestamp_for_subtitles": starting, "duration": duration,
            "duration_group": group, "question_category": category, "topic_category": "NP-News-Programs", "level": "L1",
        }  # fmt: skip

    return [
        row(0, "a", ["red", "blue", "green", "white"], 1, 15, 11.5, "S2E", "a_en.json", 595.0),
        row(1, "a", ["one", "two", "three", "four", "five"], 4, 15, 11.5, "T2O", "a_en.json", 595.0),
        row(2, "b", ["cat", "dog", "cow", "ant"], 0, 600, 420.0, "S2E", "b.json", 0.0),
    ]


def longvideobench(directory: pathlib.Path, layout: str = "json", videos=("a", "b")) -> pathlib.Path:
    """`layout`: json with candidates, or parquet with option0 … option4 and "N/A" for the fifth of four."""
    rows = longvideobench_rows()
    if layout == "json":
        write_json(directory / "lvb_val.json", rows)
    else:
        flat = []
        for row in rows:
            five = [*row.pop("candidates"), "N/A"][:5]
            flat.append(row | {f"option{i}": option for i, option in enumerate(five)})
        write_parquet(directory / "validation-00000-of-00001.parquet", flat)
    write_json(directory / "subtitles" / "a_en.json", LINES)
    write_json(directory / "subtitles" / "b.json", TIMESTAMPS)
    for name in videos:
        write_video(directory / "videos" / f"{name}.mp4")
    return directory


# ---------------------------------------------------------------------------------------------------------------------
# LVBench
# ---------------------------------------------------------------------------------------------------------------------


def lvbench_rows() -> list[dict]:
    def ask(uid, question, answer, kinds, time):
        options = "\n(A) red\n(B) blue\n(C) a (B) flag\n(D) green"
        return {"uid": uid, "question": question + options, "answer": answer, "question_type": kinds,
                "time_reference": time}  # fmt: skip

    info = {"duration_minutes": 30, "fps": 25.0, "resolution": {"width": 1280, "height": 720}}
    return [
        {"key": "first", "type": "sport", "video_info": info, "qa": [
            ask("1", "What colour is it?", "A", ["entity recognition", "key information retrieval"], "01:05-01:30"),
            ask("2", "Why does he stop?", "B", ["reasoning"], "1:00:00-1:00:10"),
        ]},
        {"key": "second", "type": "tv", "video_info": info, "qa": [
            ask("3", "What is it about?", "C", ["summarization", "event understanding", "reasoning"], "00:00-30:00"),
        ]},
    ]  # fmt: skip


def lvbench(directory: pathlib.Path, videos=("first", "second")) -> pathlib.Path:
    write_jsonl(directory / "video_info.meta.jsonl", lvbench_rows())
    for name in videos:
        write_video(directory / "all_videos" / f"{name}.mp4")
    return directory


# ---------------------------------------------------------------------------------------------------------------------
# MLVU
# ---------------------------------------------------------------------------------------------------------------------

MLVU_TASKS = {
    "plotQA": "1_plotQA", "needle": "2_needle", "ego": "3_ego", "count": "4_count", "order": "5_order",
    "anomaly_reco": "6_anomaly_reco", "topic_reasoning": "7_topic_reasoning",
}  # fmt: skip


def mlvu_rows() -> dict[str, list[dict]]:
    """Two questions about one video in each task; the second answer is the third candidate, the first is the first."""
    candidates = {"count": ["3", "1", "2", "0"]}
    rows = {}
    for task in MLVU_TASKS:
        texts = candidates.get(task, ["a horse", "a house", "a boat", "B"])
        rows[task] = [
            {"video": f"{task}_7.mp4", "duration": 480.5, "question": f"What of {task} {number}?", "candidates": texts,
             "answer": texts[right], "question_type": "findNeedle" if task == "needle" else task}
            for number, right in enumerate((0, 2))
        ]  # fmt: skip
    return rows


def mlvu(directory: pathlib.Path, root: str = ".", missing: tuple[str, ...] = ()) -> pathlib.Path:
    for task, rows in mlvu_rows().items():
        stem = MLVU_TASKS[task]
        write_json(directory / root / "json" / f"{stem}.json", rows)
        if task not in missing:
            write_video(directory / root / "video" / stem / f"{task}_7.mp4")
    return directory


def mlvu_repacked(directory: pathlib.Path, style: str = "({}) {}") -> pathlib.Path:
    """The parquet that others pass on: letters and options inside the question, the answer a letter."""
    rows = []
    for task, published in mlvu_rows().items():
        for row, answer in zip(published, "AC", strict=True):
            options = [style.format(letter, text) for letter, text in zip("ABCD", row["candidates"], strict=True)]
            rows.append({"video_name": row["video"], "duration": str(row["duration"]), "task_type": task,
                         "question": "\n".join([row["question"], *options]), "answer": answer})  # fmt: skip
        write_video(directory / f"{task}_7.mp4")
    write_parquet(directory / "data" / "test-00000-of-00001.parquet", rows)
    return directory
