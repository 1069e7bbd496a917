"""`adapttoken plan`: reading the compiler's output, the shapes it is asked about, memory, seconds, choice of the mesh.

Only the last tests need libtpu, the TPU compiler. Everything before them is checked on what the CPU's compiler makes of
the same programs, on lines of HLO as libtpu writes them, and on plain arithmetic.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapttoken_jax import cli, parameters, passes, scan, sharding
from adapttoken_jax.config import SIZES, AdaptTokenConfig, ModelConfig, TextConfig, VisionConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.model.block import product
from adapttoken_jax.planning import compiler, estimate, hlo, programs
from adapttoken_jax.planning.chips import CHIPS, Topology
from adapttoken_jax.prompt import Prompt
from checkpoints_convert import huggingface
from experiments import plan_table

GIB = 2**30

# Windows of 4 x 4 tokens (8 x 8 patches); 4 heads in both towers.
TINY = ModelConfig(
    VisionConfig(layers=4, width=64, heads=4, ff=128, out_width=128, full_attention_layers=(1,)),
    TextConfig(layers=3, width=128, heads=4, kv_heads=2, head_dim=32, ff=192, vocab=512, mrope_sections=(4, 6, 6)),
)
SETTINGS = AdaptTokenConfig.for_model(TINY, slots_per_group=8, budget=128, reference_layer=1, max_answer_tokens=5)
# 16 prompt tokens before the visual ones: with them eight divides the rows of every pass, and none is padding.
WORK = programs.Work((32, 8, 16), 4, 128, prefix=16, question=64, questions=2, may_stop=False, config=SETTINGS)
PER_SLOT = 8 * 16 // 4
V5E = CHIPS["v5e"]


def program_cost(text, *args, **kwargs):
    return hlo.program_cost(text, V5E, *args, **kwargs)


def on_cpu():
    return programs.abstract_model(TINY, sharding.make_mesh(sharding.MeshShape(1, 1)), jnp.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Slices
# ---------------------------------------------------------------------------------------------------------------------


def test_every_slice_is_read_and_none_has_more_than_256_chips():
    chips = {
        text: Topology.parse(text).chips
        for chip in CHIPS.values()
        for text in (f"{chip.name}:{s}" for s in chip.slices)
    }
    assert chips["v5e:4x4"] == 16 and chips["v5p:2x2x4"] == 16 and chips["v4:4x8x8"] == 256
    assert max(chips.values()) == 256


@pytest.mark.parametrize(("name", "gigahertz"), [("v4", 1.05), ("v5e", 1.5), ("v5p", 1.75), ("v6e", 1.75)])
def test_peak_and_matrix_units_give_the_chips_clock(name, gigahertz):
    assert CHIPS[name].clock == pytest.approx(gigahertz * 1e9, rel=2e-3)  # peaks are published to three digits


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v7:2x2", ["v4:2x2x1|", "v5e:1x1|", "v5p:", "v6e:"]),
        ("v5e:3x3", ["choose one of", "v5e:2x4, v5e:4x4"]),
        ("v5p", ["2x2x4"]),
    ],
)
def test_an_unknown_slice_is_refused_with_those_that_exist(text, words):
    with pytest.raises(UserError) as error:
        Topology.parse(text)
    assert str(error.value).startswith(f"--topology={text}: ")
    assert all(word in str(error.value) for word in words)


# ---------------------------------------------------------------------------------------------------------------------
# HLO
# ---------------------------------------------------------------------------------------------------------------------


def test_shapes_tell_bytes_and_memory():
    text = "(f32[7,512]{1,0:T(8,128)S(1)}, /*index=1*/bf16[2,3]{1,0:T(8,128)(2,1)}, pred[], pred[8,2]{1,0}, s4[6])"
    first, second, third, *others = hlo.shapes(text)
    assert first == hlo.Shape((7, 512), 4 * 7 * 512, in_hbm=False)
    assert second == hlo.Shape((2, 3), 12, in_hbm=True)
    assert third == hlo.Shape((), 1, in_hbm=True)
    assert [each.bytes for each in others] == [16, 3]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups={{0,2},{1,3}}", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("channel_id=1", math.inf),
    ],
)
def test_group_sizes_of_collectives(text, size):
    assert hlo.group_size(text) == size


# What libtpu writes, shortened: a layer loop of three rounds whose body reduces over four chips and branches, a kernel
# with metadata over several lines, an asynchronous gather, and a loop in which no constant says when it ends.
PROGRAM = """
HloModule jit_f, is_scheduled=true

%body (p.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x.1 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %all-reduce.1 = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce(%x.1), channel_id=1, replica_groups=[2,4]<=[8]
  %cond.1 = bf16[8,128]{1,0} conditional(%i.1, %all-reduce.1, %x.1),
    branch_computations={%seldom, %often}, metadata={op_name="jit(f)/question/while/body/cond"}
  ROOT %t.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%i.1, %cond.1)
}

%seldom (a.1: bf16[8,128]) -> bf16[8,128] {
  %a.1 = bf16[8,128]{1,0} parameter(0)
  ROOT %n.1 = bf16[8,128]{1,0:S(1)} negate(%a.1), metadata={op_name="jit(f)/question/while/body/cond/neg"},
    backend_config={"window_config":{"estimated_cycles":"100"}}
}

%often (a.2: bf16[8,128]) -> bf16[8,128] {
  %a.2 = bf16[8,128]{1,0} parameter(0)
  ROOT %n.2 = bf16[8,128]{1,0:S(1)} negate(%a.2),
    backend_config={"window_config":{"estimated_cycles":"1000"}}
}

%condition (p.2: (s32[], bf16[8,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  %p.2 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.2, %bound), direction=LT
}

%open_condition (p.3: (s32[], bf16[8,128])) -> pred[] {
  %p.3 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %end = pred[]{:T(512)} custom-call(%p.3), custom_call_target="tpu_custom_call",
    frontend_attributes={kernel_metadata={
"xprof_metadata":"{1}"
}}, metadata={op_name="x"}
}

ENTRY %main (x.2: bf16[8,128]) -> bf16[32,128] {
  %x.2 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %t.2 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%zero, %x.2)
  %while.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%t.2),
    condition=%condition, body=%body, metadata={op_name="jit(f)/question/while"}
  %while.2 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%while.1),
    condition=%open_condition, body=%body, metadata={op_name="jit(f)/answer/while"}
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while.2), index=1
  %gather = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%y),
    channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %all-gather-done = bf16[32,128]{1,0} all-gather-done(%gather)
}
"""
X = 2 * 8 * 128  # bytes of the array


def test_loops_branches_and_collectives_count_as_often_as_they_run():
    cost = program_cost(PROGRAM, trips={"/answer/while": 2}, shares={"/question/": 0.25})
    assert cost.cycles == 5 * (0.75 * 100 + 0.25 * 1000)
    assert cost.collectives == {"all-reduce": (5, 5 * X), "all-gather": (1, 4 * X)}
    assert cost.sent == (5 * (2 * 3 / 4 * X) + 3 / 4 * (4 * X)) / 2, "half of it goes either way round"
    assert cost.by_scope == {"jit(f)/question/while/body/cond/neg": 5 * 0.75 * 100, "": 5 * 0.25 * 1000}
    assert cost.waits == pytest.approx(cost.sent / V5E.link * V5E.clock), "nothing is done meanwhile"


# A sum in parts on a sparse core, a gather that starts while it travels, and a sum of which a chip keeps its own part.
BESIDE = """
HloModule jit_f, is_scheduled=true

%offloaded (p.1: bf16[8,128]) -> bf16[2,128] {
  %p.1 = bf16[8,128]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = bf16[2,128]{1,0} reduce-scatter(%p.1), replica_groups={{0,1,2,3}}, dimensions={0}
}

%all-reduce-scatter (p.2: bf16[8,128]) -> bf16[2,128] {
  %p.2 = bf16[8,128]{1,0} parameter(0)
  %own = s32[] partition-id()
  %all-reduce.1 = bf16[8,128]{1,0} all-reduce(%p.2), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %cut = bf16[2,128]{1,0} dynamic-slice(%all-reduce.1, %own), dynamic_slice_sizes={2,128}
}

ENTRY %main (x: bf16[8,128]) -> bf16[2,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %sum-start = ((bf16[8,128]{1,0}), bf16[2,128]{1,0}) call-start(%x), async_execution_thread="sparsecore",
    to_apply=%offloaded
  %first = bf16[8,128]{1,0:S(1)} negate(%x), backend_config={"window_config":{"estimated_cycles":"10"}}
  %gather-start = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %sum-done = bf16[2,128]{1,0} call-done(%sum-start)
  %second = bf16[8,128]{1,0:S(1)} negate(%x), backend_config={"window_config":{"estimated_cycles":"80"}}
  %gather-done = bf16[32,128]{1,0} all-gather-done(%gather-start)
  ROOT %last = bf16[2,128]{1,0:S(1)} fusion(%second), kind=kCustom, calls=%all-reduce-scatter
}
"""


@pytest.mark.parametrize(
    ("trip", "waits"),
    [
        # Cycles for a quarter of the 8 rows one way round. A sum takes 3 of them and the gather 12, after it.
        (1, (0, 0, 3)),  # the sum arrives at 3, before 10; the gather starts at 10 and arrives at 22, before 90
        (8, (24 - 10, 24 + 96 - (24 + 80), 24)),
        (40, (120 - 10, 480 - 80, 120)),
    ],
)
def test_collectives_travel_while_something_is_done_and_one_after_the_other(trip, waits):
    chip = dataclasses.replace(V5E, link=X / 4 / 2 / trip * V5E.clock)
    cost = hlo.program_cost(BESIDE, chip)
    assert cost.cycles == 90
    assert cost.waits == pytest.approx(sum(waits))
    assert cost.collectives == {"reduce-scatter": (2, 2 * X / 4), "all-gather": (1, 4 * X)}
    assert cost.sent == pytest.approx((2 * 3 / 4 * X + 3 / 4 * 4 * X) / 2)


def test_a_collective_that_fusions_carry_on_counts_once_and_travels_meanwhile():
    """As libtpu writes it for v5e: every fusion between the first and the last names the gather again."""
    gather = (
        'all-gather(%x), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="1"}'
    )
    call = lambda name, inside: (
        f"""
%{name} (x: bf16[8,128]) -> bf16[32,128] {{
  %x = bf16[8,128]{{1,0:S(1)}} parameter(0)
  %g = bf16[32,128]{{1,0:S(1)}} {gather}
  ROOT %c = bf16[32,128]{{1,0:S(1)}} {inside}
}}
"""
    )
    custom = 'custom-call(%g), custom_call_target="AsyncCollective{}"'
    fusion = "bf16[32,128]{{1,0:S(1)}} fusion(%x), kind=kCustom, calls=%{}"
    cycles = 'backend_config={"window_config":{"estimated_cycles":"50"}}'
    steps = {"first": custom.format("Start"), "between": "negate(%g)", "last": custom.format("Done")}
    text = f"""{"".join(call(name, inside) for name, inside in steps.items())}
ENTRY %main (x: bf16[8,128]) -> bf16[32,128] {{
  %x = bf16[8,128]{{1,0:S(1)}} parameter(0)
  %a = {fusion.format("first")}
  %b = {fusion.format("between")}, {cycles}
  ROOT %d = {fusion.format("last")}
}}
"""
    sent = 3 / 4 * 4 * X / 2
    cost = hlo.program_cost(text, dataclasses.replace(V5E, link=sent / 70 * V5E.clock))
    assert (cost.sent, cost.collectives) == (sent, {"all-gather": (1, 4 * X)})
    assert (cost.cycles, cost.waits) == (50, pytest.approx(70 - 50))


def test_branches_of_unknown_share_count_half():
    assert program_cost(PROGRAM, trips={"/answer/while": 0}).cycles == 3 * (100 + 1000) / 2


def test_a_loop_without_a_bound_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"jit\(f\)/answer/while"):
        program_cost(PROGRAM)


def test_instructions_broken_over_lines_are_put_together():
    module, entry = hlo.parse(PROGRAM)
    before, main, after = PROGRAM.partition("ENTRY")
    assert entry == "main" and hlo.parse(main + after + before)[1] == "main"
    assert module["open_condition"]["end"].scope == "x"


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # x[T, D] . w[D, N, H] for seven heads, a product that libtpu turns into a convolution along the heads.
        (
            "%c = bf16[14095,7,128]{2,0,1} convolution(%x, %w), window={size=7 pad=6_6 rhs_reversal=1}, "
            "dim_labels=bf0_i0o->b0f",
            2 * 14095 * 7 * 128 * 3584,
        ),
        # mixed[T, N, H] . o[N, H, D], summed over heads.
        (
            "%c = bf16[14095,64,1]{1,0,2} convolution(%m, %o), window={size=7}, dim_labels=b0f_0io->bf0",
            2 * 14095 * 64 * 7 * 128,
        ),
        # A kernel of four steps over five, with three before the first and none after the last: 1, 2, 3, 4 and 4 meet.
        (
            "%c = f32[2,3,5]{2,1,0} convolution(%d, %e), window={size=4 pad=3_0}, dim_labels=bf0_io0->bf0",
            2 * 2 * 3 * 6 * (1 + 2 + 3 + 4 + 4),
        ),
        ("%c = f32[4,6]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 4 * 6 * 5),
    ],
)  # fmt: skip
def test_flops_of_one_product(line, flops):
    operands = {
        "x": "bf16[14095,3584,1]", "w": "bf16[3584,7,128]", "m": "bf16[14095,7,128]", "o": "bf16[7,128,64]",
        "a": "f32[4,5]", "b": "f32[5,6]", "d": "f32[2,6,5]", "e": "f32[6,3,4]",
    }  # fmt: skip
    text = "\n".join(f"  %{name} = {kind} parameter({i})" for i, (name, kind) in enumerate(operands.items()))
    module, _ = hlo.parse(f"ENTRY %main () -> () {{\n{text}\n  {line}\n}}")
    assert hlo.product_flops(module["main"]["c"], module["main"]) == flops


def test_kernels_of_which_the_compiler_knows_nothing_are_counted_by_their_shapes():
    """Splash attention of seven heads over 4096 causal rows, as libtpu writes the call; half of the pairs count."""
    text = """
ENTRY %main (a: bf16[7,4096,128]) -> bf16[7,4096,128] {
  %mask = s8[1,32,32]{2,1,0} constant({...})
  %blocks = s8[1,32,32]{2,1,0} constant({...})
  %q = bf16[7,4096,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[7,4096,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %v = bf16[7,4096,128]{2,1,0:T(8,128)(2,1)} parameter(2)
  %s = s32[4096,128]{1,0:T(8,128)S(1)} parameter(3)
  %splash = (f32[128,128]{1,0:T(8,128)S(1)}, bf16[7,4096,128]{2,1,0:T(8,128)(2,1)}) custom-call(%mask, %blocks, %q, %k,
    /*index=4*/%v, %s), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(f)/context/while/body/splash_mha_fwd/pallas_call"}
  ROOT %out = bf16[7,4096,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%splash), index=1
}
"""
    cost = program_cost(text, visited={"/context/": 0.5})
    assert cost.flops == 4 * 7 * 4096 * 4096 * 128 / 2
    assert cost.bytes == 4 * 7 * 4096 * 128 * 2 + 2 * 32 * 32  # q, k, v, the result; two masks
    assert cost.time == cost.kernels == pytest.approx(cost.flops / V5E.flops_per_cycle)
    assert program_cost(text).flops == 2 * cost.flops


def test_a_kernel_may_say_what_it_computes():
    """The vision tower's, as libtpu writes the call; the array it reads three parts of is read once."""
    text = """
ENTRY %main (x: bf16[16,960,3840]) -> bf16[16,960,1280] {
  %x = bf16[16,960,3840]{2,1,0:T(8,128)(2,1)} parameter(0)
  %c = f32[960,640]{1,0:T(8,128)S(1)} parameter(1)
  %h = f32[5,1,192]{2,1,0:T(1,128)S(1)} parameter(2)
  ROOT %windows = bf16[16,960,1280]{2,1,0:T(8,128)(2,1)} custom-call(%x, %x, %x, %c, %c, %h),
    custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv",
    "cost_estimate":{"flops":"5033164800","transcendentals":"15728640","bytes_accessed":"157286400"}}}
}
"""
    cost = program_cost(text)
    assert cost.flops == 4 * 16 * 960 * 64 * 1280
    assert cost.bytes == 16 * 960 * (3840 + 1280) * 2
    assert cost.time == cost.kernels == pytest.approx(cost.bytes / V5E.bandwidth * V5E.clock), "memory limits it"


def test_memory_traffic_counts_what_is_touched():
    """One layer cut out of stacked weights, one row written into a buffer: not the whole of either."""
    text = """
%inner (p0: f32[28,64,64], p1: s32[], p2: f32[100,64]) -> f32[100,64] {
  %p0 = f32[28,64,64]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[100,64]{1,0} parameter(2)
  %layer = f32[1,64,64]{2,1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,64,64}
  %row = f32[1,64]{1,0} reduce(%layer), dimensions={0}
  ROOT %new = f32[100,64]{1,0} dynamic-update-slice(%p2, %row, %p1)
}

ENTRY %main (w: f32[28,64,64], i: s32[], b: f32[100,64]) -> f32[100,64] {
  %w = f32[28,64,64]{2,1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %b = f32[100,64]{1,0} parameter(2)
  ROOT %f = f32[100,64]{1,0} fusion(%w, %i, %b), kind=kLoop, calls=%inner
}
"""
    assert program_cost(text).bytes == 4 * (64 * 64 + 64)
    alone = """
ENTRY %main (b: f32[100,64], row: f32[1,64], i: s32[]) -> f32[100,64] {
  %b = f32[100,64]{1,0} parameter(0)
  %row = f32[1,64]{1,0:S(1)} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  ROOT %new = f32[100,64]{1,0} dynamic-update-slice(%b, %row, %i)
}
"""
    assert program_cost(alone).bytes == 4 * 64


# ---------------------------------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------------------------------


def compiled_flops(program):
    # Whole, up to the rounding of the shares.
    return round(program_cost(program.lower().compile().as_text(), program.trips, program.shares).flops, 3)


def computed_pairs(context):
    """Pairs of a row and a key of a context over itself: blocks of 64 rows, in 16 parts, up to each part's end."""
    part = 64 * -(-context // (64 * 16))
    return sum(part * min(end, context) for end in range(part, context + part, part))


def masked_flops(context, suffix, answer, questions):
    """Attention that is computed and then masked, which `costs` leaves out: above the diagonal, and the unused tail."""
    c, steps, tail = TINY.text, answer - 1, suffix + answer - 1
    above = computed_pairs(context) - context * (context + 1) / 2
    unused = questions * (suffix * suffix - suffix * (suffix + 1) / 2)
    unused += questions * (steps * tail - steps * suffix - steps * (steps + 1) / 2)
    return 4 * ((c.layers - 1) * above + c.layers * unused) * c.heads * c.head_dim


def test_trip_counts_give_the_closed_form_of_the_group_pass():
    """Exactly: what is compiled are the model's products, the masked ones, and the relevance of one layer."""
    context = WORK.prefix + SETTINGS.slots_per_group * PER_SLOT
    relevance = 2 * 2 * 64 * context * TINY.text.heads * TINY.text.head_dim
    program = programs.group_pass(on_cpu(), WORK)
    assert compiled_flops(program) == program.flops + masked_flops(context, 64, 1, 2) + relevance


def test_trip_counts_give_the_closed_form_of_the_final_pass():
    program = programs.final_pass(on_cpu(), WORK)
    assert compiled_flops(program) == program.flops + masked_flops(WORK.prefix + 128, 64, 5, 1)


@pytest.mark.parametrize("mesh", ["data=4", "data=2,context=4"])
def test_places_of_a_context_share_the_products_of_an_answers_token(mesh):
    """All but attention over the context; XLA may split some over `data` as well."""

    def token(mesh):
        mesh = sharding.make_mesh(sharding.MeshShape.parse(mesh))
        program = programs.final_pass(programs.abstract_model(TINY, mesh, jnp.float32), WORK)
        text = program.lower().compile().as_text()
        none, one = (program_cost(text, dict.fromkeys(program.trips, count), program.shares) for count in (0, 1))
        return one.flops - none.flops

    assert token(mesh) < token("data=1") / 3


def test_both_kinds_of_layers_give_the_closed_form_of_the_vision_tower():
    program = programs.vision(on_cpu(), WORK)  # 8 x 16 patches: two whole windows, no padding
    assert compiled_flops(program) == program.flops


def test_runs_of_the_programs():
    """32 slots in one chunk of the vision tower; 4 groups, 3 at a time; a final pass per question."""
    model = dataclasses.replace(on_cpu(), mesh=sharding.MeshShape(3, 1).abstract)
    assert [(p.name, p.runs) for p in programs.programs(model, WORK)] == [("vision", 1), ("group", 2), ("final", 2)]
    direct = dataclasses.replace(WORK, groups=0)
    assert [p.name for p in programs.programs(model, direct)] == ["vision", "final"]


class Tokenizer:
    eos = (1, 2)


PROMPTS = [Prompt((1,) * 16, (1,) * length, (0, length), tuple("ABCD"), (5, 6, 7, 8)) for length in (40, 64)]


@pytest.mark.parametrize("waves", [None, 3])
def test_shapes_are_those_of_the_scan(waves):
    """`scan.prompt_batch` pads and places real arrays; the plan must ask the compiler about the same."""
    model = dataclasses.replace(on_cpu(), tokenizer=Tokenizer())
    video = types.SimpleNamespace(clip=types.SimpleNamespace(grid=WORK.grid, vision=TINY.vision))
    tokens = scan.ContextTokens(np.zeros((100, 128), np.float32), np.zeros((3, 100), np.int32))
    tokens = [tokens] * (waves or 1)
    real = scan.prompt_batch(model, video, tokens, PROMPTS, SETTINGS, size=8 * PER_SLOT, waves=waves)
    asked = programs.abstract_batch(model, 1, 8 * PER_SLOT, prefix=16, question=64, questions=2, waves=waves)
    for field in dataclasses.fields(passes.PromptBatch):
        one, other = getattr(real, field.name), getattr(asked, field.name)
        assert (one.shape, one.dtype, one.sharding) == (other.shape, other.dtype, other.sharding), field.name


def test_the_next_groups_wait_on_the_chip():
    """40 groups of 256 tokens, 16 in a chunk: features, which count, position ids, where suffix and answers begin."""
    many = dataclasses.replace(WORK, groups=40)
    waiting = 16 * (256 * (128 * 4 + 1) + 3 * (16 + 256) * 4 + 4 + 2 * 4)
    assert programs.group_pass(on_cpu(), many).next_chunk == waiting
    for none in (WORK, dataclasses.replace(many, may_stop=True)):  # one chunk; none is made ahead
        assert programs.group_pass(on_cpu(), none).next_chunk == 0


def test_the_released_models_are_planned_with_the_kernel_of_a_tpu():
    mesh = sharding.MeshShape(1, 4).abstract
    for config in SIZES.values():
        assert programs.tpu_kernel(programs.abstract_model(config, mesh)).name == "splash"
    assert programs.tpu_kernel(on_cpu()).name == "xla"  # float32


def weight_bytes(name: str, mesh) -> int:
    """Of both towers, on each chip."""
    model = programs.abstract_model(SIZES[name], mesh)
    return sum(programs.parameter_bytes(model, tower) for tower in ("vision", "text"))


def test_parameters_per_chip():
    mesh = sharding.MeshShape(1, 4).abstract
    both = weight_bytes("qwen2.5-vl-7b", mesh)
    # 8 292 166 656 bfloat16 parameters: a quarter of the decoder's, but for the few that the mesh does not split, and
    # all of the vision tower's, whose feed-forward blocks have 36 channels of padding.
    wider = 32 * 36 * (3 * 1280 + 2)
    assert both == pytest.approx((8_292_166_656 - 676_550_144) * 2 / 4 + (676_550_144 + wider) * 2, rel=2e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Memory, seconds, meshes
# ---------------------------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (16.77G) exceeds available HBM (15.75G). HLO module: jit_run_prompts.\nSee https://openxla.org/xla/..."
)


def test_the_compilers_error_says_what_is_needed():
    assert compiler.needed_bytes(OUT_OF_MEMORY) == round(16.77 * GIB)
    assert compiler.needed_bytes("INTERNAL: something else (16.77G)") == 0


def test_memory_and_seconds_of_one_program():
    program = programs.Program("group", None, {}, 3, 2, 197e12, "vision", {}, {}, {})
    cost = hlo.Cost(
        flops=98.5e12,
        cycles=V5E.clock,
        waits=V5E.clock / 10,
        bytes=819e9 / 4,
        sent=5e9,
        by_scope={"jit(f)/context/while/body/add": 1},
    )
    compiled = compiler.Compiled(peak=10 * GIB, arguments=4, temporaries=3, outputs=2, code=1, cost=cost)
    got = estimate.estimate_program(program, compiled, beside=6 * GIB, chip=V5E, chips=2)
    assert got.missing == 16 * GIB - V5E.hbm  # the parameters that the program does not use stay in memory
    assert got.seconds["collectives"] == pytest.approx(0.1)
    assert got.seconds["compiler"] == pytest.approx(1.1)
    assert (got.seconds["roofline"], got.limit) == (pytest.approx(0.5), "arithmetic")
    assert got.share_of_peak == pytest.approx(1 / 2 / 1.1)
    assert got.longest == {"context/add": 1}


@pytest.fixture
def without_libtpu(monkeypatch):
    """A compiler of plain arithmetic, on abstract meshes: every program needs 2 GiB and takes one second of a v6e."""
    compiled = compiler.Compiled(peak=2 * GIB, cost=hlo.Cost(cycles=CHIPS["v6e"].clock))
    monkeypatch.setattr(estimate, "compile_program", lambda program, chip: compiled)
    monkeypatch.setattr(estimate, "make_tpu_mesh", lambda _, shape: shape.abstract)
    monkeypatch.setattr(estimate, "versions", dict)


def test_meshes_are_those_that_divide_the_decoders_heads():
    def shapes(name, slice_, groups=32):
        _, work = estimate.workload(
            SIZES[name], AdaptTokenConfig.for_model(SIZES[name], max_frames=128 * groups), "adapttoken", (560, 308),
            None, 1, 160,
        )  # fmt: skip
        assert work.groups == groups
        return estimate._Planner(SIZES[name], Topology.parse(slice_), work, None).shapes()

    sizes = lambda name, slice_: [shape.model for shape in shapes(name, slice_) if not shape.fsdp]
    assert sizes("qwen2.5-vl-7b", "v5e:4x4") == [1, 2, 4]  # 28 heads
    assert sizes("qwen2.5-vl-32b", "v5e:4x4") == [1, 2, 4, 8]  # 40
    assert sizes("qwen2.5-vl-72b", "v5e:16x16") == [1, 2, 4, 8, 16, 32, 64]  # 64
    assert [str(shape) for shape in shapes("qwen2.5-vl-72b", "v5e:2x2")] == [
        "data=4,model=1", "fsdp=4,model=1", "data=2,model=2", "fsdp=2,model=2", "data=1,model=4"
    ]  # fmt: skip
    # More places than groups: each group has several.
    assert [str(shape) for shape in shapes("qwen2.5-vl-7b", "v5e:16x16") if not shape.fsdp] == [
        "data=32,context=8,model=1", "data=32,context=4,model=2", "data=32,context=2,model=4"
    ]  # fmt: skip
    assert str(shapes("qwen2.5-vl-7b", "v5e:2x4", groups=3)[0]) == "data=2,context=4,model=1"


# 2048 slots of 220 tokens: 32 groups, two at a time; 16 slots per chip at a time in the vision tower.
RUNS = {"vision": 8, "group": 16, "final": 1}


def test_the_best_mesh_is_the_fastest_that_fits(without_libtpu):
    """A second per program: more groups side by side are faster, and half of 32B is too large for a chip of v6e."""
    found = estimate.plan("qwen2.5-vl-32b", "v6e:2x4")
    assert found.mesh == "fsdp=8,model=1"
    assert found.tried == {
        "data=8,model=1": f"{missing('data=8,model=1'):.2f} GiB missing",
        "fsdp=8,model=1": "2.00 s in group",  # two groups on each chip
        "data=4,model=2": f"{missing('data=4,model=2'):.2f} GiB missing",
        "fsdp=4,model=2": "4.00 s in group",  # wider is slower
    }
    assert found.video == {"frames": 4096, "slots": 2048, "tokens_per_slot": 220, "groups": 32, "final_tokens": 7040}
    assert {program.name: (program.runs, program.groups) for program in found.programs} == {
        "vision": (16, 0), "group": (2, 16), "final": (1, 0)
    }  # fmt: skip
    assert found.seconds == pytest.approx({"group": 1 / 16, "video": 19, "question": 19, "roofline_question": 0})
    assert found.chip_hours(100) == pytest.approx(100 * 19 * 8 / 3600)
    assert {p.name: p.groups for p in estimate.plan("qwen2.5-vl-32b", "v6e:2x4", method="lite").programs}["group"] == 8


def missing(mesh: str) -> float:
    """GiB that 32B lacks on a mesh of v6e chips."""
    over = sharding.MeshShape.parse(mesh).abstract
    return (weight_bytes("qwen2.5-vl-32b", over) - CHIPS["v6e"].hbm) / GIB


def test_questions_share_a_scan(without_libtpu):
    found = estimate.plan("qwen2.5-vl-72b", "v6e:4x4", "data=2,model=8", questions=10)
    assert found.seconds["question"] == pytest.approx((8 + 16 + 10) / 10)


def test_what_does_not_fit_says_how_much_is_missing_and_what_helps(without_libtpu):
    found = estimate.plan("qwen2.5-vl-72b", "v6e:4x4", "data=4,model=4")
    mesh = sharding.MeshShape(4, 4).abstract
    weights = weight_bytes("qwen2.5-vl-72b", mesh)
    assert not found.fits and found.seconds == {}
    assert found.advice == (
        f"--mesh=data=4,model=4: the vision program needs {weights / GIB - 31.24:.2f} GiB more than the 31.24 GiB of a "
        "v6e chip; try --mesh=fsdp=4,model=4"
    )
    advice = lambda *place: estimate.plan(*place).advice.partition("; ")[2]
    assert advice("qwen2.5-vl-7b", "v5e:1x1", "data=1") == "lower --max_pixels or take a larger --topology"
    no_room = "the weights alone do not fit: take a larger --topology"
    assert advice("qwen2.5-vl-72b", "v5e:2x4", "data=1,model=8") == no_room


def test_the_command_writes_every_figure(without_libtpu, tmp_path, capsys):
    flags = ["--model=qwen2.5-vl-72b", "--topology=v6e:4x4", "--mesh=data=2,model=8"]
    assert cli.main(["plan", *flags, f"--json={tmp_path}/plan.json"]) == 0
    written, shown = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert written["fits"] and written["seconds"]["video"] == pytest.approx(25)
    assert {program["name"]: program["runs"] for program in written["programs"]} == RUNS
    assert "v6e:4x4, 16 chips, mesh data=2,model=8" in shown and "25 by the compiler" in shown
    assert cli.main(["plan", *flags, "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out) == written


def test_the_command_exits_with_1_where_nothing_fits(without_libtpu, capsys):
    assert cli.main(["plan", "--model=qwen2.5-vl-72b", "--topology=v5e:2x2"]) == 1
    said = capsys.readouterr()
    assert "fits" in said.out and "GiB more than the 15.75 GiB" in said.err.splitlines()[-1]


def test_the_table_keeps_what_was_compiled(without_libtpu, monkeypatch, tmp_path):
    found = [plan_table.planned("qwen2.5-vl-72b@v6e:4x4", 4096, tmp_path)]
    monkeypatch.setattr(estimate, "compile_program", None)  # the second time nothing is compiled
    found.append(plan_table.planned("qwen2.5-vl-72b@v6e:4x4", 4096, tmp_path))
    found.append(
        plan_table.planned("qwen2.5-vl-72b@v5e:2x4@data=1:model=8", 4096, tmp_path)
    )  # its weights are too large
    head, _, first, second, third = plan_table.table(found).splitlines()
    assert first == second and head.count("|") == first.count("|") == third.count("|")
    assert first.startswith("| qwen2.5-vl-72b | v6e:4x4 | fsdp=16,model=1 |") and "| 0.0312 | 10 |" in first
    assert "does not fit" in third


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=qwen9"], ["--model=qwen9", "qwen2.5-vl-7b"]),
        (["--topology=v9:2x2"], ["--topology=v9:2x2", "v6e:"]),
        (["--mesh=data=3,model=2"], ["--mesh=data=3,model=2: 6 places", "16 chips"]),
        (["--mesh=data=2,model=8"], ["model=8 does not divide the 28 attention heads"]),
        (["--video_size=big"], ["--video_size=big", "WIDTHxHEIGHT"]),
        (["--mesh=data=4,model=4"], ["pip install -e '.[tpu]'"]),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, flags, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    defaults = ["--model=qwen2.5-vl-7b", "--topology=v5e:4x4", "--mesh=data=4,model=4"]
    assert cli.main(["plan", *defaults, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


# ---------------------------------------------------------------------------------------------------------------------
# The real compiler
# ---------------------------------------------------------------------------------------------------------------------


NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)


@NEEDS_LIBTPU
@pytest.mark.parametrize("name", [f"{chip.name}:{shape}" for chip in CHIPS.values() for shape in chip.slices])
def test_every_mesh_has_its_place_on_every_slice(name):
    slice_ = Topology.parse(name)
    for model in (1, 2, 4, 8, 16):
        if slice_.chips % model == 0:
            mesh = compiler.make_tpu_mesh(slice_, sharding.MeshShape(slice_.chips // model, model))
            assert mesh.devices.shape == (slice_.chips // model, model)
            assert len(set(mesh.devices.flat)) == slice_.chips


@NEEDS_LIBTPU
def test_a_tiny_model_is_compiled_for_a_tpu(monkeypatch):
    monkeypatch.setitem(estimate.SIZES, "tiny", TINY)
    settings = {"max_frames": 64, "slots_per_group": 8, "budget": 128, "max_answer_tokens": 5}
    found = estimate.plan("tiny", "v5e:2x2", "data=2,model=2", settings=settings, video_size=(224, 112))
    assert found.fits and [program.name for program in found.programs] == ["vision", "group", "final"]
    for program in found.programs:
        assert 0 < program.memory["temporaries"] < program.memory["peak"] < GIB
        assert bool(program.collectives) == (program.name != "vision")  # every chip encodes slots of its own
        assert program.seconds["compiler"] > program.seconds["roofline"] > 0
    group = found.programs[1]
    # At least the text layers' two reductions each over `model`, of the context's and the question's rows together.
    assert group.collectives["all-reduce"]["times"] >= 2 * TINY.text.layers
    # The group pass compiles more than the model needs (masked attention), and not twice as much.
    assert 1 < group.flops * found.chips / group.model_flops < 2
    assert set(found.versions) == {"jax", "libtpu"}


@NEEDS_LIBTPU
@pytest.mark.parametrize(("name", "kernels"), [("v4:2x2x1", 1), ("v5e:1x1", 2), ("v5p:2x2x1", 2), ("v6e:1x1", 2)])
def test_the_vision_towers_kernel_compiles_for_every_chip(name, kernels):
    """Of the released width, a layer of each kind, the largest slot that the kernel takes; v4 has no room for it."""
    full, topology = SIZES["qwen2.5-vl-7b"], Topology.parse(name)
    vision = dataclasses.replace(full.vision, layers=2, full_attention_layers=(1,))
    work = dataclasses.replace(WORK, grid=(4, 32, 32))
    planner = estimate._Planner(dataclasses.replace(full, vision=vision), topology, work, lambda text: None)
    model = planner.model(sharding.MeshShape(topology.chips))
    program = programs.vision(model, work)
    text = program.lower().compile(compiler_options=dict(program.options)).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == kernels


def _four_layers(topology, name="qwen2.5-vl-7b"):
    """A planner of the model with four layers, and two groups of work."""
    full = SIZES[name]
    config = dataclasses.replace(full, text=dataclasses.replace(full.text, layers=4))
    settings = AdaptTokenConfig.for_model(config, max_frames=256, reference_layer=2)
    _, work = estimate.workload(config, settings, "adapttoken", (560, 308), None, 1, 160)
    return estimate._Planner(config, Topology.parse(topology), work, lambda text: None), work


@NEEDS_LIBTPU
@pytest.mark.parametrize(("slice_", "mesh"), [("v6e:2x2", "context=4"), ("v5p:4x8x8", "data=32,context=8")])
def test_pieces_of_a_group_pass_on_keys_and_values_alone(slice_, mesh):
    """Four layers of the 7B model, a group on four or eight chips."""
    planner, work = _four_layers(slice_)
    shape = sharding.MeshShape.parse(mesh)
    model = planner.model(shape)
    group = next(p for p in programs.programs(model, work) if p.name == "group")
    sent = planner.estimate(group, shape, model).collectives
    # 14 336 rows with padding, and 160 of the question; keys and values of 4 heads of 128, in bfloat16.
    least = 4 * 2 * (14336 + 160) * 4 * 128 * 2
    assert least <= sent["all-gather"]["bytes"] < 1.2 * least
    assert sum(each["bytes"] for kind, each in sent.items() if kind != "all-gather") < 0.01 * least


@NEEDS_LIBTPU
def test_a_group_pass_spends_its_time_in_products():
    """Four layers of the 7B model: 0.79 and 0.61 where a layer copies its queries to rotate, pad and scale them."""
    planner, work = _four_layers("v6e:1x1")
    group = programs.group_pass(planner.model(sharding.MeshShape()), work)
    cost = compiler.compile_program(group, planner.topology.chip).cost
    products = sum(cycles for scope, cycles in cost.by_scope.items() if scope.endswith("dot_general"))
    assert products > 0.85 * cost.cycles
    per_cycle = planner.topology.chip.flops_per_cycle
    assert cost.flops > per_cycle * (0.64 * cost.cycles + cost.kernels)


@NEEDS_LIBTPU
def test_places_that_split_layers_share_the_rows_between_products():
    """Four layers of the 7B model on four chips: 0.59 and 0.38 where each normalises and adds up all rows."""
    planner, work = _four_layers("v6e:2x2")
    group = programs.group_pass(planner.model(sharding.MeshShape(1, 4)), work)
    cost = compiler.compile_program(group, planner.topology.chip).cost
    products = sum(cycles for scope, cycles in cost.by_scope.items() if scope.endswith("dot_general"))
    assert products > 0.75 * cost.cycles
    per_cycle = planner.topology.chip.flops_per_cycle
    assert cost.flops > per_cycle * (0.5 * cost.cycles + cost.kernels)
    rows = 2 * 14336 * 3584  # bytes
    times, scattered = cost.collectives["reduce-scatter"]
    # In seven parts of 2048 rows; of the last layer only the question's rows are summed.
    assert (times, scattered) == (3 * 2 * 7, 3 * 2 * rows / 4)
    assert cost.waits < 0.5 * travelling(cost, planner), "one part travels while another is multiplied"
    assert cost.collectives["all-reduce"][1] < 0.2 * rows


@NEEDS_LIBTPU
def test_gathered_weights_travel_while_the_layer_computes_and_once():
    """Four layers of the 7B model, their weights on four chips."""
    planner, work = _four_layers("v6e:2x2")
    group = programs.group_pass(planner.model(sharding.MeshShape(4, fsdp=True)), work)
    cost = compiler.compile_program(group, planner.topology.chip).cost
    layers = 2 * sum(
        math.prod(p.shape) for p in parameters.parameters(planner.config) if p.path[:2] == ("text", "layers")
    )
    assert layers <= cost.collectives["all-gather"][1] < 1.1 * layers
    assert cost.waits < 0.5 * travelling(cost, planner)


@NEEDS_LIBTPU
def test_weights_are_gathered_within_the_loop_over_waves():
    """Four layers of the 7B model on v5e, which gathers by plain instructions: none of them is ahead of the loop."""
    planner, work = _four_layers("v5e:2x4")
    group = programs.group_pass(planner.model(sharding.MeshShape(8, fsdp=True)), work)
    module, entry = hlo.parse(group.lower().compile(compiler_options=dict(group.options)).as_text())
    gathers = {name for name, within in module.items() for it in within.values() if "all-gather" in it.opcode}
    assert gathers and entry not in gathers


@NEEDS_LIBTPU
def test_the_loop_over_waves_copies_no_stack_of_gate_kernels():
    """Four layers of the 72B model in two parts: [8192, 14784], which a TPU keeps as [14784, 8192]."""
    planner, work = _four_layers("v6e:2x2", "qwen2.5-vl-72b")
    group = programs.group_pass(planner.model(sharding.MeshShape(2, 2)), work)
    text = group.lower().compile(compiler_options=dict(group.options)).as_text()
    stacks = re.findall(r"= bf16\[4,(?:8192,14784|14784,8192)\]\S* (\S+)\(", text)
    assert "parameter" in stacks and "copy" not in stacks


@NEEDS_LIBTPU
def test_a_layer_is_loaded_into_its_place():
    """Four layers of the 7B model: copies of all their stacks would be several times as large as the new layer."""
    planner, _ = _four_layers("v6e:2x2")
    model = planner.model(sharding.MeshShape(1, 4))
    stacks = dict(parameters.leaves(planner.config, sharding.parameter_shardings(planner.config, model.mesh)))
    group = next(group for group in huggingface._groups(planner.config) if group[0].path[:2] == ("text", "layers"))
    shardings, dtypes = tuple(stacks[p] for p in group), (jnp.dtype(jnp.bfloat16),) * len(group)
    shape = lambda shape, where: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)
    memory = huggingface._set_layer.lower(
        [shape(p.shape, stacks[p]) for p in group],
        [shape(p.split, huggingface._staging_sharding(p, stacks[p])) for p in group],
        1, group=group, dtypes=dtypes, shardings=shardings,
    ).compile().memory_analysis()  # fmt: skip
    layer = memory.argument_size_in_bytes - memory.alias_size_in_bytes
    assert memory.temp_size_in_bytes < layer < memory.alias_size_in_bytes / 3


@NEEDS_LIBTPU
def test_an_answer_copies_no_stack_of_weights():
    """Four layers of the 7B model in eight parts: [3584, 2368] of a gate kernel, which a TPU keeps as [2368, 3584]."""
    planner, work = _four_layers("v5e:2x4")
    final = programs.final_pass(planner.model(sharding.MeshShape(8, fsdp=True)), work)
    text = final.lower().compile(compiler_options=dict(final.options)).as_text()
    stacks = re.findall(r"= bf16\[4,(?:3584,2368|2368,3584)\]\S* (\S+)\(", text)
    assert stacks.count("copy") <= 1, "that of the last products' kernel"
    assert "parameter" in stacks


def travelling(cost, planner):
    """Cycles that the links are busy."""
    return cost.sent / planner.topology.chip.link * planner.topology.chip.clock


@NEEDS_LIBTPU
def test_a_lone_row_takes_a_tpu_no_longer_than_eight():
    """A token of an answer, through a product of the 7B model."""
    spec = "...D,DF->...F"
    where = sharding.replicated(compiler.make_tpu_mesh(Topology.parse("v6e:1x1"), sharding.MeshShape()))

    def cycles(multiply, rows):
        shapes = [(1, 1, rows, 3584), (3584, 18944)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where) for shape in shapes]
        return program_cost(jax.jit(multiply).lower(*arrays).compile().as_text(), {}, {}).cycles

    eight = cycles(functools.partial(product, spec), 8)
    assert cycles(functools.partial(product, spec), 1) < 1.1 * eight
    assert cycles(functools.partial(jnp.einsum, spec), 1) > 2 * eight
