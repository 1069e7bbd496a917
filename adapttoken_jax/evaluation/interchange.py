"""The files of a finished run that other tools read, in the directory `export` of the work directory.

    <date>_samples_<task>.jsonl, <date>_results.json   lmms-eval's log of samples and its results (version 0.7)
    videomme.json, lvbench.json, longvideobench.json   what the authors' scoring scripts and servers take

Responses are exported as the model gave them where the other tool parses them itself, else as the letter that the
benchmark's official rule reads. Questions of broken videos have no line: nobody answered them.
"""

import datetime
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapttoken_jax.benchmarks import SCORERS, Item
from adapttoken_jax.journal import json_line
from adapttoken_jax.result import write_text

_Pairs = Sequence[tuple[Item, Mapping[str, Any]]]  # the answered questions and their samples


def write_exports(directory, items: Sequence[Item], samples: Sequence[Mapping], results: Mapping, run: Mapping) -> None:
    """Writes every file that the benchmark has; all arguments as `session.finish` has them."""
    folder = pathlib.Path(directory) / "export"
    folder.mkdir(exist_ok=True)
    pairs = [(item, sample) for item, sample in zip(items, samples, strict=True) if sample["prediction"] is not None]
    benchmark = results["benchmark"]
    lines = lmms_eval_samples(benchmark, pairs)
    begun = datetime.datetime.fromisoformat(run["begun"]).strftime("%Y%m%d_%H%M%S")
    texts = {
        f"{begun}_samples_{lmms_eval_task(results)}.jsonl": "".join(map(json_line, lines)),
        f"{begun}_results.json": _pretty(lmms_eval_results(results, lines, run)),
    }
    if benchmark in _SUBMISSIONS:
        texts[f"{benchmark}.json"] = _pretty(_SUBMISSIONS[benchmark](pairs))
    for name, text in texts.items():
        write_text(folder / name, text)


def _pretty(content) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# lmms-eval
# ---------------------------------------------------------------------------------------------------------------------

# benchmark -> (task, metric, what its metric is multiplied by).
_LMMS_EVAL = {
    "videomme": ("videomme", "videomme_perception_score", 100.0),
    "longvideobench": ("longvideobench_val_v", "lvb_acc", 1.0),
    "lvbench": ("lvbench", "lvbench_score", 1.0),
    "mlvu": ("mlvu_dev", "mlvu_percetion_score", 100.0),  # spelt so upstream
}

# Benchmarks without subtitles refuse them.
_WITH_SUBTITLES = {"videomme": "videomme_w_subtitle", "longvideobench_val_v": "longvideobench_val_i"}


def lmms_eval_task(results: Mapping) -> str:
    """The name of lmms-eval's task for the benchmark and the setting of subtitles."""
    task = _LMMS_EVAL[results["benchmark"]][0]
    return _WITH_SUBTITLES[task] if results["subtitles"] else task


def lmms_eval_samples(benchmark: str, pairs: _Pairs) -> list[dict[str, Any]]:
    """Lines of lmms-eval's log of samples.

    "score" is 1.0 or 0.0 under lmms-eval's rule, for its paired test; the benchmark's own metric stands beside it. The
    input tokens are those of the final prompt's visual tokens: lmms-eval knows no group passes.
    """
    rule, (_, metric, _) = SCORERS[benchmark]["lmms-eval"], _LMMS_EVAL[benchmark]
    lines = []
    for item, sample in pairs:
        verdict = rule.judge(item, sample["prediction"])
        score = float(verdict.correct)
        lines.append({
            "doc_id": sample["doc_id"],
            "target": item.answer,
            "filtered_resps": [sample["prediction"]],
            "token_counts": [{"input_tokens": sample["visual_tokens"]["selected"]}],
            "doc_hash": _doc_hash(item),
            "score": score,
            metric: _METRICS[benchmark](item, verdict.letter or "", score),
            "input": item.question,
        })  # fmt: skip
    return lines


def _doc_hash(item: Item) -> str:
    doc = {"id": item.id, "video": item.video_id, "question": item.question, "options": list(item.options),
           "answer": item.answer}  # fmt: skip
    return hashlib.sha256(json.dumps(doc, indent=2, ensure_ascii=False).encode("utf-8")).hexdigest()


def _label(item: Item, name: str) -> str:
    return next(iter(item.labels.get(name, ())), "")


def _videomme_metric(item: Item, letter: str, score: float) -> dict[str, Any]:
    return {
        "question_id": item.id, "duration": _label(item, "duration"), "category": _label(item, "domain"),
        "sub_category": _label(item, "sub_category"), "task_category": _label(item, "task_type"),
        "pred_answer": letter, "answer": item.answer, "score": score, "videoID": item.video_id,
    }  # fmt: skip


def _longvideobench_metric(item: Item, letter: str, score: float) -> dict[str, Any]:
    groups = {name: _label(item, name) for name in ("duration_group", "question_category")}
    return {"id": item.id, **groups, "answer": item.answer, "parsed_pred": letter}


def _mlvu_metric(item: Item, letter: str, score: float) -> dict[str, Any]:
    return {
        "question_id": item.question,
        "task_type": _label(item, "task"),
        "pred_answer": letter,
        "answer": item.answer,
    }


_METRICS: dict[str, Callable[[Item, str, float], Any]] = {
    "videomme": _videomme_metric,
    "longvideobench": _longvideobench_metric,
    "lvbench": lambda item, letter, score: bool(score),
    "mlvu": _mlvu_metric,
}


def lmms_eval_results(results: Mapping, lines: Sequence[Mapping], run: Mapping) -> dict[str, Any]:
    """lmms-eval's results file: the metric and its standard error by task, and what its tools look up beside them."""
    task, (_, metric, factor) = lmms_eval_task(results), _LMMS_EVAL[results["benchmark"]]
    value = results["scores"]["lmms-eval"]["overall"]["accuracy"]
    scores = [line["score"] for line in lines]
    mean = sum(scores) / len(scores) if scores else 0.0
    error = math.sqrt(mean * (1 - mean) / (len(scores) - 1)) if len(scores) > 1 else None
    flags = run["flags"]
    hashes = "".join(f"sample_{index}{line['doc_hash']}" for index, line in enumerate(lines))
    return {
        "results": {
            task: {
                "alias": task,
                f"{metric},none": None if value is None else factor * value,
                f"{metric}_stderr,none": "N/A" if error is None else factor * error,
            }
        },
        "group_subtasks": {task: []},
        "configs": {task: {"task": task, "metric_list": [{"metric": metric, "higher_is_better": True}]}},
        "versions": {task: "Yaml"},
        "n-shot": {task: 0},
        "higher_is_better": {task: {metric: True}},
        "n-samples": {task: {"original": results["questions"], "effective": len(lines)}},
        "config": {"model": "adapttoken", "model_args": f"pretrained={flags['model']},method={flags['method']}"},
        "git_hash": run["git_commit"],
        "date": run["begun"],
        "task_hashes": {task: hashlib.sha256(hashes.encode("utf-8")).hexdigest()},
        "model_source": "adapttoken",
        "model_name": flags["model"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# The authors' own formats
# ---------------------------------------------------------------------------------------------------------------------


def _letters(benchmark: str, pairs: _Pairs) -> dict[str, str]:
    rule = SCORERS[benchmark]["official"]
    return {item.id: rule.judge(item, sample["prediction"]).letter or "" for item, sample in pairs}


def videomme_submission(pairs: _Pairs) -> list[dict[str, Any]]:
    """Video-MME: a list of videos with their questions and the model's responses."""
    videos: dict[str, dict[str, Any]] = {}
    for item, sample in pairs:
        head = {"video_id": item.extra["video_id"], "duration": _label(item, "duration")}
        head |= {"domain": _label(item, "domain"), "sub_category": _label(item, "sub_category")}
        head |= {"missing": False, "questions": []}  # the scorer's --skip_missing looks at it
        question = {
            "question_id": item.id, "task_type": _label(item, "task_type"), "question": item.question,
            "options": list(item.extra["options"]), "answer": item.answer, "response": sample["prediction"],
        }  # fmt: skip
        videos.setdefault(item.video_id, head)["questions"].append(question)
    return list(videos.values())


_SUBMISSIONS: dict[str, Callable[[_Pairs], Any]] = {
    "videomme": videomme_submission,
    "lvbench": lambda pairs: _letters("lvbench", pairs),
    "longvideobench": lambda pairs: _letters("longvideobench", pairs),
}
