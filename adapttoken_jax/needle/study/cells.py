"""One cell of the study: many questions of one task on videos of one length, answered by any number of arms.

Letters: n questions, G groups.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

import adapttoken_jax
from adapttoken_jax import scan
from adapttoken_jax.config import METHODS, AdaptTokenConfig
from adapttoken_jax.encoding import VisualTokens
from adapttoken_jax.errors import UserError
from adapttoken_jax.loading import Model
from adapttoken_jax.needle.scenes import scene
from adapttoken_jax.needle.study import replay
from adapttoken_jax.needle.study.answers import Prompted, run_together
from adapttoken_jax.needle.study.scans import SCAN_FIELDS, Footage, Log, evidence, film, log_scans, uniform_tokens
from adapttoken_jax.selection import StopRule, option_consensus, pooled_evidence, visiting_order

_VIDEOS_AT_ONCE = 8
_VIDEOS_PER_SEED = 10**6


@dataclasses.dataclass(frozen=True)
class Cell:
    """Which questions: the first videos of a seed's own range in a split, `per_video` questions about each."""

    task: str
    frames: int
    questions: int
    seed: int = 0
    split: str = "test"
    difficulty: str = "normal"
    per_video: int = 4


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to answer.

    Attributes:
      method: `adapttoken`, `lite`, `flexselect` and `uniform` as in `config.METHODS`; `attention`: one pool of tokens,
        by relevance; `certain`: what the most certain group says alone; `consensus`, `pooled`: what the groups say
        together, without a final pass.
      contiguous: groups of consecutive slots.
    """

    method: str
    config: AdaptTokenConfig
    contiguous: bool = False

    @property
    def scan_key(self) -> tuple:
        """Arms with the same one can be replayed from the same scan."""
        hidden = self.config.similarity == "reference_layer"
        return (*(getattr(self.config, name) for name in SCAN_FIELDS), hidden, self.contiguous)

    @functools.cached_property
    def selection_key(self) -> tuple:
        """Arms with the same one select the same tokens from the same groups."""
        stopping = ("stop_", "give_up_", "group_order")
        fields = [f.name for f in dataclasses.fields(self.config) if not f.name.startswith(stopping)]
        return (self.method.replace("lite", "adapttoken"), *(getattr(self.config, name) for name in fields))


@dataclasses.dataclass(frozen=True)
class Answer:
    """right: the option is the true one. entropy: nats. visited: share of the groups. found: the final prompt shows
    every needle (None without a final prompt). option: index of the option."""

    right: bool
    entropy: float
    visited: float
    found: bool | None
    option: int


@dataclasses.dataclass(frozen=True)
class CellResult:
    """What a cell gave.

    Attributes:
      video: int64[n], which video each question is about.
      answers: arm -> n answers.
      entropy: float64[n, G] of each group's answer, nats; shown: int64[n, G], needles that the group shows; agrees:
        bool[n, G], the group's answer is right. All from the scan of the first arm.
      blind: float64[n], entropy of the answer to the question alone.
    """

    cell: Cell
    video: np.ndarray
    answers: dict[str, list[Answer]]
    entropy: np.ndarray
    shown: np.ndarray
    agrees: np.ndarray
    blind: np.ndarray

    def values(self, arm: str, field: str) -> np.ndarray:
        """One field of an arm's answers, [n]."""
        return np.asarray([getattr(each, field) for each in self.answers[arm]])


@dataclasses.dataclass(frozen=True)
class Case:
    """One question with the log of one scan.

    Attributes:
      blind: entropy of the answer to the question alone, nats.
      uniform: the video as the arm `uniform` sees it, if there is one.
      selected: what was selected before, by groups and settings: many stop rules ask the same.
    """

    footage: Footage
    log: Log
    blind: float
    uniform: VisualTokens | None
    selected: dict = dataclasses.field(default_factory=dict, repr=False)


@dataclasses.dataclass(frozen=True)
class Shot:
    """One question about video number `video`, with a `Case` per `Arm.scan_key`."""

    video: int
    cases: dict[tuple, Case]
    blind: float

    def without_frames(self) -> "Shot":
        """A light copy: no arm needs the pictures any more."""
        bare = lambda case: dataclasses.replace(case, footage=case.footage.without_frames())
        return dataclasses.replace(self, cases={key: bare(case) for key, case in self.cases.items()})


def count_videos(cell: Cell) -> int:
    """Videos that a cell's questions need."""
    return -(-cell.questions // cell.per_video)


def parts_of(cell: Cell) -> list[range]:
    """The numbers of a cell's videos, in parts that are held in memory together."""
    videos = count_videos(cell)
    return [range(start, min(start + _VIDEOS_AT_ONCE, videos)) for start in range(0, videos, _VIDEOS_AT_ONCE)]


def join_results(parts: Sequence[CellResult]) -> CellResult:
    """One result from the parts of a cell."""
    join = lambda name: np.concatenate([getattr(part, name) for part in parts])
    answers = {name: [each for part in parts for each in part.answers[name]] for name in parts[0].answers}
    return CellResult(parts[0].cell, join("video"), answers, *map(join, ("entropy", "shown", "agrees", "blind")))


def shoot(model: Model, cell: Cell, number: int, arms: Mapping[str, Arm], frames: bool = False) -> list[Shot]:
    """Renders, encodes and scans one video for all that the arms need: one `Shot` per question.

    `frames`: keep the pictures, which the arms do not need any more.
    """
    footage = film_video(model, cell, number, next(iter(arms.values())).config)
    shots = [Shot(number, *each) for each in _cases(model, footage, arms)]
    return shots if frames else [shot.without_frames() for shot in shots]


def answer_shots(model: Model, cell: Cell, shots: Sequence[Shot], arms: Mapping[str, Arm]) -> CellResult:
    """Answers questions by arms whose scans the shots hold."""
    done = run_together(
        model, [answer_by(model, shot.cases[arm.scan_key], arm) for shot in shots for arm in arms.values()]
    )
    first = [shot.cases[next(iter(arms.values())).scan_key] for shot in shots]
    return CellResult(
        cell=cell,
        video=np.asarray([shot.video for shot in shots]),
        answers={name: done[place :: len(arms)] for place, name in enumerate(arms)},
        entropy=np.stack([case.log.entropy for case in first]),
        shown=np.stack([evidence(case.footage.scene, case.log).sum(1) for case in first]),
        agrees=np.stack([case.log.options == case.footage.scene.question.correct for case in first]),
        blind=np.asarray([shot.blind for shot in shots]),
    )


def film_video(model: Model, cell: Cell, number: int, config: AdaptTokenConfig) -> list[Footage]:
    """Video `number` of a cell in as many variants as there are questions left for it.

    Raises:
      UserError: an odd number of frames, or so few that they are one group.
    """
    if cell.frames % 2:
        raise UserError(f"--frames={cell.frames}: give an even number, so that every frame is sampled")
    made = scene(cell.seed * _VIDEOS_PER_SEED + number, cell.split, cell.frames, cell.task, cell.difficulty)
    footage = film(model, made, min(cell.per_video, cell.questions - number * cell.per_video), config)
    if footage[0].tokens.clip.grid[0] <= config.slots_per_group:
        raise UserError(f"--frames={cell.frames}: all in one group; give more than {2 * config.slots_per_group}")
    return footage


def _cases(model: Model, footage: Sequence[Footage], arms: Mapping[str, Arm]) -> list[tuple[dict, float]]:
    """For each variant of a video: a `Case` per scan that the arms need, and the blind answer's entropy."""
    scans = {arm.scan_key: arm for arm in arms.values()}
    config = next(iter(arms.values())).config
    blind = scan.blind_replies(model, footage[0].tokens, [footage[0].prompt], config)[0].entropy
    logs = {key: log_scans(model, footage, arm.config, arm.contiguous) for key, arm in scans.items()}
    sampled = [arm.config for arm in arms.values() if arm.method == "uniform"]
    uniform = [uniform_tokens(model, each, sampled[0]) if sampled else None for each in footage]
    return [
        ({key: Case(each, logs[key][place], blind, uniform[place]) for key in scans}, blind)
        for place, each in enumerate(footage)
    ]


def answer_by(model: Model, case: Case, arm: Arm):
    """The generator (see `answers`) that answers a case by an arm and returns an `Answer`."""
    if arm.method in ("consensus", "pooled"):
        return _by_groups(case, arm)
    if arm.method == "certain":
        return _by_most_certain(case)
    if arm.method == "uniform":
        return _by_uniform(model, case, arm)
    if arm.method == "lite":
        return _by_lite(model, case, arm)
    return _by_selection(model, case, arm, np.arange(len(case.log.entropy)))


def _by_most_certain(case: Case):
    best = int(case.log.entropy.argmin())
    found = bool(evidence(case.footage.scene, case.log)[best].all())
    option = int(case.log.options[best])
    return Answer(option == case.footage.scene.question.correct, float(case.log.entropy[best]), 1.0, found, option)
    yield  # a generator, as the other arms


def _by_groups(case: Case, arm: Arm):
    said = case.log.option_probabilities(case.footage.prompt)
    if arm.method == "pooled":
        p = pooled_evidence(said)
    else:
        video, prompt = case.footage.tokens, case.footage.prompt
        p = option_consensus(said, replay.select(video, case.log, prompt, arm.config, "adapttoken").weights)
    option = int(p.argmax())
    entropy = float(-(p * np.log(np.maximum(p, 1e-300))).sum())
    return Answer(option == case.footage.scene.question.correct, entropy, 1.0, None, option)
    yield  # a generator, as the other arms


def _by_uniform(model: Model, case: Case, arm: Arm):
    video = case.uniform
    tokens = video.coordinates(np.arange(video.clip.grid[0]))
    reply = yield Prompted(video, case.footage.prompt, tokens, arm.config, renumber=False)
    frames = video.clip.frame_indices
    rows = [np.any((frames >= n.start) & (frames < n.stop)) for n in case.footage.scene.needles]
    return _answer(model, case, reply, 0.0, all(rows))


def _by_selection(model: Model, case: Case, arm: Arm, groups: np.ndarray):
    reply, tokens = yield from _ask(case, arm, groups)
    return _answer(model, case, reply, len(groups) / len(case.log.entropy), _shows_all(case, tokens))


def _by_lite(model: Model, case: Case, arm: Arm):
    """Visits groups in the arm's order until its stop rule fires, as `pipeline` does."""
    rule, log, config = StopRule.of(arm.config), case.log, arm.config
    order = visiting_order(len(log.entropy), config.group_order)
    for count in range(1, len(order) + 1):
        visited, asked = order[:count], None
        if rule.rule == "rerun" and count % rule.groups == 0:
            asked, tokens = yield from _ask(case, arm, np.sort(visited))
        rerun = (lambda: asked.entropy) if asked else _not_due  # noqa: B023 (called at once)
        if rule.reason(log.entropy[visited], log.options[visited].tolist(), blind=case.blind, rerun=rerun):
            break
    if asked is None:
        asked, tokens = yield from _ask(case, arm, np.sort(visited))
    return _answer(model, case, asked, count / len(order), _shows_all(case, tokens))


def _not_due() -> float:
    raise AssertionError("the stop rule asks again only where it is due")


def _ask(case: Case, arm: Arm, groups: np.ndarray):
    """Steps 8 to 11 over some groups: (reply, tokens)."""
    video, prompt = case.footage.tokens, case.footage.prompt
    key = groups.tobytes(), arm.selection_key
    if key not in case.selected:
        case.selected[key] = replay.select(video, case.log.take(groups), prompt, arm.config, arm.method).tokens
    tokens = case.selected[key]
    reply = yield Prompted(video, prompt, tokens, arm.config, arm.config.final_positions == "compact")
    return reply, tokens


def _shows_all(case: Case, tokens: np.ndarray) -> bool:
    return all(case.footage.scene.visible_in_cells(*tokens.T))


def _answer(model, case, reply: scan.Reply, visited: float, found: bool) -> Answer:
    prompt = case.footage.prompt
    option = prompt.letters.index(scan.read_answer(model, prompt, reply)[1])
    return Answer(option == case.footage.scene.question.correct, reply.entropy, visited, bool(found), option)


# ---------------------------------------------------------------------------------------------------------------------
# The replay held against the real thing
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Check:
    """Of `answers` compared: with the same option, with the very same tokens; largest difference of entropy, nats."""

    answers: int
    options: int
    tokens: int
    entropy: float

    @property
    def holds(self) -> bool:
        """The same answers from the same tokens, but for one set of tokens in a hundred, where scores nearly tie."""
        return self.options == self.answers and self.tokens >= 0.99 * self.answers - 1 and self.entropy < 1e-2


def check_replay(model: Model, cell: Cell, arms: Mapping[str, Arm]) -> Check:
    """Answers the questions about the first video by `adapttoken_jax.answer` too; arms that it has not are left out."""
    real = {n: arm for n, arm in arms.items() if arm.method in METHODS and not arm.contiguous}
    shots = shoot(model, cell, 0, real, frames=True)
    rows = [_compare(model, shot.cases[arm.scan_key], arm) for shot in shots for arm in real.values()]
    same, tokens, entropy = zip(*rows, strict=True)
    return Check(len(rows), sum(same), sum(tokens), max(entropy))


def _compare(model, case: Case, arm: Arm) -> tuple[bool, bool, float]:
    recorded = []

    def noting(generator):
        reply = None
        while True:
            try:
                prompted = generator.send(reply)
            except StopIteration as end:
                return end.value
            recorded.append(prompted.tokens)
            reply = yield prompted

    ours = run_together(model, [noting(answer_by(model, case, arm))])[0]
    asked, frames = case.footage.scene.question, case.footage.frames
    config = dataclasses.replace(arm.config, max_frames=len(frames.images))
    real = adapttoken_jax.answer(model, frames, asked.text, asked.options, config, arm.method)
    tokens = np.stack([real.selected.slots, real.selected.rows, real.selected.cols], 1)
    option = case.footage.prompt.letters.index(real.option)
    return ours.option == option, np.array_equal(tokens, recorded[-1]), abs(ours.entropy - real.entropy)
