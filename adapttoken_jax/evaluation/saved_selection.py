"""Which visual tokens a question's final prompt held, small enough to keep for every question of a benchmark.

A record has the grid, the tokens' numbers in the merged video (slot x rows x columns, ascending) and each one's rank by
weighted relevance, 0 for the highest. 7040 tokens take about 30 kB.
"""

import base64
import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from adapttoken_jax.errors import UserError
from adapttoken_jax.result import Result


@dataclasses.dataclass(frozen=True)
class SavedSelection:
    """The selected tokens of one question.

    Attributes:
      grid: (slots, rows, columns) of the merged video.
      tokens: int64[n, 3], (slot, row, column), in video order.
      ranks: int64[n], 0 for the most relevant. Where nothing was ranked, as in the uniform arm, the order of the video:
        ranks in that order say nothing.
    """

    grid: tuple[int, int, int]
    tokens: np.ndarray
    ranks: np.ndarray

    def best(self, count: int) -> np.ndarray:
        """The `count` most relevant tokens, or all if there are fewer: int64[m, 3] in video order.

        Of tokens that nothing ranked, as many, evenly spread over the video.
        """
        ranks, places = self.ranks, np.arange(len(self.ranks))
        if (ranks == places).all():
            # Multiples of the golden section modulo 1 are even, and never in step with the rows and columns of a slot.
            ranks = np.argsort(np.argsort(places * (5**0.5 - 1) / 2 % 1))
        return self.tokens[ranks < count]

    def to_record(self, name: str) -> dict[str, Any]:
        """As a line of a journal, under the question's id."""
        numbers = np.ravel_multi_index(tuple(self.tokens.T), self.grid)
        return {
            "id": name,
            "grid": list(self.grid),
            "tokens": _packed(np.diff(numbers, prepend=0)),
            "ranks": _packed(self.ranks),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "SavedSelection":
        """The inverse of `to_record`.

        Raises:
          UserError: a record that is not whole.
        """
        try:
            grid, numbers = tuple(record["grid"]), np.cumsum(_unpacked(record["tokens"]))
            tokens = np.stack(np.unravel_index(numbers, grid), 1).astype(np.int64)
            return cls(grid, tokens, _unpacked(record["ranks"]))
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise UserError(
                f"selection of {record.get('id')!r}: damaged ({error}); answer the question again"
            ) from None


def saved_selection(result: Result, merge: int) -> SavedSelection:
    """The selection of a result; `merge` is patches per token side."""
    slots, height, width = result.video.grid
    chosen = result.selected
    tokens = np.array([chosen.slots, chosen.rows, chosen.cols], np.int64).T
    grid = (slots, height // merge, width // merge)
    return SavedSelection(grid, tokens, _ranks(result, tokens, grid))


def _ranks(result: Result, tokens: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Ranks by weight of the group x relevance; ties go to the earlier token."""
    score = np.zeros(len(tokens))
    if result.relevance is not None:
        per_slot, weighted = grid[1] * grid[2], np.full((grid[0], grid[1] * grid[2]), -np.inf)
        for group, relevance in zip(result.groups, result.relevance, strict=True):
            if group.visited:
                own = relevance[: len(group.slots) * per_slot].reshape(-1, per_slot)
                weighted[list(group.slots)] = group.weight * own
        score = weighted[tokens[:, 0], tokens[:, 1] * grid[2] + tokens[:, 2]]
    ranks = np.empty(len(tokens), np.int64)
    ranks[np.argsort(-score, kind="stable")] = np.arange(len(tokens))
    return ranks


def _packed(numbers: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(numbers.astype("<u4").tobytes(), 9)).decode("ascii")


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u4").astype(np.int64)
