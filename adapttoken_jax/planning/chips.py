"""TPU chips and the slices of them that can be rented.

Peaks and bandwidths are Google's published figures per chip (cloud.google.com/tpu/docs); memory is what the compiler of
libtpu lets a program use, from its own error for a program that is too large. An ICI link is one of a chip's
links to its neighbours, one direction: published bidirectional bandwidth / links / 2.
"""

import dataclasses
import math

from adapttoken_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      hbm: bytes of memory that a program may use.
      flops: bfloat16 operations per second at peak.
      flops_per_cycle: the same per clock cycle, all matrix units of the chip together.
      bandwidth: bytes per second from and to memory.
      link: bytes per second over one ICI link, one direction.
      slices: the shapes of up to 256 chips.
      options: what libtpu must be told beside the shape.
    """

    name: str
    hbm: int
    flops: float
    flops_per_cycle: int
    bandwidth: float
    link: float
    slices: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.flops / self.flops_per_cycle


_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
_GIB = 2**30

CHIPS = {
    chip.name: chip
    for chip in (
        # A v4 chip has two cores; they work as one device only if libtpu is told so.
        Chip("v4", int(30.75 * _GIB), 275e12, 2**18, 1228e9, 50e9, _3D, (("chip_config_name", "megacore"),)),
        Chip("v5e", int(15.75 * _GIB), 197e12, 2**17, 819e9, 50e9, _2D),
        Chip("v5p", int(95.73 * _GIB), 459e12, 2**18, 2765e9, 100e9, _3D),
        Chip("v6e", int(31.24 * _GIB), 918e12, 2**19, 1638e9, 100e9, _2D),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: `--topology v5e:4x4`."""

    chip: Chip
    shape: str

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Reads "v5p:2x2x4".

        Raises:
          UserError: a chip or a shape that there is not; the message lists those that there are.
        """
        name, _, shape = text.partition(":")
        if name not in CHIPS:
            known = "; ".join(f"{chip.name}:{'|'.join(chip.slices)}" for chip in CHIPS.values())
            raise UserError(f"--topology={text}: unknown chip; known are {known}")
        if shape not in CHIPS[name].slices:
            slices = ", ".join(f"{name}:{each}" for each in CHIPS[name].slices)
            raise UserError(f"--topology={text}: choose one of {slices}")
        return cls(CHIPS[name], shape)

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(map(int, self.shape.split("x")))

    def __str__(self):
        return f"{self.chip.name}:{self.shape}"
