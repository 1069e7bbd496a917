"""Needle videos of the study: every scene is asked about several times, with its needles at other places each time.

Scanning a long video costs far more than changing it: when the needles move, only the groups that held them or hold
them now say anything new. So each scene comes in variants. All share the question and its options; the needles stand
elsewhere and take the values of another option, so that every letter is right once. A place that a needle has left is
filled with frames from elsewhere in the video.

Letters: F frames.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from adapttoken_jax.errors import UserError
from adapttoken_jax.needle.questions import Question
from adapttoken_jax.needle.render import COLOURS, SHAPES, FrameTable, render_planes
from adapttoken_jax.needle.scenes import SPLITS, Needle, Scene

_PURPOSE_VARIANTS = 3
_FRAMES_PER_DRAW = 256
_TRIES = 50  # arrangements of the needles, before a video is called too short for them


def variant(scene: Scene, number: int) -> Scene:
    """The scene with its needles moved and given the values of the option `number` after the right one.

    `number` 0 is the scene itself. The same scene and number give the same variant.

    Raises:
      UserError: a number that the question has no option for, or a video too short to move its needles.
    """
    if number == 0:
        return scene
    options = len(scene.question.options)
    if not 0 < number < options:
        raise UserError(f"--questions_per_video: a question has {options} options, so there are {options} variants")
    sequence = [SPLITS[scene.split], _PURPOSE_VARIANTS, scene.seed, len(scene.needles), scene.frames, number]
    rng = np.random.default_rng(np.random.SeedSequence(sequence))
    lengths = [n.stop - n.start for n in scene.needles]
    own = [(n.start, n.stop) for n in scene.needles]
    targets = _free_spans(rng, scene.frames, own, lengths)
    donors = [_free_spans(rng, scene.frames, own, [length])[0] for length in lengths]
    correct = (scene.question.correct + number) % options
    values = scene.question.beliefs[correct]
    return dataclasses.replace(
        scene,
        table=_moved_table(scene, targets, donors, values),
        needles=tuple(
            _moved_needle(scene.question.asked, needle, span, value)
            for needle, span, value in zip(scene.needles, targets, values, strict=True)
        ),
        question=dataclasses.replace(_with_values(scene.question, values), correct=correct),
        open_question=_with_values(scene.open_question, values),
    )


def _free_spans(rng, frames, taken, lengths) -> list[tuple[int, int]]:
    """One span per length, in order, at uniform places that overlap neither `taken` nor one another."""
    for _ in range(_TRIES):
        spans: list[tuple[int, int]] = []
        for length in lengths:
            starts = np.arange(frames - length + 1)
            free = np.all([(starts + length <= start) | (starts >= stop) for start, stop in [*taken, *spans]], axis=0)
            if not free.any():
                break
            start = int(rng.choice(starts[free]))
            spans.append((start, start + length))
        else:
            return spans
    raise UserError(f"--frames={frames}: too few to move the needles; give more, or --questions_per_video=1")


def _moved_table(scene: Scene, targets, donors, values) -> FrameTable:
    source = np.arange(scene.frames)
    for needle, donor in zip(scene.needles, donors, strict=True):
        source[needle.start : needle.stop] = np.arange(*donor)
    for needle, target in zip(scene.needles, targets, strict=True):
        source[slice(*target)] = np.arange(needle.start, needle.stop)
    table = scene.table.take(source)
    for target, value in zip(targets, values, strict=True):
        if scene.question.asked == "colour":
            table.rgb[slice(*target), 0] = COLOURS[value]
        else:
            table.shape[slice(*target), 0] = SHAPES.index(value)
    return table


def _moved_needle(asked: str, needle: Needle, span, value) -> Needle:
    return dataclasses.replace(needle, start=span[0], stop=span[1], **{asked: value})


def _with_values(question: Question, values) -> Question:
    parts = [part if part.needle is None else dataclasses.replace(part, word=values[part.needle])
             for part in question.parts]  # fmt: skip
    return dataclasses.replace(question, parts=tuple(parts))


def differing_frames(scene: Scene, other: Scene) -> np.ndarray:
    """Frames, ascending, that may differ between two variants of a scene."""
    spans = [range(n.start, n.stop) for each in (scene, other) for n in each.needles]
    return np.unique(np.concatenate(spans)).astype(np.int64)


def draw_frames(scene: Scene, frames: np.ndarray) -> np.ndarray:
    """Renders frames by number: uint8 [len(frames), height, width, 3]. Compiled, piece by piece of one size."""
    images = np.empty((len(frames), scene.height, scene.width, 3), np.uint8)
    for start in range(0, len(frames), _FRAMES_PER_DRAW):
        piece = frames[start : start + _FRAMES_PER_DRAW]
        padded = np.pad(piece, (0, _FRAMES_PER_DRAW - len(piece)), mode="edge")
        images[start : start + len(piece)] = _draw(scene.table.take(padded), scene.height, scene.width)[: len(piece)]
    return images


def _draw(table: FrameTable, height: int, width: int) -> np.ndarray:
    return np.moveaxis(np.asarray(_planes(table, height, width)), 1, -1)


@functools.partial(jax.jit, static_argnames=("height", "width"))
def _planes(table, height, width):
    return render_planes(table, height, width, jnp)
