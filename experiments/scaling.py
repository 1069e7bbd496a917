"""Measures how a question about a video scales with its length, on real mp4 files of the needle generator.

    python -m experiments.scaling --frames=256,1000,10000 --json=scaling.json

For every length, in a fresh process: seconds per group (of the passes alone, beside which the next groups are decoded
and encoded, and of the whole), seconds until the first groups were visited, programs compiled after them, how far host
memory grew while the question was answered, the seconds of each stage, and the whole against the longer of decoding and
computing. Beside it, in the same run, decoding and preprocessing alone against two bare PyAV passes over the same file:
one that decodes only, and one that also converts the sampled frames to RGB. Linux only (`/proc/self`).

With `--apart` the first core computes, and the others decode and do the rest, as where an accelerator computes.
"""

import json
import os
import pathlib
import tempfile
import time

import av
import jax
import numpy as np
from absl import flags

import adapttoken_jax as at
from adapttoken_jax import needle
from adapttoken_jax.encoding import chunk_slots
from adapttoken_jax.errors import UserError
from adapttoken_jax.parity.shapes import SHAPES, random_model
from adapttoken_jax.pipeline import plan_run
from adapttoken_jax.result import made_directory
from adapttoken_jax.terminal import check_outputs, table
from adapttoken_jax.video import read_patches
from experiments import command

_FPS = 4.0  # of the files, all of whose frames are sampled

_FRAMES = flags.DEFINE_list("frames", ["256", "1000", "10000"], "Lengths of the videos.")
_MODEL = flags.DEFINE_string(
    "model", "needle", "Checkpoint directory, the bundled model's name, or 118m: random weights of that size."
)
_METHOD = flags.DEFINE_string("method", "adapttoken", "How tokens are chosen.")
_SIDE = flags.DEFINE_integer("side", 56, "Side of a frame in pixels, a multiple of 28; 112 make 16 tokens per slot.")
_APART = flags.DEFINE_bool("apart", False, "Compute on the first core, and do all else on the others.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Keeps the videos here; default: a temporary directory.")
_JSON = flags.DEFINE_string("json", None, "Write the rows here; - for stdout, in place of the table.")
_ONE = flags.DEFINE_string("one", None, "Measure only this file and print the row as JSON (the child process).")


def keep_apart() -> None:
    """Leaves the first core to XLA's threads. This thread, and those that it starts from here on, have the others.

    Raises:
      UserError: there are no others.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise UserError("--apart: takes two cores or more; this process may use one")
    os.sched_setaffinity(0, cores[:1])
    jax.devices()  # the threads start here
    os.sched_setaffinity(0, cores[1:])


class Compilations:
    """Counts the programs that XLA builds, from now on."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, *_, **__) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


class Groups:
    """A progress callback that notes the time, and the programs compiled so far, at every group."""

    def __init__(self, compilations: Compilations):
        self.marks, self._compilations = [], compilations

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "groups":
            self.marks.append((time.perf_counter(), done, self._compilations.count))

    def summary(self) -> dict:
        """Wall seconds of a group after the first report, and the programs compiled between first and last report."""
        (begin, first, before), (end, last, after) = self.marks[0], self.marks[-1]
        per_group = (end - begin) / (last - first) if last > first else None
        return {"groups": last, "group_ms": per_group and 1e3 * per_group, "compiled_after_first": after - before}


def bare_pass(path: str, wanted: set[int]) -> float:
    """Seconds of a straight PyAV pass that converts the frames in `wanted` to RGB."""
    begin = time.perf_counter()
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                frame.to_ndarray(format="rgb24")
    return time.perf_counter() - begin


def decoding(model: at.Model, clip) -> dict:
    """Decoding and preprocessing alone, and bare passes, in seconds: the median of three, taken in turns.

    "patches_thread_s" is processor time of the thread that takes the patches, which also feeds the device.
    """
    path, wanted = clip.info.path, set(clip.frame_indices.tolist())
    times = {"bare_s": [], "bare_rgb_s": [], "patches_s": [], "patches_thread_s": []}
    for _ in range(3):
        times["bare_s"].append(bare_pass(path, set()))
        times["bare_rgb_s"].append(bare_pass(path, wanted))
        begin, busy = time.perf_counter(), time.thread_time()
        for _ in read_patches(clip, chunk_slots=chunk_slots(model, clip, scanned=True)):
            pass
        times["patches_s"].append(time.perf_counter() - begin)
        times["patches_thread_s"].append(time.thread_time() - busy)
    return {name: float(np.median(values)) for name, values in times.items()}


def measure(path: str) -> dict:
    """The row of one file, after a first question about another video has compiled what there is to compile."""
    if _APART.value:
        keep_apart()
    random = SHAPES.get(_MODEL.value) if _MODEL.value != "needle" else None
    model = random_model(random.model) if random else at.load(_MODEL.value)
    compilations = Compilations()
    own = {"slots_per_group": random.slots_per_group, "budget": random.budget} if random else {}
    config = at.AdaptTokenConfig.for_model(model.config, max_frames=10**6, max_pixels=_SIDE.value**2, **own)
    ask = lambda video, progress=None: at.answer(
        model, video, "What colour is the star?", ("red", "green", "blue"), config, _METHOD.value, on_progress=progress
    )
    plan = plan_run(model.config, path, config, _METHOD.value)
    side = plan.clip.height, plan.clip.width
    ask(at.Frames(np.zeros((256, *side, 3), np.uint8), _FPS))
    before, warm, groups = command.resident("VmRSS"), compilations.count, Groups(compilations)
    begin = time.perf_counter()
    result = ask(path, groups)
    seconds = result.cost.seconds
    row = {"frames": len(plan.clip.frame_indices), **groups.summary(), "compiled": compilations.count - warm}
    row |= {"grown_mib": (command.resident("VmHWM") - before) / 2**20}
    row["first_group_s"] = groups.marks[0][0] - begin
    row |= {f"{name}_s": getattr(seconds, name) for name in ("decode", "vision", "groups", "final", "total")}
    row |= decoding(model, plan.clip)
    longest = max(row["patches_s"], row["vision_s"] + row["groups_s"])
    ratios = {"total_per_group_ms": 1e3 * row["total_s"] / max(1, row["groups"])}
    return row | ratios | {"total_over_longest": row["total_s"] / longest}


def write_videos(directory: pathlib.Path, lengths: list[int]) -> list[pathlib.Path]:
    """The files of all lengths, written unless they are there."""
    paths = []
    for frames in lengths:
        paths.append(directory / f"needle-{_SIDE.value}-{frames}.mp4")
        if not paths[-1].exists():
            needle.write_mp4(needle.scene(0, "test", frames, "pair", size=(_SIDE.value,) * 2), paths[-1], _FPS)
    return paths


def child(path: pathlib.Path) -> dict:
    """`measure` in a fresh process, so that peaks of memory and compilations are this file's own."""
    own = [f"--{name}={flags.FLAGS[name].value}" for name in ("model", "method", "side", "apart")]
    return command.in_fresh_process("scaling", f"--one={path}", *own)


def run() -> None:
    """The whole run, from flags to the table."""
    if _ONE.value:
        print(json.dumps(measure(_ONE.value)))
        return
    check_outputs({"json": _JSON.value})
    lengths = command.numbers(_FRAMES, low=1)
    with tempfile.TemporaryDirectory(prefix="scaling.") as temporary:
        directory = made_directory("workdir", _WORKDIR.value or temporary)
        rows = [child(path) for path in write_videos(directory, lengths)]
    command.show({"rows": rows}, _JSON.value, table(rows))


if __name__ == "__main__":
    command.start("scaling", run)
