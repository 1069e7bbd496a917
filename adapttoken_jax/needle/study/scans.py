"""The log of a scan: what every group of a video said to a question, as arrays, ready to be replayed.

Letters: G groups, K slots per group, M tokens per slot, n = K M tokens per group, V vocabulary, D width.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from adapttoken_jax import scan
from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.encoding import VisualTokens, encode_video
from adapttoken_jax.loading import Model
from adapttoken_jax.needle.scenes import Scene
from adapttoken_jax.needle.study.videos import differing_frames, draw_frames, variant
from adapttoken_jax.passes import encode_slots
from adapttoken_jax.pipeline import plan_run
from adapttoken_jax.prompt import Prompt, build_prompt
from adapttoken_jax.run import option_probabilities
from adapttoken_jax.selection import group_slots
from adapttoken_jax.video import Frames, plan_clip, probe, read_patches

# Groups that go through one pass together: what a group says does not depend on its neighbours in the batch.
GROUPS_PER_PASS = 16
_SLOTS_PER_ENCODING = 16
FPS = 4.0

# Settings that a pass over the groups depends on; two configurations that share them share a log.
SCAN_FIELDS = (
    "reference_layer",
    "relevance_heads",
    "relevance_text",
    "relevance_queries",
    "keep_after_reference",
    "group_positions",
    "slots_per_group",
    "mrope",
)


@dataclasses.dataclass(frozen=True)
class Log:
    """All groups of one video, as one question saw them.

    Attributes:
      slots: int64[G, K], -1 where a group is shorter.
      relevance: float32[G, n], NaN there.
      logits: float32[G, V] before the answer's only token.
      entropy: float64[G], nats.
      options: int64[G], which option each group chose.
      hidden: [G, n, D] at the reference layer, if it was asked for.
    """

    slots: np.ndarray
    relevance: np.ndarray
    logits: np.ndarray
    entropy: np.ndarray
    options: np.ndarray
    hidden: np.ndarray | None

    def take(self, groups: np.ndarray) -> "Log":
        """The log of some groups only."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Log(**{name: None if value is None else value[groups] for name, value in fields.items()})

    def with_rows(self, groups: np.ndarray, other: "Log") -> "Log":
        """This log with the rows of `groups` replaced by those of `other`, which has these groups only."""
        replaced = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                value = value.copy()
                value[groups] = getattr(other, field.name)
            replaced[field.name] = value
        return Log(**replaced)

    def option_probabilities(self, prompt: Prompt) -> np.ndarray:
        """float64[G, options]."""
        of_options = self.logits[:, list(prompt.letter_ids)]
        return np.asarray([list(option_probabilities(prompt, row).values()) for row in of_options])


@dataclasses.dataclass(frozen=True)
class Footage:
    """One variant of a scene, rendered and encoded."""

    scene: Scene
    frames: Frames | None
    tokens: VisualTokens
    prompt: Prompt

    def without_frames(self) -> "Footage":
        """A light copy: the pictures are dropped, what was made of them stays."""
        clip = self.tokens.clip
        bare = dataclasses.replace(clip, info=dataclasses.replace(clip.info, frames=None))
        return dataclasses.replace(self, frames=None, tokens=dataclasses.replace(self.tokens, clip=bare))


def film(model: Model, scene: Scene, variants: int, config: AdaptTokenConfig) -> list[Footage]:
    """Renders and encodes a scene and its first `variants` - 1 variants; only what differs is done again."""
    images = draw_frames(scene, np.arange(scene.frames))
    tokens = encode_video(model, _clip(model, Frames(images, FPS), config))
    prompt = build_prompt(model.tokenizer, scene.question.text, scene.question.options)
    out = [Footage(scene, tokens.clip.info.frames, tokens, prompt)]
    for number in range(1, variants):
        changed = variant(scene, number)
        where = differing_frames(scene, changed)
        own = images.copy()
        own[where] = draw_frames(changed, where)
        clip = _clip(model, Frames(own, FPS), config)
        features = tokens.features.copy()
        slots = np.unique(where // 2)
        features[slots] = _encode(model, clip, slots)
        out.append(
            Footage(changed, clip.info.frames, dataclasses.replace(tokens, features=features, clip=clip), prompt)
        )
    return out


def _clip(model, frames, config):
    """Every frame of the video, whatever the configuration's largest number is."""
    return plan_clip(probe(frames), model.config.vision, preset=config.preset, fps=FPS, max_frames=len(frames.images),
                     max_pixels=config.max_pixels,
                     context_frames=config.slots_per_group * model.config.vision.temporal_patch)  # fmt: skip


def _encode(model, clip, slots) -> np.ndarray:
    height, width = clip.grid[1:]
    chunks = []
    for indices, patches in read_patches(clip, slots, _SLOTS_PER_ENCODING):
        padded = np.zeros((_SLOTS_PER_ENCODING, *patches.shape[1:]), patches.dtype)
        padded[: len(indices)] = patches
        chunks.append(np.asarray(encode_slots(model.module.vision, padded, height, width))[: len(indices)])
    return np.concatenate(chunks)


def uniform_tokens(model: Model, footage: Footage, config: AdaptTokenConfig) -> VisualTokens:
    """As many frames as the budget holds, sampled uniformly and encoded: the comparison arm `uniform`."""
    config = dataclasses.replace(config, max_frames=len(footage.frames.images))
    return encode_video(model, plan_run(model.config, footage.frames, config, "uniform").clip)


def log_scans(
    model: Model, footage: Sequence[Footage], config: AdaptTokenConfig, contiguous: bool = False
) -> list[Log]:
    """Visits every group of the first variant, and of the others the groups in which they differ from it.

    `contiguous`: groups are consecutive slots instead of interleaved ones.
    """
    first, rest = footage[0], footage[1:]
    count = first.tokens.clip.grid[0]
    groups = (
        contiguous_slots(count, config.slots_per_group) if contiguous else group_slots(count, config.slots_per_group)
    )
    group_of_slot = np.empty(count, np.int64)
    for g, slots in enumerate(groups):
        group_of_slot[slots] = g
    wanted = [(first, np.arange(len(groups)))]
    wanted += [(each, np.unique(group_of_slot[differing_frames(first.scene, each.scene) // 2])) for each in rest]
    log = ask_groups(model, [(each, groups[g]) for each, gs in wanted for g in gs], config)
    parts = np.split(np.arange(len(log.entropy)), np.cumsum([len(gs) for _, gs in wanted])[:-1])
    base = log.take(parts[0])
    return [base, *(base.with_rows(gs, log.take(part)) for (_, gs), part in zip(wanted[1:], parts[1:], strict=True))]


def contiguous_slots(num_slots: int, slots_per_group: int) -> list[np.ndarray]:
    """As many groups as `group_slots` makes, of the same sizes, each of consecutive slots."""
    sizes = [len(slots) for slots in group_slots(num_slots, slots_per_group)]
    return np.split(np.arange(num_slots), np.cumsum(sizes)[:-1])


def ask_groups(model: Model, visits: Sequence[tuple[Footage, np.ndarray]], config: AdaptTokenConfig) -> Log:
    """Asks the question of every (variant of one scene, slots) pair: the group pass of `scan.visit_groups`, batched."""
    footage = visits[0][0]
    spec = scan.group_spec(model, [footage.prompt], config)
    size = config.slots_per_group * footage.tokens.per_slot
    outs = []
    for start in range(0, len(visits), GROUPS_PER_PASS):
        wave = visits[start : start + GROUPS_PER_PASS]
        contexts = [scan.group_context(each.tokens, slots, each.prompt, config) for each, slots in wave]
        contexts += [contexts[-1]] * (GROUPS_PER_PASS - len(wave))
        batch = scan.prompt_batch(model, footage.tokens, contexts, [footage.prompt], config, size)
        out = scan.run_and_read(model, batch, spec)
        outs.append({name: value[: len(wave)] for name, value in out.items()})
    out = {name: np.concatenate([each[name] for each in outs]) for name in outs[0]}
    return _log(model, footage, [slots for _, slots in visits], out, config)


def _log(model, footage, groups, out, config) -> Log:
    K, per_slot = config.slots_per_group, footage.tokens.per_slot
    slots = np.stack([np.pad(each, (0, K - len(each)), constant_values=-1) for each in groups])
    tokens = np.repeat(slots >= 0, per_slot, axis=1)
    return Log(
        slots=slots,
        relevance=np.where(tokens, out["relevance"][:, 0], np.float32(np.nan)),
        logits=out["first_logits"][:, 0],
        entropy=out["entropy"][:, 0, 0].astype(np.float64),
        options=chosen_options(model, footage.prompt, out["option_logits"][:, 0], out["tokens"][:, 0, :1]),
        hidden=out.get("kept"),
    )


def chosen_options(model: Model, prompt: Prompt, option_logits: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Index of the option that each reply chose, int64[replies]; answers: int32[replies, A] token ids."""
    letters, known = {letter: i for i, letter in enumerate(prompt.letters)}, {}
    among = option_logits[:, : len(letters)].argmax(1)
    for ids, best in zip(map(tuple, answers.tolist()), among, strict=True):
        if (ids, best) not in known:
            said = scan.Reply(None, np.arange(len(letters)) == best, np.asarray(ids, np.int64), 0.0, 0.0)
            known[ids, best] = letters[scan.read_answer(model, prompt, said)[1]]
    return np.asarray([known[ids, best] for ids, best in zip(map(tuple, answers.tolist()), among, strict=True)])


def evidence(scene: Scene, log: Log) -> np.ndarray:
    """Which needles each group shows: bool[G, needles]."""
    return np.stack([np.isin(log.slots, needle.slots).any(1) for needle in scene.needles], 1)
