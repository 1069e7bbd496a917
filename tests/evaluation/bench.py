"""A small LVBench on disk, with real videos, and a tiny checkpoint: what the tests of the runner run on."""

import json
import pathlib

from tests import media

SMALL = (
    "--max_pixels=4704", "--slots_per_group=4", "--budget=20", "--max_answer_tokens=2", "--max_frames=24", "--fps=12",
)  # fmt: skip
QUESTIONS = ("What is it?", "Who came in after the break?", "Where does it end?")


def write_lvbench(directory, videos: int = 3, questions: int = 2, frames: int = 36) -> pathlib.Path:
    """`videos` files of a second or two, each with the same `questions`; returns the directory."""
    directory = pathlib.Path(directory)
    (directory / "all_videos").mkdir(parents=True)
    lines = []
    for v in range(videos):
        media.write(directory / "all_videos" / f"clip{v}.mp4", frames + 4 * v)
        asked = [_question(v, q) for q in range(questions)]
        lines.append({"key": f"clip{v}", "type": "cartoon", "video_info": {"duration_minutes": 0.03}, "qa": asked})
    (directory / "video_info.meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def _question(v: int, q: int) -> dict:
    return {
        "uid": f"{v}-{q}",
        "question": f"{QUESTIONS[q]}\n(A) a cat\n(B) a dog\n(C) a cow\n(D) a hen",
        "answer": "ABCD"[(v + q) % 4],
        "question_type": ["entity recognition", "reasoning"][: 1 + q],
        "time_reference": "00:00-00:01",
    }


def evaluate_flags(data, model, workdir, *more: str) -> list[str]:
    """The words of `adapttoken evaluate` on this benchmark, at a small size."""
    places = [f"--data={data}", f"--model={model}", f"--workdir={workdir}"]
    return ["evaluate", "--benchmark=lvbench", *places, *SMALL, *map(str, more)]


def outcome(workdir) -> dict[str, bytes]:
    """The files of a run that must not depend on how often it was interrupted, or on how it was shared out."""
    names = ("samples.jsonl", "results.json", "export/lvbench.json")
    return {name: (pathlib.Path(workdir) / name).read_bytes() for name in names}
