"""Training batches: short clips, what is kept of them, and questions whose labels follow from what is kept.

A clip stands for what the method puts before the model: a group of slots, far apart in time, or the final prompt, in
which single visual tokens from many moments follow each other. So half of the clips keep their grid, with slots or
tokens dropped from many of them, and in the other half the tokens are scattered: shuffled and set at new times. Times
run on in even steps, or with gaps of up to a thousand seconds.

Labels are beliefs: a needle that no kept token shows leaves the options that agree with the rest equally likely.

Axis letters: B clips, Q questions, T suffix and answer tokens, A positions that are read, C candidate words, V visual
tokens, S prefix and visual tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from adapttoken_jax import geometry, prompt
from adapttoken_jax.needle import questions
from adapttoken_jax.needle.questions import OTHER, VALUES, Question
from adapttoken_jax.needle.render import CELL, NO_SHAPE, FrameTable
from adapttoken_jax.needle.scenes import SPLITS, Difficulty, frame_table

_PURPOSE_CLIPS = 2  # scenes of videos draw with purpose 1: a clip never repeats a scene's stream
_SEGMENT_LENGTHS = (1, 2, 3, 4, 6, 8, 16)
_MAX_GAP_BITS = 11  # gaps of up to 2^11 ids, 1024 seconds at the model's 2 ids per second, between neighbours
_CANDIDATES = 6


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """What a batch is made of.

    slots: per clip. choice, open: questions per clip of either kind. pair_share: share of questions about two needles.
    seen_share: how often a question is about a needle that is seen, as far as there is one. reading_share: share of
    the multiple-choice questions that need no video. hints: weight of the hints and matches in the loss.
    grade: 0 only clear pictures full of sprites that are kept whole; 1 all that `DIFFICULTIES` and the method do to
    them. size: pixels.
    """

    slots: int = 8
    choice: int = 2
    open: int = 2
    pair_share: float = 0.5
    seen_share: float = 0.7
    reading_share: float = 0.05
    hints: float = 0.0
    grade: float = 1.0
    size: tuple[int, int] = (56, 56)

    @property
    def tokens_per_slot(self) -> int:
        """Merged visual tokens of one temporal slot."""
        return (self.size[0] // CELL) * (self.size[1] // CELL)


class Labels(NamedTuple):
    """What is learned at some positions.

    read: int32 [B, Q, A] position; targets: int32 [B, Q, A, C] candidate tokens; beliefs: float32 [B, Q, A, C], a
    distribution over them; weight: float32 [B, Q, A], 0 for padding.
    """

    read: Any
    targets: Any
    beliefs: Any
    weight: Any


class QuestionBlock(NamedTuple):
    """Questions of one kind, padded to one length.

    ids: int32 [B, Q, T] prompt suffix, then the answer without its end; position_ids: int32 [B, Q, 3, T];
    valid: bool [B, Q, T]. answer: the tokens that follow; value: bool [B, Q, A], True where one of them depends on what
    is seen. hints: what words of the prompt stand for, learned from an early layer: a key for its value, the words
    of an option for its letter. matches: which words of the options are right, learned one layer later: the option's
    letter for a right one, the end token for a wrong one. Answers need these facts first, and they are found far sooner
    with a push.
    """

    ids: Any
    position_ids: Any
    valid: Any
    answer: Labels
    value: Any
    hints: Labels
    matches: Labels


class Batch(NamedTuple):
    """table: `FrameTable` [B, F]; order: int32 [B, V] which visual token stands at each place; position_ids: int32
    [B, 3, S]; valid: bool [B, S]; blocks: a `QuestionBlock` each for "choice" and "open", where there are any."""

    table: FrameTable
    order: Any
    position_ids: Any
    valid: Any
    blocks: dict[str, QuestionBlock]


@dataclasses.dataclass(frozen=True)
class _Clip:
    """One clip. `shows` bool [V, 6]: token shows key. `fixed`: keys with one value all through, which can be asked."""

    asked: str
    table: FrameTable
    shows: np.ndarray
    values: np.ndarray
    fixed: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Remembering(prompt.ChatTokenizer):
    """A tokenizer that remembers what it encoded: most pieces of a prompt come again in every question."""

    known: dict[str, list[int]] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, tokenizer: prompt.ChatTokenizer) -> "_Remembering":
        return cls(**{field.name: getattr(tokenizer, field.name) for field in dataclasses.fields(tokenizer)})

    def encode(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = super().encode(text)
        return self.known[text]


class ClipMaker:
    """Makes batches. A batch depends on (split, seed, step) alone, so that a run can resume at any step."""

    def __init__(self, tokenizer: prompt.ChatTokenizer, seed: int, split: str = "train"):
        self.tokenizer, self.seed, self.split = _Remembering.of(tokenizer), seed, split
        self.prefix_ids = prompt.build_prompt(tokenizer, "?").prefix_ids
        self.end = tokenizer.eos[0]
        self.longest = {name: self._longest(name == "choice") for name in ("choice", "open")}

    def batch(self, step: int, clips: int, settings: ClipSettings) -> Batch:
        """The batch of a step: B = `clips`."""
        sequence = np.random.SeedSequence([SPLITS[self.split], _PURPOSE_CLIPS, self.seed, step])
        made = [self._one(np.random.default_rng(child), settings) for child in sequence.spawn(clips)]
        tables, orders, positions, valids, asked = zip(*made, strict=True)
        blocks = {
            name: self._block(rows, self.longest[name], settings.hints)
            for name, rows in zip(("choice", "open"), zip(*asked, strict=True), strict=True)
            if rows[0]
        }
        table = FrameTable(*(np.stack(field) for field in zip(*tables, strict=True)))
        return Batch(table, np.stack(orders), np.stack(positions), np.stack(valids), blocks)

    def _one(self, rng, settings):
        clip = _draw_clip(rng, settings)
        layout = draw_layout(rng, settings, len(self.prefix_ids))
        seen = clip.shows[layout.order[layout.kept]].any(0)
        kinds = (
            [self._row(*_ask(rng, clip, seen, settings, choice), layout) for _ in range(count)]
            for choice, count in ((True, settings.choice), (False, settings.open))
        )
        valid = np.concatenate([np.ones(len(self.prefix_ids), bool), layout.kept])
        return clip.table, layout.order, layout.position_ids, valid, tuple(kinds)

    def _row(self, question: Question, visible: Sequence[bool], layout: "Layout") -> "_Row":
        """Token ids, positions and labels of one question, unpadded."""
        built = prompt.build_prompt(self.tokenizer, question.text, question.options or None)
        if question.options:
            words = [(built.letter_ids, questions.option_distribution(question, visible), True)]
            answer = [built.letter_ids[question.correct]]
        else:
            words, answer = self._open_words(question, visible), self.tokenizer.encode(question.answer)
        words = [*words, ((self.end,), (1.0,), False)]
        suffix, stated = len(built.suffix_ids), self._stated(question, built, visible)
        return _Row(
            ids=[*built.suffix_ids, *answer],
            positions=layout.text_start + np.arange(suffix + len(answer)),
            labels=[(suffix - 1 + i, ids, belief) for i, (ids, belief, _) in enumerate(words)],
            value=[depends for _, _, depends in words],
            hints=self._key_hints(question, built, visible) + [(at, [letter], [1.0]) for at, letter, _ in stated],
            matches=[(at, [letter, self.end], [p, 1 - p]) for at, letter, p in stated],
        )

    def _open_words(self, question, visible):
        """(candidate ids, belief, depends on what is seen) per word of an open answer."""
        found = []
        beliefs = questions.word_distributions(question, visible)
        for place, (part, belief) in enumerate(zip(question.parts, beliefs, strict=True)):
            ids = [self.tokenizer.encode(" " * bool(place) + word)[0] for word in belief]
            found.append((ids, list(belief.values()), part.needle is not None))
        return found

    def _key_hints(self, question, built, visible) -> list[tuple]:
        """(position, candidate ids, belief) of the keys in the question."""
        word = lambda text: self.tokenizer.encode(" " + text)[0]
        values = [part for part in question.parts if part.needle is not None]
        start, stop = built.question_span
        found = []
        for key, part in zip(question.keys, values, strict=True):
            belief = {part.word: 1.0} if visible[part.needle] else dict.fromkeys(part.values, 1 / len(part.values))
            place = start + built.suffix_ids[start:stop].index(word(key))
            found.append((place, [word(w) for w in belief], list(belief.values())))
        return found

    def _stated(self, question, built, visible) -> list[tuple]:
        """(position, the option's letter, belief that it is right) of each value in the options."""
        words = {self.tokenizer.encode(" " + value)[0] for value in VALUES[question.asked]}
        after = built.question_span[1]
        places = [after + i for i, token in enumerate(built.suffix_ids[after:]) if token in words]
        said = [
            (letter, value, needle)
            for letter, belief in zip(built.letter_ids, question.beliefs, strict=bool(question.options))
            for needle, value in enumerate(belief)
        ]
        truth = question.beliefs[question.correct] if question.options else ()
        known = [{truth[n]} if visible[n] else {belief[n] for belief in question.beliefs} for n in range(len(truth))]
        return [
            (place, letter, (value in known[needle]) / len(known[needle]))
            for place, (letter, value, needle) in zip(places, said, strict=bool(question.options))
        ]

    def _longest(self, choice: bool) -> dict[str, int]:
        """Most tokens, labels and hints of any question: one shape for all batches."""
        layout = Layout(np.zeros(0, int), np.zeros(0, bool), np.zeros((3, 0), int), 0)
        rows = [self._row(question, (True,) * len(question.keys), layout) for question in questions.examples(choice)]
        return {name: max(len(getattr(row, name)) for row in rows) for name in ("ids", "labels", "hints", "matches")}

    def _block(self, clips: Sequence[list["_Row"]], longest: dict[str, int], hint_weight: float) -> QuestionBlock:
        """Pads [B][Q] rows to a `QuestionBlock`."""
        shape, length = (len(clips), len(clips[0])), longest["ids"]
        block = QuestionBlock(
            ids=np.zeros((*shape, length), np.int32),
            position_ids=np.zeros((*shape, 3, length), np.int32),
            valid=np.zeros((*shape, length), bool),
            answer=_empty_labels(shape, longest["labels"]),
            value=np.zeros((*shape, longest["labels"]), bool),
            hints=_empty_labels(shape, longest["hints"]),
            matches=_empty_labels(shape, longest["matches"]),
        )
        for place, row in (((b, q), row) for b, rows in enumerate(clips) for q, row in enumerate(rows)):
            block.ids[place][: len(row.ids)] = row.ids
            block.position_ids[place][:, : len(row.ids)] = row.positions
            block.valid[place][: len(row.ids)] = True
            block.value[place][: len(row.value)] = row.value
            _fill_labels(block.answer, place, row.labels, 1.0)
            _fill_labels(block.hints, place, row.hints, hint_weight)
            _fill_labels(block.matches, place, row.matches, hint_weight)
        return block


class _Row(NamedTuple):
    """One question. Labels, hints and matches are (position, candidate ids, belief)."""

    ids: list
    positions: np.ndarray
    labels: list
    value: list
    hints: list
    matches: list


def _empty_labels(shape, count) -> Labels:
    return Labels(
        read=np.zeros((*shape, count), np.int32),
        targets=np.zeros((*shape, count, _CANDIDATES), np.int32),
        beliefs=np.zeros((*shape, count, _CANDIDATES), np.float32),
        weight=np.zeros((*shape, count), np.float32),
    )


def _fill_labels(labels: Labels, place, entries, weight) -> None:
    for i, (position, candidates, belief) in enumerate(entries):
        labels.read[place][i] = position
        labels.targets[place][i, : len(candidates)] = candidates
        labels.beliefs[place][i, : len(belief)] = belief
        labels.weight[place][i] = weight


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def _draw_clip(rng, settings) -> _Clip:
    frames = 2 * settings.slots
    segments = _clip_segments(rng, frames)
    asked = ("colour", "shape")[rng.integers(2)]
    kinds, fixed_values = rng.permutation(6), rng.integers(6, size=6)
    pool, loose = kinds[: rng.integers(2, 7)], rng.permutation(6)[: rng.integers(4)]
    count = int(segments[-1]) + 1
    share = np.asarray([1 - settings.grade * rng.uniform(0.05, 0.5), rng.uniform(0, 1) * rng.integers(2)])
    keys = np.where(rng.random((count, 2)) < share, pool[rng.integers(len(pool), size=(count, 2))], NO_SHAPE)
    fixed = ~np.isin(np.arange(6), loose)
    values = np.where(fixed[keys], fixed_values[keys], rng.integers(6, size=keys.shape))
    table = frame_table(rng, segments, keys, values, asked, _draw_difficulty(rng, settings.grade), settings.size)
    return _Clip(asked, table, _shown_keys(keys[segments], table, settings), fixed_values, fixed)


def _clip_segments(rng, frames) -> np.ndarray:
    mean = _SEGMENT_LENGTHS[rng.integers(len(_SEGMENT_LENGTHS))]
    lengths = rng.integers(max(1, round(0.7 * mean)), round(1.3 * mean) + 1, size=frames + 1)
    start = rng.integers(lengths[0])  # the clip may begin in the middle of a segment
    segments = np.repeat(np.arange(len(lengths)), lengths)[start : start + frames]
    return segments - segments[0]


def _draw_difficulty(rng, grade: float) -> Difficulty:
    contrast = 1 - grade * 0.65 * rng.random() if rng.random() < 0.6 else 1.0
    noise = grade * 34 * rng.random() if rng.random() < 0.7 else 0.0
    return Difficulty(contrast=contrast, noise=noise, motion=rng.uniform(0.0, 0.5))


def _shown_keys(keys, table, settings) -> np.ndarray:
    """bool [V, 6]: which keys each visual token shows; keys is int [F, N]."""
    cell = (table.centre // CELL).astype(int)
    columns = settings.size[1] // CELL
    slot = np.arange(len(keys))[:, None] // 2
    token = slot * settings.tokens_per_slot + cell[..., 0] * columns + cell[..., 1]
    shows = np.zeros((settings.slots * settings.tokens_per_slot, 6), bool)
    shows[token[keys != NO_SHAPE], keys[keys != NO_SHAPE]] = True
    return shows


def _ask(rng, clip: _Clip, seen, settings: ClipSettings, choice: bool) -> tuple[Question, tuple[bool, ...]]:
    """A question about the clip and which of its needles are visible."""
    needles = 2 if rng.random() < settings.pair_share else 1
    keys = _draw_keys(rng, seen, clip.fixed, needles, settings.seen_share)
    names = [VALUES[OTHER[clip.asked]][k] for k in keys]
    values = [VALUES[clip.asked][clip.values[k]] for k in keys]
    visible = tuple(bool(seen[k]) for k in keys)
    if not choice:
        return questions.open_question(rng, clip.asked, names, values), visible
    options = int(rng.integers(2, len(questions.LETTERS) + 1))
    if rng.random() < settings.reading_share:
        return questions.reading_question(rng, clip.asked, values, options), (True,) * needles
    return questions.choice_question(rng, clip.asked, names, values, options), visible


def _draw_keys(rng, seen, fixed, needles, seen_share) -> list[int]:
    """Askable keys, seen and unseen ones in the given proportion as far as there are both."""
    chosen: list[int] = []
    for _ in range(needles):
        free = fixed.copy()
        free[chosen] = False
        wanted = free & (seen == (rng.random() < seen_share))
        choices = np.flatnonzero(wanted if wanted.any() else free)
        chosen.append(int(choices[rng.integers(len(choices))]))
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Places
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the visual tokens of a clip stand.

    order: int32 [V]; kept: bool [V], by place; position_ids: int32 [3, S] with the prefix; text_start: first id of the
    text after them.
    """

    order: np.ndarray
    kept: np.ndarray
    position_ids: np.ndarray
    text_start: int


def draw_layout(rng: np.random.Generator, settings: ClipSettings, prefix: int) -> Layout:
    """Draws a grid or scattered tokens, what is dropped, times, and the rule by which the text goes on."""
    per_slot, columns = settings.tokens_per_slot, settings.size[1] // CELL
    count = settings.slots * per_slot
    if rng.random() < 0.5:
        order, slot = np.arange(count), np.arange(count) // per_slot
        kept = _draw_kept(rng, settings.slots, per_slot, settings.grade)
    else:
        order, kept = rng.permutation(count), rng.random(count) < _keep_share(rng, settings.grade)
        slot = _scattered_slots(rng, order % per_slot)
    times = _draw_times(rng, int(slot[-1]) + 1)[slot]
    cell = order % per_slot
    visual = geometry.token_position_ids(prefix, times, cell // columns, cell % columns)
    before = np.broadcast_to(np.arange(prefix, dtype=np.int32), (3, prefix))
    rule = "hf5" if rng.random() < 0.2 else "legacy"
    side = max(settings.size) // 14
    start = geometry.text_start(rule, prefix, visual[:, kept], side, side, 2)
    return Layout(order.astype(np.int32), kept, np.concatenate([before, visual], 1), start)


def _keep_share(rng, grade: float) -> float:
    return rng.random() if rng.random() < 0.5 * grade else 1.0


def _draw_kept(rng, slots, per_slot, grade) -> np.ndarray:
    """Half of the time whole slots are dropped, otherwise tokens."""
    share = _keep_share(rng, grade)
    if rng.random() < 0.5:
        return np.repeat(rng.random(slots) < share, per_slot)
    return rng.random(slots * per_slot) < share


def _scattered_slots(rng, cell) -> np.ndarray:
    """Slot numbers for shuffled tokens: a new slot at random, and wherever the cells would not go up within one."""
    new = (np.diff(cell, prepend=-1) <= 0) | (rng.random(len(cell)) < rng.random())
    return np.cumsum(new) - new[0]


def _draw_times(rng, slots) -> np.ndarray:
    """Temporal ids of slots: compact (1 s apart), evenly spaced, or with gaps of any length."""
    kind = rng.random()
    if kind < 0.4:
        return 2 * np.arange(slots)
    size = 1 if kind < 0.6 else slots
    steps = np.broadcast_to(np.floor(2 ** rng.uniform(0, _MAX_GAP_BITS, size)).astype(int), slots)
    first = int(2 ** rng.uniform(0, _MAX_GAP_BITS)) if rng.random() < 0.5 else 0
    return first + np.cumsum(steps) - steps[0]
