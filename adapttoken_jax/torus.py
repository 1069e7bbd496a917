"""Which chip of a TPU slice takes which place of a mesh.

Collectives go round in rings, both ways at once. A ring whose neighbours are chips side by side has every link to
itself; along a line it must come back over the links that it went, at half the speed. So the places of an axis lie in a
block as compact as can be, in the order of a closed path through it; blocks of an inner axis make up an outer one's.
"""

import itertools
import math

import numpy as np


def places(sizes: tuple[int, ...], coords: np.ndarray) -> np.ndarray | None:
    """The chip of every place of a mesh, int[sizes], as an index into coords int[chips, axes of the torus].

    None where the chips do not fill a box, each its own place in it.
    """
    coords = coords - coords.min(0)  # one host's chips may lie anywhere in the slice
    box = coords.max(0) + 1
    if not math.prod(sizes) == len(coords) == len(np.unique(coords, axis=0)) == math.prod(box):
        return None
    place, stride = np.zeros((*sizes, len(box)), int), np.ones_like(box)
    for axis in reversed(range(len(sizes))):
        block = _compact(sizes[axis], box // stride, stride)
        path = closed_path(block) * stride
        place += path.reshape(sizes[axis], *[1] * (len(sizes) - 1 - axis), len(box))
        stride = stride * block
    index = np.zeros(box, int)
    index[tuple(coords.T)] = np.arange(len(coords))
    return index[tuple(np.moveaxis(place, -1, 0))]


def _compact(size: int, room: np.ndarray, stride: np.ndarray) -> tuple[int, ...]:
    """The most compact block of so many that divides `room`; rather along axes where its neighbours are next to it."""
    divisors = ([each for each in range(1, length + 1) if length % each == 0] for length in room)
    blocks = [block for block in itertools.product(*divisors) if math.prod(block) == size]
    apart = lambda block: sum(length > 1 for length, step in zip(block, stride, strict=True) if step > 1)
    return min(blocks, key=lambda block: (max(block), apart(block), block))


def closed_path(block: tuple[int, ...]) -> np.ndarray:
    """A way through all places of a block, int[places, axes], each beside the one before.

    The last is beside the first too, unless all lie in one line or their number is odd: the way leads along one axis
    and comes back in turns through the others.
    """
    axis = next((axis for axis, length in enumerate(block) if length % 2 == 0), 0)
    first, *others = _in_turns([*block[:axis], *block[axis + 1 :]])
    there = [(step, *first) for step in range(block[axis])]
    back = [(block[axis] - 1 - step, *place) for step, *place in _in_turns([block[axis]], others)]
    path = np.array(there + back)
    return np.insert(path[:, 1:], axis, path[:, 0], axis=1)


def _in_turns(lengths: list[int], through=((),)) -> list[tuple[int, ...]]:
    """All places of a box, each beside the one before; at each of them `through`, forwards and backwards in turn."""
    for length in reversed(lengths):
        through = [(step, *place) for step in range(length) for place in (through[::-1] if step % 2 else through)]
    return list(through)
