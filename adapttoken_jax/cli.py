"""The command line: `adapttoken <command> --flags`. It parses, calls and prints.

Design decisions:
- A command is a row of `COMMANDS`: its flags as data and a function. absl flags, one `FlagValues` per command, so that
  a command knows its own flags only.
- Every field of `AdaptTokenConfig` is a flag whose default is "not given", so that only what the user writes wins over
  the model's preset.
- Exit codes: 0 success, 1 `compare` found a difference or `plan` that it does not fit, 2 the user's mistake (one line
  on stderr), 3 a fault of this program, 4 another process of the run was lost, 130 interrupted, 141 nobody reads
  stdout, 143 terminated. A traceback only with `--debug`.
- stdout carries the answer, everything else goes to stderr. Of several processes the first one writes.
- Nothing heavy is imported before a command runs: help must not wait for JAX.
"""

import contextlib
import dataclasses
import difflib
import itertools
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from adapttoken_jax import config as configs
from adapttoken_jax import hosts, parity
from adapttoken_jax.errors import UserError
from adapttoken_jax.terminal import (
    DIFFERENT,
    OK,
    PROGRAM,
    Command,
    Flag,
    aligned,
    check_outputs,
    check_required,
    exit_status,
    fail,
    failed,
    given_settings,
    help_text,
    overview,
    parse,
    setting_flags,
    table,
    write_json,
)

# ---------------------------------------------------------------------------------------------------------------------
# Flags that several commands have
# ---------------------------------------------------------------------------------------------------------------------

_DEBUG = Flag("debug", bool, "show a traceback with an error", "General")
_MODEL = Flag(
    "model",
    str,
    "directory of a Hugging Face or converted checkpoint, or needle: the bundled model",
    "Input",
    "DIR",
    required=True,
)
_VIDEO = Flag("video", str, "video file", "Input", "FILE", required=True)
_QUESTION = Flag("question", str, "what to ask about the video", "Input", "TEXT", required=True, once=True)
_OPTION = Flag("option", list, "an answer to choose from, without its letter; repeat the flag", "Input", "TEXT")


def _process_flags(together: str) -> tuple[Flag, ...]:
    """The flags of a command that several processes can run together; `together` says how they share the work."""
    return (
        Flag("distributed", bool, f"start jax.distributed; {together}", "Devices"),
        Flag(
            "process",
            str,
            "which process this is, where no cluster says so; the first one listens at HOST:PORT",
            "Devices",
            "INDEX/COUNT@HOST:PORT",
        ),
        Flag(
            "lost_after",
            int,
            "a process that has shown no sign of life for so long is lost, and the others end",
            "Devices",
            "SECONDS",
            hosts.LOST_AFTER,
            low=5,
        ),
        Flag(
            "join_within",
            int,
            "how long to wait at the start for the other processes",
            "Devices",
            "SECONDS",
            hosts.JOIN_WITHIN,
            low=5,
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# answer
# ---------------------------------------------------------------------------------------------------------------------

_ANSWER_FLAGS = (
    _MODEL,
    _VIDEO,
    dataclasses.replace(_QUESTION, required=False, help="what to ask about the video (required without --dry_run)"),
    _OPTION,
    Flag(
        "method",
        str,
        "how to choose what the model sees",
        "Method",
        "NAME",
        choices=configs.METHODS,
        shown_default=configs.METHODS[0],
    ),
    Flag("lite", bool, "the same as --method lite", "Method"),
    Flag("stop_calibration", str, "lite: stop as this certificate of calibrate_stop says", "Method", "FILE"),
    Flag("abstain_above", float, "above this entropy the answer is: not found in the video", "Method", "NATS", low=0.0),
    Flag("deadline", float, "visit no more groups when so much time has passed", "Method", "SECONDS", low=0.0),
    Flag("feature_cache", str, "keep vision features here for later questions about the same video", "Method", "DIR"),
    Flag("dry_run", bool, "print frames, grid, tokens, groups and budget; answer nothing, load no weights", "Method"),
    Flag("json", str, "write result.json here; - writes it to stdout instead of the answer", "Output", "FILE"),
    Flag("report", str, "write a page with the answer and the moments it rests on, as .html", "Output", "FILE"),
    Flag("trace", str, "write every array needed to recompute the run, as .npz", "Output", "FILE"),
    Flag(
        "mesh",
        str,
        "devices that hold groups and layers, as data=4,model=2; with fsdp=4 in place of data=4 the devices that hold "
        "groups split the weights too; context=2 gives a group's rows to two devices",
        "Devices",
        "SIZES",
        shown_default="one device of one process; groups on all devices of several",
    ),
    Flag(
        "dtype",
        str,
        "number format of the computation",
        "Devices",
        "NAME",
        choices=("float32", "bfloat16", "float16"),
        shown_default="float32 on a CPU, elsewhere the checkpoint's own",
    ),
    Flag(
        "attention",
        str,
        "attention kernels; xla does without the accelerator's own, to compare, or should one fail",
        "Devices",
        "NAME",
        default="auto",
        choices=("auto", "xla"),
    ),
    *_process_flags("--mesh lies over the devices of all processes"),
    *setting_flags(),
    _DEBUG,
)


def _answer(values: flags.FlagValues) -> int:
    """`adapttoken answer`. What can be wrong is checked before weights are loaded."""
    method = _method(values)
    if hosts.leads():
        check_outputs({name: values[name].value for name in ("json", "report", "trace")}, {"--video": values.video})
    if values.question is None and not values.dry_run:
        raise UserError("--question is required: what to ask about the video")
    from adapttoken_jax import pipeline
    from adapttoken_jax.sharding import MeshShape, check_mesh

    settings = given_settings(values)
    certificate = _certificate(values, method, settings)
    plan = pipeline.dry_run(values.model, values.video, settings, method, values.question, values.option)
    if values.mesh is not None:
        check_mesh(configs.read_model_config(values.model), MeshShape.parse(values.mesh).abstract)
    if values.dry_run:
        return _show_plan(values, plan) if hosts.leads() else OK
    pipeline.check_feature_cache(values.feature_cache, bool(values.trace))
    result = _run(values, method, settings, certificate)
    if hosts.leads():
        try:
            _write_outputs(values, result)
        finally:  # an answer that took long is not lost with a disk that is full
            _print_answer(result, as_json=values.json == "-")
    return OK


def _method(values: flags.FlagValues) -> str:
    if values.lite and values.method not in (None, "lite"):
        raise UserError(f"--lite: contradicts --method={values.method}; give one of them")
    for name in ("report", "trace"):
        if values.dry_run and values[name].value:
            raise UserError(f"--{name}: a dry run has nothing to {name}; drop one of --{name} and --dry_run")
    return "lite" if values.lite else values.method or configs.METHODS[0]


def _certificate(values: flags.FlagValues, method: str, settings: Mapping[str, Any]):
    """The certificate of `--stop_calibration`, checked against everything but the model's weights; None without."""
    path = values.stop_calibration
    if path is None:
        return None
    if not path:
        raise UserError("--stop_calibration=: the name is empty; give a certificate of experiments.calibrate_stop")
    from adapttoken_jax.calibration import RULE_FIELDS, read_certificate

    if method != "lite":
        raise UserError(f"--stop_calibration: says when Lite stops, but the method is {method}; add --lite")
    for name in RULE_FIELDS:
        if name in settings:
            raise UserError(f"--{name}: --stop_calibration={path} decides it; drop one of them")
    if values.deadline is not None:
        raise UserError("--deadline: stops where --stop_calibration promises nothing; drop one of them")
    certificate = read_certificate(path)
    config = configs.AdaptTokenConfig.for_model(configs.read_model_config(values.model), **settings)
    certificate.config_for(config, source=f"--stop_calibration={path}")
    return certificate


def _show_plan(values: flags.FlagValues, plan: Mapping[str, Any]) -> int:
    write_json(values.json, plan)
    if values.json != "-":
        sys.stdout.write(aligned(plan))
    return OK


def _run(values: flags.FlagValues, method: str, settings: Mapping[str, Any], certificate=None):
    import adapttoken_jax as at
    from adapttoken_jax.progress import Progress

    if sys.stderr.isatty() and hosts.leads():
        print(f"loading {values.model}", file=sys.stderr, flush=True)
    mesh = hosts.default_mesh() if values.mesh is None else values.mesh
    model = at.load(values.model, mesh=mesh, dtype=values.dtype, attention=values.attention)
    config = at.AdaptTokenConfig.for_model(model.config, **settings)
    if certificate is not None:
        from adapttoken_jax.calibration import model_fingerprint

        source = f"--stop_calibration={values.stop_calibration}"
        config = certificate.config_for(config, model_fingerprint(model), source)
    with Progress() as progress:
        return at.answer(
            model,
            values.video,
            values.question,
            values.option,
            config=config,
            method=method,
            trace=bool(values.trace),
            abstain_above=values.abstain_above,
            deadline=values.deadline,
            feature_cache=values.feature_cache,
            on_progress=progress if hosts.leads() else None,
        )


def _write_outputs(values: flags.FlagValues, result) -> None:
    """Every file that was asked for; one that cannot be written keeps none of the others back."""
    from adapttoken_jax.result import write_result, write_trace

    with contextlib.ExitStack() as stack:  # which calls all, and raises what went wrong in the end
        if values.report:
            stack.callback(_write_report, values, result)
        if values.json and values.json != "-":
            stack.callback(write_result, values.json, result)
        if values.trace:
            stack.callback(write_trace, values.trace, result.trace)


def _write_report(values: flags.FlagValues, result) -> None:
    from adapttoken_jax import report

    model = configs.read_model_config(values.model)
    report.write(values.report, [report.entry(model, values.video, result, values.question, values.option)])


def _print_answer(result, as_json: bool) -> None:
    """The answer or its JSON on stdout, and one line about the run on stderr."""
    from adapttoken_jax.result import naming

    with naming("stdout"):
        sys.stdout.write(result.to_json() if as_json else f"{result.answer}\n")
        sys.stdout.flush()
    print(summary_line(result), file=sys.stderr)


def summary_line(result) -> str:
    """One line about a run: option, entropy, groups, tokens, seconds."""
    parts = []
    if result.option is not None:
        share = (result.option_probabilities or {}).get(result.option)
        parts.append(f"option {result.option}" + (f" ({share:.0%})" if share is not None else ""))
        together = max(result.consensus, key=result.consensus.get) if result.consensus else result.option
        if together != result.option:
            parts.append(f"but the groups together say {together} ({result.consensus[together]:.0%})")
    if result.entropy is not None:
        parts.append(f"entropy {result.entropy:.2f} nats")
    if result.stop.groups_total:
        parts.append(f"{result.stop.groups_visited} of {result.stop.groups_total} groups")
    parts.append(f"{result.selected.count} of {result.video.tokens} visual tokens")
    parts.append(f"{result.cost.seconds.total:.1f} s")
    return ", ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# convert and compare
# ---------------------------------------------------------------------------------------------------------------------

_CONVERT_FLAGS = (
    Flag("source", str, "checkpoint to read, or needle: the bundled model", "Input", "DIR", required=True),
    Flag("target", str, "directory to write; it must not exist yet", "Output", "DIR", required=True),
    Flag("to", str, "format to write", "Output", "NAME", "orbax", choices=("orbax", "huggingface")),
    _DEBUG,
)


def _convert(values: flags.FlagValues) -> int:
    from checkpoints_convert.convert import convert

    convert(values.source, values.target, values.to)
    print(values.target)
    return OK


_COMPARE_FLAGS = (
    _MODEL,
    _VIDEO,
    _QUESTION,
    _OPTION,
    Flag("tolerance", float, "largest relative difference that passes", "Comparison", "X", 1e-4, low=0.0),
    *setting_flags(),
    _DEBUG,
)


def _compare(values: flags.FlagValues) -> int:
    with parity.needed_by("compare"):
        from adapttoken_jax.parity.compare import compare

        rows, passed = compare(
            values.model, values.video, values.question, values.option, given_settings(values), values.tolerance
        )
    sys.stdout.write(table(rows))
    verdict = "all stages are within" if passed else "some stage is above"
    print(f"{verdict} --tolerance={values.tolerance:g}", file=sys.stderr)
    return OK if passed else DIFFERENT


# ---------------------------------------------------------------------------------------------------------------------
# plan
# ---------------------------------------------------------------------------------------------------------------------

_PLAN_FLAGS = (
    Flag("model", str, "name of a model, or directory with its config.json", "Input", "NAME|DIR", required=True),
    Flag("topology", str, "slice of a TPU pod, as v5e:4x4 or v5p:2x2x4", "Devices", "SLICE", required=True),
    Flag("mesh", str, "chips for groups and layers, as data=4,model=2; auto finds them", "Devices", "SIZES", "auto"),
    Flag("video_size", str, "width and height of the source", "Input", "WxH", "560x308"),
    Flag("duration", float, "length of the video", "Input", "SECONDS", None, low=1.0, high=1e6,
         shown_default="max_frames / fps"),
    Flag("questions", int, "questions about the video in one scan", "Input", "N", 1, low=1),
    Flag("question_tokens", int, "prompt tokens after the video, of each question", "Input", "N", 160, low=1),
    Flag("method", str, "what is run", "Method", "NAME", configs.METHODS[0], choices=configs.METHODS),
    Flag("json", str, "write every figure here; - writes them to stdout instead of the table", "Output", "FILE"),
    *setting_flags(),
    _DEBUG,
)  # fmt: skip


def _plan(values: flags.FlagValues) -> int:
    """`adapttoken plan`; nothing is run, so a machine's own accelerator is left alone."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # What is compiled for chips that are not here JAX can write to its cache, and then not read.
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
    check_outputs({"json": values.json})
    from adapttoken_jax import planning
    from adapttoken_jax.planning import command

    plan = planning.plan(
        values.model, values.topology, values.mesh, settings=given_settings(values), method=values.method,
        video_size=command.parse_size(values.video_size), duration=values.duration, questions=values.questions,
        question_tokens=values.question_tokens, on_progress=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    write_json(values.json, command.as_json(plan))
    if values.json != "-":
        lines = [command.summary(plan), *(command.details(program) for program in plan.programs)]
        sys.stdout.write(f"{aligned(lines[0])}\n{table(command.rows(plan))}")
        sys.stdout.write("".join(f"\n{aligned(each)}" for each in lines[1:] if each))
    if plan.advice:
        print(f"{PROGRAM} plan: {plan.advice}", file=sys.stderr)
    return OK if plan.fits else DIFFERENT


# ---------------------------------------------------------------------------------------------------------------------
# demo
# ---------------------------------------------------------------------------------------------------------------------

_DEMO_FLAGS = (
    Flag("output", str, "directory to write, made if missing", "Output", "DIR", "adapttoken_demo"),
    Flag("frames", int, "length of the video", "Video", "N", 1024, low=32, high=10_000),
    Flag("seed", int, "which video", "Video", "N", 0, low=0),
    _DEBUG,
)


def _demo(values: flags.FlagValues) -> int:
    from adapttoken_jax import demo
    from adapttoken_jax.progress import Progress

    with Progress() as progress:
        rows = demo.run(values.output, values.frames, values.seed, progress)
    head, *lines = table([{name: row[name] for name in row if name != "question"} for row in rows]).splitlines()
    print(head)
    for question, own in itertools.groupby(zip(rows, lines, strict=True), lambda each: each[0]["question"]):
        print(f"\n{question}", *(line for _, line in own), sep="\n")
    print("seconds begin with the scan that a method's questions share; they hold what had to be compiled, which a "
          "second run need not do again", file=sys.stderr)  # fmt: skip
    print(f"wrote {pathlib.Path(values.output) / 'report.html'}", file=sys.stderr)
    return OK


# ---------------------------------------------------------------------------------------------------------------------
# evaluate
# ---------------------------------------------------------------------------------------------------------------------

_METHOD, _MESH, _DTYPE, _ATTENTION = (
    next(flag for flag in _ANSWER_FLAGS if flag.name == name) for name in ("method", "mesh", "dtype", "attention")
)
_BENCHMARKS = ("videomme", "longvideobench", "lvbench", "mlvu")

_EVALUATE_FLAGS = (
    Flag("benchmark", str, "which questions", "Input", "NAME", required=True, choices=_BENCHMARKS),
    Flag("data", str, "directory with the benchmark's files as published", "Input", "DIR", required=True),
    dataclasses.replace(_MODEL, required=False, help=f"{_MODEL.help} (required without --check)"),
    Flag("prompt", str, "official, lmms-eval (default), flexselect, qwen or plain wording", "Questions", "NAME"),
    Flag("subtitles", bool, "put the subtitles of the sampled frames into the prompt", "Questions"),
    Flag("limit", int, "ask the first so many questions only", "Questions", "N", low=1),
    _METHOD,
    Flag("replay", str, "answer from the tokens that the run in this directory selected", "Method", "DIR"),
    Flag("workdir", str, "directory of the run, made if missing (required without --check)", "Run", "DIR"),
    Flag("check", bool, "print what the data directory lacks, and answer nothing", "Run"),
    Flag("strict", bool, "stop at a missing file or a video that cannot be read", "Run"),
    Flag("resume", bool, "go on with a run that the directory holds", "Run", default=True, shown_default="true"),
    Flag("shard", str, "answer part INDEX of COUNT, as 0/4; parts share the work directory", "Run", "INDEX/COUNT"),
    dataclasses.replace(_MESH, shown_default="one device"),
    _DTYPE,
    _ATTENTION,
    *_process_flags("each process answers its part on its own devices"),
    *setting_flags(),
    _DEBUG,
)


def _evaluate(values: flags.FlagValues) -> int:
    from adapttoken_jax.evaluation import command

    for flag in () if values.check else ("model", "workdir"):
        if not values[flag].value:
            raise UserError(f"--{flag} is required without --check")
    return command.check(values) if values.check else command.evaluate(values, given_settings(values))


# ---------------------------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------------------------


COMMANDS = (
    Command("demo", "answers questions about a generated video", _DEMO_FLAGS, _demo),
    Command("answer", "answers a question about a video", _ANSWER_FLAGS, _answer),
    Command("convert", "turns Hugging Face safetensors into an Orbax checkpoint, and back", _CONVERT_FLAGS, _convert),
    Command("compare", "runs PyTorch beside this library, stage by stage (needs torch)", _COMPARE_FLAGS, _compare),
    Command("plan", "says what a question costs on TPUs, on any machine (needs libtpu)", _PLAN_FLAGS, _plan),
    Command("evaluate", "answers a benchmark's questions and scores them", _EVALUATE_FLAGS, _evaluate),
)


def main(argv: Sequence[str] | None = None, commands: Sequence[Command] = COMMANDS) -> int:
    """Runs `adapttoken` with the arguments after the program's name and returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return exit_status(" ".join([PROGRAM, *argv[:1]]), argv, lambda: _main(argv, commands))


def _main(argv: Sequence[str], commands: Sequence[Command]) -> int:
    known = {command.name: command for command in commands}
    if not argv or argv[0] in ("--help", "-h", "help"):
        sys.stdout.write(overview(commands))
        return OK
    if argv[0] == "--version":
        print(f"{PROGRAM} {_version()}")
        return OK
    if argv[0] not in known:
        return fail(PROGRAM, f"{_unknown_command(argv[0], known)}; see {PROGRAM} --help")
    return _run_command(known[argv[0]], argv[1:])


def _unknown_command(word: str, known: Iterable[str]) -> str:
    if word.startswith("-"):
        return f"{word}: a command comes first ({', '.join(known)})"
    near = difflib.get_close_matches(word, list(known), 1)
    return f"unknown command {word!r}" + (f", did you mean {near[0]!r}?" if near else "")


def _run_command(command: Command, argv: Sequence[str]) -> int:
    """Parses and runs; every way that this can end becomes an exit status."""
    name = f"{PROGRAM} {command.name}"
    debug = "--debug" in argv  # until the flags are parsed
    try:
        values = parse(command, argv)
        debug = values.debug
        if values.help:
            sys.stdout.write(help_text(command))
            return OK
        check_required(command, values)
        shared_cache = _keep_compilations()
        _join(name, values, shared_cache)
        return command.run(values)
    except Exception as error:
        return failed(name, error, debug)


def _join(name: str, values: flags.FlagValues, shared_cache: bool) -> None:
    """Joins the other processes of the run, if the flags say that there are any."""
    if "distributed" in values and (values.distributed or values.process is not None):
        hosts.start(name, values.process, values.lost_after, values.join_within, values.debug, shared_cache)


def _keep_compilations() -> bool:
    """Lets JAX find on disk what an earlier run compiled; the user's own JAX_ variables win.

    Returns:
      Whether these name the place.
    """
    named = "JAX_COMPILATION_CACHE_DIR" in os.environ
    if not named:
        try:
            cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "adapttoken-jax"
            cache.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # a user without a home, or one who may not write there, as in containers
            return False
        if not os.access(cache, os.W_OK):
            return False
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    return named


def _version() -> str:
    import importlib.metadata  # a third of the start-up time, and nothing else needs it

    try:
        return importlib.metadata.version("adapttoken-jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
