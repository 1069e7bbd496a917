"""Times the method against a fast PyTorch version of it, in one run, on the same random weights and patches.

    python -m experiments.benchmark --threads=2
    python -m experiments.benchmark --models=7b --dtypes=bfloat16 --repetitions=5      # on a GPU

First both sides answer the question and their results are held together; only then is anything timed. Every stage and
the whole question run warm, the two sides in turn; the table has medians, the median ratio, what our first call took
longer (compilation), and the share of what the device can do. With `--questions` above 1 it also tells what each
further question about the same video costs. Needs jax, flax, numpy, absl-py, torch and transformers, nothing else.

Exit status 1 when the two sides do not agree.
"""

import itertools
import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata

from absl import flags

from adapttoken_jax import parity, terminal
from adapttoken_jax.errors import UserError
from experiments import command

_DTYPES = ("float32", "bfloat16")

_MODELS = flags.DEFINE_list("models", ["needle", "118m"], "Shapes to time: needle, 118m, 3b, 7b.")
_TYPES = flags.DEFINE_list("dtypes", list(_DTYPES), "Element types of both sides.")
_REPETITIONS = flags.DEFINE_integer("repetitions", 5, "Timed runs of every stage on each side.", lower_bound=1)
_GROUPS = flags.DEFINE_integer("groups", 0, "Groups of the video; 0: as many as the shape's row says.", lower_bound=0)
_SLOTS = flags.DEFINE_integer("slots_per_group", 0, "Slots per group; 0: the shape's.", lower_bound=0)
_BUDGET = flags.DEFINE_integer("budget", 0, "Visual tokens of the final prompt; 0: the shape's.", lower_bound=0)
_ANSWER = flags.DEFINE_integer("answer_tokens", 2, "Most tokens of the final answer.", lower_bound=1)
_QUESTIONS = flags.DEFINE_integer("questions", 5, "Questions about the video; 1: no further ones.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 0, "Cores, and threads of both sides; 0: all.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of weights and patches.", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "Write every number here; - for stdout, in place of the table.")


def limit_threads(threads: int) -> int:
    """Keeps this process on `threads` cores and both frameworks on as many threads; how many these are.

    Must run before either framework starts its threads.

    Raises:
      UserError: more than there are.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    count = threads or len(cores)
    if count > len(cores):
        raise UserError(f"--threads={threads}: this process may use {len(cores)} cores")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores[:count])
    os.environ["NPROC"] = str(count)  # XLA's pool
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with PyTorch
    import torch

    torch.set_num_threads(count)
    return count


def chosen_shape(name: str):
    """The row of `shapes.SHAPES` with what the flags change.

    Raises:
      UserError: no such row, or a video that is answered directly.
    """
    import dataclasses

    from adapttoken_jax.parity import speed
    from adapttoken_jax.parity.shapes import SHAPES

    if name not in SHAPES:
        raise UserError(f"--models={name}: choose from {', '.join(SHAPES)}")
    given = {"groups": _GROUPS.value, "slots_per_group": _SLOTS.value, "budget": _BUDGET.value}
    shape = dataclasses.replace(SHAPES[name], **{field: value for field, value in given.items() if value})
    tokens = shape.groups * speed.make_plan(shape).clip.tokens_per_slot * shape.slots_per_group
    if shape.groups < 2 or shape.budget * 1.1 > tokens:
        raise UserError(f"--groups={shape.groups}, --budget={shape.budget}: a video of two groups or more is scanned, "
                        f"and only if the budget is below its {tokens} tokens")  # fmt: skip
    return shape


def time_model(name: str, dtype: str) -> dict:
    """Agreement and, if it holds, all times of one shape in one element type."""
    from adapttoken_jax import parameters
    from adapttoken_jax.parity import speed

    shape = chosen_shape(name)
    pair = speed.make_pair(shape, dtype, questions=_QUESTIONS.value, answer_tokens=_ANSWER.value, seed=_SEED.value)
    answers = speed.answers(pair)
    found = {
        "model": name, "dtype": dtype, "parameters": parameters.count(shape.model), "groups": shape.groups,
        "visual_tokens_per_group": shape.slots_per_group * pair.plan.clip.tokens_per_slot, "budget": shape.budget,
        "agreement": speed.agreement(answers),
    }  # fmt: skip
    _tell(f"{name}, {dtype}: {describe(found['agreement'])}")
    if not found["agreement"]["ok"]:
        return found
    stages = speed.stages(pair, answers)
    # Before and after: a CPU that others slow down for a moment would show more than its peak.
    load, before = [os.getloadavg()[0]], speed.device_peak(dtype)
    times = speed.measure(stages, _REPETITIONS.value, tell=_tell)
    peak = max(filter(None, (before, speed.device_peak(dtype))), default=None)
    found |= {
        "load_average": [*load, os.getloadavg()[0]], "peak_flops_per_s": peak,
        "stages": [speed.summary(stage, times[stage.name], peak) for stage in stages],
        "overhead": speed.overhead(times), "tokens_per_s": speed.rates(pair, times),
    }  # fmt: skip
    if _QUESTIONS.value > 1:
        found["further_question"] = speed.further_question(times, _QUESTIONS.value)
        found["further_question"] |= speed.questions_agree(pair, answers.run.video)
    return found


def time_models(cases: Iterable[tuple[str, str]], content: dict, target: str | None) -> None:
    """Adds every (shape, element type) to the content's models, and writes it after each: a run may be cut off."""
    for name, dtype in cases:
        content["models"].append(time_model(name, dtype))
        if target != "-":
            terminal.write_json(target, content)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def describe(agreement: dict) -> str:
    """Whether both sides agree, in one line."""
    return (
        f"the two sides {'agree' if agreement['ok'] else 'DIFFER'}: entropies within "
        f"{agreement['entropy_difference']:.1e} nats, {agreement['selected_in_common']:.1%} of the selected tokens in "
        f"common, {'the same answer' if agreement['same_answer'] else 'another answer'}"
    )


def about(threads: int) -> dict:
    """Where this ran."""
    import jax

    names = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")
    return {
        "command": " ".join(["python -m experiments.benchmark", *sys.argv[1:]]),
        "device": jax.devices()[0].device_kind if jax.default_backend() != "cpu" else processor(),
        "threads": threads, "repetitions": _REPETITIONS.value,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in names}},
    }  # fmt: skip


def processor() -> str:
    """The CPU's name where Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def document(content: dict) -> str:
    """All models as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in content["about"]["versions"].items())
    head = f"{content['about']['device']}, {content['about']['threads']} threads; {versions}."
    return "\n\n".join([head, *(section(model) for model in content["models"])]) + "\n"


def section(found: dict) -> str:
    """One model in one element type: title, agreement, table, and what questions cost."""
    title = (
        f"**{found['model']}, {found['dtype']}**: {found['parameters'] / 1e6:.1f} M parameters, {found['groups']} "
        f"groups of {found['visual_tokens_per_group']} visual tokens, budget {found['budget']}; "
        f"{describe(found['agreement'])}."
    )
    if "stages" not in found:
        return title
    rows = [["stage", "ours", "PyTorch", "ratio", "first call", "ours, FLOP/s (peak)", "PyTorch, FLOP/s (peak)"]]
    rows += [_row(stage) for stage in found["stages"]]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join([title, "", *lines, "", _costs(found)])


def _row(stage: dict) -> list[str]:
    rate = lambda side: (
        ("" if stage[f"{side}_flops_per_s"] is None else f"{stage[f'{side}_flops_per_s']:.2e}")
        + ("" if stage[f"{side}_share_of_peak"] is None else f" ({stage[f'{side}_share_of_peak']:.0%})")
    )
    theirs = ["", ""] if stage["pytorch_s"] is None else [f"{_time(stage['pytorch_s'])}", f"{stage['ratio']:.2f}"]
    return [stage["stage"], _time(stage["ours_s"]), *theirs, f"+{_time(stage['compile_s'])}", rate("ours"),
            rate("pytorch")]  # fmt: skip


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _costs(found: dict) -> str:
    extra = found["overhead"]
    text = (
        f"Relevance and entropy take {extra['relevance_and_entropy']:+.1%} of a pass without them; a group pass takes "
        f"{extra['ours']:+.1%} more than a plain prefill, PyTorch's {extra['pytorch']:+.1%}."
    )
    if more := found.get("further_question"):
        text += (
            f" Each further question: {_time(more['seconds'])}, {more['share']:.1%} of the first one's scan; asked "
            f"together or alone, entropies differ by {more['entropy']:.1e} nats, relevance by {more['relevance']:.1e}."
        )
    rates = found["tokens_per_s"]
    text += (
        f" Tokens per second: {rates['prefill']:,.0f} in a plain prefill; visual ones {rates['group']:,.0f} through "
        f"vision tower and group pass, {rates['whole']:,.0f} over the whole question."
    )
    low, high = sorted(found["load_average"])
    return text + f" Load average {low:.1f} to {high:.1f}."


def run() -> int:
    """The whole run, from flags to files; status 1 where the two sides differ.

    Raises:
      UserError: a model or an element type that there is not, or PyTorch is not installed.
    """
    terminal.check_outputs({"json": _JSON.value})
    for dtype in _TYPES.value:
        if dtype not in _DTYPES:
            raise UserError(f"--dtypes={dtype}: choose from {', '.join(_DTYPES)}")
    with parity.needed_by("benchmark"):
        threads = limit_threads(_THREADS.value)
        for name in _MODELS.value:
            chosen_shape(name)
    content = {"about": about(threads), "models": []}
    time_models(itertools.product(_MODELS.value, _TYPES.value), content, _JSON.value)
    command.show(content, _JSON.value, document(content))
    return 0 if all(model["agreement"]["ok"] for model in content["models"]) else 1


if __name__ == "__main__":
    command.start("benchmark", run)
