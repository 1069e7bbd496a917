"""A video as the text decoder sees it: visual tokens per slot, encoded once and shared by every pass.

Design decisions:
- Whoever needs tokens of some slots asks for them (`VisualTokens.ensure`, `gather`); the encoder then reads on in its
  planned order until they are there, by whole calls of the vision tower. A scan that stops early leaves the rest of
  the video undecoded.
- Decoding and resizing run ahead in threads, by a bounded number of images. The vision tower is called in the thread
  that asks, one chunk ahead of the device: the order of computations on the devices, on which the hosts of a pod must
  agree, then does not depend on how fast files are read.
- On a mesh of several processes each decodes the slots that its own devices encode; the features are gathered on all.
- Every call of the vision tower has the same shape: it is compiled once, and the order does not change a bit. A video
  that is scanned fills whole calls however short it is, so that videos of other lengths do not compile it again.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from adapttoken_jax import sharding
from adapttoken_jax.feature_cache import Entry
from adapttoken_jax.geometry import round_up, time_ids, token_position_ids
from adapttoken_jax.loading import Model
from adapttoken_jax.passes import encode_slots
from adapttoken_jax.streaming import Part, one_pass
from adapttoken_jax.video import Clip, SlotPatches, normalised

# What one call of the vision tower takes at most on each device: bounds its memory. A GPU is so fast that the host can
# only just hand patches and features over in chunks as small as a TPU's: its products then wait now and again.
_PATCHES_PER_CHUNK = 16384
_PATCHES_PER_GPU_CHUNK = 32768
_SLOTS_PER_CHUNK = 64
_SLOTS_AT_ONCE = 2048  # on all devices together: what 4096 frames have, or a large slice would mostly encode padding
_GATHERED_BYTES = 2**30  # of features, on each device of several processes, which all read them

OnProgress = Callable[[str, int, int], None]  # stage, done, total


@dataclasses.dataclass(frozen=True)
class VisualTokens:
    """All visual tokens of a clip.

    Attributes:
      features: [T, M, D], in the model's type, M in raster order of the merged grid. Rows of slots that `ensure` has
        not been asked for may not have been computed yet.
      clip: where they come from.
      patches: float32[T h w, 1176] as fed to the vision tower, if they were kept.
      seconds: spent so far, see `SlotEncoder`.
      source: what encodes slots that are still missing; None if there are none.
    """

    features: np.ndarray
    clip: Clip
    patches: np.ndarray | None
    seconds: dict[str, float]
    source: "SlotEncoder | None" = None

    def ensure(self, slots: Sequence[int], soon: Sequence[int] = ()) -> None:
        """Decodes and encodes until the features of `slots` are there, and begins with those that are wanted `soon`.

        Raises:
          UserError: a file that ends early or is damaged.
        """
        if self.source is not None:
            self.source.encode(slots, soon)

    @property
    def encoded(self) -> int:
        """Slots that this run has encoded so far."""
        return len(self.features) if self.source is None else self.source.encoded

    @property
    def per_slot(self) -> int:
        """M, visual tokens per slot."""
        return self.features.shape[1]

    def coordinates(self, slots) -> np.ndarray:
        """(slot, row, column) of every token of `slots`, int64[len(slots) M, 3]."""
        row, col = np.divmod(np.arange(self.per_slot), self.clip.token_grid[1])
        slot = np.repeat(np.asarray(slots, np.int64), self.per_slot)
        return np.stack([slot, np.tile(row, len(slots)), np.tile(col, len(slots))], 1)

    def gather(self, coordinates: np.ndarray) -> np.ndarray:
        """Features [n, D] of tokens given by (slot, row, column), which are encoded first if need be."""
        slot, row, col = coordinates.T
        self.ensure(np.unique(slot))
        return self.features[slot, row * self.clip.token_grid[1] + col]

    def read_slots(self, slots: Sequence[int], out: np.ndarray) -> None:
        """Copies the features of whole slots, which are encoded already, to out[len(slots) M, D]."""
        # "clip" writes straight into `out`; to be ready to raise, NumPy would copy once more.
        np.take(self.features, slots, 0, out=out.reshape(len(slots), self.per_slot, -1), mode="clip")

    def position_ids(self, coordinates: np.ndarray, start: int, renumber: bool) -> np.ndarray:
        """M-RoPE ids int32[3, n] of tokens after a prefix of `start` tokens.

        With `renumber` the slots that occur count 0, 1, 2, … at one second each; else they keep their true times.
        """
        slot, row, col = coordinates.T
        seconds = self.clip.seconds_per_slot
        if renumber:
            slot, seconds = np.unique(slot, return_inverse=True)[1], 1.0
        times = time_ids(slot, seconds, self.clip.vision.tokens_per_second)
        return token_position_ids(start, times, row, col)


class SlotEncoder:
    """Decodes, resizes and encodes the slots of a clip as far as is asked for; use it as a context manager.

    Args:
      model: whose vision tower encodes.
      clip: from `plan_clip`.
      order: in which slots are read; every slot once.
      keep_patches: whether to keep what the vision tower was fed with.
      on_progress: called with ("encode", slots that are there, all slots).
      chunks: what somebody else reads, and comes first: pairs of slots, `chunk_slots` of them, and their patches.
      entry: features known from before, which are not computed again; what is new is added when the block ends well.
      scanned: whether the video has groups, as for `chunk_slots`.

    Attributes:
      features: [T, M, D], filled slot by slot.
      patches: [n, h w, 1176] of each chunk read so far, if they are kept.
      seconds: "decode", seconds that the reading threads were busy, summed over them (waiting, for `chunks`); "vision",
        seconds that the asking thread spent on the vision tower; "waiting", seconds that it spent in `encode`
        altogether, which includes waiting for decoded frames.
      encoded: slots encoded so far.
    """

    def __init__(
        self,
        model: Model,
        clip: Clip,
        order: Sequence[Part],
        keep_patches: bool = False,
        on_progress: OnProgress | None = None,
        chunks: Iterable | None = None,
        entry: Entry | None = None,
        scanned: bool = False,
    ):
        slots, height, width = clip.grid
        vision = model.config.vision
        self._model, self._clip, self._keep, self._on_progress = model, clip, keep_patches, on_progress
        # One size whatever the order: another one rounds differently in the last bit.
        self._size = chunk_slots(model, clip, scanned)
        self._two_at_once = 2 * self._size <= most_gathered(model, clip)
        self.features = np.empty((slots, height * width // vision.merge**2, vision.out_width), model.dtype)
        # What is kept or read by somebody else is whole on every process.
        whole = keep_patches or chunks is not None
        mesh = None if whole else model.mesh
        self._own = sharding.own_rows(mesh, self._size, sharding.slot_sharding)
        self._entry = entry
        self._there = entry.read(self.features) if entry else np.zeros(slots, bool)
        self._started = self._there.copy()
        self._on_device: tuple[np.ndarray, jax.Array] | None = None
        self.patches: list[np.ndarray] = []
        self.seconds = {"decode": 0.0, "vision": 0.0, "waiting": 0.0}
        self._reading = self._read(order)
        self._chunks = itertools.chain(_timed(chunks or (), self.seconds, "decode"), self._reading)
        self.encoded = 0

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self._reading.close()
        self._reading = self._chunks = iter(())  # from Python 3.12 on one that never began would keep this one alive
        if self._entry and self.encoded and error is None:
            self._entry.write(self.features, self._there)

    def encode(self, slots: Sequence[int], soon: Sequence[int] = ()) -> None:
        """Reads on until `slots` are encoded; what comes `soon` keeps the device busy while these are collected."""
        begin = time.perf_counter()
        # Where one call's features are as many as may lie on the devices, none wait there beside a group pass.
        wanted = np.concatenate([slots, soon if self._two_at_once else []]).astype(np.int64)
        while not self._there[slots].all():
            chunk = None if self._started[wanted].all() else next(self._chunks)
            before = time.perf_counter()
            self._hand_over(chunk)
            self.seconds["vision"] += time.perf_counter() - before
        self.seconds["waiting"] += time.perf_counter() - begin

    def _hand_over(self, chunk: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Starts a chunk, if there is one, and collects the one before: first, if not both may lie on the devices."""
        previous, self._on_device = self._on_device, None
        if previous and not self._two_at_once:
            self._collect(*previous)
        if chunk:
            self._on_device = self._start(*chunk)
        if previous and self._two_at_once:
            self._collect(*previous)

    def _read(self, order: Sequence[Part]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (slots, uint8 [n, h w, 1176] patches), no more than a call of the vision tower takes.

        The patches are those of the slots that this process's devices encode.
        """
        for part in order:
            slots, busy = part.slots[~self._started[part.slots]], self.seconds["decode"]
            chunks = [slots[start : start + self._size] for start in range(0, len(slots), self._size)]
            own = [chunk[self._own[self._rows(len(chunk))]] for chunk in chunks]
            with SlotPatches(self._clip, np.concatenate([slots[:0], *own]), part.ahead) as reader:
                for chunk, mine in zip(chunks, own, strict=True):
                    patches = reader.take_slots(len(mine))
                    self.seconds["decode"] = busy + reader.busy_s
                    yield chunk, patches

    def _rows(self, count: int) -> np.ndarray:
        """Where `count` slots stand in the shape that is compiled, int[count]: every device has its share of them."""
        devices = 1 if self._model.mesh is None else self._model.mesh.size
        device, place = np.divmod(np.arange(count), -(-count // devices))
        return device * (self._size // devices) + place

    def _start(self, slots: np.ndarray, patches: np.ndarray) -> tuple[np.ndarray, jax.Array]:
        """Hands a chunk to the device, padded to the one shape that is compiled."""
        _, height, width = self._clip.grid
        if self._keep:
            self.patches.append(patches)
        if len(patches) < self._size:
            rows = self._rows(len(slots))
            padded = np.zeros((self._size, *patches.shape[1:]), patches.dtype)
            padded[rows[self._own[rows]]] = patches
            patches = padded
        self._started[slots] = True
        model = self._model
        encoded = encode_slots(model.module.vision, _place(model, patches), height, width, model.vision_kernel)
        return slots, sharding.everywhere(encoded, model.mesh)

    def _collect(self, slots: np.ndarray, encoded: jax.Array) -> None:
        rows = self._rows(len(slots))
        for (places, *others), part in sharding.parts(encoded):
            first, end, _ = places.indices(self._size)
            here = (first <= rows) & (rows < end)
            filled = part if here.sum() == len(part) else part[rows[here] - first]
            self.features[(slots[here], *others)] = filled
        self._there[slots] = True
        self.encoded += len(slots)
        if self._on_progress:
            self._on_progress("encode", int(self._there.sum()), len(self._there))


@contextlib.contextmanager
def stream_video(
    model: Model,
    clip: Clip,
    order: Sequence[Part],
    on_progress: OnProgress | None = None,
    entry: Entry | None = None,
    scanned: bool = False,
    chunks: Iterable | None = None,
) -> Iterator[VisualTokens]:
    """Visual tokens that are encoded when they are asked for, decoded then or before; leaving the block ends that.

    The arguments are those of `SlotEncoder`.
    """
    with SlotEncoder(model, clip, order, False, on_progress, chunks, entry, scanned) as source:
        yield VisualTokens(source.features, clip, None, source.seconds, source)


def encode_video(
    model: Model,
    clip: Clip,
    keep_patches: bool = False,
    on_progress: OnProgress | None = None,
    chunks: Iterable | None = None,
    scanned: bool = False,
) -> VisualTokens:
    """Encodes every slot of a clip in one pass over the file; the arguments are those of `SlotEncoder`."""
    with SlotEncoder(model, clip, one_pass(clip), keep_patches, on_progress, chunks, scanned=scanned) as done:
        done.encode(np.arange(clip.grid[0]))
    patches = [normalised(each).reshape(-1, each.shape[-1]) for each in done.patches]
    return VisualTokens(done.features, clip, np.concatenate(patches) if keep_patches else None, done.seconds)


def chunk_slots(model: Model, clip: Clip, scanned: bool = False) -> int:
    """Slots of a clip per call of the vision tower, the same number on every device.

    Of a video that is not `scanned`, no more than it has; else its length makes no difference.
    """
    slots, height, width = clip.grid
    patches = _PATCHES_PER_GPU_CHUNK if jax.default_backend() == "gpu" else _PATCHES_PER_CHUNK
    devices = 1 if model.mesh is None else model.mesh.size
    at_once = min(_SLOTS_AT_ONCE, most_gathered(model, clip))
    most = max(1, min(_SLOTS_PER_CHUNK, patches // (height * width), at_once // devices))
    even = 1 << (most.bit_length() - 1)  # a power of two divides the usual groups
    return even * devices if scanned else min(even * devices, round_up(slots, devices))


def most_gathered(model: Model, clip: Clip) -> float:
    """Slots whose features may lie on every device at once, as they do where processes share a mesh."""
    # An abstract mesh has no processes.
    if model.mesh is None or isinstance(model.mesh, jax.sharding.AbstractMesh) or not model.mesh.is_multi_process:
        return math.inf
    _, height, width = clip.grid
    vision = model.config.vision
    return _GATHERED_BYTES // (height * width // vision.merge**2 * vision.out_width * model.dtype.itemsize)


def _place(model: Model, array: np.ndarray):
    return array if model.mesh is None else sharding.place(array, sharding.slot_sharding(model.mesh))


def _timed(iterator: Iterable, seconds: dict[str, float], stage: str) -> Iterator:
    """Yields from `iterator`, adding the time spent inside it to `seconds[stage]`."""
    iterator = iter(iterator)
    while True:
        begin = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            seconds[stage] += time.perf_counter() - begin
        yield item
