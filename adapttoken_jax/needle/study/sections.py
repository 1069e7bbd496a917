"""What the study consists of: the choice of settings on validation videos, then every table on test videos.

Each function returns plain numbers, ready for JSON. Shares are in 0..1, entropies in nats, times in seconds.
"""

import dataclasses
import math
import operator
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import adapttoken_jax
from adapttoken_jax.config import MODEL_FIELDS, AdaptTokenConfig
from adapttoken_jax.needle.study import measures
from adapttoken_jax.needle.study.cells import Arm, Cell, CellResult, film_video
from adapttoken_jax.needle.study.lab import Lab

ARMS = ("uniform", "attention", "flexselect", "certain", "paper", "adapttoken", "lite", "lite_groups", "lite_rerun")

TEMPERATURES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.4, 0.7, 1.0, 2.0)
TARGETS = (1.0, 1.5, 2.0, 3.0, 4.0)
RULES = (0.5, 2.0, 8.0)
STOP_ENTROPIES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
_BINS = np.linspace(0.0, 1.6, 41)
# A setting replaces the one before it in the list only if it is right this much more often.
_WORTH = 0.005
# Stop rules that are tried on many questions, and what each task may lose to the full run.
_SHORT_LIST = 6
_MOST_LOSS = {"single": 0.01, "pair": 0.02}
# Tokens of the final prompt; settings are chosen at the largest, and the budget last: the smallest that reaches what
# the method shall reach on test videos, with a margin.
BUDGETS = (4, 8, 16, 32)
_LEAST_ACCURACY = {"single": 0.97, "pair": 0.85}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
      tasks, frames, questions, seed, split, difficulty, per_video: the cells of the main table.
      detail_frames: lengths at which settings are varied one at a time.
      scan_questions: questions for settings that need scans of their own.
      choice_questions: questions per cell where settings are chosen.
      stop_questions: questions per cell where the stop rule is chosen, among the few that `choice_questions` leave.
      hard_frames: length of the videos of other difficulties.
      timed_videos: videos answered one by one with a clock.
      torch_questions: questions answered by PyTorch too.
    """

    tasks: tuple[str, ...]
    frames: tuple[int, ...]
    questions: int
    seed: int = 0
    split: str = "test"
    difficulty: str = "normal"
    per_video: int = 4
    detail_frames: tuple[int, ...] = (256, 1024)
    scan_questions: int = 400
    choice_questions: int = 160
    stop_questions: int = 800
    hard_frames: int = 1024
    timed_videos: int = 8
    torch_questions: int = 200

    def cell(self, task: str, frames: int, questions: int | None = None, **changes) -> Cell:
        """A cell of this study."""
        cell = Cell(task, frames, questions or self.questions, self.seed, self.split, self.difficulty, self.per_video)
        return dataclasses.replace(cell, **changes)

    def choice_cell(self, task: str, frames: int) -> Cell:
        """A cell of validation questions, where settings are chosen."""
        return self.cell(task, frames, self.choice_questions, split="validation", seed=0)

    @property
    def choice_places(self) -> list[tuple[str, int]]:
        """Task and length of the cells where settings are chosen."""
        lengths = [f for f in self.frames if f in self.detail_frames] or [self.frames[0]]
        return [(task, frames) for task in self.tasks for frames in lengths]


def paper_settings(config: AdaptTokenConfig) -> AdaptTokenConfig:
    """The published values of everything that is not bound to the model: the defaults of `AdaptTokenConfig`."""
    fields = {f.name: f.default for f in dataclasses.fields(AdaptTokenConfig) if f.name not in MODEL_FIELDS}
    return dataclasses.replace(config, **fields)


def main_arms(config: AdaptTokenConfig, names: Sequence[str] = ARMS) -> dict[str, Arm]:
    """The arms of the main table, all with the same budget of final tokens."""
    change = lambda **fields: dataclasses.replace(config, **fields)
    arms = {
        "paper": Arm("adapttoken", paper_settings(config)),
        "lite_groups": Arm("lite", change(stop_rule="groups", stop_groups=3, stop_entropy=0.25)),
        "lite_rerun": Arm("lite", change(stop_rule="rerun", stop_groups=4, stop_entropy=0.25)),
    }
    return {name: arms.get(name) or Arm(name, config) for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# Tables of one cell
# ---------------------------------------------------------------------------------------------------------------------


def row(result: CellResult, arm: str) -> dict[str, Any]:
    """A line of the main table."""
    right, visited = result.values(arm, "right"), result.values(arm, "visited")
    found = [each.found for each in result.answers[arm] if each.found is not None]
    low, high = measures.wilson(right, result.video)
    needle, needle_half = _group_auc(result, result.shown > 0)
    return {
        "arm": arm,
        "task": result.cell.task,
        "frames": result.cell.frames,
        "difficulty": result.cell.difficulty,
        "questions": len(right),
        "videos": len(np.unique(result.video)),
        "groups": result.entropy.shape[1],
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "groups_visited_share": float(visited.mean()),
        "needles_in_prompt": float(np.mean(found)) if found else None,
        "entropy": float(result.values(arm, "entropy").mean()),
        "entropy_auc_needle": needle if arm != "uniform" else None,
        "entropy_auc_needle_half_width": needle_half if arm != "uniform" else None,
        "entropy_auc_right": measures.auc(-result.values(arm, "entropy"), right, result.video)[0],
    }


def _group_auc(result: CellResult, positive) -> tuple[float | None, float | None]:
    """`measures.auc` of the certainty of groups' own answers."""
    return measures.auc(-result.entropy.ravel(), positive.ravel(), _video_of_groups(result).ravel())


def _video_of_groups(result: CellResult) -> np.ndarray:
    return np.broadcast_to(np.asarray(result.video)[:, None], result.entropy.shape)


def against(result: CellResult, arm: str, base: str) -> dict[str, Any]:
    """Accuracy of an arm and its difference to another one on the same questions, with its 95 % half-width."""
    right = result.values(arm, "right")
    gain, half = measures.difference(right, result.values(base, "right"), result.video)
    visited = float(result.values(arm, "visited").mean())
    return {"accuracy": float(right.mean()), "gain": gain, "half_width": half, "groups_visited_share": visited}


def group_statistics(result: CellResult) -> dict[str, Any]:
    """Entropy of the groups' own answers: as a detector of needles and of right answers, with histograms."""
    entropy, shown, agrees = result.entropy, result.shown, result.agrees
    count = lambda where: np.histogram(np.clip(entropy[where], 0, _BINS[-1]), _BINS)[0].tolist()
    video = _video_of_groups(result)
    by_needles = [shown == k for k in range(int(shown.max()) + 1)]
    mean = lambda values, where: measures.mean(values[where], video[where]) if where.any() else (None, None)
    entropies, accuracies = ([mean(values, where) for where in by_needles] for values in (entropy, agrees))
    (needle, needle_half), (right, right_half) = _group_auc(result, shown > 0), _group_auc(result, agrees)
    return {
        "task": result.cell.task,
        "frames": result.cell.frames,
        "groups": entropy.shape[1],
        "auc_needle": needle,
        "auc_needle_half_width": needle_half,
        "auc_right": right,
        "auc_right_half_width": right_half,
        "entropy_by_needles": [value for value, _ in entropies],
        "entropy_by_needles_half_width": [half for _, half in entropies],
        "accuracy_by_needles": [value for value, _ in accuracies],
        "accuracy_by_needles_half_width": [half for _, half in accuracies],
        "blind_entropy": float(result.blind.mean()),
        "prior_entropy": math.log(4),
        "bins": _BINS.tolist(),
        "by_needles": [count(where) for where in by_needles],
        "by_right": [count(~agrees), count(agrees)],
    }


def risk_curve(result: CellResult, arm: str, points: int = 50) -> dict[str, Any]:
    """The risk-coverage curve of an arm, thinned, and what abstaining above some thresholds would do."""
    entropy, right = result.values(arm, "entropy"), result.values(arm, "right")
    coverage, risk = measures.risk_coverage(entropy, right)
    keep = np.unique(np.linspace(0, len(risk) - 1, points).astype(int))
    thresholds = [
        {
            "abstain_above": t,
            "answered": float((entropy <= t).mean()),
            "wrong_among_answered": float((~right[entropy <= t]).mean()) if (entropy <= t).any() else None,
        }
        for t in (0.1, 0.25, 0.5, 0.7, 1.0)
    ]
    return {
        "arm": arm,
        "task": result.cell.task,
        "frames": result.cell.frames,
        "difficulty": result.cell.difficulty,
        "coverage": coverage[keep].tolist(),
        "risk": risk[keep].tolist(),
        "area": measures.area_under_risk(entropy, right),
        "wrong": float((~right).mean()),
        "thresholds": thresholds,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Which settings are varied
# ---------------------------------------------------------------------------------------------------------------------


def rule_temperature(groups: int, factor: float = 2.0) -> float:
    """ln 2 / ln(factor G): the temperature at which G groups that know nothing weigh together as much as 1 / factor of
    a group that has ruled out half of the options (its entropy is ln 2 lower)."""
    return math.log(2) / math.log(factor * groups)


def temperature_arms(config: AdaptTokenConfig, groups: int) -> dict[str, Arm]:
    """Temperatures, the rule for G groups, and adaptive temperatures."""
    arms = {f"{t:g}": {"temperature": t, "temperature_target": 0.0} for t in TEMPERATURES}
    rules = {f"rule {c:g}": {"temperature": rule_temperature(groups, c), "temperature_target": 0.0} for c in RULES}
    arms |= {name: fields for name, fields in rules.items() if 0 < fields["temperature"] < 10}
    arms |= {f"target {t:g}": {"temperature_target": t} for t in TARGETS}
    return {name: Arm("adapttoken", dataclasses.replace(config, **fields)) for name, fields in arms.items()}


def lite_arms(config: AdaptTokenConfig) -> dict[str, Arm]:
    """Stop rules over thresholds; the names are "rule groups threshold order"."""
    arms = {}
    for rule, counts in (("groups", (1, 2, 3)), ("rerun", (4, 8))):
        for order in ("sequential", "bit_reversed"):
            for count in counts if order == "sequential" else counts[:1]:
                for t in STOP_ENTROPIES:
                    changed = dataclasses.replace(
                        config, stop_rule=rule, stop_groups=count, stop_entropy=t, group_order=order
                    )
                    arms[f"{rule} {count} {t:g} {order}"] = Arm("lite", changed)
    return arms


def _redundancy(kernel: str, scale: float, over_selection: float) -> dict[str, Any]:
    return {"over_selection": over_selection, "proximity": kernel, "proximity_scale": scale}


# (what is varied, label, fields); a label with an asterisk is what the paper says or implies.
REPLAYED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("certainty", "neg_entropy *", {"certainty": "neg_entropy"}),
    ("certainty", "option_entropy", {"certainty": "option_entropy"}),
    ("certainty", "max_probability", {"certainty": "max_probability"}),
    ("certainty", "deepconf", {"certainty": "deepconf"}),
    *(
        ("certainty, two groups aimed at", form, {"certainty": form, "temperature_target": 2.0})
        for form in ("neg_entropy", "option_entropy", "max_probability", "deepconf")
    ),
    ("final positions", "original *", {"final_positions": "original"}),
    ("final positions", "compact", {"final_positions": "compact"}),
    ("redundancy", "off, over-selection 1", {"over_selection": 1.0}),
    ("redundancy", "exponential 2 s, 1.1 *", _redundancy("exponential", 2.0, 1.1)),
    ("redundancy", "exponential 0.5 s, 1.1", _redundancy("exponential", 0.5, 1.1)),
    ("redundancy", "exponential 8 s, 1.1", _redundancy("exponential", 8.0, 1.1)),
    ("redundancy", "window 2 s, 1.1", _redundancy("window", 2.0, 1.1)),
    ("redundancy", "exponential 2 s, 1.25", _redundancy("exponential", 2.0, 1.25)),
    ("redundancy", "exponential 2 s, 1.5", _redundancy("exponential", 2.0, 1.5)),
    ("redundancy", "exponential 2 s, 2", _redundancy("exponential", 2.0, 2.0)),
    ("coverage floor", "0 *", {"coverage": 0.0}),
    ("coverage floor", "0.05", {"coverage": 0.05}),
    ("coverage floor", "0.1", {"coverage": 0.1}),
    ("coverage floor", "0.25", {"coverage": 0.25}),
    ("attention debias", "off *", {"debias": False}),
    ("attention debias", "on", {"debias": True}),
)


def scanned(layers: int) -> list[tuple[str, str, dict[str, Any]]]:
    """The same for settings that need a scan of their own, for a decoder of that many layers."""
    reductions = [(heads, text) for heads in ("max", "mean") for text in ("max", "mean")]
    return [
        *(("reference layer", str(layer), {"reference_layer": layer}) for layer in range(layers)),
        *(
            (
                "relevance, heads then text",
                f"{h}, {t}" + (" *" if h == t == "max" else ""),
                {"relevance_heads": h, "relevance_text": t},
            )
            for h, t in reductions
        ),
        ("query rows", "after_vision *", {"relevance_queries": "after_vision"}),
        ("query rows", "question", {"relevance_queries": "question"}),
        ("query rows", "last", {"relevance_queries": "last"}),
        ("group positions", "compact *", {"group_positions": "compact"}),
        ("group positions", "real_time", {"group_positions": "real_time"}),
        ("similarity", "projector *", {"similarity": "projector"}),
        ("similarity", "reference_layer", {"similarity": "reference_layer"}),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Choosing settings
# ---------------------------------------------------------------------------------------------------------------------


def choose(lab: Lab, size: Size, config: AdaptTokenConfig) -> dict[str, Any]:
    """Settles one setting after the other on the validation split, starting from the paper's values with a low
    temperature (at the paper's own one, with many groups, everything else is at chance).

    Returns:
      "settings": the fields that differ from the paper's; "steps": every candidate's accuracy per cell.
    """
    current = dataclasses.replace(paper_settings(config), temperature=0.1, budget=BUDGETS[-1])
    steps: list[dict] = []
    cells = [size.choice_cell(task, frames) for task, frames in size.choice_places]
    variants = [*scanned(lab.model.config.text.layers), *_temperature_candidates(), *REPLAYED]
    for name in (
        "reference layer",
        "relevance, heads then text",
        "query rows",
        "group positions",
        "temperature",
        "final positions",
        "certainty",
        "redundancy",
        "coverage floor",
        "attention debias",
    ):
        current = _step(lab, cells, [each for each in variants if each[0] == name], current, steps)
    default = paper_settings(config)
    names = [f.name for f in dataclasses.fields(current) if f.name not in MODEL_FIELDS]
    settings = {n: getattr(current, n) for n in names if getattr(current, n) != getattr(default, n)}
    return {"settings": {"reference_layer": current.reference_layer} | settings, "steps": steps}


def _changed(config, variant) -> AdaptTokenConfig:
    return dataclasses.replace(config, **variant[2])


def _temperature_candidates():
    fixed = [("temperature", f"{t:g}", {"temperature": t, "temperature_target": 0.0}) for t in TEMPERATURES]
    return fixed + [("temperature", f"target {t:g}", {"temperature_target": t}) for t in TARGETS]


def _step(lab, cells, variants, current, steps) -> AdaptTokenConfig:
    """Tries variants, notes them, and returns the settings with the best one, or the present one if it is as good."""
    name = variants[0][0]
    arms = {label: Arm("adapttoken", _changed(current, (name, label, fields))) for name, label, fields in variants}
    # The current settings come first: the next steps find their scans kept.
    every = {"current": Arm("adapttoken", current)} | arms
    results = [lab.measure(cell, every, f"choose: {name}", keep=True) for cell in cells]
    accuracy = {label: [float(r.values(label, "right").mean()) for r in results] for label in arms}
    mean = {label: float(np.mean(values)) for label, values in accuracy.items()}
    best = preferred(mean)
    steps.append(
        {
            "setting": name,
            "chosen": best,
            "cells": [[c.task, c.frames] for c in cells],
            "accuracy": accuracy,
            "mean": mean,
        }
    )
    return arms[best].config


def preferred(mean: Mapping[str, float]) -> str:
    """The label to choose: the one with an asterisk (else the first), unless another one is clearly better."""
    best = next((label for label in mean if "*" in label), next(iter(mean)))
    for label in mean:
        if mean[label] > mean[best] + _WORTH:
            best = label
    return best


def chosen_settings(study: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the steps on validation videos have chosen so far; a later step's win."""
    steps = [study.get(name, {}).get("settings", {}) for name in ("choose", "budget", "stop")]
    return {name: value for step in steps for name, value in step.items()}


def choose_budget(lab: Lab, size: Size, config: AdaptTokenConfig) -> dict[str, Any]:
    """Settles the budget on validation videos: the smallest one at which AdaptToken reaches the accuracy asked for in
    every cell. What a larger budget adds, and what other arms do with each, stands beside it. Fewer tokens may want
    another temperature, which is settled anew.

    Returns:
      "settings"; "rows": per budget, arm and cell the accuracy; "steps": as of `choose`.
    """
    cells = [size.choice_cell(*place) for place in size.choice_places]
    arms = {
        (budget, name): Arm(name, dataclasses.replace(config, budget=budget))
        for budget in BUDGETS for name in ("flexselect", "certain", "adapttoken")
    }  # fmt: skip
    results = [lab.measure(cell, arms, "choose: budget") for cell in cells]
    accuracy = {key: [float(r.values(key, "right").mean()) for r in results] for key in arms}
    least = [_LEAST_ACCURACY[cell.task] for cell in cells]
    enough = [b for b in BUDGETS if all(map(operator.ge, accuracy[b, "adapttoken"], least))]
    rows = [
        {"budget": budget, "arm": name, "task": cell.task, "frames": cell.frames, "accuracy": value}
        for (budget, name), values in accuracy.items() for cell, value in zip(cells, values, strict=True)
    ]  # fmt: skip
    steps: list[dict] = []
    settled = dataclasses.replace(config, budget=enough[0] if enough else BUDGETS[-1])
    settled = _step(lab, cells, _temperature_candidates(), settled, steps)
    settings = {name: getattr(settled, name) for name in ("budget", "temperature", "temperature_target")}
    return {"settings": settings, "rows": rows, "steps": steps}


def choose_stop(lab: Lab, size: Size, config: AdaptTokenConfig) -> dict[str, Any]:
    """Settles Lite's stop rule on validation videos. A rule is safe if its loss to the full run stays below a point on
    singles and two on pairs in every cell, the 95 % interval of the loss included; the safe rule that visits the fewest
    groups is chosen. Few questions make a short list, many more, about other videos, decide among it.

    Returns:
      "settings": the rule's fields, empty where no rule is safe; "tried": every rule on the few questions; "decided":
      the short list on the many; "cells".
    """
    arms = {"full": Arm("adapttoken", config)} | lite_arms(config)
    few = [size.choice_cell(task, frames) for task, frames in size.choice_places]
    many = [dataclasses.replace(cell, questions=size.stop_questions, seed=1) for cell in few]
    tried = _stop_table(lab, few, arms)
    short = sorted((n for n in tried if max(tried[n]["loss"]) <= 0.02), key=lambda n: tried[n]["share"])[:_SHORT_LIST]
    decided = _stop_table(lab, many, {name: arms[name] for name in ("full", *short)})
    limits = [_MOST_LOSS[cell.task] for cell in many]
    safe = [n for n in short if all(map(operator.le, decided[n]["loss_at_most"], limits))]
    best = min(safe, key=lambda name: decided[name]["share"], default="full")
    fields = ("group_order", "stop_rule", "stop_groups", "stop_entropy")
    settings = {} if best == "full" else {name: getattr(arms[best].config, name) for name in fields}
    return {"settings": settings, "chosen": best, "cells": [[c.task, c.frames, c.questions] for c in many],
            "tried": tried, "decided": decided}  # fmt: skip


def _stop_table(lab, cells, arms) -> dict[str, dict]:
    """Per stop rule and cell: accuracy lost to the full run, the upper end of its 95 % interval, groups visited."""
    results = [lab.measure(cell, arms, "choose: stop rule") for cell in cells]
    table = {}
    for name in (name for name in arms if name != "full"):
        found = [against(result, name, "full") for result in results]
        shares = [each["groups_visited_share"] for each in found]
        table[name] = {
            "loss": [-each["gain"] for each in found],
            "loss_at_most": [each["half_width"] - each["gain"] for each in found],
            "shares": shares,
            "share": float(np.mean(shares)),
        }
    return table


# ---------------------------------------------------------------------------------------------------------------------
# The study proper
# ---------------------------------------------------------------------------------------------------------------------


def rows_only(lab: Lab, size: Size, config, names) -> list[dict]:
    """The main table alone."""
    arms, rows = main_arms(config, names), []
    for task in size.tasks:
        for frames in size.frames:
            stage = f"{task}, {frames} frames"
            result = lab.measure(size.cell(task, frames), arms, stage)
            rows += [row(result, name) for name in names]
    return rows


def main_section(lab: Lab, size: Size, config, names) -> dict[str, Any]:
    """The main table and everything that is replayed from the same scans."""
    out = {"rows": [], "groups": [], "temperature": [], "lite": [], "replayed": [], "options": [], "risk": []}
    for task in size.tasks:
        for frames in size.frames:
            _main_cell(lab, size, config, names, size.cell(task, frames), out)
    return out


def _main_cell(lab, size, config, names, cell: Cell, out) -> None:
    groups = -(-cell.frames // (2 * config.slots_per_group))
    sets = {"": main_arms(config, tuple(dict.fromkeys((*names, "adapttoken", "uniform"))))}
    sets["tau"] = temperature_arms(config, groups)
    if cell.frames in size.detail_frames:
        sets["lite"] = lite_arms(config)
        sets["replayed"] = _replayed_arms(config, REPLAYED)
        sets["option"] = option_arms(config)
    arms = {f"{kind}/{name}" if kind else name: arm for kind, own in sets.items() for name, arm in own.items()}
    stage = f"{cell.task}, {cell.frames} frames"
    result = lab.measure(cell, arms, stage)
    where = {"task": cell.task, "frames": cell.frames}
    out["rows"] += [row(result, name) for name in names]
    out["groups"].append(group_statistics(result))
    out["risk"] += [risk_curve(result, name) for name in ("adapttoken", "uniform")]
    found = {n: measures.mean(result.values(f"tau/{n}", "right"), result.video) for n in sets["tau"]}
    out["temperature"].append(
        where
        | {"groups": groups, "accuracy": {n: share for n, (share, _) in found.items()}}
        | {"half_width": max(half for _, half in found.values())}
    )
    out["lite"] += [
        where | _named_stop(name) | against(result, f"lite/{name}", "adapttoken") for name in sets.get("lite", ())
    ]
    for kind, key in (("replayed", "replayed"), ("option", "options")):
        out[key] += [
            where
            | dict(zip(("setting", "value"), name.split(": "), strict=True))
            | against(result, f"{kind}/{name}", "adapttoken")
            for name in sets.get(kind, ())
        ]
    if "option" in sets:
        out["options"] += [where | each for each in consensus_as_warning(result)]


def _replayed_arms(config, variants) -> dict[str, Arm]:
    return {f"{each[0]}: {each[1]}": Arm("adapttoken", _changed(config, each)) for each in variants}


def _named_stop(name: str) -> dict[str, Any]:
    rule, count, threshold, order = name.split()
    return {"rule": rule, "stop_groups": int(count), "stop_entropy": float(threshold), "order": order}


def option_arms(config: AdaptTokenConfig) -> dict[str, Arm]:
    """The cheap options beyond the paper that are not settings of `REPLAYED`."""
    change = lambda **fields: dataclasses.replace(config, **fields)
    loose = {"stop_rule": "groups", "stop_groups": 1, "stop_entropy": 0.5, "stop_agreement": False}
    return {
        "consensus: instead of a final pass": Arm("consensus", config),
        "pooled evidence: instead of a final pass": Arm("pooled", config),
        "lite, one certain group: sequential": Arm("lite", change(**loose, group_order="sequential")),
        "lite, one certain group: bit_reversed": Arm("lite", change(**loose, group_order="bit_reversed")),
        "lite, one certain group: blind gain 0.5": Arm("lite", change(**loose, stop_gain=0.5)),
        "lite, one certain group: blind gain 1": Arm("lite", change(**loose, stop_gain=1.0)),
        "lite, one certain group: give up after 8": Arm("lite", change(**loose, give_up_groups=8)),
    }


def consensus_as_warning(result: CellResult) -> list[dict[str, Any]]:
    """Accuracy of the final answer where the groups' consensus, or their pooled evidence, agrees and where not."""
    rows, right = [], result.values("adapttoken", "right")
    for name in ("consensus", "pooled evidence"):
        agrees = result.values(f"option/{name}: instead of a final pass", "option") == result.values(
            "adapttoken", "option"
        )
        rows.append({"setting": f"{name} as a warning", "value": "disagrees", "warned": float((~agrees).mean())})
        for key, where in (("accuracy_agreeing", agrees), ("accuracy_warned", ~agrees)):
            found = measures.mean(right[where], result.video[where]) if where.any() else (None, None)
            rows[-1] |= dict(zip((key, f"{key}_half_width"), found, strict=True))
    return rows


def scanned_section(lab: Lab, size: Size, config) -> list[dict]:
    """Settings that need scans of their own, and contiguous groups."""
    frames = size.detail_frames[-1] if size.detail_frames[-1] in size.frames else size.frames[-1]
    base, rows = {"base": Arm("adapttoken", config)}, []
    arms = base | _replayed_arms(config, scanned(lab.model.config.text.layers))
    # Groups of neighbouring slots are no option of the library, because nothing speaks for them.
    arms["groups: contiguous"] = Arm("adapttoken", config, contiguous=True)
    for task in size.tasks:
        cell = size.cell(task, frames, min(size.questions, size.scan_questions))
        stage = f"{task}, settings of the scan"
        result = lab.measure(cell, arms, stage)
        rows += [
            {"task": task, "frames": frames, **dict(zip(("setting", "value"), name.split(": "), strict=True))}
            | against(result, name, "base")
            | _needles_found(result, name)
            for name in arms
            if name != "base"
        ]
    return rows


def _needles_found(result: CellResult, arm: str) -> dict[str, Any]:
    return {
        "needles_in_prompt": float(np.mean(result.values(arm, "found").astype(bool))),
        "questions": len(result.answers[arm]),
    }


def hard_section(lab: Lab, size: Size, config) -> dict[str, list]:
    """The main arms on the other difficulties, reported as they are."""
    arms, out = main_arms(config, ("uniform", "flexselect", "certain", "adapttoken", "lite")), {"rows": [], "risk": []}
    for difficulty in ("easy", "hard", "extreme"):
        for task in size.tasks:
            stage = f"{task}, {difficulty}"
            cell = size.cell(task, size.hard_frames, difficulty=difficulty)
            result = lab.measure(cell, arms, stage)
            out["rows"] += [row(result, name) for name in arms]
            out["risk"].append(risk_curve(result, "adapttoken"))
    return out


def seconds_section(lab: Lab, size: Size, config) -> list[dict]:
    """Wall seconds of `answer` itself, one video after the other, after a first run that compiles."""
    rows, frames = [], size.hard_frames
    methods = {name: arm for name, arm in main_arms(config).items() if name in _TIMED}
    for task in size.tasks:
        cell, spent = size.cell(task, frames, size.timed_videos + 1, per_video=1), {name: [] for name in methods}
        for number in range(cell.questions):
            lab.on_progress(f"{task}, seconds", number, cell.questions)
            footage = film_video(lab.model, cell, number, config)[0]
            for name, arm in methods.items():
                spent[name].append(_timed(lab.model, footage, arm))
        rows += [
            {"task": task, "frames": frames, "arm": name, "videos": size.timed_videos}
            | {key: float(np.mean([each[key] for each in runs[1:]])) for key in runs[0]}
            for name, runs in spent.items()
        ]
    return rows


_TIMED = ("uniform", "flexselect", "adapttoken", "lite", "lite_groups", "lite_rerun")


def _timed(model, footage, arm: Arm) -> dict[str, float]:
    asked, begin = footage.scene.question, time.perf_counter()
    config = dataclasses.replace(arm.config, max_frames=len(footage.frames.images))
    result = adapttoken_jax.answer(model, footage.frames, asked.text, asked.options, config, arm.method)
    total = time.perf_counter() - begin
    spent = result.cost.seconds
    share = result.stop.groups_visited / max(result.stop.groups_total, 1)
    return {
        "total": total,
        "encode": spent.decode + spent.vision,
        "groups": spent.groups,
        "final": spent.final,
        "groups_visited_share": share,
    }


# The PyTorch version has the paper's steps alone.
_PAPER_STEPS = {"temperature_target": 0.0, "coverage": 0.0, "debias": False, "stop_rule": "groups", "stop_gain": 0.0,
                "give_up_groups": 0}  # fmt: skip


def torch_section(lab: Lab, size: Size, config) -> dict[str, Any] | None:
    """The method in PyTorch on the exported directory: how many answers are the same. None without PyTorch."""
    try:
        from adapttoken_jax.parity import compare, pytorch_method
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        return None
    config = dataclasses.replace(config, **_PAPER_STEPS)
    model, theirs = lab.model, pytorch_method.load_model(lab.model.path)
    same, right, total, frames = 0, [0, 0], 0, size.detail_frames[0]
    for task in size.tasks:
        cell = size.cell(task, frames, size.torch_questions // len(size.tasks), per_video=1)
        for number in range(cell.questions):
            lab.on_progress(f"{task}, PyTorch", number, cell.questions)
            footage = film_video(model, cell, number, config)[0]
            asked = footage.scene.question
            ours = adapttoken_jax.answer(model, footage.frames, asked.text, asked.options, config, trace=True)
            inputs = compare.method_inputs(model, footage.tokens.clip, ours.trace, asked.text, asked.options)
            other = pytorch_method.run(theirs, inputs, config)
            mine = footage.prompt.letters.index(ours.option)
            same, total = same + np.array_equal(ours.trace["answer_ids"], other["answer_ids"]), total + 1
            right = [right[0] + (mine == asked.correct), right[1] + (other["option"] == asked.correct)]
    return {
        "questions": total,
        "frames": frames,
        "identical": same,
        "share": same / total,
        "accuracy": right[0] / total,
        "accuracy_torch": right[1] / total,
    }


def by_key(rows: Sequence[Mapping[str, Any]], **wanted) -> list[Mapping[str, Any]]:
    """Rows that have these values."""
    return [each for each in rows if all(each[key] == value for key, value in wanted.items())]
