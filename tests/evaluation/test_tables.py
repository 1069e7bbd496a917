"""Tables, exports and the needle benchmark: numbers by hand, and readers that share no code with the writers."""

import dataclasses
import hashlib
import json

import pytest
from matplotlib.figure import Figure
from pyarrow import parquet

from adapttoken_jax.benchmarks import BENCHMARKS, Item, Report, score_all
from adapttoken_jax.errors import UserError
from adapttoken_jax.evaluation import interchange, session, tables, workdir
from adapttoken_jax.evaluation.needle_benchmark import write_benchmark
from adapttoken_jax.needle import scene
from experiments import table


def items():
    """Four videos with two questions each, in Video-MME's terms; the right answers are all B."""
    labels = {"duration": ("short",), "domain": ("Law",), "sub_category": ("Court",), "task_type": ("OCR",)}
    return [
        Item(f"{v}-{q}", f"v{v}", None, f"What is {q}?", ("red", "blue"), "B", labels=labels,
             extra={"video_id": f"00{v}", "options": ["A. red", "B. blue"]})
        for v in range(4) for q in range(2)
    ]  # fmt: skip


def finished(directory, predictions, method="adapttoken", size="qwen2.5-vl-7b", tokens=100, subtitles=False,
             budget=20, frames=4096, prompt="official", replay=None, groups=4):  # fmt: skip
    """A finished run whose predictions are given; None is a broken video's."""
    flags = {"benchmark": "videomme", "method": method, "prompt": prompt, "subtitles": subtitles, "model": "/m/x"}
    flags |= {"data": "/d", "replay": replay}
    run = workdir.begin_run(
        directory,
        workdir.describe_run(flags, {"max_frames": frames, "budget": budget}, {"questions": "q", "model": "m"}, size),
    )
    samples = []
    for number, (item, text) in enumerate(zip(items(), predictions, strict=True)):
        head = {"doc_id": number, "id": item.id, "video_id": item.video_id, "target": item.answer, "prediction": text}
        answered = {
            "groups": {"visited": groups // 2, "total": groups},
            "visual_tokens": {
                "video": 80,
                "candidates": 22,
                "selected": 20,
                "scanned": tokens - 20,
                "prefilled": tokens,
            },
            "flops": 2e12,
        }
        samples.append(head | (answered if text is not None else {"error": "cannot be read"}))
    report = Report("videomme", directory, ())
    results = session.finish(directory, items(), samples, report, run)
    costs = [{"id": item.id, "amortised": float(number**2)} for number, item in enumerate(items())]
    (directory / "costs.jsonl").write_text("".join(json.dumps(cost) + "\n" for cost in costs))
    return results


RIGHT, WRONG = "B", "The best answer is A."


def test_the_accuracy_stands_beside_the_published_number(tmp_path):
    finished(tmp_path / "ours", [RIGHT, WRONG] * 3 + [RIGHT] * 2)
    finished(tmp_path / "uniform", [RIGHT] * 4 + [WRONG] * 4, method="uniform")
    runs = [tables.read_finished(tmp_path / name) for name in ("ours", "uniform")]
    ours, uniform = tables.accuracy_table(runs, "lmms-eval")
    assert (ours["model"], ours["method"], ours["frames"]) == ("qwen2.5-vl-7b", "adapttoken", 4096)
    # Videos score 0.5 three times and 1: standard error sqrt(4/3 * (3 * 0.125² + 0.375²)) / 4 = 0.125, t(3) = 3.182.
    assert ours["videomme"] == "62.5 [22.7, 100.0] (70.5, -8.0), 8 of 2700 questions"
    assert uniform["videomme"].startswith("50.0 [") and "(" not in uniform["videomme"]
    whole = dataclasses.replace(runs[0], results=runs[0].results | {"answered": 2700})
    assert tables.accuracy_table([whole], "lmms-eval")[0]["videomme"] == "62.5 [22.7, 100.0] (70.5, -8.0)"
    with pytest.raises(UserError, match="a second run of"):
        tables.accuracy_table([runs[0], runs[0]], "lmms-eval")
    (tmp_path / "ours" / "results.json").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"results\.json: damaged"):
        tables.read_finished(tmp_path / "ours")


def test_costs_and_pairs_by_hand(tmp_path):
    finished(tmp_path / "ours", [RIGHT] * 6 + [WRONG] * 2, tokens=100)
    finished(tmp_path / "base", [RIGHT] * 2 + [WRONG] * 6, method="full", tokens=80, groups=0)
    ours, base = (tables.read_finished(tmp_path / name) for name in ("ours", "base"))
    assert tables.cost_table([base], "official")[0]["groups"] is None
    row = tables.cost_table([ours], "official")[0]
    # Eight questions of 0, 1, 4, … 49 seconds, 9 and 16 in the middle; 20 tokens of their own each, and 80 of a scan
    # once per video of two questions.
    assert (row["seconds"], row["visual tokens"], row["tokens, shared scan"]) == (12.5, 100, 20 + 80 // 2)
    assert row["TFLOPs"] == 2 and row["groups"] == "2.0 of 4.0"
    (pair,) = tables.paired_table([ours, base], base, "official")
    assert (pair["difference, %"], pair["only run"], pair["only baseline"], pair["questions"]) == (50, 4, 0, 8)
    assert pair["low"] < 50 < pair["high"]


def test_runs_are_called_apart_by_what_they_differ_in(tmp_path):
    """Everywhere: in the table of accuracies, in that of pairs, in the plot."""
    kinds = {"few": {"frames": 1024}, "many": {}, "small": {"budget": 10}, "worded": {"prompt": "qwen"}}
    kinds |= {"again": {"replay": "/r", "budget": 10}, "less": {"replay": "/r", "budget": 5}}
    for name, kind in kinds.items():
        finished(tmp_path / name, [RIGHT, WRONG] * 4, **kind)
    runs = dict(zip(kinds, tables.read_runs([tmp_path / name for name in kinds]), strict=True))
    methods = {"few": "", "many": " (budget 20, prompt official)", "small": " (budget 10, prompt official)"}
    methods |= {"worded": " (budget 20, prompt qwen)", "again": " (replayed) (budget 10)"}
    assert {name: runs[name].method for name in methods} == {name: f"adapttoken{x}" for name, x in methods.items()}
    assert len(tables.accuracy_table([*runs.values()], "official")) == len(kinds)
    pairs = tables.paired_table([*runs.values()], runs["many"], "official")
    assert len({pair["run"] for pair in pairs}) == 5 and pairs[0]["run"] == "qwen2.5-vl-7b adapttoken, 1024 frames"
    with pytest.raises(UserError, match=r"a second run of qwen2\.5-vl-7b adapttoken 4096 on videomme; give one"):
        tables.accuracy_table(tables.read_runs([tmp_path / "many"] * 2), "official")


def test_the_table_of_places_is_in_percent(tmp_path):
    finished(tmp_path / "run", [RIGHT] * 8)
    run = tables.read_finished(tmp_path / "run")
    places = {"questions": 3, "chance": 0.125, "budget": 0.25, "selected": 1 / 3, "hit": 1.0}
    timed = dataclasses.replace(run, results=run.results | {"localisation": places})
    (row,) = tables.localisation_table([run, timed])
    assert row == {
        "benchmark": "videomme", "model": "qwen2.5-vl-7b", "method": "adapttoken", "frames": 4096, "questions": 3,
        "chance, %": 12.5, "budget, %": 25, "selected, %": 33.33, "hit, %": 100,
    }  # fmt: skip


@pytest.mark.parametrize(("response", "rows"), [(None, []), ("who knows", [None])], ids=["broken", "unread"])
def test_a_run_of_which_nothing_counts_has_no_accuracy(tmp_path, response, rows):
    finished(tmp_path / "run", [response] * 8)
    runs = tables.read_runs([tmp_path / "run"])
    assert tables.accuracy_table(runs, "official")[0]["videomme"] == "–"
    assert [row["accuracy"] for row in tables.cost_table(runs, "official")] == rows
    tables.pareto_plot(tmp_path / "p.png", runs, "official")


def test_a_replay_has_no_place_in_the_plot(tmp_path):
    finished(tmp_path / "again", [RIGHT] * 8, replay="/r")
    replay = tables.read_finished(tmp_path / "again")
    with pytest.raises(UserError, match=r"^--plot: .* give the runs that are replayed"):
        tables.pareto_plot(tmp_path / "p.png", [replay], "official")
    assert not (tmp_path / "p.png").exists()


def test_a_run_that_went_on_and_was_interrupted_is_not_finished(tmp_path):
    finished(tmp_path / "run", [RIGHT] * 8)
    samples = tmp_path / "run" / "samples.jsonl"
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    del lines[3]["verdicts"]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"run: not finished; run the same evaluation again to go on$"):
        tables.read_finished(tmp_path / "run")


@pytest.mark.parametrize(
    ("benchmark", "task"),
    [("videomme", ("videomme", "videomme_w_subtitle")),
     ("longvideobench", ("longvideobench_val_v", "longvideobench_val_i"))],
)  # fmt: skip
def test_subtitles_are_another_task_upstream(benchmark, task):
    names = [interchange.lmms_eval_task({"benchmark": benchmark, "subtitles": shown}) for shown in (False, True)]
    assert names == [*task]


def mlvu_run(path, right):
    """A run on 20 questions of one of MLVU's tasks, 2 of another and 10 of a third; each has a video."""
    sizes = {"plotQA": 20, "needle": 2, "order": 10}
    asked = [
        Item(f"{task}_{i}", f"{task}/{i}", None, "?", ("a", "b"), "A", labels={"task": (task,)})
        for task, size in sizes.items() for i in range(size)
    ]  # fmt: skip
    said = ["A" if item.labels["task"][0] in right else "B" for item in asked]
    samples = [
        {"id": item.id, "video_id": item.video_id, "target": item.answer, "prediction": text}
        for item, text in zip(asked, said, strict=True)
    ]
    samples = {sample["id"]: sample for sample in session.with_verdicts("mlvu", asked, samples)}
    scores = {rule: scores.to_json() for rule, scores in score_all("mlvu", zip(asked, said, strict=True)).items()}
    run = {"model_size": "m", "flags": {"replay": None}}
    results = {"benchmark": "mlvu", "method": "full", "subtitles": False, "scores": scores, "config": {"max_frames": 9}}
    return tables.FinishedRun(path, run, results, samples, {})


@pytest.mark.parametrize(
    ("rule", "difference", "questions"),
    [
        ("official", 100 * (2 / 3 - 1 / 3), 32),  # means of the tasks: needle and order against plotQA
        ("lmms-eval", 100 * (2 / 3 - 1 / 3), 32),
        ("VLMEvalKit", 100 * (12 - 20) / 32, 32),
        ("VLMEvalKit-printed", 100 * (2 - 20) / 22, 22),  # without order
    ],
)
def test_a_paired_difference_is_that_of_the_accuracies(tmp_path, rule, difference, questions):
    base, ours = mlvu_run(tmp_path / "base", {"plotQA"}), mlvu_run(tmp_path / "ours", {"needle", "order"})
    (pair,) = tables.paired_table([ours], base, rule)
    first, second = (each.cell(rule) for each in (base, ours))
    assert pair["difference, %"] == round(difference, 2)
    assert pair["difference, %"] == round(100 * (second["accuracy"] - first["accuracy"]), 2)
    assert pair["questions"] == questions == first["n"]


def test_runs_scored_without_labels_are_compared_where_none_are_needed(tmp_path):
    base, ours = mlvu_run(tmp_path / "base", {"plotQA"}), mlvu_run(tmp_path / "ours", {"needle"})
    for run in (base, ours):
        for sample in run.samples.values():
            del sample["labels"]
    assert tables.paired_table([ours], base, "VLMEvalKit")[0]["questions"] == 32
    with pytest.raises(UserError, match=f"^{base.path}: scored by an earlier version; run the same evaluation again"):
        tables.paired_table([ours], base, "official")


def test_the_baseline_is_a_directory_not_a_name(tmp_path):
    for model in ("small", "large"):
        finished(tmp_path / model / "uniform", [RIGHT] * 8, method="uniform")
    (tmp_path / "again").symlink_to(tmp_path / "small")
    small, large, again = (tables.read_finished(tmp_path / name / "uniform") for name in ("small", "large", "again"))
    assert len(tables.paired_table([small, large, again], small, "official")) == 1
    with pytest.raises(UserError, match=f"^--baseline={small.path}: no other run on videomme"):
        tables.paired_table([small, again], small, "official")


def test_questions_of_other_videos_make_no_pair(tmp_path):
    for name in ("ours", "base"):
        finished(tmp_path / name, [RIGHT] * 8)
    ours, base = (tables.read_finished(tmp_path / name) for name in ("ours", "base"))
    ours.samples["2-1"]["video_id"] = "another"
    with pytest.raises(UserError, match=f"^--baseline={base.path}: question 2-1 is about another video in {ours.path}"):
        tables.paired_table([ours], base, "official")


def test_latex_prints_what_would_be_its_own_signs():
    rows = [{"m_o": "a~b^c{d}$e\\f & 5 % #", "n": 1.5}]
    assert tables.latex(rows).splitlines()[2::2] == [
        r"m\_o & n \\",
        r"a\textasciitilde{}b\textasciicircum{}c\{d\}\$e\textbackslash{}f \& 5 \% \# & 1.5 \\",
        r"\end{tabular}",
    ]


def test_a_run_with_subtitles_is_a_row_of_its_own_beside_no_published_number(tmp_path):
    finished(tmp_path / "plain", [RIGHT] * 8)
    finished(tmp_path / "subtitled", [RIGHT] * 8, subtitles=True)
    plain, subtitled = tables.accuracy_table(
        [tables.read_finished(tmp_path / name) for name in ("plain", "subtitled")], "official"
    )
    assert plain["videomme"] == "100.0 [47.3, 100.0] (70.5, +29.5), 8 of 2700 questions"
    assert subtitled["method"] == "adapttoken (subtitles)"
    assert subtitled["videomme"] == "100.0 [47.3, 100.0], 8 of 2700 questions"


def test_the_command_prints_tables_and_draws_the_plot(tmp_path, capsys, monkeypatch):
    finished(tmp_path / "ours", [RIGHT] * 8)
    finished(tmp_path / "base", [RIGHT] * 4 + [None] * 4, method="full", tokens=300)
    for form, words in (
        ("markdown", "| qwen2.5-vl-7b | adapttoken | 4096 | 100.0"),
        ("latex", r"100.0 [47.3, 100.0] (70.5, +29.5), 8 of 2700 questions \\"),
    ):
        for name, value in (("format", form), ("baseline", str(tmp_path / "base")), ("plot", str(tmp_path / "p.png"))):
            monkeypatch.setattr(table.flags.FLAGS[name], "value", value)
        monkeypatch.setattr(table.flags.FLAGS["rule"], "value", "official")
        table.flags.FLAGS.mark_as_parsed()
        table.run([str(tmp_path / "ours"), str(tmp_path / "base")])
        assert words in capsys.readouterr().out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"no run\.json"):
        table.run([str(tmp_path)])


@pytest.mark.parametrize(
    ("costs", "ticks"),
    [((32, 249), ["50", "100", "200"]), ((900, 64000), ["1k", "2k", "5k", "10k", "20k", "50k"]),
     ((6200, 6900), [f"6.{tenth}k" for tenth in range(2, 10)])],
)  # fmt: skip
def test_costs_under_the_axis_are_plain_numbers(costs, ticks):
    figure = Figure()
    axes = figure.add_subplot()
    axes.set(xscale="log", xlim=costs)
    tables._plain_ticks(axes)
    figure.draw_without_rendering()
    low, high = costs
    shown = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    assert [label.get_text() for place, label in shown if low <= place <= high] == ticks


def test_the_pareto_front_by_hand():
    points = [(3, 50), (1, 30), (1, 40), (2, 40), (2, 45), (5, 49), (6, 60), (4, 60)]
    assert tables.pareto_front(points) == [(1, 40), (2, 45), (3, 50), (4, 60)]


def baseline_scores(path):
    """What lmms-eval 0.7 reads from a log of samples for its paired test, by its documented rule."""
    scores = {}
    for line in path.read_text().splitlines():
        sample = json.loads(line)
        numeric = [v for k, v in sample.items() if "score" in k.lower() and isinstance(v, int | float)]
        scores[sample["doc_id"]] = float(numeric[0])
    return scores


def test_the_exports_say_what_the_samples_say(tmp_path):
    predictions = [RIGHT, WRONG, RIGHT, "no idea", None, None, RIGHT, WRONG]
    results = finished(tmp_path / "run", predictions)
    (samples,) = (tmp_path / "run" / "export").glob("*_samples_videomme.jsonl")
    assert baseline_scores(samples) == {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0, 6: 1.0, 7: 0.0}
    first = json.loads(samples.read_text().splitlines()[0])
    assert (
        first["target"] == "B" and first["filtered_resps"] == ["B"] and first["token_counts"] == [{"input_tokens": 20}]
    )
    assert len(first["doc_hash"]) == 64 and first["videomme_perception_score"]["task_category"] == "OCR"
    whole = json.loads(next((tmp_path / "run" / "export").glob("*_results.json")).read_text())
    assert whole["results"]["videomme"]["videomme_perception_score,none"] == pytest.approx(50.0)
    # Half of six answers are right: sqrt(0.5 * 0.5 / 5), in the unit of the score.
    assert whole["results"]["videomme"]["videomme_perception_score_stderr,none"] == pytest.approx(100 * 0.05**0.5)
    assert whole["n-samples"]["videomme"] == {"original": 8, "effective": 6}
    hashes = [json.loads(line)["doc_hash"] for line in samples.read_text().splitlines()]
    joined = "".join(f"sample_{i}{each}" for i, each in enumerate(hashes))
    assert whole["task_hashes"]["videomme"] == hashlib.sha256(joined.encode()).hexdigest()
    submission = json.loads((tmp_path / "run" / "export" / "videomme.json").read_text())
    assert [video["video_id"] for video in submission] == ["000", "001", "003"]
    assert not any(video["missing"] for video in submission)
    assert submission[0]["questions"][1] == {
        "question_id": "0-1", "task_type": "OCR", "question": "What is 1?", "options": ["A. red", "B. blue"],
        "answer": "B", "response": WRONG,
    }  # fmt: skip
    assert results["broken_videos"] == [{"video_id": "v2", "error": "cannot be read", "questions": 2}]


@pytest.mark.parametrize(
    ("benchmark", "metric", "value", "first", "submission"),
    [
        ("longvideobench", "lvb_acc", 0.5,
         {"id": "q0", "duration_group": "15", "question_category": "S2E", "answer": "B", "parsed_pred": "B"},
         {"longvideobench.json": {"q0": "B", "q1": "A"}}),
        # Here the official rule reads nothing in the second response.
        ("lvbench", "lvbench_score", 0.5, True, {"lvbench.json": {"q0": "B", "q1": ""}}),
        ("mlvu", "mlvu_percetion_score", 50.0,
         {"question_id": "Which?", "task_type": "order", "pred_answer": "B", "answer": "B"}, {}),
    ],
)  # fmt: skip
def test_the_exports_of_the_other_benchmarks_literally(tmp_path, benchmark, metric, value, first, submission):
    labels = {"duration_group": ("15",), "question_category": ("S2E",), "task": ("order",)}
    asked = [Item(f"q{i}", "v", None, "Which?", ("red", "blue"), "B", labels=labels) for i in range(3)]
    said = ["B) blue", "The answer is A", None]
    samples = [{"doc_id": i, "prediction": x, "visual_tokens": {"selected": 20}} for i, x in enumerate(said)]
    scores = {rule: each.to_json() for rule, each in score_all(benchmark, zip(asked, said, strict=True)).items()}
    results = {"benchmark": benchmark, "subtitles": False, "questions": 3, "scores": scores}
    run = {"begun": "2026-04-01T12:30:00+00:00", "git_commit": None, "flags": {"model": "m", "method": "lite"}}
    interchange.write_exports(tmp_path, asked, samples, results, run)
    files = {path.name: path.read_text() for path in (tmp_path / "export").iterdir()}
    task = interchange.lmms_eval_task(results)
    lines = [json.loads(line) for line in files.pop(f"20260401_123000_samples_{task}.jsonl").splitlines()]
    assert [line["score"] for line in lines] == [1.0, 0.0] and lines[0][metric] == first
    assert json.loads(files.pop("20260401_123000_results.json"))["results"][task][f"{metric},none"] == value
    assert {name: json.loads(text) for name, text in files.items()} == submission


def test_a_needle_benchmark_keeps_only_the_videos_that_are_its_own(tmp_path):
    asked, written = [], []
    for difficulty in ("easy", "hard", "easy"):
        write_benchmark(tmp_path, videos=1, frames=48, difficulty=difficulty)
        asked.append(BENCHMARKS["videomme"].load(tmp_path)[0][0].video)
        written.append(asked[-1].read_bytes())
    assert asked[0] == asked[2] != asked[1] and written[0] == written[2]
    assert len(written[1]) > 2 * len(written[0])  # noise, which hard videos have more of, is what takes the room


def test_the_needle_benchmark_is_read_as_two_benchmarks_and_its_answers_are_true(tmp_path):
    write_benchmark(tmp_path, videos=2, frames=48)
    asked, report = BENCHMARKS["videomme"].load(tmp_path)
    assert len(asked) == 6 and not report.missing_videos
    timed, _ = BENCHMARKS["lvbench"].load(tmp_path)
    assert [item.video for item in timed] == [asked[i].video for i in (1, 2, 4, 5)]
    for seed in range(2):
        made = scene(seed, "test", 48, "pair")
        values = [getattr(needle, made.question.asked) for needle in made.needles]
        both, *single = asked[3 * seed : 3 * seed + 3]
        assert both.options["ABCD".index(both.answer)] == " and ".join(values)
        for needle, value, item, located in zip(made.needles, values, single, timed[2 * seed :], strict=False):
            assert item.options["ABCD".index(item.answer)] == value
            assert (located.question, located.options, located.answer) == (item.question, item.options, item.answer)
            begin, end = located.time_reference
            assert begin <= needle.start / 4 < needle.stop / 4 <= end and end - begin <= 3
    assert parquet.read_table(tmp_path / "videomme" / "test-00000-of-00001.parquet").num_rows == 6
