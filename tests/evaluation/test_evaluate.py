"""`adapttoken evaluate` from files to files, on a tiny checkpoint and real videos."""

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil

import jax
import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax import cli
from adapttoken_jax.benchmarks import BENCHMARKS, PROMPTS, SCORERS
from adapttoken_jax.errors import UserError
from adapttoken_jax.evaluation.runner import group_by_video, run_videos, scanned
from adapttoken_jax.evaluation.saved_selection import SavedSelection
from adapttoken_jax.evaluation.tables import read_finished
from adapttoken_jax.journal import Journal
from tests import media, tiny
from tests.evaluation import bench

SETTINGS = {
    "max_pixels": 4704,
    "slots_per_group": 4,
    "budget": 20,
    "max_answer_tokens": 2,
    "max_frames": 24,
    "fps": 12.0,
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Data, model, and the work directory of a whole run."""
    directory = tmp_path_factory.mktemp("evaluate")
    data = bench.write_lvbench(directory / "data")
    model = tiny.write_checkpoint(directory / "model", tiny.SHAPES["base"])
    assert cli.main(bench.evaluate_flags(data, model, directory / "whole")) == 0
    return data, model, directory / "whole"


def run(capsys, words, status=0):
    """Runs a command; its standard output and error."""
    capsys.readouterr()
    found = cli.main(words)
    out, err = capsys.readouterr()
    assert found == status, err
    return out, err


def lines(workdir, name="samples"):
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


def test_every_question_is_answered_as_if_asked_alone(places):
    data, path, whole = places
    model = at.load(path)
    config = at.AdaptTokenConfig.for_model(model.config, **SETTINGS)
    selections = {record["id"]: SavedSelection.from_record(record) for record in lines(whole, "selections")}
    items, _ = BENCHMARKS["lvbench"].load(data)
    for item, sample in zip(items, lines(whole), strict=True):
        alone = at.answer(model, str(item.video), PROMPTS["lvbench"]["lmms-eval"](item, None), config=config)
        assert (sample["id"], sample["target"]) == (item.id, item.answer)
        assert (sample["prediction"], sample["option"]) == (alone.answer, alone.option)
        assert sample["entropy"] == pytest.approx(alone.entropy, rel=1e-4)  # float32, another batch size
        assert sample["visual_tokens"]["prefilled"] == alone.cost.visual_tokens_prefilled
        chosen = np.array([alone.selected.slots, alone.selected.rows, alone.selected.cols]).T
        np.testing.assert_array_equal(selections[item.id].tokens, chosen)


def test_results_are_the_samples_scored(places):
    data, _, whole = places
    items, _ = BENCHMARKS["lvbench"].load(data)
    results, samples = json.loads((whole / "results.json").read_text()), lines(whole)
    for rule, scorer in SCORERS["lvbench"].items():
        right = [scorer.judge(item, sample["prediction"]).correct for item, sample in zip(items, samples, strict=True)]
        assert results["scores"][rule]["overall"]["correct"] == sum(right)
    for name in ("chance", "budget", "selected", "hit"):
        mean = np.mean([sample["localisation"][name] for sample in samples])
        assert results["localisation"][name] == pytest.approx(mean)
    prefilled = [sample["visual_tokens"]["prefilled"] for sample in samples]
    assert results["cost"]["visual_tokens"] == pytest.approx(np.mean(prefilled))
    # Two questions per video, and no early stop: the second question's groups are those of the first.
    scans = [tokens - 20 for tokens in prefilled]
    assert results["cost"]["visual_tokens_shared"] == pytest.approx(20 + sum(scans[::2]) / len(samples))


def test_the_run_says_what_it_was(places):
    _, _, whole = places
    run = json.loads((whole / "run.json").read_text())
    assert run["flags"]["benchmark"] == "lvbench" and run["flags"]["prompt"] == "lmms-eval"
    assert run["config"]["budget"] == 20 and run["config"]["reference_layer"] == 3
    assert set(run["hashes"]) == {"questions", "model"} and "jax" in run["versions"] and "git_commit" in run
    for cost in lines(whole, "costs"):
        assert cost["questions_of_video"] == 2 and 0 < cost["seconds"]["final"] < cost["seconds"]["total"]
        assert cost["amortised"] * 2 >= cost["seconds"]["total"]


def test_a_corrupt_video_in_the_middle_is_recorded_and_tried_again(places, tmp_path, capsys, monkeypatch):
    data, model, whole = places
    shutil.copytree(data, tmp_path / "data")
    video = tmp_path / "data" / "all_videos" / "clip1.mp4"
    media.truncated(video, video, 0.7)
    out, err = run(capsys, bench.evaluate_flags(tmp_path / "data", model, tmp_path / "run"))
    assert "1 videos could not be read, the first is clip1" in err and "4 of 6 questions" in err
    before, after = lines(whole), lines(tmp_path / "run")
    assert [after[i] for i in (0, 1, 4, 5)] == [before[i] for i in (0, 1, 4, 5)]
    assert all(after[i]["prediction"] is None and after[i]["error"] for i in (2, 3))
    assert str(tmp_path) not in after[2]["error"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [(video["video_id"], video["questions"]) for video in results["broken_videos"]] == [("clip1", 2)]
    assert results["scores"]["official"]["missing"] == 2 and results["answered"] == 4
    # Going on tries again, and --strict does not take a broken video for a whole run.
    assert run(capsys, bench.evaluate_flags(tmp_path / "data", model, tmp_path / "run"))[0] == out
    benchmark = dataclasses.replace(BENCHMARKS["lvbench"], questions=6, videos=3)
    monkeypatch.setitem(BENCHMARKS, "lvbench", benchmark)  # complete, so that only the video stops the run
    strict = bench.evaluate_flags(tmp_path / "data", model, tmp_path / "run", "--strict")
    assert f"--strict: {video}: " in run(capsys, strict, status=2)[1].splitlines()[-1]
    shutil.copy(data / "all_videos" / "clip1.mp4", video)
    run(capsys, strict)
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    scores = lambda directory: json.loads((directory / "results.json").read_text()) | {"warnings": []}
    assert scores(tmp_path / "run") == scores(whole)


def test_a_retry_that_is_killed_leaves_no_old_scores_and_no_record_twice(places, tmp_path, capsys, monkeypatch):
    data, model, whole = places
    shutil.copytree(data, tmp_path / "data")
    video = tmp_path / "data" / "all_videos" / "clip1.mp4"
    media.truncated(video, video, 0.7)
    words = bench.evaluate_flags(tmp_path / "data", model, tmp_path / "run")
    run(capsys, words)
    shutil.copy(data / "all_videos" / "clip1.mp4", video)
    append = Journal.append

    def killed(journal, records):
        if journal.path.name == "samples.jsonl":
            raise KeyboardInterrupt
        append(journal, records)

    monkeypatch.setattr(Journal, "append", killed)
    run(capsys, words, status=130)
    monkeypatch.undo()
    assert [record["id"] for record in lines(tmp_path / "run", "selections")][-2:] == ["1-0", "1-1"]
    with pytest.raises(UserError, match="not finished; run the same evaluation again"):
        read_finished(tmp_path / "run")
    run(capsys, words)
    assert bench.outcome(tmp_path / "run") == bench.outcome(whole)
    asked = [sample["id"] for sample in lines(whole)]
    for name in ("samples", "selections", "costs"):
        assert sorted(record["id"] for record in lines(tmp_path / "run", name)) == asked


def test_with_strict_a_corrupt_video_ends_the_run_after_those_before_it(places, tmp_path):
    data, path, _ = places
    shutil.copytree(data, tmp_path / "data")
    video = tmp_path / "data" / "all_videos" / "clip1.mp4"
    media.truncated(video, video, 0.7)
    model, written = at.load(path), []
    config = at.AdaptTokenConfig.for_model(model.config, **SETTINGS)
    videos = group_by_video(BENCHMARKS["lvbench"].load(tmp_path / "data")[0])
    word = lambda item, clip: PROMPTS["lvbench"]["lmms-eval"](item, None)
    with pytest.raises(UserError, match=rf"^--strict: {video}: ") as error:
        run_videos(model, videos, word, config, "uniform", lambda video, _: written.append(video.id), strict=True)
    assert written == ["clip0"] and "\n" not in str(error.value)


def test_strict_stops_at_what_is_missing_and_says_so(places, tmp_path, capsys):
    data, model, _ = places
    out, err = run(capsys, bench.evaluate_flags(data, model, tmp_path / "run", "--strict"), status=2)
    assert out == "" and err.count("\n") == 1 and "--strict" in err and not (tmp_path / "run").exists()


def test_check_prints_what_is_there_without_model_or_workdir(places, capsys):
    data, _, _ = places
    out, err = run(capsys, ["evaluate", "--benchmark=lvbench", f"--data={data}", "--check"])
    assert re.search(r"questions +6 +1549", out) and err == ""
    _, err = run(capsys, ["evaluate", "--benchmark=lvbench", f"--data={data}"], status=2)
    assert "--model is required" in err and err.count("\n") == 1


def test_a_changed_flag_is_refused_and_nothing_is_touched(places, tmp_path, capsys):
    data, model, whole = places
    shutil.copytree(whole, tmp_path / "run")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for flag in (
        "--budget=21",
        "--method=lite",
        "--prompt=official",
        "--limit=2",
        "--subtitles",
        "--replay=" + str(whole),
    ):
        out, err = run(capsys, bench.evaluate_flags(data, model, tmp_path / "run", flag), status=2)
        assert out == "" and flag.partition("=")[0] in err and err.count("\n") == 1
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_full_disk_is_one_line_and_the_run_goes_on_from_there(places, tmp_path, capsys):
    data, model, whole = places
    # Compiled programs are larger than the disk will be, and half a one would stay in the cache.
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    shutil.copytree(whole, tmp_path / "run")
    first_video = "".join((whole / "samples.jsonl").read_text().splitlines(keepends=True)[:2])
    (tmp_path / "run" / "samples.jsonl").write_text(first_video)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(first_video.encode()) + 100, hard))
    try:
        _, err = run(capsys, bench.evaluate_flags(data, model, tmp_path / "run"), status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    assert "samples.jsonl: File too large" in err.splitlines()[-1]
    run(capsys, bench.evaluate_flags(data, model, tmp_path / "run"))
    assert bench.outcome(tmp_path / "run") == bench.outcome(whole)


@pytest.mark.parametrize("method", ["uniform", "flexselect", "lite", "full"])
def test_every_other_arm_runs_and_keeps_its_word(places, tmp_path, capsys, method):
    data, model, _ = places
    run(capsys, bench.evaluate_flags(data, model, tmp_path / "run", f"--method={method}", "--limit=2"))
    samples = lines(tmp_path / "run")
    assert len(samples) == 2
    for sample in samples:
        tokens, found = sample["visual_tokens"], sample["localisation"]
        if method in ("uniform", "full"):
            assert found["selected"] == pytest.approx(found["chance"]) == found["budget"]
            assert tokens["prefilled"] == tokens["selected"] == tokens["video"]
        else:
            assert tokens["selected"] == 20 < tokens["video"] and sample["groups"]["total"] == 2
        assert tokens["selected"] <= 20 or method == "full"


def test_replay_answers_again_from_the_same_tokens_or_the_best_of_them(places, tmp_path, capsys):
    data, model, whole = places
    same = ("prediction", "option", "entropy", "option_probabilities")
    run(capsys, bench.evaluate_flags(data, model, tmp_path / "same", f"--replay={whole}"))
    for before, after in zip(lines(whole), lines(tmp_path / "same"), strict=True):
        assert {name: before[name] for name in same} == {name: after[name] for name in same}
        assert after["visual_tokens"]["prefilled"] == 20 and after["stop"] == "replayed selection"
    assert all(cost["seconds"]["vision"] > 0 == cost["seconds"]["groups"] for cost in lines(tmp_path / "same", "costs"))
    run(
        capsys, bench.evaluate_flags(data, model, tmp_path / "less", f"--replay={whole}", "--budget=7", "--prompt=qwen")
    )
    for before, after in zip(lines(whole, "selections"), lines(tmp_path / "less", "selections"), strict=True):
        before, after = SavedSelection.from_record(before), SavedSelection.from_record(after)
        np.testing.assert_array_equal(after.tokens, before.tokens[np.isin(before.ranks, range(7))])
    words = bench.evaluate_flags(data, model, tmp_path / "other", f"--replay={whole}", "--max_frames=12")
    _, err = run(capsys, words, status=2)
    assert "give the settings of sampling that the run had" in err.splitlines()[-1]


def test_a_replay_has_the_budget_of_its_run_unless_it_is_given_a_smaller_one(places, tmp_path, capsys):
    data, model, whole = places
    words = lambda name, *more: bench.evaluate_flags(data, model, tmp_path / name, f"--replay={whole}", *more)
    _, err = run(capsys, words("more", "--budget=21"), status=2)
    assert re.search(r"--budget=21: the run of --replay=.* selected 20 tokens; give at most that, or drop", err)
    assert err.count("\n") == 1 and not (tmp_path / "more").exists()
    run(capsys, [word for word in words("same") if not word.startswith("--budget")])
    assert json.loads((tmp_path / "same" / "run.json").read_text())["config"]["budget"] == 20
    assert {sample["visual_tokens"]["selected"] for sample in lines(tmp_path / "same")} == {20}


@pytest.mark.parametrize("one_group", [False, True])
def test_a_replay_of_what_was_answered_without_a_scan_answers_the_same(places, tmp_path, capsys, one_group):
    data, model, _ = places
    words = lambda name, *more: bench.evaluate_flags(
        data, model, tmp_path / name, *(["--slots_per_group=64"] if one_group else ["--method=full"]), *more
    )
    run(capsys, words("whole"))
    run(capsys, words("same", f"--replay={tmp_path / 'whole'}"))
    run(capsys, words("less", f"--replay={tmp_path / 'whole'}", "--budget=12"))
    for before, after, less in zip(*(lines(tmp_path / name) for name in ("whole", "same", "less")), strict=True):
        assert before["visual_tokens"]["selected"] > 20  # the budget
        same = ("prediction", "entropy", "option_probabilities", "localisation", "visual_tokens")
        assert {name: before[name] for name in same} == {name: after[name] for name in same}
        assert less["visual_tokens"]["selected"] == 12
    for record in lines(tmp_path / "less", "selections"):
        found = SavedSelection.from_record(record)
        # As many from either half of the video, and from every place of a frame.
        assert 5 <= (found.tokens[:, 0] < found.grid[0] / 2).sum() <= 7
        assert len({(row, col) for _, row, col in found.tokens.tolist()}) == 6


def test_a_flag_that_does_not_suit_a_video_names_it(places, tmp_path, capsys):
    data, model, _ = places
    words = bench.evaluate_flags(data, model, tmp_path / "run", "--method=uniform", "--budget=1")
    error = run(capsys, words, status=2)[1].splitlines()[-1]
    assert re.search(r"--budget=1: one slot of this video has \d+ tokens; allow at least that \(video \w+\)$", error)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (["--method=uniform", "--budget=1"], ["--method=uniform", "--budget=6"]),
        (["--min_tokens_per_group=100"], []),
    ],
)
def test_a_mistaken_flag_ties_the_directory_to_nothing(places, tmp_path, capsys, wrong, right):
    data, model, _ = places
    words = lambda *more: bench.evaluate_flags(data, model, tmp_path / "run", "--limit=2", *more)
    assert wrong[-1].partition("=")[0] in run(capsys, words(*wrong), status=2)[1].splitlines()[-1]
    assert os.listdir(tmp_path / "run") == [".lock"]
    run(capsys, words(*right))


def test_a_replay_that_cannot_be_is_refused_before_anything_is_written(places, tmp_path, capsys):
    data, model, whole = places
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    selections = (whole / "selections.jsonl").read_text().splitlines(keepends=True)
    (part / "selections.jsonl").write_text("".join(selections[:-1]))
    words = lambda replay: bench.evaluate_flags(data, model, tmp_path / "run", f"--replay={replay}", "--budget=7")
    for replay, reason in (
        (tmp_path / "none", r"^--replay: .*/none: no run\.json"),
        (part, r"^--replay=.*/part: 1 of 6 questions have no selection, the first is 2-1; finish that run first$"),
        ("", r"^--replay: the name is empty"),
    ):
        err = run(capsys, words(replay), status=2)[1]
        assert re.search(reason, err.removeprefix("adapttoken evaluate: ").strip()) and err.count("\n") == 1
        assert not (tmp_path / "run").exists()
    (part / "selections.jsonl").write_text("".join(selections))
    refused = lambda *more: run(capsys, [*words(part), *more], status=2)[1]
    assert "--method=lite: the run of --replay=" in refused("--method=lite")
    asked, of_another = data / "video_info.meta.jsonl", tmp_path / "data"
    shutil.copytree(data, of_another)
    (of_another / asked.name).write_text(asked.read_text().replace('"clip1"', '"clip0"'))
    other = refused(f"--data={of_another}")
    assert "question 1-0 is about another video there, or has another answer" in other and other.count("\n") == 1
    assert not (tmp_path / "run").exists()
    run(capsys, words(part))


@pytest.mark.parametrize("flag", ["shard", "replay", "prompt", "mesh"])
def test_an_empty_value_is_not_no_value(places, tmp_path, capsys, flag):
    data, model, _ = places
    err = run(capsys, bench.evaluate_flags(data, model, tmp_path / "run", f"--{flag}="), status=2)[1]
    assert f"--{flag}" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists() or os.listdir(tmp_path / "run") == [".lock"]


def test_subtitles_of_a_benchmark_without_any_are_refused(places, tmp_path, capsys):
    data, model, _ = places
    err = run(capsys, bench.evaluate_flags(data, model, tmp_path / "run", "--subtitles"), status=2)[1]
    assert "--subtitles: no video" in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lacking", "more", "written"),
    [
        ({"clip1"}, {}, ["clip0", "clip1: too little memory", "clip2"]),
        ({"clip0"}, {}, []),
        ({"clip0"}, {"fits": True}, ["clip0: too little memory", "clip1", "clip2"]),
        ({"clip1"}, {"strict": True}, ["clip0"]),
    ],
)
def test_too_little_memory_for_one_video_is_that_videos_failure(places, lacking, more, written):
    data, path, _ = places
    model, found = at.load(path), []
    config = at.AdaptTokenConfig.for_model(model.config, **SETTINGS)
    scan = scanned(model, config, "uniform")

    def answer(plan, tokens, prompts, items, begin):
        if items[0].video_id in lacking:
            raise MemoryError("Unable to allocate 900. GiB for an array")
        return scan(plan, tokens, prompts, items, begin)

    def write(video, records):
        error = records.samples[0].get("error")
        found.append(video.id if error is None else f"{video.id}: {error.removeprefix('--mesh: ')[:17]}")

    videos = group_by_video(BENCHMARKS["lvbench"].load(data)[0])
    word = lambda item, clip: PROMPTS["lvbench"]["lmms-eval"](item, None)
    ends = len(written) < len(videos)
    with pytest.raises(UserError, match=r"^--mesh: too little") if ends else contextlib.nullcontext():
        run_videos(model, videos, word, config, "uniform", write, answerer=answer, **more)
    assert found == written


def test_what_a_replayed_run_could_not_read_is_passed_over(places, tmp_path, capsys):
    data, model, whole = places
    shutil.copytree(whole, tmp_path / "part")
    samples = [sample | {"error": "no video"} if sample["video_id"] == "clip1" else sample for sample in lines(whole)]
    selections = [record for record in lines(whole, "selections") if not record["id"].startswith("1-")]
    for name, records in (("samples", samples), ("selections", selections)):
        (tmp_path / "part" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run(capsys, bench.evaluate_flags(data, model, tmp_path / "run", f"--replay={tmp_path / 'part'}"))
    reasons = [sample.get("error") for sample in lines(tmp_path / "run")]
    assert reasons == [None] * 2 + ["the replayed run could not read this video"] * 2 + [None] * 2


def test_the_command_knows_the_benchmarks(places):
    listed = next(flag for flag in cli._EVALUATE_FLAGS if flag.name == "benchmark")
    assert set(listed.choices) == set(BENCHMARKS)
