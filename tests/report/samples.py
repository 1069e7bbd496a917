"""Entries for the report's tests: real clips and selections, and answers that are made up instead of computed."""

import dataclasses

import numpy as np

from adapttoken_jax.config import SIZES, AdaptTokenConfig
from adapttoken_jax.report import ReportEntry
from adapttoken_jax.result import (
    Cost,
    GroupResult,
    ModelSummary,
    Result,
    Seconds,
    Selection,
    Stop,
    VideoSummary,
)
from adapttoken_jax.selection import allocate_budget, group_slots, group_weights, top_tokens, visiting_order
from adapttoken_jax.video import Clip, Frames, plan_clip, probe

VISION = SIZES["qwen2.5-vl-7b"].vision


def film(frames: int, height: int = 112, width: int = 168, fps: float = 4.0) -> Frames:
    """A disc that wanders over a slowly changing sky, uint8 [frames, height, width, 3]."""
    row, col = np.mgrid[:height, :width]
    images = np.empty((frames, height, width, 3), np.uint8)
    for i in range(frames):
        turn = 2 * np.pi * i / max(frames, 1)
        sky = 90 + 60 * np.stack([np.sin(turn + 2 + row / height), np.sin(turn + col / width), np.cos(turn)
                                  + row / height], -1)  # fmt: skip
        disc = (row - height * (0.5 + 0.3 * np.sin(3 * turn))) ** 2 + (col - width * (0.5 + 0.35 * np.cos(turn))) ** 2
        sky[disc < (height / 6) ** 2] = (250, 214, 120)
        images[i] = np.clip(sky, 0, 255)
    return Frames(images, fps)


def clip_of(frames: Frames, max_frames: int = 10000) -> Clip:
    """All frames of a small film, each pair a slot."""
    height, width = frames.images.shape[1:3]
    return plan_clip(probe(frames), VISION, fps=frames.fps, max_frames=max_frames, max_pixels=height * width)


def config(**changes) -> AdaptTokenConfig:
    return AdaptTokenConfig(reference_layer=20, **changes)


def grouped(
    clip: Clip,
    settings: AdaptTokenConfig,
    *,
    options: tuple[str, ...] = (),
    needle_s: tuple[float, ...] = (),
    visited: int | None = None,
    method: str = "adapttoken",
    path: str | None = None,
    seed: int = 0,
) -> Result:
    """A result as the pipeline builds it; groups that hold a slot within 2 s of a needle are certain of option B."""
    rng, per_slot = np.random.default_rng(seed), clip.tokens // clip.grid[0]
    groups, times = group_slots(clip.grid[0], settings.slots_per_group), clip.slot_times
    order = visiting_order(len(groups), settings.group_order)[:visited]
    near = np.array([np.abs(np.subtract.outer(times, needle_s or (-99,))).min(1)])[0]
    seen = {int(g): (near[groups[g]] < 1).any() for g in order}
    entropy = {g: float(rng.uniform(0.01, 0.2) if found else rng.uniform(1.0, 1.38)) for g, found in seen.items()}
    relevance = np.full((len(groups), settings.slots_per_group * per_slot), np.nan, np.float32)
    for g in order:
        boost = (
            np.repeat(np.exp(-((near[groups[g]] / 1.5) ** 2)), per_slot)
            * blob(clip).ravel()[np.tile(np.arange(per_slot), len(groups[g]))]
        )
        relevance[g, : len(boost)] = rng.gamma(0.6, 0.002, len(boost)) + 0.05 * boost
    certainty = np.array([-entropy[int(g)] for g in order])
    capacity = np.array([len(groups[g]) * per_slot for g in order])
    budgets = allocate_budget(certainty, capacity, min(settings.budget, capacity.sum()), settings.temperature)
    weights = group_weights(certainty, settings.temperature)
    chosen = []
    for g, budget in zip(order, budgets, strict=True):
        flat = np.flatnonzero(top_tokens(relevance[g][None, : len(groups[g]) * per_slot], [budget])[0])
        chosen.append(np.stack([groups[g][flat // per_slot], *np.divmod(flat % per_slot, clip.grid[2] // 2)], 1))
    tokens = np.concatenate(chosen)
    tokens = tokens[np.lexsort(tokens.T[::-1])]
    place = {int(g): i for i, g in enumerate(order)}
    kept = {int(g): len(part) for g, part in zip(order, chosen, strict=True)}
    letters = "ABCDEFGH"[: len(options)]
    return _result(
        clip, settings, method, path, tokens, options,
        groups=[
            GroupResult(g, slots, times[slots], g in place, selected=kept.get(g, 0), **({} if g not in place else {
                "entropy": entropy[g], "certainty": -entropy[g],
                "answer": ("B" if seen[g] else letters[g % len(letters)]) if letters else "a red star",
                "option": ("B" if seen[g] else letters[g % len(letters)]) if letters else None,
                "weight": weights[place[g]], "budget": budgets[place[g]],
            })) for g, slots in enumerate(groups)
        ],
        stop=Stop(len(order) < len(groups), "certain groups agree" if len(order) < len(groups) else
                  "all groups visited", len(order), len(groups)),
        relevance=relevance,
    )  # fmt: skip


def direct(clip: Clip, settings: AdaptTokenConfig, *, options=(), method="uniform", path=None) -> Result:
    """A result of a clip that the model saw at once."""
    slots, rows, cols = clip.grid[0], clip.grid[1] // 2, clip.grid[2] // 2
    tokens = np.stack(np.meshgrid(np.arange(slots), np.arange(rows), np.arange(cols), indexing="ij"), -1)
    stop = Stop(False, f"answered directly from all {clip.tokens} tokens", 0, 0)
    return _result(clip, settings, method, path, tokens.reshape(-1, 3), options, groups=[], stop=stop)


def _result(clip, settings, method, path, tokens, options, **parts) -> Result:
    shares = {letter: 0.91 if letter == "B" else 0.09 / (len(options) - 1) for letter in "ABCDEFGH"[: len(options)]}
    video = VideoSummary(
        path, clip.info.duration_s, clip.info.source_fps, len(clip.frame_indices), clip.grid[0], clip.grid, clip.tokens
    )
    return Result(
        answer="B" if options else "a red star", option="B" if options else None, option_probabilities=shares or None,
        entropy=0.31, method=method, video=video,
        selected=Selection(len(tokens), len(tokens), *tokens.T),
        cost=Cost(Seconds(1.84, 6.1, 9.72, 0.41, 18.2), clip.tokens + len(tokens), 4.1e14),
        config=dataclasses.asdict(settings),
        model=ModelSummary("/models/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", "bfloat16", None),
        versions={"python": "3.11.2", "adapttoken-jax": "0.1.0", "jax": "0.10.2"},
        **parts,
    )  # fmt: skip


def blob(clip: Clip) -> np.ndarray:
    """float64 [rows, cols], high in the upper left."""
    row, col = np.mgrid[: clip.grid[1] // 2, : clip.grid[2] // 2]
    rows, cols = row.shape
    return np.exp(-(((row - rows * 0.4) / (rows * 0.25)) ** 2) - ((col - cols * 0.35) / (cols * 0.2)) ** 2)


def entry(result: Result, clip: Clip | None, question="Who opens the letter?", options=(), **known) -> ReportEntry:
    return ReportEntry(result, question, tuple(options), clip, **known)
