"""The command line around the commands: help, flags, exit codes, what goes to which stream. No weights are loaded."""

import dataclasses
import gc
import importlib
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types
import weakref

import av
import numpy as np
import pytest

from adapttoken_jax import cli, terminal
from adapttoken_jax.config import METHODS, AdaptTokenConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.progress import Progress
from tests.test_result import make_result, make_trace

ROOT = pathlib.Path(__file__).resolve().parent.parent
ANSWER = next(command for command in cli.COMMANDS if command.name == "answer")
INPUT = ["--model", "m", "--video", "v.mp4", "--question", "Where?"]


def command(run, flags=()):
    """A command table with one command, `try`, that runs `run`."""
    return [terminal.Command("try", "tries something", (*flags, terminal.Flag("debug", bool, "", "General")), run)]


def one_line(capsys, argv, commands=cli.COMMANDS):
    """The single line that a mistake leaves on stderr; stdout stays empty and the status is 2."""
    assert cli.main(argv, commands) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n")
    return err.rstrip("\n")


def subprocess_cli(*argv):
    line = [sys.executable, "-m", "adapttoken_jax.cli", *argv]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)


# Help


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_lists_every_command(capsys, argv):
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("usage: adapttoken COMMAND")
    for listed in cli.COMMANDS:
        assert f"  {listed.name} " in out and listed.summary in out


@pytest.mark.parametrize("listed", cli.COMMANDS, ids=lambda c: c.name)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_a_command_shows_its_flags_and_no_others(capsys, listed, flag):
    assert cli.main([listed.name, flag]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    shown = {line.split()[0].replace("[no]", "") for line in out.splitlines() if line.startswith("  --")}
    assert shown == {f"--{flag.name}" for flag in listed.flags} | {"--flagfile"}
    assert max(map(len, out.splitlines())) <= 110


def test_help_shows_choices_and_defaults(capsys):
    cli.main(["answer", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--fps X frames sampled per second of video (default 4)" in out
    assert "legacy, hf5 (default legacy)" in out
    assert "--[no]stop_agreement lite: the certain groups must agree on the answer (default true)" in out
    assert "visual tokens in the final prompt (default the model's preset, else 7040)" in out
    assert "adapttoken, lite, flexselect, uniform, full (default adapttoken)" in out
    cli.main(["demo", "--help"])
    assert "--seed N which video (default 0)" in " ".join(capsys.readouterr().out.split())
    assert "Other settings" not in out  # every setting has a section of its own
    cli.main(["evaluate", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--benchmark NAME which questions: videomme, longvideobench, lvbench, mlvu (required)" in out


@pytest.mark.parametrize("argv", [["--help"], *([listed.name, "--help"] for listed in cli.COMMANDS)], ids=" ".join)
def test_help_fits_the_terminal_and_breaks_no_name(capsys, monkeypatch, argv):
    monkeypatch.setenv("COLUMNS", "60")
    cli.main(argv)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60 and not re.search(r"\S  \[--flags\]", out)
    assert not re.search(r"\w-$", out, re.MULTILINE)


def test_a_missing_flag_says_what_it_may_be(capsys):
    assert cli.main(["evaluate", "--data=."]) == 2
    said = capsys.readouterr().err
    assert said.endswith("--benchmark is required: choose one of videomme, longvideobench, lvbench, mlvu\n")


def test_help_does_not_wait_for_jax():
    code = (
        "import sys; from adapttoken_jax import cli; cli.main(['answer', '--help']);"
        "print({'jax', 'flax', 'numpy', 'tokenizers', 'av', 'torch', 'tqdm'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "set()\n"


def test_the_version_is_one_line(capsys):
    assert cli.main(["--version"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("adapttoken ") and out.count("\n") == 1 and err == ""


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("answr", "adapttoken: unknown command 'answr', did you mean 'answer'?; see adapttoken --help"),
        ("transcribe", "adapttoken: unknown command 'transcribe'; see adapttoken --help"),
        (
            "--model",
            "adapttoken: --model: a command comes first (demo, answer, convert, compare, plan, evaluate); "
            "see adapttoken --help",
        ),
    ],
)
def test_an_unknown_command_is_one_line(capsys, word, words):
    assert one_line(capsys, [word]) == words


# Flags


def given(argv):
    values = terminal.parse(ANSWER, argv)
    return terminal.given_settings(values)


def test_every_setting_is_a_flag_that_is_not_given_by_default():
    assert given([]) == {}
    for field in dataclasses.fields(AdaptTokenConfig):
        other = field.metadata.get("choices", (None, None))[1]
        if other is None:
            other = not field.default if isinstance(field.default, bool) else field.default
        text = str(other).lower() if isinstance(other, bool) else str(other)
        for argv in ([f"--{field.name}={text}"], [f"--{field.name}", text]):
            if isinstance(other, bool) and len(argv) == 2:
                continue  # a switch takes no word of its own
            parsed = given(argv)
            assert parsed == {field.name: other} and type(parsed[field.name]) is type(field.default)
            AdaptTokenConfig(**parsed)


def test_flags_set_and_unset_switches_and_repeat_lists():
    assert given(["--nostop_agreement"]) == {"stop_agreement": False}
    assert given(["--stop_agreement"]) == {"stop_agreement": True}
    assert given(["--budget", "5", "--budget", "6"]) == {"budget": 6}
    assert given(["--fps", "4"]) == {"fps": 4.0}
    values = terminal.parse(ANSWER, ["--option", "a, b", "--option=-5", "--option", "--"])
    assert values.option == ["a, b", "-5", "--"]


def test_a_flag_file_of_another_encoding_is_one_line(capsys, tmp_path):
    (tmp_path / "flags").write_bytes("--question=Où ?\n".encode("latin-1"))
    line = one_line(capsys, ["answer", f"--flagfile={tmp_path / 'flags'}"])
    assert line == "adapttoken answer: --flagfile: the file is not UTF-8 text; save it as UTF-8"


def test_a_flag_file_sets_flags(tmp_path):
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    inner.write_text("# a comment\n--budget=12\n--option=a b\n")
    outer.write_text(f"--flagfile={inner}\n--lite\n")
    values = terminal.parse(ANSWER, [f"--flagfile={outer}", "--budget=13", "--option", "c"])
    assert (values.budget, values.lite, values.option) == (13, True, ["a b", "c"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--modle", "x"], "--modle: unknown flag; did you mean --model?"),
        (["--xyzzy"], "--xyzzy: unknown flag; see adapttoken answer --help"),
        (["--budget=many"], "--budget=many: must be a whole number"),
        (["--budget=1.5"], "--budget=1.5: must be a whole number"),
        (["--budget=0"], "--budget=0: must be at least 1"),
        (["--fps=fast"], "--fps=fast: must be a number"),
        (["--fps=nan"], "--fps=nan: must be a finite number"),
        (["--bottom_fraction=1.5"], "--bottom_fraction=1.5: must be at most 1.0"),
        (["--mrope=new"], "--mrope=new: choose one of legacy, hf5"),
        (["--method=best"], f"--method=best: choose one of {', '.join(METHODS)}"),
        (["--stop_agreement=perhaps"], "--stop_agreement=perhaps: must be true or false"),
        (["--video"], "--video: a value must follow"),
        (["--flagfile=/no/such"], "--flagfile=/no/such: No such file or directory"),
        (["--model", "m", "x y"], "'x y' belongs to no flag; put quotes around values with spaces"),
        (
            ["--video", "v"],
            "--model is required: directory of a Hugging Face or converted checkpoint, or needle: the bundled model",
        ),
        (["--model", "m"], "--video is required: video file"),
        (["--model", "m", "--video", "v"], "--question is required: what to ask about the video"),
        ([*INPUT, "--lite", "--method=full"], "--lite: contradicts --method=full; give one of them"),
        (
            [*INPUT, "--dry_run", "--trace=t"],
            "--trace: a dry run has nothing to trace; drop one of --trace and --dry_run",
        ),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(capsys, argv, words):
    assert one_line(capsys, ["answer", *argv]) == f"adapttoken answer: {words}"


@pytest.mark.parametrize(
    ("name", "argv", "words"),
    [
        ("convert", [], "--source is required"),
        ("convert", ["--source=a"], "--target is required"),
        ("convert", ["--source=a", "--target=b", "--to=pickle"], "--to=pickle: choose one of orbax, huggingface"),
        ("compare", INPUT[:4], "--question is required"),
        ("compare", [*INPUT, "--question=again"], "--question: given 2 times; give one"),
        ("compare", [*INPUT, "--tolerance=-1"], "--tolerance=-1: must be at least 0.0"),
        ("compare", [*INPUT, "--json=x"], "--json: unknown flag"),
        (
            "plan",
            ["--model=m", "--topology=v5e:2x2", "--duration=1e300"],
            "--duration=1e300: must be at most 1000000.0",
        ),
    ],
)
def test_the_other_commands_check_their_flags(capsys, name, argv, words):
    assert words in one_line(capsys, [name, *argv])


def test_lite_is_a_method_and_lite_twice_is_no_contradiction():
    methods = [cli._method(terminal.parse(ANSWER, argv)) for argv in ([], ["--lite"], ["--lite", "--method=lite"])]
    assert methods == ["adapttoken", "lite", "lite"]
    assert [cli._method(terminal.parse(ANSWER, [f"--method={name}"])) for name in METHODS] == list(METHODS)


# Output files


@pytest.mark.parametrize("flag", ["json", "trace"])
def test_outputs_are_checked_before_any_work(capsys, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.mp4").write_bytes(b"film")
    os.link("v.mp4", "hard.mp4")
    os.symlink("v.mp4", "soft.mp4")
    cases = {
        str(tmp_path): "is a directory",
        "": "the name is empty; give a file",
        "v.mp4/out": "is no directory; name another",
        "no/such/out": "does not exist; create it first",
        "v.mp4": "the same file as --video",
        "soft.mp4": "the same file as --video",
    }
    for path, words in cases.items():
        line = one_line(capsys, ["answer", *INPUT, f"--{flag}={path}"])
        assert line.startswith(f"adapttoken answer: --{flag}={path}: ") and words in line
    assert (tmp_path / "v.mp4").read_bytes() == b"film"


def test_two_outputs_cannot_be_one_file(capsys, tmp_path):
    path = tmp_path / "out"
    line = one_line(capsys, ["answer", *INPUT, f"--json={path}", f"--trace={tmp_path}/./out"])
    assert "the same file as --json" in line


def test_a_directory_without_write_permission_is_refused(tmp_path, monkeypatch):
    # Root may write anywhere, so the system's answer is asked for rather than provoked.
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != str(tmp_path))
    with pytest.raises(UserError, match=r"--json=.*: Permission denied"):
        terminal.check_outputs({"json": str(tmp_path / "out")})


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path, capsys):
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    terminal.check_outputs({"json": str(tmp_path / ("x" * longest))})
    terminal.write_json(str(tmp_path / ("x" * longest)), {})
    assert [path.name for path in tmp_path.iterdir()] == ["x" * longest]
    line = one_line(capsys, ["answer", *INPUT, f"--json={tmp_path / ('x' * (longest + 1))}"])
    assert line.endswith(": File name too long")


def test_devices_are_outputs_too(tmp_path):
    terminal.check_outputs({"json": os.devnull})
    terminal.check_outputs({"json": str(tmp_path / "new.json")})
    (tmp_path / "old.json").write_text("{}")
    terminal.check_outputs({"json": str(tmp_path / "old.json")})
    read, write = os.pipe()
    terminal.check_outputs({"json": f"/dev/fd/{write}"})
    os.close(read)
    os.close(write)


# Exit codes


def test_the_status_of_a_command_is_the_programs(capsys):
    for status in (0, 1):
        assert cli.main(["try"], command(lambda values, status=status: status)) == status
    assert capsys.readouterr() == ("", "")


def raising(error):
    def run(values):
        raise error

    return command(run)


def test_a_users_mistake_is_one_line_and_with_debug_a_traceback_too(capsys):
    commands = raising(UserError("--budget=3: too\n  small"))
    assert one_line(capsys, ["try"], commands) == "adapttoken try: --budget=3: too small"
    assert cli.main(["try", "--debug"], commands) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("adapttoken try: --budget=3: too small\n")


def test_what_the_system_refuses_is_one_line(capsys):
    error = OSError(28, "No space left on device", "/out/result.json")
    assert one_line(capsys, ["try"], raising(error)) == "adapttoken try: /out/result.json: No space left on device"
    assert one_line(capsys, ["try"], raising(OSError("odd"))) == "adapttoken try: odd"


def test_a_fault_of_the_program_is_one_line_with_a_status_of_its_own(capsys):
    commands = raising(ZeroDivisionError("a\nb"))
    assert cli.main(["try"], commands) == 3
    line = "adapttoken try: internal error: ZeroDivisionError: a"
    assert capsys.readouterr().err == f"{line} (run again with --debug for a traceback)\n"
    assert cli.main(["try", "--debug"], commands) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith(f"{line}\n")


def test_an_interrupt_is_130(capsys):
    assert cli.main(["try"], raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "adapttoken try: interrupted\n")
    failing = RuntimeError("release unlocked lock")  # as a condition does that is interrupted while it waits
    failing.__context__ = KeyboardInterrupt()
    assert cli.main(["try"], raising(failing)) == 130
    assert capsys.readouterr() == ("", "adapttoken try: interrupted\n")


def test_ctrl_c_ends_the_process_with_130_and_no_traceback():
    code = (
        "import sys, time; from adapttoken_jax import cli, terminal as t;"
        "run = lambda values: (print('ready', flush=True), time.sleep(60));"
        "sys.exit(cli.main(['try'], [t.Command('try', '', (t.Flag('debug', bool, '', 'General'),), run)]))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=120)[1] == "adapttoken try: interrupted\n"
    assert process.returncode == 130


def terminate(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # Python calls its handler between two instructions


class Heavy:
    """An object during whose finalization SIGTERM comes."""

    def __del__(self):
        terminate()


def in_a_finalizer():
    Heavy()


def in_a_callback_of_a_weak_reference():
    thing = set()
    there = weakref.ref(thing, terminate)
    del thing
    assert there() is None


def in_a_callback_of_the_garbage_collector():
    gc.callbacks.append(terminate)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(terminate)


@pytest.mark.parametrize(
    "come", [terminate, in_a_finalizer, in_a_callback_of_a_weak_reference, in_a_callback_of_the_garbage_collector]
)
def test_a_signal_that_comes_where_exceptions_get_lost_is_heard(capsys, come):
    def run(values):
        come()
        time.sleep(20)

    assert cli.main(["try"], command(run)) == 143  # 0 if `run` came to its end
    assert capsys.readouterr() == ("", "adapttoken try: terminated\n")


@pytest.mark.parametrize(("sent", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_import_is_finished_before_a_signal_is_heard(capsys, tmp_path, monkeypatch, sent, status):
    code = f"import os, signal, time\nos.kill(os.getpid(), signal.{sent})\ntime.sleep(0.2)\nprint('whole')\n"
    (tmp_path / f"imported_{sent}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, f"imported_{sent}", raising=False)

    def run(values):
        importlib.import_module(f"imported_{sent}")
        time.sleep(20)

    assert cli.main(["try"], command(run)) == status
    out, err = capsys.readouterr()
    assert out == "whole\n" and err.count("\n") == 1


def test_a_signal_before_the_command_runs_and_one_while_an_error_is_printed(capsys, monkeypatch):
    def commands():
        terminate()
        yield from cli.COMMANDS

    assert cli.main(["try"], commands()) == 143
    assert capsys.readouterr() == ("", "adapttoken try: terminated\n")

    class Interrupted(io.StringIO):
        def write(self, text):
            if "broken" in text:
                terminate()
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Interrupted())
    assert cli.main(["try"], raising(UserError("broken"))) == 143
    assert sys.stderr.getvalue() == "adapttoken try: terminated\n"


def test_afterwards_the_signals_are_as_before():
    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    assert cli.main(["try"], command(lambda values: 0)) == 0
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, "-m", "adapttoken_jax.cli", "answer", "--help"]
    done = subprocess.run(line, stdout=write, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("redirected", "status", "said"),
    [
        (">/dev/full", 2, "adapttoken --version: stdout: No space left on device\n"),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">/dev/full 2>/dev/full", 2, ""),
    ],
)
def test_streams_that_cannot_be_written_to(redirected, status, said):
    line = f"{sys.executable} -m adapttoken_jax.cli --version {redirected}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-", ">&- 2>&-"])
def test_a_mistake_that_cannot_be_said_has_its_status(redirected):
    line = f"{sys.executable} -m adapttoken_jax.cli answer --budgte=3 {redirected}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_an_answer_that_cannot_be_printed_names_stdout(monkeypatch):
    with open("/dev/full", "w") as full, pytest.raises(OSError, match="No space left on device: 'stdout'"):
        monkeypatch.setattr(sys, "stdout", full)
        try:
            cli._print_answer(make_result(), as_json=False)
        finally:
            terminal.ending._drop(full)


def test_the_program_as_a_process():
    done = subprocess_cli("answer", "--budgte=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "adapttoken answer: --budgte: unknown flag; did you mean --budget?\n"
    done = subprocess_cli("--help")
    assert done.returncode == 0 and done.stderr == "" and "answer" in done.stdout


@pytest.mark.parametrize("refusal", [None, PermissionError(13, "Permission denied")])
def test_a_cache_is_named_where_it_can_be_written_and_else_left_off(tmp_path, monkeypatch, refusal):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if refusal:  # root may write anywhere
        monkeypatch.setattr(pathlib.Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(refusal))
    assert not cli._keep_compilations()
    found = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    assert found == (None if refusal else str(tmp_path / "cache" / "adapttoken-jax"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    assert cli._keep_compilations() and os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "own")


# What is printed


def test_the_answer_alone_goes_to_stdout(capsys):
    cli._print_answer(make_result(), as_json=False)
    out, err = capsys.readouterr()
    assert out == "B\n"
    assert err == "option B (75%), entropy 0.50 nats, 1 of 2 groups, 2 of 24 visual tokens, 1.0 s\n"


def test_the_json_alone_goes_to_stdout(capsys):
    result = make_result()
    cli._print_answer(result, as_json=True)
    out, err = capsys.readouterr()
    assert out == result.to_json() and err.count("\n") == 1


def test_the_summary_leaves_out_what_there_is_not():
    stop = dataclasses.replace(make_result().stop, groups_visited=0, groups_total=0)
    result = make_result(option=None, option_probabilities=None, entropy=None, stop=stop)
    assert cli.summary_line(result) == "2 of 24 visual tokens, 1.0 s"


def test_outputs_are_written_where_they_were_asked_for(tmp_path, capsys):
    argv = [*INPUT, f"--json={tmp_path}/r.json", f"--trace={tmp_path}/t.npz"]
    cli._write_outputs(terminal.parse(ANSWER, argv), make_result(trace=make_trace()))
    assert json.loads((tmp_path / "r.json").read_text())["answer"] == "B"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "t.npz"]
    cli._write_outputs(terminal.parse(ANSWER, [*INPUT, "--json=-"]), make_result())
    assert len(list(tmp_path.iterdir())) == 2 and capsys.readouterr() == ("", "")


PLAN = {"duration_s": 12.5, "grid": [3, 4, 6], "groups": 2, "method": "lite", "path": None}


def test_a_plan_is_aligned_text_or_json(tmp_path, capsys):
    assert cli._show_plan(terminal.parse(ANSWER, []), PLAN) == 0
    text = "duration_s  12.5\ngrid        3, 4, 6\ngroups      2\nmethod      lite\npath        -\n"
    assert capsys.readouterr().out == text
    cli._show_plan(terminal.parse(ANSWER, ["--json=-"]), PLAN)
    assert json.loads(capsys.readouterr().out) == PLAN
    cli._show_plan(terminal.parse(ANSWER, [f"--json={tmp_path}/plan.json"]), PLAN)
    assert capsys.readouterr().out == text and json.loads((tmp_path / "plan.json").read_text()) == PLAN


def test_a_table_has_its_numbers_on_the_right():
    rows = [
        {"stage": "patches", "max_rel": 0.0, "ok": True},
        {"stage": "layer 12", "max_rel": 1.25e-6, "ok": False},
    ]
    assert terminal.table(rows) == "stage      max_rel  ok\npatches          0  yes\nlayer 12  1.25e-06  no\n"
    assert terminal.table([]) == ""


# Bad input and dry runs: as much of `answer` as needs no weights

CONFIG = {
    **{"model_type": "qwen2_5_vl", "hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
    **{"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 96, "vocab_size": 320, "rope_theta": 1e6},
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    **{"vision_start_token_id": 300, "vision_end_token_id": 301, "image_token_id": 302, "video_token_id": 303},
    "vision_config": {
        **{"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64},
        **{"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112, "in_chans": 3},
        **{"fullatt_block_indexes": [1], "tokens_per_second": 2, "hidden_act": "silu"},
    },
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A directory with `model` (a config alone), `v.mp4` (10 s, 10 fps, 112 x 84) and `text.mp4`, which is none."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "text.mp4").write_text("no film")
    with av.open(str(folder / "v.mp4"), "w") as container:
        stream = container.add_stream("h264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 112, 84, "yuv420p"
        for shade in range(100):
            picture = np.full((84, 112, 3), shade, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return folder


def answer(folder, **flags):
    values = {"model": folder / "model", "video": folder / "v.mp4", **flags}
    return ["answer", *(f"--{name}={value}" for name, value in values.items())]


def test_a_dry_run_shows_what_would_be_done_and_needs_neither_weights_nor_question(inputs, capsys):
    argv = answer(inputs, slots_per_group=4, budget=300, json="-")
    assert cli.main([*argv, "--dry_run"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    # 112 x 84 is under 128 * 28 * 28 pixels: both sides grow by sqrt(100352 / 9408) and are rounded up to 28.
    expected = {"sampled_frames": 40, "frame_size": "392x280", "grid": [20, 20, 28], "tokens_per_slot": 140}
    expected |= {"tokens": 2800, "groups": 5, "slots_per_group": 4, "budget": 300, "reference_layer": 3}
    assert expected.items() <= json.loads(out).items()


@pytest.mark.parametrize("mesh", ["data=1,model=3", "data=", "rows=2,model=1"])
def test_a_dry_run_refuses_a_mesh_that_cannot_be(inputs, capsys, mesh):
    assert cli.main([*answer(inputs, mesh=mesh), "--dry_run"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--mesh" in err and err.count("\n") == 1
    assert cli.main([*answer(inputs, mesh="data=64,model=2"), "--dry_run"]) == 0  # of devices that are elsewhere


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"video": "none.mp4"}, "none.mp4"),
        ({"video": "text.mp4"}, "text.mp4"),
        ({"model": "none"}, "no such model directory"),
        ({"model": "."}, "no config.json"),
        ({"question": " "}, "--question"),
        ({"option": "red"}, "--option"),
        ({"video": os.devnull}, f"{os.devnull}: is no plain file"),
        ({"video": "a\0b"}, "--video=a\0b: holds a zero byte"),
        ({"trace": "-"}, "--trace=-: only JSON goes to stdout; give a file"),
        ({"mesh": ""}, "--mesh=: write data=N"),
        ({"mesh": "data=²"}, "--mesh=data=²: write data=N"),
        ({"stop_calibration": "", "method": "lite"}, "--stop_calibration=: the name is empty"),
        ({"process": ""}, "--process=: write INDEX/COUNT@HOST:PORT"),
        ({"stop_entropy": 1e300}, "--stop_entropy=1e+300: must be at most"),
        ({"stop_gain": 1e300}, "--stop_gain=1e+300: must be at most"),
        ({"sampling_temperature": 1e300}, "--sampling_temperature=1e+300: must be at most"),
        ({"reference_layer": 4}, "--reference_layer=4: the model has layers 0 to 3"),
        ({"slots_per_group": 4, "budget": 40, "min_tokens_per_group": 9}, "--budget=40"),
        ({"method": "uniform", "budget": 100}, "--budget=100"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(inputs, tmp_path, capsys, monkeypatch, changes, words):
    monkeypatch.chdir(inputs)
    argv = answer(inputs, **{"question": "Where?", "json": tmp_path / "r.json", "trace": tmp_path / "t.npz", **changes})
    assert words in one_line(capsys, argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"feature_cache": ""}, "--feature_cache: the name is empty"),
        ({"feature_cache": "v.mp4"}, "--feature_cache=v.mp4: is no directory; name another"),
        ({"feature_cache": "c", "trace": "t.npz"}, "drop one of --feature_cache and --trace"),
    ],
)
def test_the_feature_cache_is_checked_before_weights_are_loaded(inputs, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(cli, "_run", None)
    assert words in one_line(capsys, answer(inputs, question="Where?", **flags))
    assert not (inputs / "c").exists()


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def logged(monkeypatch, calls):
    """The log of calls (seconds, stage, done, total)."""
    clock = iter([call[0] for call in calls])
    monkeypatch.setattr("adapttoken_jax.progress.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    log = io.StringIO()
    with Progress(log) as progress:
        for _, *call in calls:
            progress(*call)
    return log.getvalue()


def test_short_stages_leave_no_log(monkeypatch):
    assert logged(monkeypatch, [(0, "encode", 1, 2), (5, "groups", 1, 1), (9, "encode", 2, 2)]) == ""


def test_a_long_stage_shows_signs_of_life_and_its_end(monkeypatch):
    seconds = [0, 9, 11, 20, 22, 23]
    calls = [(second, "groups", done, 5) for done, second in enumerate(seconds)]
    assert logged(monkeypatch, calls) == "groups: 2 of 5\ngroups: 4 of 5\ngroups: 5 of 5\n"


def test_a_terminal_gets_a_bar_per_stage(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with Progress(terminal) as progress:
        progress("encode", 1, 2)
        progress("groups", 4, 4)
        progress("encode", 2, 2)
    text = terminal.getvalue()
    assert "encode" in text and "2/2" in text and "4/4" in text and "100%" in text


def test_a_terminal_that_cannot_move_its_cursor_gets_none(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    with Progress(terminal) as progress:
        progress("groups", 4, 4)
    assert terminal.getvalue() == ""
