"""What a compiled program costs on one chip, read from its optimised HLO text.

XLA's own `cost_analysis` counts the body of a loop once. Here every computation counts as often as it runs: the body of
a `while` by its trip count, which is the constant that a scan's counter is compared with, and a branch of a
`conditional` by the share of times that it is taken, which only the caller knows.

The text is in the order in which a chip runs it. A collective that it starts and ends apart travels while it does what
stands between; it waits for what is then still under way, and for all of any other collective. One travels at a time.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from adapttoken_jax.planning.chips import Chip

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$", re.DOTALL)
_SHAPE = re.compile(r"\b(pred|[suf]\d+\w*|bf16|c\d+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")

_CHANNEL = re.compile(r"\bchannel_id=(\d+)")

# Fusions may carry a collective on while they compute; the first of them starts it, and in the last it is done.
_FUSED_STEP = re.compile(r'custom_call_target="AsyncCollective(Start|Done)"')

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# They move nothing: names for what is there, or the end of what was counted when it began.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: sizes of its axes, bytes, and whether it lies in memory (HBM) or in the core's own buffers."""

    dims: tuple[int, ...]
    bytes: int
    in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `shapes` of its result (several for a tuple), its arguments and its attributes as text."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return _NAME.findall(self.arguments)

    @property
    def scope(self) -> str:
        """Where it comes from in the traced Python code: the path of named scopes and loops."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, key: str) -> str | None:
        """The computation that the attribute `key` names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one chip does.

    Attributes:
      flops: operations of matrix products and convolutions, two per multiply-add.
      cycles: the compiler's estimate, without collectives and kernels (Pallas), which it does not estimate.
      kernels: cycles of kernels at the chip's published rates.
      waits: cycles of nothing but waiting for links.
      bytes: read from and written to memory.
      sent: bytes that leave over the busiest ICI link, one direction. Rings of more than two chips turn both ways at
        once, each with half of the bytes, as the compiler's schedules of gathers, sums and scattered sums do.
      collectives: kind -> (times, bytes of the results).
      by_scope: scope -> cycles.
    """

    flops: float = 0.0
    cycles: float = 0.0
    kernels: float = 0.0
    waits: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0
    collectives: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    by_scope: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def time(self) -> float:
        """All cycles from beginning to end."""
        return self.cycles + self.kernels + self.waits

    def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
        """This and `times` the other."""
        both = {kind: np.zeros(2) for kind in (*self.collectives, *other.collectives)}
        scopes = dict.fromkeys((*self.by_scope, *other.by_scope), 0.0)
        for cost, factor in ((self, 1.0), (other, times)):
            for kind, pair in cost.collectives.items():
                both[kind] += factor * np.asarray(pair)
            for scope, cycles in cost.by_scope.items():
                scopes[scope] += factor * cycles
        sums = {name: getattr(self, name) + times * getattr(other, name) for name in _SUMS}
        return Cost(
            **sums,
            collectives={kind: tuple(pair.tolist()) for kind, pair in both.items() if pair.any()},
            by_scope=scopes,
        )


_SUMS = ("flops", "cycles", "kernels", "waits", "bytes", "sent")


def program_cost(
    text: str,
    chip: Chip,
    trips: Mapping[str, float] | None = None,
    shares: Mapping[str, float] | None = None,
    visited: Mapping[str, float] | None = None,
) -> Cost:
    """The `Cost` of one run of a compiled program.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      chip: that it was compiled for.
      trips: last part of a loop's scope -> how often its body runs, where no constant of the program says so.
      shares: part of a conditional's scope -> share of the times that its second branch (true) is taken; else a half.
      visited: part of an attention kernel's scope -> share of the pairs of a row and a key that it computes; else all.

    Raises:
      ValueError: a loop whose trip count is neither in the program nor given.
    """
    module, entry = parse(text)
    return _Walk(module, chip, trips or {}, shares or {}, visited or {}).computation(entry)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """HLO text -> computations by name, and the name of the one that is run."""
    module, entry, current = {}, "", {}
    for line in _logical_lines(text):
        if header := _HEADER.match(line):
            current = module.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    return module, entry


def _logical_lines(text: str) -> Iterator[str]:
    """Lines; an instruction that its attributes break over several (the metadata of a kernel) is put together."""
    pending = ""
    for line in text.splitlines():
        if _INSTRUCTION.match(line) or _HEADER.match(line) or line == "}":
            yield pending
            pending = line
        else:
            pending += f" {line}"
    yield pending


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    kind = text[: _balanced(text)] if text.startswith("(") else text.partition(" ")[0]
    opcode, _, rest = text[len(kind) :].strip().partition("(")
    end = _balanced(f"({rest}") - 1
    return Instruction(name, opcode, shapes(kind), rest[: end - 1], rest[end:], is_root)


def _balanced(text: str) -> int:
    """Length of the parenthesised group that `text` starts with."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"no end to the parenthesis in {text[:80]!r}")


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type: "(f32[8,2]{1,0:S(1)}, s32[])" are two, the first of them in a buffer of the core."""
    return tuple(_shape(*found) for found in _SHAPE.findall(text))


def _shape(kind: str, dims: str, layout: str) -> Shape:
    sizes = tuple(int(size) for size in dims.split(",") if size)
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
    return Shape(sizes, math.prod(sizes) * bits // 8, "S(" not in layout)  # the space that is not written is HBM


# ---------------------------------------------------------------------------------------------------------------------
# Adding up
# ---------------------------------------------------------------------------------------------------------------------


class _Walk:
    """Adds up the instructions of a module."""

    def __init__(self, module: Mapping[str, Computation], chip: Chip, trips, shares, visited):
        self.module, self.chip, self._known = module, chip, {}
        self.trips, self.shares, self.visited = trips, shares, visited

    def computation(self, name: str) -> Cost:
        if name not in self._known:
            self._known[name] = self.in_order(self.module[name])
        return self._known[name]

    def in_order(self, instructions: Computation) -> Cost:
        """Instructions one after the other; collectives beside them, from where they start to where they are done."""
        total, arrives, links_free = Cost(), {}, 0.0
        for it in instructions.values():
            cost, (step, which) = self.instruction(it, instructions), self.step(it)
            if step == "start" and cost.waits:
                arrives[which] = links_free = max(total.time, links_free) + cost.waits
                cost = dataclasses.replace(cost, waits=0.0)
            elif step == "done" or cost.waits:
                there = arrives.get(which, 0.0) if step == "done" else links_free
                cost = dataclasses.replace(cost, waits=cost.waits + max(0.0, there - total.time))
            total = total.plus(cost)
        return total

    def step(self, it: Instruction) -> tuple[str, str]:
        """Whether something asynchronous has its "start" here or is "done", and what; ("", "") of anything else."""
        if it.opcode == "fusion":
            inside = " ".join(each.attributes for each in self.module[it.called("calls")].values())
            found = _FUSED_STEP.search(inside)
            return (found[1].lower(), _CHANNEL.search(inside)[1]) if found else ("", "")
        kind = it.opcode.rpartition("-")[2]
        if kind == "start":
            return kind, it.name
        return (kind, it.operands[0]) if kind == "done" else ("", "")

    def instruction(self, it: Instruction, within: Computation) -> Cost:
        if it.opcode == "while":
            once = self.computation(it.called("body")).plus(self.computation(it.called("condition")))
            return Cost().plus(once, self.trip_count(it))
        if it.opcode == "conditional":
            return self.conditional(it)
        if it.opcode in ("call", "call-start", "async-start"):
            return self.computation(it.called("to_apply") or it.called("calls"))
        if it.opcode in _FREE or it.opcode.endswith("-done"):
            return Cost()
        return self.operation(it, within)

    def operation(self, it: Instruction, within: Computation) -> Cost:
        """What an instruction itself does; of a fusion's inside only products and collectives count."""
        inner = self.computation(it.called("calls")) if it.opcode == "fusion" else Cost()
        estimate = re.search(r'"estimated_cycles":"(\d+)"', it.attributes)
        cycles = float(estimate[1]) if estimate else 0.0
        kind, size, sent = _collective(it, within)
        moved, kernel = traffic(it, within, self.module), self.kernel_flops(it, within)
        seconds = max(kernel / self.chip.flops, moved / self.chip.bandwidth) if kernel else 0.0
        return Cost(
            flops=product_flops(it, within) + inner.flops + kernel,
            cycles=cycles,
            kernels=seconds * self.chip.clock,
            waits=(sent + inner.sent) / self.chip.link * self.chip.clock,
            bytes=moved,
            sent=sent + inner.sent,
            collectives={**inner.collectives, **({kind: (1.0, size)} if kind else {})},
            by_scope={it.scope: cycles} if cycles else {},
        )

    def kernel_flops(self, it: Instruction, within: Computation) -> float:
        """Operations of an attention kernel: what it declares itself, or those of q, k and v[..., S, H].

        These are its last three operands of the highest rank.
        """
        if 'custom_call_target="tpu_custom_call"' not in it.attributes:
            return 0.0
        if declared := re.search(r'"cost_estimate":\{"flops":"(\d+)"', it.attributes):
            return float(declared[1])
        arrays = [within[name].shapes[0].dims for name in it.operands]
        highest = [dims for dims in arrays if len(dims) == max(map(len, arrays))]
        if len(highest) < 3:
            return 0.0  # another kernel, of which only the memory traffic is known
        q, k, _ = highest[-3:]
        share = next((share for scope, share in self.visited.items() if scope in it.scope), 1.0)
        return 4.0 * math.prod(q) * k[-2] * share

    def conditional(self, it: Instruction) -> Cost:
        listed = re.search(r"branch_computations=\{([^}]*)\}", it.attributes)
        names = (_NAME.findall(listed[1]) if listed else None) or [
            it.called("false_computation"),
            it.called("true_computation"),
        ]
        second = next((share for scope, share in self.shares.items() if scope in it.scope), None)
        weights = [1 / len(names)] * len(names) if second is None else [1 - second, second]
        total = Cost()
        for name, weight in zip(names, weights, strict=True):
            total = total.plus(self.computation(name), weight)
        return total

    def trip_count(self, it: Instruction) -> float:
        given = next((count for scope, count in self.trips.items() if it.scope.endswith(scope)), None)
        if given is not None:
            return given
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', it.attributes):
            return float(known[1])
        bounds = self.constants(it.called("condition"))
        if len(bounds) != 1:
            raise ValueError(f"the loop {it.scope!r} has no single bound: {sorted(bounds)}")
        return float(bounds.pop())

    def constants(self, name: str) -> set[int]:
        """Whole numbers in a computation and in those that it calls."""
        found = set()
        for it in self.module[name].values():
            if it.opcode == "constant" and it.arguments.isdigit():
                found.add(int(it.arguments))
            elif it.called("calls"):
                found |= self.constants(it.called("calls"))
        return found


def product_flops(it: Instruction, within: Computation) -> float:
    """Operations of a `dot` or a `convolution`, which is what TPUs make of dots; 0 for anything else."""
    if it.opcode == "dot":
        left = within[it.operands[0]].shapes[0].dims
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", it.attributes)[1]
        return 2.0 * math.prod(it.shapes[0].dims) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    if it.opcode == "convolution":
        return _convolution_flops(it, within)
    return 0.0


def _convolution_flops(it: Instruction, within: Computation) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", it.attributes).groups()
    data, kernel, result = (
        dict(zip(names, arrays[0].dims, strict=True))
        for names, arrays in zip(labels, (*(within[o].shapes for o in it.operands[:2]), it.shapes), strict=True)
    )
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", it.attributes) or [""] * 2)[1]))
    per_axis = {name: values.split("x") for name, values in window.items()}
    products = [
        _products_along(data[axis], kernel[axis], result[axis], {name: v[int(axis)] for name, v in per_axis.items()})
        for axis in (label for label in labels[2] if label.isdigit())
    ]
    return 2.0 * result["b"] * result["f"] * kernel["i"] * math.prod(products)


def _products_along(data: int, kernel: int, result: int, window: Mapping[str, str]) -> int:
    """Pairs of a result and a kernel element that meet a real element of the data, along one spatial axis."""
    get = lambda name, default: int(window.get(name, default))
    low = int(window.get("pad", "0_0").split("_")[0])
    place = np.arange(result)[:, None] * get("stride", 1) + np.arange(kernel) * get("rhs_dilate", 1) - low
    spread = get("lhs_dilate", 1)
    return int(np.sum((place >= 0) & (place <= (data - 1) * spread) & (place % spread == 0)))


def _collective(it: Instruction, within: Computation) -> tuple[str, float, float]:
    """(kind, bytes of the result, bytes over the busiest link) of a collective; ("", 0, 0) of anything else."""
    kind = it.opcode.removesuffix("-start")
    carried_on = "chain_id=" in it.attributes and not any(
        "CollectiveStart" in each.attributes for each in within.values()
    )
    if kind not in _COLLECTIVES or carried_on:
        return "", 0.0, 0.0
    # The start of an asynchronous one returns its operand beside its result.
    size = float(max(s.bytes for s in it.shapes) if it.opcode != kind else sum(s.bytes for s in it.shapes))
    chips = group_size(it.attributes)
    whole = size * chips if kind == "reduce-scatter" else size
    root = next((each for each in within.values() if each.is_root), it)
    if kind == "all-reduce" and root.opcode == "dynamic-slice" and it.name in root.operands:
        kind, size = "reduce-scatter", float(root.shapes[0].bytes)  # a fusion of both: a chip gets no sums but its own
    once_round = whole * (1 - 1 / chips) / (2 if chips > 2 else 1)
    sent = {"all-reduce": 2 * once_round, "collective-permute": size}
    return kind, size, sent.get(kind, once_round)


def group_size(attributes: str) -> float:
    """Chips that take part in one collective; infinite where all do, whose number the text does not say."""
    if found := re.search(r"replica_groups=\[([\d,]+)\]", attributes):
        return float(found[1].split(",")[-1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(float(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return float(len(found[1].split(",")))
    return math.inf


# ---------------------------------------------------------------------------------------------------------------------
# Memory traffic
# ---------------------------------------------------------------------------------------------------------------------


def traffic(it: Instruction, within: Computation, module: Mapping[str, Computation]) -> float:
    """Bytes that an instruction reads from and writes to memory.

    An array that is only cut from (one layer of stacked weights) or written into counts as the part that is touched.
    """
    read = 0.0
    for name in dict.fromkeys(it.operands):
        present = sum(s.bytes for s in within[name].shapes if s.in_hbm) if name in within else 0
        read += min(present, _touched(it, name, within, module)) if present else 0.0
    return read + _written(it, within, module)


def _touched(user: Instruction, name: str, within: Computation, module) -> float:
    """Bytes of the value `name` that one of its users reads."""
    first = user.operands[0] == name
    if user.opcode in ("dynamic-slice", "slice", "gather") and first:
        return float(sum(s.bytes for s in user.shapes))
    if user.opcode == "dynamic-update-slice" and first:
        return 0.0
    if user.opcode == "fusion":
        inner = module[user.called("calls")]
        places = {place for place, operand in enumerate(user.operands) if operand == name}
        parameters = [p for p in inner.values() if p.opcode == "parameter" and int(p.arguments) in places]
        return sum(_touched_by_all(p.name, inner, module) for p in parameters)
    if user.opcode == "bitcast":
        return _touched_by_all(user.name, within, module)
    return math.inf


def _touched_by_all(name: str, within: Computation, module) -> float:
    return sum(_touched(user, name, within, module) for user in within.values() if name in user.operands)


def _written(it: Instruction, within: Computation, module) -> float:
    arrays = it.shapes[:1] if it.opcode.endswith("-start") else it.shapes
    if it.opcode == "dynamic-update-slice":
        return float(within[it.operands[1]].shapes[0].bytes) if arrays[0].in_hbm else 0.0
    sizes = [math.inf] * len(arrays)
    if it.opcode == "fusion":
        inner = module[it.called("calls")]
        root = next(each for each in inner.values() if each.is_root)
        parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        sizes = [_written_part(part, inner) for part in parts] if len(parts) == len(arrays) else sizes
    return float(sum(min(s.bytes, size) for s, size in zip(arrays, sizes, strict=True) if s.in_hbm))


def _written_part(part: Instruction, inner: Computation) -> float:
    """Bytes of one result of a fusion that are written: for an array updated in place, the update."""
    while part.opcode == "bitcast":
        part = inner[part.operands[0]]
    return float(inner[part.operands[1]].shapes[0].bytes) if part.opcode == "dynamic-update-slice" else math.inf
