"""Which frames are sampled and how large they become, by the rules of each preset.

Sources: `qwen-vl-utils` 0.0.14 for the preset of that name; the Qwen2-VL video processor of transformers 5.23 for `hf`;
FlexSelect's use of qwen-vl-utils for `flexselect`.
"""

import dataclasses
import math

import numpy as np

from adapttoken_jax.config import VisionConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.video.probe import VideoInfo

# Sizes in merged tokens: pixels are these times the area of one token.
_MIN_FRAME_TOKENS = 128
_MAX_FRAME_TOKENS = 768
_CONTEXT_TOKENS = 128000
_CONTEXT_SHARE = 0.9
_MIN_FRAMES = 4
_MAX_ASPECT_RATIO = 200


@dataclasses.dataclass(frozen=True)
class Preset:
    """One set of conventions.

    Attributes:
      sampling: `ends` (first and last frame included) or `left` (the start of n equal parts).
      resizer: `float32` or `pillow`, see `resize.RESIZERS`.
      context_cap: whether a frame's share of the context bounds its pixels.
      max_pixels: the preset's own bound per frame, pixels.
      seconds_per_slot: None where it follows from the sampling rate.
    """

    sampling: str = "ends"
    resizer: str = "float32"
    context_cap: bool = True
    max_pixels: float = math.inf
    seconds_per_slot: float | None = None


PRESETS: dict[str, Preset] = {
    "qwen-vl-utils": Preset(),
    "flexselect": Preset(max_pixels=308 * 560, seconds_per_slot=1.0),
    "hf": Preset(sampling="left", resizer="pillow", context_cap=False),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """The frames of a video that are shown to the model, and their size.

    Attributes:
      info: the video.
      frame_indices: int64 [N] indices into the video; a frame may repeat where the frame rate varies.
      frame_times: float64 [N] seconds.
      height, width: pixels after resizing, multiples of a merged token's side.
      grid: (T, h, w): slots, rows and columns of patches.
      seconds_per_slot: what the time ids of M-RoPE are computed from.
      preset: a key of `PRESETS`.
      vision: the sizes of patches, slots and merged tokens.
    """

    info: VideoInfo
    frame_indices: np.ndarray = dataclasses.field(repr=False)
    frame_times: np.ndarray = dataclasses.field(repr=False)
    height: int
    width: int
    grid: tuple[int, int, int]
    seconds_per_slot: float
    preset: str
    vision: VisionConfig = dataclasses.field(repr=False)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens (merged) in one slot."""
        return self.grid[1] // self.vision.merge, self.grid[2] // self.vision.merge

    @property
    def tokens_per_slot(self) -> int:
        """M, visual tokens of one slot."""
        return math.prod(self.token_grid)

    @property
    def tokens(self) -> int:
        """Visual tokens of the whole clip."""
        return self.grid[0] * self.tokens_per_slot

    @property
    def slot_frames(self) -> np.ndarray:
        """int64 [T, temporal_patch] indices into the video; the last frame repeats where a slot is not full."""
        position = np.arange(self.grid[0] * self.vision.temporal_patch)
        return self.frame_indices[np.minimum(position, len(self.frame_indices) - 1)].reshape(self.grid[0], -1)

    @property
    def slot_times(self) -> np.ndarray:
        """float64 [T] seconds: the time of each slot's first frame."""
        return self.frame_times[:: self.vision.temporal_patch]

    def positions(self, tokens: np.ndarray) -> np.ndarray:
        """(seconds, row, column) of tokens (slot, row, column), for step 10: float64 [n, 3].

        Seconds are rounded as in a trace, to float32: whoever computes step 10 again from one has the same ties.
        """
        seconds = self.slot_times.astype(np.float32)
        return np.column_stack([seconds[tokens[:, 0]], tokens[:, 1:]]).astype(np.float64)


def plan_clip(
    info: VideoInfo,
    vision_config: VisionConfig,
    *,
    preset: str = "qwen-vl-utils",
    fps: float = 4.0,
    max_frames: int = 4096,
    max_pixels: float = 308 * 560,
    context_frames: int | None = None,
) -> Clip:
    """Chooses frames and their size.

    Args:
      info: what `probe` found.
      vision_config: sizes of patches, slots and merged tokens.
      preset: a key of `PRESETS`.
      fps: frames sampled per second of video; more than the video has means all of them.
      max_frames: most frames sampled.
      max_pixels: most pixels per resized frame. Below the presets' minimum of 128 tokens, no frame is enlarged.
      context_frames: most frames that enter the model at once, None for all; they share the context's pixels.

    Raises:
      UserError: an unknown preset, or a video more than 200 times as long as wide or the reverse.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset={preset}: choose one of {', '.join(PRESETS)}")
    rules, factor = PRESETS[preset], vision_config.temporal_patch
    count = frame_count(info.total, info.source_fps, fps, max_frames, factor)
    sample = left_indices if rules.sampling == "left" else end_to_end_indices
    frames = frames_at(sample(info.total, count), info.times)
    shared = min(len(frames), context_frames or len(frames))
    low, high = pixel_bounds(rules, vision_config, shared, max_pixels)
    side = vision_config.pixels_per_token
    if max(info.height, info.width) > _MAX_ASPECT_RATIO * min(info.height, info.width):
        size = f"{info.width}x{info.height} pixels"
        raise UserError(f"{info.name}: {size}, an aspect ratio over {_MAX_ASPECT_RATIO}; crop the video")
    height, width = smart_resize(info.height, info.width, side, low, high)
    return Clip(
        info=info,
        frame_indices=frames,
        frame_times=info.times[frames],
        height=height,
        width=width,
        grid=(-(-len(frames) // factor), height // vision_config.patch, width // vision_config.patch),
        seconds_per_slot=rules.seconds_per_slot or factor / (len(frames) / info.total * info.source_fps),
        preset=preset,
        vision=vision_config,
    )


def frame_count(total: int, source_fps: float, fps: float, max_frames: int, factor: int = 2) -> int:
    """Frames to sample out of `total`: duration times `fps` within [4, max_frames] and `total`, down to whole slots.

    The rule of qwen-vl-utils and, with the same result, of transformers. Where it leaves no whole slot (a video of one
    frame, or max_frames 1) both raise an error; here one frame is sampled, which then fills the slot alone. A video of
    three frames gives two.
    """
    least, most = -(-_MIN_FRAMES // factor) * factor, max_frames // factor * factor
    wanted = min(max(total / source_fps * fps, least), most, total)
    return math.floor(wanted / factor) * factor or 1


def end_to_end_indices(total: int, count: int) -> np.ndarray:
    """int64 [count] frames from the first to the last, equal to `torch.linspace(0, total - 1, count).round()`.

    torch computes in float32, from both ends to the middle, with one rounding per value; float64 differs in one index
    of five hundred. A float64 product of two float32 numbers is exact, which gives the same single rounding.
    """
    if count == 1:
        return np.zeros(1, np.int64)
    last = total - 1
    step = np.float64(np.float32(last) / np.float32(count - 1))
    position = np.arange(count)
    values = np.where(position < count // 2, step * position, last - step * (count - 1 - position))
    return np.rint(values.astype(np.float32)).astype(np.int64)


def left_indices(total: int, count: int) -> np.ndarray:
    """int64 [count] first frames of `count` equal parts, equal to `torch.arange(0, total, total / count).int()`.

    torch fills a float32 range in pairs of vectors of 8, each vector rounded at its start and again at every value,
    and what is left over value by value. It sometimes adds a value equal to `total`, which is no frame and is left out.
    """
    step = total / count
    position = np.arange(count)
    vector, whole = position // 8 * 8, math.ceil(total / step) // 16 * 16
    start = (step * vector).astype(np.float32)
    values = np.where(position < whole, start + step * (position - vector), step * position)
    return values.astype(np.float32).astype(np.int64)


def frames_at(indices: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The frames nearest in time to where `indices` would lie if the frame rate were constant.

    At a constant rate these are `indices` themselves. At a varying one they are spread evenly over time, as the time
    ids assume; a frame that stays on screen for long is then taken more than once.
    """
    if len(times) == 1:
        return np.zeros_like(indices)
    target = times[0] + indices / (len(times) - 1) * (times[-1] - times[0])
    after = np.clip(np.searchsorted(times, target), 1, len(times) - 1)
    return np.where(target - times[after - 1] <= times[after] - target, after - 1, after)


def pixel_bounds(rules: Preset, vision: VisionConfig, frames: int, max_pixels: float) -> tuple[float, float]:
    """(fewest, most) pixels of a resized frame when `frames` of them share one context."""
    token = vision.pixels_per_token**2
    low, high = _MIN_FRAME_TOKENS * token, float(_MAX_FRAME_TOKENS * token)
    if rules.context_cap:
        share = _CONTEXT_TOKENS * token * _CONTEXT_SHARE / frames * vision.temporal_patch
        high = max(min(high, share), int(low * 1.05))
    high = min(high, max_pixels, rules.max_pixels)
    # The reference refuses a maximum under its minimum; a user who sets one wants small frames.
    return (low if low <= high else token), high


def smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """(height, width) as multiples of `factor`, near the aspect ratio and within the pixel bounds where that can be.

    Neither side falls below `factor`, so a very long strip may keep more than `max_pixels`.
    """
    rows, cols = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * cols > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    if rows * cols < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, cols


def slot_edges(times: np.ndarray, duration_s: float) -> np.ndarray:
    """Where slots begin and end: float64 [T + 1] seconds. A slot lasts up to the next one's first frame.

    The first begins with the video and the last ends with it, or lasts as long as the others where the video's length
    leaves it nothing; together they are never empty.

    Args:
      times: float64 [T] seconds, the time of each slot's first frame.
      duration_s: the video's length, seconds.
    """
    step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    end = duration_s if duration_s > times[-1] else times[-1] + max(step, 1e-3)
    return np.array([0.0, *times[1:], end])
