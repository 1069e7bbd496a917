"""Each benchmark in each layout, from published files to results, answered by the bundled model."""

import json

import pytest

from adapttoken_jax import cli
from adapttoken_jax.benchmarks import BENCHMARKS
from adapttoken_jax.needle import scene, write_mp4
from tests.benchmarks import layouts

SMALL = ("--model=needle", "--max_frames=48", "--fps=4", "--slots_per_group=12", "--budget=16", "--max_answer_tokens=1")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The bytes of a needle video of 48 frames, 12 seconds."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_mp4(scene(0, "test", 48, "pair"), path, 4.0)
    return path.read_bytes()


def evaluated(benchmark, data, workdir, *more):
    """The results and the samples, after every empty video file was given something to show."""
    words = [
        "evaluate",
        f"--benchmark={benchmark}",
        f"--data={data}",
        f"--workdir={workdir}",
        *SMALL,
        "--method=uniform",
        *more,
    ]
    assert cli.main(words) == 0
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    return json.loads((workdir / "results.json").read_text()), samples


def shown(directory, clip):
    """The directory, with a video in every place of one."""
    for path in directory.rglob("*"):
        if path.is_file() and not path.stat().st_size:
            path.write_bytes(clip)
    return directory


def check(benchmark, data, results, samples, answered):
    """Every question has its sample, in the published order; those of videos that are there have an answer."""
    items, _ = BENCHMARKS[benchmark].load(data)
    assert [sample["id"] for sample in samples] == [item.id for item in items]
    assert [sample["target"] for sample in samples] == [item.answer for item in items]
    assert [i for i, sample in enumerate(samples) if sample["prediction"] is not None] == answered
    for i in answered:
        assert samples[i]["option"] in items[i].letters and samples[i]["visual_tokens"]["selected"] == 16
    assert (results["questions"], results["answered"]) == (len(items), len(answered))
    for rule, scores in results["scores"].items():
        assert scores["missing"] == len(items) - len(answered), rule
    return {name: {k: v["n"] for k, v in labels.items()} for name, labels in scores["breakdowns"].items()}


def test_videomme_with_subtitles_and_a_video_that_is_missing(tmp_path, clip):
    data = shown(layouts.videomme(tmp_path / "data", suffixes=(".mp4", None, ".mkv")), clip)
    results, samples = evaluated("videomme", data, tmp_path / "without", "--prompt=official")
    counted = check("videomme", data, results, samples, [0, 1, 3, 4])
    assert counted["duration"] == {"long": 2, "short": 2} and results["broken_videos"][0]["video_id"] == "video-2"
    _, subtitled = evaluated("videomme", data, tmp_path / "with", "--subtitles", "--prompt=official")
    entropies = lambda found: [sample.get("entropy") for sample in found]
    # Only the first video has subtitles; the official prompt says nothing of them where there are none.
    assert [a == b for a, b in zip(entropies(subtitled), entropies(samples), strict=True)] == [False] * 2 + [True] * 3


def test_a_run_goes_on_with_its_own_subtitles_alone(tmp_path, clip, capsys):
    """Else half of a result would be with the subtitles that were there at its beginning."""
    data = shown(layouts.videomme(tmp_path / "data"), clip)
    evaluated("videomme", data, tmp_path / "run", "--subtitles")
    again = ["evaluate", "--benchmark=videomme", f"--data={data}", f"--workdir={tmp_path / 'run'}", *SMALL]
    again += ["--method=uniform", "--subtitles"]
    file = data / "subtitle" / "video-1.srt"
    before = file.read_bytes()
    for change in (lambda: file.write_bytes(before + b"\n"), file.unlink):
        change()
        capsys.readouterr()
        assert cli.main(again) == 2
        assert f"--data={data}: not the same subtitles as when the run in" in capsys.readouterr().err
    file.write_bytes(before)
    assert cli.main(again) == 0


def test_subtitles_that_cannot_be_read_are_named_without_their_place(tmp_path, clip):
    """The same data elsewhere give the same bytes."""
    data = shown(layouts.videomme(tmp_path / "data"), clip)
    (data / "subtitle" / "video-2.srt").write_text("no times")
    results, _ = evaluated("videomme", data, tmp_path / "run", "--subtitles")
    reason = "video-2.srt: no readable subtitles (no line as 00:00:01,000 --> 00:00:02,000)"
    assert results["broken_videos"] == [{"video_id": "video-2", "error": reason, "questions": 1}]
    assert "2 videos with subtitles instead of the 744 published" in results["warnings"]


@pytest.mark.parametrize("layout", ["json", "parquet"])
def test_longvideobench_with_both_shapes_of_subtitles(tmp_path, clip, layout):
    data = shown(layouts.longvideobench(tmp_path / "data", layout), clip)
    results, samples = evaluated("longvideobench", data, tmp_path / "run", "--subtitles")
    counted = check("longvideobench", data, results, samples, [0, 1, 2])
    assert counted["question_category"] == {"S2E": 2, "T2O": 1}
    # The second question has five options, the others four and an "N/A" that is none.
    assert [len(sample["option_probabilities"]) for sample in samples] == [4, 5, 4]


def test_lvbench_counts_a_question_under_each_of_its_labels(tmp_path, clip):
    data = shown(layouts.lvbench(tmp_path / "data"), clip)
    results, samples = evaluated("lvbench", data, tmp_path / "run", "--method=adapttoken")
    counted = check("lvbench", data, results, samples, [0, 1, 2])
    assert counted["question_type"] == {"ER": 1, "EU": 1, "KIR": 1, "Rea": 2, "Sum": 1}
    # The clip lasts 12 s: the last question's reference covers it, the others lie behind its end.
    assert [sample["localisation"]["selected"] for sample in samples] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("layout", [layouts.mlvu, layouts.mlvu_repacked])
def test_mlvu_as_published_and_as_passed_on(tmp_path, clip, layout):
    data = shown(layout(tmp_path / "data"), clip)
    results, samples = evaluated("mlvu", data, tmp_path / "run", "--prompt=official", "--limit=6")
    assert [sample["id"] for sample in samples] == [
        f"{stem}_{i}" for stem in ("1_plotQA", "2_needle", "3_ego") for i in (0, 1)
    ]
    assert results["answered"] == 6 and set(results["scores"]["official"]["breakdowns"]["task"]) == {
        "ego",
        "needle",
        "plotQA",
    }
