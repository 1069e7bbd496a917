"""What the method must show on needle videos, held against the study's numbers."""

from collections.abc import Iterable, Mapping
from typing import Any

from adapttoken_jax.needle.study.sections import by_key

LENGTHS = (256, 1024, 2048)


def check_targets(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line per target whose numbers were measured: {"target", "measured", "met"}."""
    found: list[dict[str, Any]] = []
    if "main" in study:
        found += _entropy_targets(study["main"]["groups"])
        found += _accuracy_targets(study["main"]["rows"])
        found += _lite_targets(study["main"]["rows"], study.get("seconds") or [])
    if study.get("torch"):
        torch = study["torch"]
        found.append(
            _line(
                f"The method in PyTorch gives the same answer to at least 99 % of {torch['questions']} questions",
                f"{torch['identical']} of {torch['questions']}",
                torch["share"] >= 0.99,
            )
        )
    return found


def _line(target: str, measured: str, met: bool) -> dict[str, Any]:
    return {"target": target, "measured": measured, "met": bool(met)}


def _entropy_targets(groups) -> Iterable[dict]:
    cells = [each for each in groups if each["frames"] in LENGTHS]
    if not cells:
        return
    lowest = min(cells, key=lambda each: each["auc_needle"])
    yield _line(
        "AUC of entropy as a detector of needles in a group: at least .95 at 256 to 2048 frames",
        f"lowest {lowest['auc_needle']:.4f} ± {lowest['auc_needle_half_width']:.4f} ({_place(lowest)})",
        lowest["auc_needle"] >= 0.95,
    )
    gap = lambda each: abs(each["entropy_by_needles"][0] - each["prior_entropy"])
    widest = max(cells, key=gap)
    yield _line(
        "Entropy of groups without a needle: within 0.1 nats of the prior's ln 4",
        f"largest distance {gap(widest):.4f} ({_place(widest)})",
        gap(widest) <= 0.1,
    )


def _accuracy_targets(rows) -> Iterable[dict]:
    for task, least in (("single", 0.95), ("pair", 0.80)):
        cells = _cells(rows, task)
        if cells:
            worst = min(cells, key=lambda each: each["adapttoken"])
            yield _line(
                f"AdaptToken, {task}: at least {least:.0%} at 256, 1024 and 2048 frames",
                f"lowest {worst['adapttoken']:.1%} ({_place(worst)})",
                worst["adapttoken"] >= least,
            )
    for other, name, task, least in (
        ("uniform", "uniform sampling", None, 0.30),
        ("flexselect", "equal budgets", None, 0.30),
        ("certain", "the most certain group alone", "pair", 0.20),
    ):
        cells = [each for t in ("single", "pair") if task in (None, t) for each in _cells(rows, t) if other in each]
        if cells:
            lead = lambda each, other=other: each["adapttoken"] - each[other]
            worst = min(cells, key=lead)
            on = "pairs: " if task else ""
            yield _line(
                f"{on}at least {100 * least:.0f} points over {name}",
                f"smallest lead {100 * lead(worst):.1f} ({_place(worst)})",
                lead(worst) >= least,
            )


def _lite_targets(rows, seconds) -> Iterable[dict]:
    for task, points, most in (("single", 0.01, 0.60), ("pair", 0.02, 0.999)):
        cells = [each for each in _cells(rows, task) if "lite" in each]
        if not cells:
            continue
        loss = max(each["adapttoken"] - each["lite"] for each in cells)
        share = max(each["lite_share"] for each in cells)
        yield _line(
            f"Lite, {task}: within {100 * points:.0f} point{'s' if points > 0.01 else ''} of the full run with "
            + ("at most 60 % of the groups visited" if most == 0.60 else "work saved"),
            f"loses {100 * loss:.1f} at most, visits {share:.0%} at most",
            loss <= points and share <= most,
        )
        timed = {each["arm"]: each["total"] for each in by_key(seconds, task=task)}
        if task == "single" and {"lite", "adapttoken"} <= set(timed):
            yield _line(
                "Lite, single: less wall time than the full run",
                f"{timed['lite']:.2f} s against {timed['adapttoken']:.2f} s",
                timed["lite"] < timed["adapttoken"],
            )


def _cells(rows, task: str) -> list[dict]:
    """Per length, the accuracy of every arm, and the share of groups that Lite visited."""
    found = []
    for frames in LENGTHS:
        own = {each["arm"]: each for each in by_key(rows, task=task, frames=frames)}
        if "adapttoken" in own:
            cell = {"task": task, "frames": frames} | {arm: each["accuracy"] for arm, each in own.items()}
            found.append(cell | ({"lite_share": own["lite"]["groups_visited_share"]} if "lite" in own else {}))
    return found


def _place(cell) -> str:
    return f"{cell['task']}, {cell['frames']} frames"
