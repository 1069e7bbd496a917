"""The figures of the study, one style for all. Input: the study's JSON. Output: PNG files."""

import pathlib
from collections.abc import Mapping

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from adapttoken_jax.needle.study.sections import by_key, rule_temperature
from adapttoken_jax.result import atomic_file

# Colours that differ in brightness too, after Okabe and Ito.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#7A5195")
_STYLE = {
    "figure.dpi": 130,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
ARM_NAMES = {
    "uniform": "uniform sampling",
    "attention": "attention alone",
    "flexselect": "equal budgets (FlexSelect)",
    "certain": "most certain group alone",
    "paper": "AdaptToken, published values",
    "adapttoken": "AdaptToken",
    "lite": "AdaptToken-Lite",
    "lite_groups": "Lite, certain groups",
    "lite_rerun": "Lite, asking again",
}


# Arms that the first figure shows, with their lines.
_LINES = {
    "adapttoken": ("#000000", "-"),
    "lite": ("#000000", ":"),
    "certain": ("#0072B2", "-"),
    "paper": ("#E69F00", "--"),
    "attention": ("#009E73", "-"),
    "flexselect": ("#CC79A7", "-"),
    "uniform": ("#D55E00", "-"),
}


def by_stop_rule(rows) -> dict[str, list]:
    """Rows of `main["lite"]` by the name of their stop rule: what it asks for, `stop_groups` and the visiting order."""
    found: dict[str, list] = {}
    for each in rows:
        kind = "certain groups" if each["rule"] == "groups" else "asking again"
        found.setdefault(f"{kind} ({each['stop_groups']}, {each['order'].replace('_', ' ')})", []).append(each)
    return found


def draw_all(study: Mapping, directory) -> list[str]:
    """Draws every figure whose numbers are there; returns the names of the files."""
    directory = pathlib.Path(directory)
    main = study.get("main", {})
    figures = {
        "accuracy.png": lambda: _accuracy(main["rows"]),
        "entropy.png": lambda: _entropy(main["groups"]),
        "temperature.png": lambda: _temperature(main["temperature"]),
        "lite.png": lambda: _lite(main["lite"]),
        "risk.png": lambda: _risk(main["risk"] + study["hard"]["risk"]),
    }
    names = []
    with plt.rc_context(_STYLE):
        for name, draw in figures.items():
            if not main or (name == "risk.png" and "hard" not in study) or (name == "lite.png" and not main["lite"]):
                continue
            save(draw(), directory / name)
            names.append(name)
    return names


def save(figure, path) -> None:
    """Writes a figure and closes it. The same numbers give the same bytes."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
    plt.close(figure)


TITLES = {"single": "one needle", "pair": "two needles"}


def _panels(rows, height: float = 3.2, stacked: int = 1):
    """A figure, and for each task of the rows the axes of its panels, which stand one above the other, and its name."""
    tasks = [task for task in TITLES if any(each["task"] == task for each in rows)]
    figure, axes = plt.subplots(stacked, len(tasks), figsize=(4.2 * len(tasks), height), squeeze=False)
    return figure, zip(axes.T, tasks, strict=True)


def _accuracy(rows):
    arms = [arm for arm in _LINES if any(each["arm"] == arm for each in rows)]
    figure, panels = _panels(rows, 3.4)
    for (axis,), task in panels:
        for arm in arms:
            colour, line = _LINES[arm]
            own = sorted(by_key(rows, task=task, arm=arm), key=lambda each: each["frames"])
            x, y = [each["frames"] for each in own], [each["accuracy"] for each in own]
            below = [each["accuracy"] - each["accuracy_low"] for each in own]
            above = [each["accuracy_high"] - each["accuracy"] for each in own]
            axis.errorbar(
                x,
                y,
                [below, above],
                color=colour,
                linestyle=line,
                marker="o",
                capsize=2,
                elinewidth=0.8,
                label=ARM_NAMES.get(arm, arm),
            )
        axis.axhline(0.25, color="#999999", linestyle=":", linewidth=1)
        axis.annotate("guessing", (0.02, 0.25), va="top", fontsize=7, xycoords=("axes fraction", "data"))
        axis.set(xscale="log", ylim=(0.15, 1.02), title=TITLES[task], xlabel="frames of the video", ylabel="accuracy")
        _frame_ticks(axis, sorted({each["frames"] for each in rows}))
    _legend_beside(figure)
    return figure


def _frame_ticks(axis, values) -> None:
    """One tick per length. 1024 and 2048 stand too close together for anything wider."""
    axis.set_xticks(values, [str(value) for value in values], fontsize=8)
    axis.minorticks_off()


def _entropy(groups):
    figure, panels = _panels(groups, 5.2, stacked=2)
    for (above, below), task in panels:
        cells = by_key(groups, task=task)
        bins = np.asarray(cells[0]["bins"])
        most = max(len(each["by_needles"]) for each in cells)
        kinds = [_summed([c["by_needles"][k] for c in cells if k < len(c["by_needles"])]) for k in range(most)]
        _histogram(above, bins, kinds, [f"{k} needle{'' if k == 1 else 's'} in the group" for k in range(most)])
        _histogram(
            below,
            bins,
            [_summed([c["by_right"][k] for c in cells]) for k in (0, 1)],
            ["group's answer wrong", "group's answer right"],
        )
        above.set_title(TITLES[task], pad=14)  # above the names of the lines
    return figure


def _summed(counts) -> np.ndarray:
    return np.sum(np.asarray(counts, float), axis=0)


def _histogram(axis, bins, counts, labels) -> None:
    for colour, count, label in zip(COLOURS, counts, labels, strict=False):
        axis.stairs(count / max(count.sum(), 1), bins, fill=True, color=colour, alpha=0.45)
        axis.stairs(count / max(count.sum(), 1), bins, color=colour, label=f"{label} ({int(count.sum())})")
    for value, name in ((np.log(2), "ln 2"), (np.log(4), "ln 4")):
        axis.axvline(value, color="#999999", linestyle=":", linewidth=1)
        axis.annotate(name, (value, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=7)
    axis.set(yscale="log", xlabel="entropy of the group's answer, nats", ylabel="share of such groups")
    axis.set_yticks(10.0 ** np.arange(-5, 1))
    axis.set_ylim(top=200)  # room for the legend: shares end at 1
    axis.legend(loc="upper center", frameon=True, edgecolor="none", framealpha=1)


def _temperature(rows):
    figure, panels = _panels(rows)
    for (axis,), task in panels:
        own = sorted(by_key(rows, task=task), key=lambda each: each["groups"])
        for colour, each in zip(COLOURS, own, strict=False):
            fixed = {float(name): value for name, value in each["accuracy"].items() if _is_number(name)}
            axis.plot(list(fixed), list(fixed.values()), marker="o", color=colour, label=f"{each['groups']} groups")
            axis.plot(
                [rule_temperature(each["groups"])],
                [each["accuracy"]["rule 2"]],
                marker="*",
                markersize=11,
                color=colour,
                markeredgecolor="white",
            )
        axis.set(
            xscale="log",
            ylim=(0.15, 1.02),
            xlabel="temperature (star: ln 2 / ln 2G)",
            ylabel="accuracy",
            title=TITLES[task],
        )
        axis.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"])
        axis.minorticks_off()
    figure.axes[0].legend(loc="lower left")
    return figure


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _lite(rows):
    frames = max(each["frames"] for each in rows)
    figure, panels = _panels(rows)
    for (axis,), task in panels:
        own = by_key(rows, task=task, frames=frames)
        colours = dict(zip(dict.fromkeys((e["rule"], e["stop_groups"]) for e in own), COLOURS, strict=False))
        for name, line in by_stop_rule(own).items():
            rule, count, order = (line[0][key] for key in ("rule", "stop_groups", "order"))
            axis.plot(
                [e["groups_visited_share"] for e in line],
                [e["accuracy"] for e in line],
                color=colours[rule, count],
                marker="o",
                linestyle="-" if order == "sequential" else "--",
                label=name,
            )
        full = own[0]["accuracy"] - own[0]["gain"]
        axis.axhline(full, color="#000000", linestyle=":", linewidth=1)
        axis.annotate("all groups", (0.28, full), va="top", fontsize=7, xycoords=("axes fraction", "data"))
        axis.set(
            xlim=(0, 1.03),
            xlabel="share of groups visited",
            ylabel="accuracy",
            title=f"{TITLES[task]}, {frames} frames",
        )
    _legend_beside(figure)
    return figure


def _risk(curves):
    figure, panels = _panels(curves)
    for (axis,), task in panels:
        every = by_key(curves, task=task)
        own = [each for each in every if each["frames"] == 1024 or each["difficulty"] != "normal"] or every
        widths = np.linspace(3.2, 1.2, len(own))  # each thinner than those under it, which show where lines meet
        for colour, width, each in zip(COLOURS, widths, own, strict=False):
            label = f"{ARM_NAMES[each['arm']]}, {each['difficulty']}"
            axis.plot(each["coverage"], each["risk"], color=colour, linewidth=width, label=label)
        axis.set(
            xlim=(0, 1.02),
            ylim=(-0.02, 1.02),
            xlabel="share of questions answered, most certain first",
            ylabel="share wrong among them",
            title=TITLES[task],
        )
    _legend_beside(figure)
    return figure


def _legend_beside(figure) -> None:
    """One legend for all panels, where it hides no line."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center")


def draw_layers(rows, path) -> None:
    """The layer probe's figure: recall per layer, one line per number of tokens taken. Rows as `probe_layer` writes."""
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(5.0, 3.0))
        for colour, taken in zip(COLOURS, dict.fromkeys(each["taken"] for each in rows), strict=False):
            own = by_key(rows, taken=taken)
            axis.plot(
                [e["layer"] for e in own],
                [e["recall"] for e in own],
                marker="o",
                color=colour,
                label="as many as show the needle" if taken == "needle" else f"{taken} tokens",
            )
        axis.set(ylim=(-0.02, 1.02), xlabel="decoder layer", ylabel="needle tokens among the most relevant")
        axis.set_xticks(sorted({each["layer"] for each in rows}))
        axis.legend(title="tokens taken per group")
        save(figure, path)
