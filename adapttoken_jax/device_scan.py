"""The scan as one compiled loop: the groups of a chunk run without the host, and the loop ends itself early.

Design decisions:
- A chunk is a few waves of groups, padded to a fixed number of waves; its size follows from the model and the frame
  size. No shape depends on the video's length: after the first chunk nothing compiles again, and the device holds no
  more than two chunks of features.
- Groups of few tokens run several side by side on each device, where products of one alone would not fill it, and so
  do groups that weights are gathered for; in a scan that may stop early only such as nothing can stop between, or it
  would compute groups that it does not visit.
- The host puts the next chunk together while the device runs the current one. A scan that may stop early and whose
  slots are decoded on demand gets one wave per chunk, and none ahead: decoding what is not visited costs more.
- Stopping is decided on the device (`selection.compiled_stopping`). The host then applies the rule itself to what was
  visited, as `scan.visit_groups` does, so that both loops stop alike whatever the device could not see.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adapttoken_jax import sharding
from adapttoken_jax.compilation import compiled
from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.encoding import OnProgress, VisualTokens
from adapttoken_jax.loading import Model
from adapttoken_jax.model.text import TextDecoder
from adapttoken_jax.passes import GPU_OPTIONS, TPU_OPTIONS, PassSpec, PromptBatch, exact, prompts_pass
from adapttoken_jax.prompt import Prompt
from adapttoken_jax.scan import (
    ContextTokens,
    Scan,
    ScanLog,
    Stopping,
    filled_up,
    group_position_ids,
    group_spec,
    prompt_batch,
    question_rows,
    read_visits,
    to_read,
)
from adapttoken_jax.selection import group_certainty, visiting_order
from adapttoken_jax.selection.compiled_stopping import (
    DeviceRule,
    Stop,
    StopState,
    count_group,
    device_rule,
    start_state,
)

# Features of one chunk at most, and waves at most: enough to hide the host, little enough to hold two of them.
_CHUNK_BYTES = 2**28
_MOST_WAVES = 16
_ROWS = 256  # visual tokens that fill a device
_PER_GATHER = 2  # groups on each device where weights are gathered for them: that takes as long for one as for many


class LoopState(NamedTuple):
    """State of the compiled loop over the W waves of a chunk; a wave is w groups side by side.

    It ends when `wave` reaches the last one asked for, or when no question is still `Stop.GOING`.

    Attributes:
      wave: int32[], the next wave.
      stopping: what the stop rule remembers.
      said: what `prompts_pass` returned of every wave run, each array with a leading axis W; zeros elsewhere.
    """

    wave: jax.Array
    stopping: StopState
    said: dict[str, jax.Array]


class Chunk(NamedTuple):
    """Waves of groups on the device.

    Attributes:
      groups: the groups in visiting order.
      lengths: visual tokens of each.
      batch: their contexts; the fields `per_context` are [W, w, ...].
      real: bool[W, w], False for padding.
      waves: waves that are not padding alone.
    """

    groups: list[int]
    lengths: list[int]
    batch: PromptBatch
    real: np.ndarray
    waves: int


def visit_groups(
    model: Model,
    video: VisualTokens,
    prompts: list[Prompt],
    config: AdaptTokenConfig,
    stop: Stopping | None = None,
    time_is_up: Callable[[], bool] | None = None,
    on_progress: OnProgress | None = None,
    keep_logits: bool = False,
) -> list[Scan]:
    """Steps 3 to 7 as `scan.visit_groups`, same arguments and results; progress is reported per chunk.

    With `time_is_up` the loop returns after every wave, to ask.
    """
    log = ScanLog.start(video, prompts, config, stop)
    rows = filled_up(prompts)
    rule = device_rule(stop.rule if stop else None, filled_up(stop.blind) if stop else [None] * len(rows))
    stride = 1 if time_is_up else stop.rule.stride if stop else 0
    on_demand = stride > 0 and video.source is not None
    width = side_by_side(model, config.slots_per_group * video.per_slot, stride)
    state, chunks = None, _chunks(model, video, log.groups, rows, config, width, 1 if on_demand else None)
    chunk = next(chunks, None)
    while chunk is not None:
        state = state or start_state(*chunk.batch.option_ids.shape)._replace(stop=_ended(log))
        first, following = 0, None
        while first < chunk.waves and not log.done:
            last = chunk.waves if time_is_up is None else first + 1
            running = _run(model, chunk, rule, state, first, last, prompts, config, keep_logits)
            following = following or (None if on_demand else next(chunks, None))
            first, state = _collect(running, chunk, first, log, config)
            log.after_wave(time_is_up, on_progress)
        chunk = None if log.done else following or next(chunks, None)
    return log.scans()


def _run(model, chunk, rule, state, first, last, prompts, config, keep_logits) -> LoopState:
    """Starts the loop on the waves `first` <= wave < `last` of a chunk; returns before it has ended."""
    spec, span = group_spec(model, prompts, config), np.asarray([first, last], np.int32)
    loop = run_waves(model.module.text, chunk.batch, chunk.real, span, rule, state, spec, config.bottom_fraction)
    return sharding.everywhere(loop._replace(said=to_read(loop.said, keep_logits)), model.mesh)


def _collect(running: LoopState, chunk: Chunk, first: int, log: ScanLog, config) -> tuple[int, StopState]:
    """Waits for the loop and logs what it visited: the wave to go on with, and the state to go on from."""
    wave, stopping, said = jax.device_get(running)
    width = chunk.real.shape[1]
    for place in range(first * width, min(wave * width, len(chunk.groups))):
        own = {name: value[place // width] for name, value in said.items()}
        index, b = chunk.groups[place], place % width
        log.add(read_visits(own, b, index, log.groups[index], chunk.lengths[place], config))
    # A question that the device ended goes on if the host, which sees texts, does not agree.
    return int(wave), stopping._replace(stop=_ended(log))


def _ended(log: ScanLog) -> np.ndarray:
    """A `Stop` for every row, int32[Q]: of a question by its log; a row without one needs no group at all."""
    ended = np.full(question_rows(len(log.reasons)), Stop.ENDED, np.int32)
    ended[: len(log.reasons)] = [Stop.ENDED if reason else Stop.GOING for reason in log.reasons]
    return ended


@compiled(static=("spec", "bottom_fraction"), tpu_options=TPU_OPTIONS, gpu_options=GPU_OPTIONS)
@exact
def run_waves(
    text: TextDecoder,
    batch: PromptBatch,
    real,
    span,
    rule: DeviceRule,
    state: StopState,
    spec: PassSpec,
    bottom_fraction: float,
) -> LoopState:
    """The compiled loop over waves of a chunk, until every question has stopped.

    Args:
      text: the model's decoder.
      batch: as `Chunk.batch`.
      real: bool[W, w].
      span: int32[2], the first wave and the one to end before.
      rule, state: the stop rule, and what it remembers of earlier chunks.
      spec: what a group pass holds.
      bottom_fraction: share of an answer's least certain tokens that its entropy averages.
    """
    text = text.as_it_lies(spec.kernel)
    # Traced once, for the shapes of its results and for the loop.
    ask = jax.jit(lambda wave: prompts_pass(_in_loop(text, wave), _wave_of(batch, wave), spec), inline=True)

    def going(loop: LoopState):
        return (loop.wave < span[1]) & jnp.any(loop.stopping.stop == Stop.GOING)

    def advance(loop: LoopState) -> LoopState:
        out = ask(loop.wave)
        stopping = _count_wave(rule, loop.stopping, out, batch.option_ids, real[loop.wave], bottom_fraction)
        said = jax.tree.map(lambda buffer, value: buffer.at[loop.wave].set(value), loop.said, out)
        return LoopState(loop.wave + 1, stopping, said)

    shapes = jax.eval_shape(ask, jnp.int32(0))
    blank = jax.tree.map(lambda s: jnp.zeros((real.shape[0], *s.shape), s.dtype), shapes)
    return jax.lax.while_loop(going, advance, LoopState(span[0], jax.tree.map(jnp.asarray, state), blank))


def _in_loop(text: TextDecoder, wave) -> TextDecoder:
    """The decoder, with whose weights nothing is done before the loop gets to `wave`.

    A TPU's compiler would take what every wave does alike ahead of the loop, and hold it: the last layer's weights,
    gathered. That is 1.7 GiB per chip for the 72B model on `fsdp=16`.
    """
    wait = lambda text, wave: jax.lax.optimization_barrier((text, wave))[0]
    return jax.lax.platform_dependent(text, wave, tpu=wait, default=lambda text, wave: text)


def _wave_of(batch: PromptBatch, wave) -> PromptBatch:
    return dataclasses.replace(batch, **{name: value[wave] for name, value in batch.per_context.items()})


def _count_wave(rule, state, out, option_ids, real, bottom_fraction) -> StopState:
    """The stop state after the groups of a wave, one by one in visiting order."""
    entropy = -group_certainty(out["entropy"], out["counted"], bottom_fraction)  # [w, Q]
    option = _chosen_option(out, option_ids)
    step = lambda state, group: (count_group(rule, state, *group), None)
    return jax.lax.scan(step, state, (entropy, option, real))[0]


def _chosen_option(out, option_ids) -> jax.Array:
    """The likeliest letter of each answer, int32[w, Q]: a greedy one that begins with a letter has it; -1 if open."""
    likeliest = jnp.where(option_ids >= 0, out["option_logits"], -jnp.inf).argmax(-1)
    return jnp.where((option_ids >= 0).any(-1), likeliest, -1)


def _chunks(
    model, video: VisualTokens, groups, prompts, config, width: int, waves: int | None = None
) -> Iterator[Chunk]:
    """The groups in visiting order, so many waves of `width` at a time; None: as many as a chunk holds."""
    order = [int(g) for g in visiting_order(len(groups), config.group_order)]
    waves = waves or waves_per_chunk(model, width * config.slots_per_group * video.per_slot)
    step = waves * width
    for start in range(0, len(order), step):
        yield _chunk(model, video, groups, order[start : start + step], (waves, width), prompts, config)


def side_by_side(model: Model, size: int, stride: int = 0) -> int:
    """Groups of `size` visual tokens in a wave: as many on each place of the mesh's first axis as are worth it.

    Where a group is cut into pieces, a place has no other. Of a scan that may stop after every `stride` groups (0: it
    visits all) a wave ends there too.
    """
    if model.kernel.pieces(model.wave, size).count > 1:
        return model.wave
    least = _PER_GATHER if sharding.gathers(model.mesh) else 1
    between = stride // model.wave if stride % model.wave == 0 else 1
    return model.wave * max(n for n in range(1, max(least, _ROWS // size) + 1) if between % n == 0)


def waves_per_chunk(model: Model, size: int) -> int:
    """Waves that fit into a chunk, at least one; `size`: visual tokens of a wave."""
    wave_bytes = size * model.config.text.width * model.dtype.itemsize
    return max(1, min(_MOST_WAVES, _CHUNK_BYTES // wave_bytes))


def _chunk(model, video, groups, indices: list[int], shape: tuple[int, int], prompts, config) -> Chunk:
    waves, width = shape
    own = np.tile(sharding.own_rows(model.mesh, width, sharding.batch_sharding), waves)
    size = config.slots_per_group * video.per_slot
    # Features are copied once, to where the device takes them from; of other processes' groups there are zeros.
    visual = np.zeros((waves * width, size, video.features.shape[-1]), video.features.dtype)
    contexts = []
    soon = np.concatenate([groups[g] for g in indices])
    for mine, g, room in zip(own, indices, visual, strict=False):
        video.ensure(groups[g], soon)
        features = room[: len(groups[g]) * video.per_slot]
        if mine:
            video.read_slots(groups[g], features)
        contexts.append(ContextTokens(features, group_position_ids(video, groups[g], prompts[0], config)))
    lengths = [len(c.features) for c in contexts]
    contexts += [contexts[-1]] * (waves * width - len(contexts))
    batch = prompt_batch(model, video, contexts, prompts, config, size, waves=waves, visual=visual)
    if model.mesh is None:
        batch = jax.device_put(batch)  # now, while the device runs the chunk before
    real = (np.arange(waves * width) < len(indices)).reshape(shape)
    return Chunk(indices, lengths, batch, real, int(real[:, 0].sum()))
