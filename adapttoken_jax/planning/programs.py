"""The programs that answer a question, as `encoding`, `device_scan` and `scan` run them, in shapes without storage.

Nothing is computed and no weights are needed: every array is a `jax.ShapeDtypeStruct` with its place on the mesh.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adapttoken_jax import costs, parameters, sharding
from adapttoken_jax.config import AdaptTokenConfig, ModelConfig
from adapttoken_jax.device_scan import run_waves, side_by_side, waves_per_chunk
from adapttoken_jax.encoding import chunk_slots
from adapttoken_jax.loading import Model
from adapttoken_jax.model import Qwen25VL
from adapttoken_jax.model.kernels import Kernel, resolve, resolve_vision
from adapttoken_jax.passes import PassSpec, PromptBatch, encode_slots, run_prompts
from adapttoken_jax.scan import OPTION_STEP, context_size, question_rows, suffix_size
from adapttoken_jax.selection import StopRule
from adapttoken_jax.selection.compiled_stopping import device_rule, start_state

_END_IDS = (151645, 151643)  # any two tokens will do


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be answered.

    Attributes:
      grid: slots, and rows and columns of patches, of the sampled video.
      groups: groups of the scan; 0 where the video is answered directly.
      final_tokens: visual tokens of the final prompt.
      prefix, question: prompt tokens before and after the visual ones.
      questions: questions that one scan answers.
      may_stop: whether the scan may stop early.
      config: the method's settings, resolved.
    """

    grid: tuple[int, int, int]
    groups: int
    final_tokens: int
    prefix: int
    question: int
    questions: int
    may_stop: bool
    config: AdaptTokenConfig


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program and what it is for.

    Attributes:
      name: "vision", "group" or "final".
      lower: traces it.
      options: for the compiler.
      runs: how often it runs to answer all questions about the video.
      groups: that one run visits; 0 if it is not the group pass.
      flops: operations that the model needs for one run, on all chips together.
      absent: top level of the parameters that it does not use; they stay in memory beside it.
      next_chunk: bytes per chip of what the host puts there for the next one while it runs.
      trips, shares, visited: see `hlo.program_cost`.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    options: Mapping[str, str]
    runs: int
    groups: int
    flops: float
    absent: str
    next_chunk: int = 0
    trips: Mapping[str, float] = dataclasses.field(default_factory=dict)
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    visited: Mapping[str, float] = dataclasses.field(default_factory=dict)


def abstract_model(config: ModelConfig, mesh: Mesh, dtype=jnp.bfloat16) -> Model:
    """A `Model` whose parameters have shapes, types and places on the mesh, and no values; it has no tokenizer."""
    placed = lambda array, place: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
    values = jax.tree.map(placed, parameters.abstract(config, dtype), sharding.parameter_shardings(config, mesh))
    return Model(Qwen25VL(config, values), config, tokenizer=None, path="", mesh=mesh)


def parameter_bytes(model: Model, tower: str) -> int:
    """Bytes of one tower's parameters ("vision" or "text") on each chip, as the model holds them."""
    return _bytes_per_chip(getattr(model.module, tower))


def _bytes_per_chip(tree) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def programs(model: Model, work: Work) -> list[Program]:
    """Everything that runs on the chips to answer the questions; the group pass only where there are groups."""
    passes = [group_pass(model, work)] if work.groups else []
    return [vision(model, work), *passes, final_pass(model, work)]


def vision(model: Model, work: Work) -> Program:
    """`passes.encode_slots` on one chunk of the video."""
    slots, height, width = work.grid
    c = model.config.vision
    size = chunk_slots(model, work, scanned=bool(work.groups))  # of a clip it asks for the grid alone
    shape = (size, height * width, c.patch_features)
    patches = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding.slot_sharding(model.mesh))
    kernel = lambda: resolve_vision(model.dtype, c.head_dim, model.mesh, platform="tpu")  # of the chips, once lowered
    return Program(
        name="vision",
        lower=lambda: encode_slots.lower(model.module.vision, patches, height, width, kernel()),
        options=encode_slots.tpu_options,
        runs=-(-slots // size),
        groups=0,
        flops=costs.vision_flops(model.config, size, height, width),
        absent="text",
    )


def group_pass(model: Model, work: Work) -> Program:
    """`device_scan.run_waves` on one chunk of groups; as a run of it counts one wave."""
    tokens = work.config.slots_per_group * work.grid[1] * work.grid[2] // model.config.vision.merge**2
    wave = side_by_side(model, tokens, StopRule.of(work.config).stride if work.may_stop else 0)
    waves = 1 if work.may_stop else waves_per_chunk(model, wave * tokens)
    spec = PassSpec.answering(work.config, 1, _END_IDS, tpu_kernel(model)).of_groups(work.config)
    batch = abstract_batch(model, wave, tokens, work.prefix, work.question, question_rows(work.questions), waves)
    inputs = (batch, *_loop_inputs(model, batch), spec, work.config.bottom_fraction)
    runs = -(-work.groups // wave)
    ahead = _bytes_per_chip(batch.per_context) if runs > waves and not work.may_stop else 0
    return _prompts("group", run_waves, inputs, spec, model, work, work.questions, runs, ahead)


def _loop_inputs(model: Model, batch: PromptBatch):
    """What else `run_waves` is given: the real groups, the waves to run, the stop rule and its state."""
    rows = len(batch.suffix_ids)
    real, span = np.zeros(batch.visual.shape[:2], bool), np.zeros(2, np.int32)
    inputs = real, span, device_rule(None, [None] * rows), start_state(rows, OPTION_STEP)
    everywhere = sharding.replicated(model.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), inputs)


def final_pass(model: Model, work: Work) -> Program:
    """`passes.run_prompts` on the tokens that were selected, one question at a time."""
    tokens, config = context_size(work.final_tokens), work.config
    spec = PassSpec.answering(config, config.max_answer_tokens, _END_IDS, tpu_kernel(model)).final(config)
    batch = abstract_batch(model, 1, tokens, work.prefix, work.question, question_rows(1))
    return _prompts("final", run_prompts, (batch, spec), spec, model, work, 1, work.questions)


def tpu_kernel(model: Model) -> Kernel:
    """What computes attention on the TPUs that are planned for, which this machine need not have."""
    return resolve(model.dtype, model.config.text.head_dim, model.mesh, platform="tpu")


def _prompts(name, program, inputs, spec, model, work, questions, runs, next_chunk=0) -> Program:
    """What runs the decoder: `program` of it and of `inputs`, the first of which is a batch."""
    contexts, tokens = inputs[0].visual.shape[-3:-1]
    answered, context = spec.answer_tokens - 1, work.prefix + tokens  # the first token needs no further step
    pruned = costs.pruned(model.config, work.config, work.prefix, tokens) if spec.relevance else None
    in_loop = pruned.layer + 1 if pruned else model.config.text.layers - 1
    question = costs.question_flops(model.config, work.question, answered, context, pruned)
    return Program(
        name=name,
        lower=lambda: program.lower(model.module.text, *inputs),
        options=program.tpu_options,
        runs=runs,
        groups=contexts if spec.relevance else 0,
        flops=contexts * (costs.context_flops(model.config, context, pruned) + questions * question),
        absent="vision",
        next_chunk=next_chunk,
        trips={"/answer/while": answered, "jit(run_waves)/while": 1},  # of the waves of a chunk one
        shares={"/probe/": 1 / in_loop},  # of the layers that may be probed one is
        visited={"/context/": 0.5},  # causal
    )


def abstract_batch(
    model: Model, contexts: int, tokens: int, prefix: int, question: int, questions: int, waves: int | None = None
) -> PromptBatch:
    """The `PromptBatch` of so many contexts of `tokens` visual tokens, in shape and place as of `scan.prompt_batch`."""
    B, Q, T = contexts, questions, suffix_size(question)
    W = () if waves is None else (waves,)
    everywhere = sharding.replicated(model.mesh)
    over_data = sharding.batch_sharding(model.mesh, axis=len(W)) if contexts % model.wave == 0 else everywhere
    key = jax.eval_shape(lambda: jax.random.key(0))
    split = {
        "visual": ((*W, B, tokens, model.config.text.width), model.dtype),
        "visual_valid": ((*W, B, tokens), bool),
        "context_positions": ((*W, B, 3, prefix + tokens), np.int32),
        "suffix_start": ((*W, B), np.int32),
        "answer_start": ((*W, B, Q), np.int32),
    }
    shared = {
        "prefix_ids": ((prefix,), np.int32),
        "suffix_ids": ((Q, T), np.int32),
        "suffix_length": ((Q,), np.int32),
        "query_rows": ((Q, T), bool),
        "limit": ((Q,), np.int32),
        "option_ids": ((Q, OPTION_STEP), np.int32),
        "key": (key.shape, key.dtype),
    }
    place = lambda fields, where: {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, (shape, dtype) in fields.items()
    }
    return PromptBatch(**place(split, over_data), **place(shared, everywhere))
