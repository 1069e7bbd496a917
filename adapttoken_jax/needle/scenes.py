"""Scenes: the description of a synthetic video, its needles and its question, made from a seed with NumPy alone.

A video is a row of segments. Each has its own dim, moving background and mostly a sprite, sometimes a second one. A
needle is a sprite of a few frames whose key (the attribute that the question names) no other sprite of the video has.
A sprite stays inside one cell of 28 x 28 pixels, that is one visual token of the model, so that the frames and cells of
a needle are exactly the tokens that hold the evidence.

Seeds: every draw comes from `np.random.SeedSequence` with the split's number as the first entropy word. Training,
validation and test are therefore different streams even for equal seeds, and no seed of one can reach another's videos.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from adapttoken_jax.errors import UserError
from adapttoken_jax.needle.questions import OTHER, VALUES, Question, choice_question, describe_question, open_question
from adapttoken_jax.needle.render import CELL, COLOURS, NO_SHAPE, FrameTable, render

SPLITS = {"train": 1, "validation": 2, "test": 3}
TASKS = {"single": 1, "pair": 2}
_PURPOSE_SCENE = 1
_RGB = np.asarray(list(COLOURS.values()), np.float32)
# A sprite reaches radius + jitter + sway <= 14 px from the middle of its cell: it never touches another token.
_RADIUS, _JITTER, _SWAY = (10.5, 12.0), 1.2, 0.8


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """How hard a scene is.

    needle_frames: length of a needle. segment_frames: shortest and longest segment. distractor_kinds: how many keys
    other than the asked ones occur (0 to 4). sprite_share, companion_share: probability that a segment has a sprite,
    and a second one. contrast: opacity of all sprites, 0..1. noise: half-width of the grey noise in levels of 255.
    motion: radians per frame that the background's wave travels.
    """

    needle_frames: int = 6
    segment_frames: tuple[int, int] = (4, 8)
    distractor_kinds: int = 4
    sprite_share: float = 0.75
    companion_share: float = 0.0
    contrast: float = 1.0
    noise: float = 4.0
    motion: float = 0.15


DIFFICULTIES = {
    "easy": Difficulty(needle_frames=8, distractor_kinds=2, noise=0.0),
    "normal": Difficulty(),
    "hard": Difficulty(needle_frames=4, companion_share=0.3, contrast=0.6, noise=16.0, motion=0.3),
    "extreme": Difficulty(needle_frames=2, companion_share=0.5, contrast=0.4, noise=32.0, motion=0.5),
}


@dataclasses.dataclass(frozen=True)
class Needle:
    """A sprite that the question is about.

    start, stop: its frames (stop excluded). cell: (row, column) of its 28-px cell, the same in all of them.
    boxes: int [stop - start, 4], per frame top, left, bottom, right in pixels, the last two excluded.
    """

    shape: str
    colour: str
    start: int
    stop: int
    cell: tuple[int, int]
    boxes: np.ndarray

    @property
    def slots(self) -> np.ndarray:
        """Temporal slots (frames 2s and 2s + 1) in which it appears, when every frame of the video is sampled."""
        return np.arange(self.start // 2, (self.stop - 1) // 2 + 1)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A video and what is to be known about it. `question` is multiple choice, `open_question` wants words."""

    seed: int
    split: str
    task: str
    difficulty: Difficulty
    height: int
    width: int
    table: FrameTable
    needles: tuple[Needle, ...]
    question: Question
    open_question: Question

    @property
    def frames(self) -> int:
        """How many the video has."""
        return len(self.table.phase)

    def visible_in_cells(self, slots: Sequence[int], rows: Sequence[int], cols: Sequence[int]) -> tuple[bool, ...]:
        """For each needle, whether one of the visual tokens (slot, row, column) holds it."""
        slots, rows, cols = (np.asarray(values) for values in (slots, rows, cols))
        return tuple(
            bool(np.any(np.isin(slots, n.slots) & (rows == n.cell[0]) & (cols == n.cell[1]))) for n in self.needles
        )

    def images(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Frames start to stop, uint8 [frames, height, width, 3]."""
        return render(self.table.take(slice(start, stop)), self.height, self.width)

    def image_chunks(self, frames: int = 256) -> Iterator[np.ndarray]:
        """All frames in pieces of at most `frames`, so that a long video never lies in memory."""
        for start in range(0, self.frames, frames):
            yield self.images(start, start + frames)


def scene(
    seed: int,
    split: str = "test",
    frames: int = 256,
    task: str = "single",
    difficulty: str | Difficulty = "normal",
    size: tuple[int, int] = (56, 56),
) -> Scene:
    """Makes the scene of a seed.

    Args:
      seed: non-negative. The same seed, split, task, frame count and size give the same question in every difficulty.
      split: "train", "validation" or "test"; seeds of different splits share nothing.
      frames: length of the video, at least enough for the needles.
      task: "single" (one needle) or "pair" (two needles in different places, one question about both).
      difficulty: a name in `DIFFICULTIES` or a `Difficulty`.
      size: (height, width) in pixels, multiples of 28.

    Raises:
      UserError: a negative seed, an unknown name, a bad size, or too few frames.
    """
    difficulty = _checked(seed, split, frames, task, difficulty, size)
    sequence = np.random.SeedSequence([SPLITS[split], _PURPOSE_SCENE, seed, TASKS[task], frames])
    # Separate streams: the question of a seed stays the same when a setting changes how many draws the video takes.
    asking, placing, filling = (np.random.default_rng(child) for child in sequence.spawn(3))
    asked = ("colour", "shape")[asking.integers(2)]
    keys = asking.permutation(6)[: TASKS[task]]
    values = asking.integers(6, size=len(keys))
    segments = _segments(filling, frames, difficulty)
    spans = _needle_spans(placing, frames, difficulty.needle_frames, len(keys))
    segments, marks = insert_segments(segments, spans)
    table = _draw(filling, segments, marks, asked, keys, values, difficulty, size)
    key_names, value_names = [VALUES[OTHER[asked]][k] for k in keys], [VALUES[asked][v] for v in values]
    return Scene(
        seed=seed,
        split=split,
        task=task,
        difficulty=difficulty,
        height=size[0],
        width=size[1],
        table=table,
        needles=tuple(
            _needle(table, span, asked, k, v) for span, k, v in zip(spans, key_names, value_names, strict=True)
        ),
        question=choice_question(asking, asked, key_names, value_names),
        open_question=describe_question(asked, key_names[0], value_names[0])
        if task == "single"
        else open_question(asking, asked, key_names, value_names),
    )


def _checked(seed, split, frames, task, difficulty, size) -> Difficulty:
    if seed < 0:
        raise UserError(f"seed {seed}: must be at least 0")
    for name, value, known in (("split", split, SPLITS), ("task", task, TASKS)):
        if value not in known:
            raise UserError(f"{name} {value!r}: choose one of {', '.join(known)}")
    if isinstance(difficulty, str):
        if difficulty not in DIFFICULTIES:
            raise UserError(f"difficulty {difficulty!r}: choose one of {', '.join(DIFFICULTIES)}")
        difficulty = DIFFICULTIES[difficulty]
    if any(side < CELL or side % CELL for side in size) or max(size) == CELL:
        raise UserError(f"size {size}: both sides must be multiples of {CELL}, and at least two cells are needed")
    needed = TASKS[task] * (difficulty.needle_frames + 1)
    if frames < needed:
        raise UserError(f"frames {frames}: a {task} scene of this difficulty needs at least {needed}")
    return difficulty


def _segments(rng, frames, difficulty) -> np.ndarray:
    """Number of the segment of each frame, int [frames]."""
    low, high = difficulty.segment_frames
    lengths = rng.integers(low, high + 1, size=frames // low + 1)
    return np.repeat(np.arange(len(lengths)), lengths)[:frames]


def _needle_spans(rng, frames, length, count) -> list[tuple[int, int]]:
    """Disjoint spans at uniform places, at least one frame apart, in random order."""
    room = frames - count * length - (count - 1)
    starts = np.sort(rng.integers(room + 1, size=count)) + np.arange(count) * (length + 1)
    return [(int(starts[i]), int(starts[i]) + length) for i in rng.permutation(count)]


def insert_segments(segments: np.ndarray, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, list[int]]:
    """Gives each span a segment number of its own. Returns the new segments and the spans' numbers."""
    segments, first = segments.copy(), int(segments.max()) + 1
    for number, (start, stop) in enumerate(spans):
        segments[start:stop] = first + number
    return segments, list(range(first, first + len(spans)))


def _draw(rng, segments, marks, asked, keys, values, difficulty, size) -> FrameTable:
    """The table of a scene: distractors everywhere, needles in the marked segments."""
    count = int(segments.max()) + 1
    others = np.setdiff1d(np.arange(6), keys)
    pool = rng.permutation(others)[: difficulty.distractor_kinds]
    sprites = np.full((count, 2), NO_SHAPE), rng.integers(6, size=(count, 2))
    if len(pool):
        share = np.asarray([difficulty.sprite_share, difficulty.companion_share])
        here = rng.random((count, 2)) < share
        sprites[0][here] = pool[rng.integers(len(pool), size=(count, 2))][here]
    sprites[0][marks, 0], sprites[1][marks, 0] = keys, values
    return frame_table(rng, segments, sprites[0], sprites[1], asked, difficulty, size)


def frame_table(
    rng: np.random.Generator,
    segments: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    asked: str,
    difficulty: Difficulty,
    size: tuple[int, int],
) -> FrameTable:
    """Backgrounds, places and motion for segments whose sprites are given.

    Args:
      segments: int [F], the segment of each frame.
      keys, values: int [segments, N] indices of the key and value attribute of sprite n, key `NO_SHAPE` for none.
      asked: which attribute the values are ("colour": keys are shapes).
    """
    count, frames = len(keys), len(segments)
    shape, colour = (keys, values) if asked == "colour" else (values, keys)
    shape = np.where(keys == NO_SHAPE, NO_SHAPE, shape)
    direction = rng.normal(size=(count, 2))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    wave = direction * rng.uniform(0.3, 1.2, (count, 1)) * (2 * np.pi / 56)
    time = np.arange(frames)
    phase = rng.uniform(0, 2 * np.pi, count)[segments] + difficulty.motion * time
    swing = _SWAY * np.stack([np.sin(0.9 * phase), np.cos(0.9 * phase)], -1)
    centre = _centres(rng, count, keys.shape[1], size)[segments] + swing[:, None]
    return FrameTable(
        base=rng.uniform(0.05, 0.35, (count, 3)).astype(np.float32)[segments],
        amplitude=rng.uniform(-0.12, 0.12, (count, 3)).astype(np.float32)[segments],
        wave=wave.astype(np.float32)[segments],
        phase=np.mod(phase, 2 * np.pi).astype(np.float32),
        shape=shape.astype(np.int32)[segments],
        rgb=_RGB[colour][segments],
        centre=centre.astype(np.float32),
        radius=rng.uniform(*_RADIUS, keys.shape).astype(np.float32)[segments],
        opacity=np.full((frames, keys.shape[1]), difficulty.contrast, np.float32),
        noise=np.full(frames, difficulty.noise, np.float32),
        key=rng.integers(1 << 32, size=frames, dtype=np.uint32),
    )


def _centres(rng, count, sprites, size) -> np.ndarray:
    """Middle of each sprite before its sway, float [count, sprites, 2]; sprites of a segment are in different cells."""
    rows, cols = size[0] // CELL, size[1] // CELL
    first = rng.integers(rows * cols, size=count)
    step = rng.integers(1, rows * cols, size=count)
    cells = (first[:, None] + step[:, None] * np.arange(sprites)) % (rows * cols)
    middle = np.stack(np.divmod(cells, cols), -1) * CELL + CELL / 2
    return middle + rng.uniform(-_JITTER, _JITTER, middle.shape)


def _needle(table, span, asked, key, value) -> Needle:
    shape, colour = (key, value) if asked == "colour" else (value, key)
    centre, radius = table.centre[slice(*span), 0], table.radius[slice(*span), 0, None]
    boxes = np.concatenate([np.floor(centre - radius - 0.5), np.ceil(centre + radius + 0.5)], 1).astype(int)
    cell = tuple(int(c) for c in centre[0] // CELL)
    return Needle(shape, colour, *span, cell, boxes)
