"""The real TPU compiler on any machine: libtpu compiles for a slice that need not exist."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from adapttoken_jax import sharding
from adapttoken_jax.errors import UserError
from adapttoken_jax.planning.chips import Chip, Topology
from adapttoken_jax.planning.hlo import Cost, program_cost
from adapttoken_jax.planning.programs import Program

# What libtpu would otherwise ask the metadata server of a cloud machine, and complain about on any other.
_NOT_ON_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nobody holds a chip: several plans may be made at once
}

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_LARGE = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says about one program, per chip.

    Attributes:
      peak: bytes needed at the worst moment of the run.
      arguments, temporaries, outputs, code: bytes; 0 for a program that is too large for the chip.
      cost: None for a program that is too large.
    """

    peak: int
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    code: int = 0
    cost: Cost | None = None


def make_tpu_mesh(topology: Topology, shape: sharding.MeshShape) -> Mesh:
    """A mesh over the chips of a slice.

    Raises:
      UserError: libtpu is not installed, or the mesh has not as many places as the slice has chips.
    """
    if shape.devices != topology.chips:
        raise UserError(f"--mesh={shape}: {shape.devices} places, but --topology={topology} has {topology.chips} chips")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("plan needs the TPU compiler; in the source tree: pip install -e '.[tpu]'")
    for name, value in _NOT_ON_A_TPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = dict(topology.chip.options)
    if topology.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # by default a host has four, which a lone chip is not
    slice_ = topologies.get_topology_desc(platform="tpu", topology_name=str(topology), **options)
    return sharding.make_mesh(shape, slice_.devices)


def compile_program(program: Program, chip: Chip) -> Compiled:
    """Compiles for such chips; a program that is too large for the chip is an answer, not an error."""
    try:
        compiled = program.lower().compile(compiler_options=dict(program.options))
    except jax.errors.JaxRuntimeError as error:
        if needed := needed_bytes(str(error)):
            return Compiled(peak=needed)
        raise
    memory = compiled.memory_analysis()
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        peak=memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes,
        cost=program_cost(_text(compiled), chip, program.trips, program.shares, program.visited),
    )


def _text(compiled: jax.stages.Compiled) -> str:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        found = " with ".join(f"{name} {version}" for name, version in versions().items())
        raise UserError(f"plan: {found}: they do not belong together; run: pip install 'jax[tpu]'") from error


def needed_bytes(message: str) -> int:
    """What a program needs, from the compiler's error for one that is too large; 0 for any other error.

    The compiler speaks of temporaries, but the figure holds the arguments too.
    """
    found = _TOO_LARGE.search(message)
    return round(float(found[1]) * _UNITS[found[2]]) if found else 0


def versions() -> Mapping[str, str]:
    """Versions of what the figures come from."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
