"""Step 10 of the method: drops tokens that repeat what a kept token close by in space and time already shows.

Axis letters: n tokens, D features. NumPy, on the host; JAX arrays are accepted and a NumPy mask comes back.

Design decisions:
- Redundancy of a pair = cosine of its features, clamped at 0, times the proximity of its positions (`KERNELS`).
- The most redundant pair loses its lower score, again and again; ties go to the smallest i, then the smallest j > i.
- Real videos tie all the time (a static scene repeats its tokens exactly), so cosines are float64 rounded to 12
  decimals: equal features have cosine exactly 1, and neither block sizes nor the BLAS decide which token goes.
- `remove_redundant` never holds an n x n array. It keeps each token's few best partners, seeks others when all of them
  are gone, and looks at features only where the proximity alone, the upper bound of redundancy, leaves a pair in the
  race.
"""

import math

import numpy as np

from adapttoken_jax.errors import UserError
from adapttoken_jax.selection.arrays import array_and_namespace

_DECIMALS = 12

# Rows whose partners are sought together, and columns whose features are in float64 at a time: these bound the memory.
_ROWS, _COLUMNS = 128, 1024

_BEST = 4  # partners that are kept of each token

# Nearest partners tried first; what the last of the best among them has, the remaining partners' proximity must reach.
_NEAREST = 16


def _exponential(time, rows, cols, scale):
    time, xp = array_and_namespace(time)
    # Rows and columns are whole numbers: this is their distance to the last bit, in less time than `hypot` takes.
    return xp.exp(-(abs(time) / scale) - xp.sqrt(rows * rows + cols * cols))


def _window(time, rows, cols, scale):
    time, _ = array_and_namespace(time)
    return ((abs(time) <= scale) & (abs(rows) <= 1) & (abs(cols) <= 1)).astype(time.dtype)


# Proximity in [0, 1] from differences of time (seconds), row and column (merged cells), and the scale (seconds). They
# serve JAX arrays too, for the compiled twin.
KERNELS = {"exponential": _exponential, "window": _window}


def remove_redundant(features, positions, score, keep: int, *, kernel: str = "exponential", scale: float = 2.0):
    """Marks the `keep` tokens that are left when redundant pairs lose their lower-scored token, one after another.

    Same result as `remove_redundant_reference`, in about n * D * (partners within reach) operations.

    Args:
      features: [n, D], compared in float32 precision by cosine; a zero vector resembles nothing.
      positions: [n, 3] time in seconds, row and column in merged cells.
      score: [n], weighted relevance; of a pair the lower one goes, on a tie the one with the higher index.
      keep: tokens to leave, at least 1; n or more keeps all.
      kernel: `exponential`: exp(-|dt| / scale - Euclidean distance of row and column); `window`: 1 where |dt| <= scale
        and row and column differ by at most 1, else 0.
      scale: seconds.

    Returns:
      bool[n].

    Raises:
      UserError: another kernel, or a scale that is not positive.
      ValueError: shapes that do not fit, numbers that are not finite, or `keep` below 1.
    """
    features, positions, score = _checked(features, positions, score, keep, kernel, scale)
    kept = np.ones(len(score), bool)
    if keep >= len(score):
        return kept
    partners = _Partners(features, positions, KERNELS[kernel], scale)
    best, partner = partners.strongest(np.arange(len(score)), kept)
    for _ in range(len(score) - keep):
        place = int(best.argmax())  # of equals the smallest i, and of its partners the smallest j
        i, j = place // _BEST, int(partner.flat[place])
        dropped = i if score[i] < score[j] else j
        kept[dropped] = False
        lost = partner == dropped
        best[lost] = best[dropped] = -1
        orphans = np.flatnonzero(kept & lost.any(1) & (best < 0).all(1))
        best[orphans], partner[orphans] = partners.strongest(orphans, kept)
    return kept


def remove_redundant_reference(
    features, positions, score, keep: int, *, kernel: str = "exponential", scale: float = 2.0
):
    """The reference twin of `remove_redundant`: the definition as plain loops, O(n^2) per dropped token."""
    features, positions, score = _checked(features, positions, score, keep, kernel, scale)

    def redundancy(i, j):
        a, b = features[i].astype(np.float64), features[j].astype(np.float64)
        norms = math.sqrt(a @ a) * math.sqrt(b @ b)
        cosine = max(0.0, float(a @ b) / norms) if norms else 0.0
        return np.round(cosine, _DECIMALS) * KERNELS[kernel](*(positions[i] - positions[j]), scale)

    pairs = {(i, j): redundancy(i, j) for j in range(len(score)) for i in range(j)}
    kept = set(range(len(score)))
    while len(kept) > keep:
        i, j = min((pair for pair in pairs if kept.issuperset(pair)), key=lambda pair: (-pairs[pair], pair))
        kept.remove(i if score[i] < score[j] else j)
    return np.isin(np.arange(len(score)), list(kept))


def _checked(features, positions, score, keep, kernel, scale):
    """The arguments as float arrays on the host, or the error that names what is wrong with them."""
    if kernel not in KERNELS:
        raise UserError(f"--proximity={kernel}: choose one of {', '.join(KERNELS)}")
    if not scale > 0:
        raise UserError(f"--proximity_scale={scale}: must be above 0")
    if keep < 1:
        raise ValueError(f"keep must be at least 1: {keep}")
    features = np.asarray(features, np.float32)
    positions, score = np.asarray(positions, np.float64), np.asarray(score, np.float64)
    n = len(score)
    if score.shape != (n,) or positions.shape != (n, 3) or features.ndim != 2 or len(features) != n:
        raise ValueError(
            f"features [n, D], positions [n, 3] and score [n] do not fit: "
            f"{features.shape}, {positions.shape}, {score.shape}"
        )
    for name, values in (("features", features), ("positions", positions), ("score", score)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite")
    return features, positions, score


class _Partners:
    """Finds tokens' most redundant partners among those of higher index, so that each pair has one owner."""

    def __init__(self, features, positions, kernel, scale):
        self.features, self.positions, self.kernel, self.scale = features, positions, kernel, scale
        norms = np.sqrt(np.einsum("nd,nd->n", features, features, dtype=np.float64))
        self.inverse_norms = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)

    def strongest(self, rows, kept):
        """For each row i: its largest redundancies with kept j > i, falling; of equal ones the smallest j comes first.

        Args:
          rows: int[r], ascending.
          kept: bool[n].

        Returns:
          float64[r, _BEST], -1 where there is no other j, and these j, int64[r, _BEST].
        """
        best, partner = np.full((len(rows), _BEST), -1.0), np.zeros((len(rows), _BEST), np.int64)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            later = part[0] + 1 + np.flatnonzero(kept[part[0] + 1 :])
            if later.size:
                redundancy, own = self._redundancy(part, later), np.arange(len(part))
                for place in range(_BEST):
                    column = redundancy.argmax(axis=1)
                    best[start + own, place] = redundancy[own, column]
                    partner[start + own, place] = later[column]
                    redundancy[own, column] = -1
        return best, partner

    def _redundancy(self, rows, later):
        """[r, c] redundancy of `rows` with `later`; -1 where not j > i, 0 where it cannot be among the row's best."""
        difference = self.positions.T[:, rows, None] - self.positions.T[:, None, later]
        proximity = np.where(later > rows[:, None], self.kernel(*difference, self.scale), -1.0)
        tries = min(_NEAREST, later.size)
        nearest = np.unique(np.argpartition(-proximity, tries - 1, axis=1)[:, :tries])
        found = np.sort(proximity[:, nearest] * self._cosine(rows, later[nearest]), axis=1)
        at_least = found[:, -_BEST].clip(0) if tries >= _BEST else np.zeros(len(rows))
        # A pair is at most as redundant as it is near; one that is as near as `at_least` may still tie with it.
        open_columns = np.flatnonzero(((proximity > 0) & (proximity >= at_least[:, None])).any(axis=0))
        redundancy = np.minimum(proximity, 0.0)
        near = proximity[:, open_columns]
        redundancy[:, open_columns] = np.where(near > 0, near * self._cosine(rows, later[open_columns]), near)
        return redundancy

    def _cosine(self, rows, columns):
        """[r, c] cosines, clamped at 0 and rounded."""
        cosine = np.empty((len(rows), len(columns)))
        left = self._unit(rows)
        for start in range(0, len(columns), _COLUMNS):
            cosine[:, start : start + _COLUMNS] = left @ self._unit(columns[start : start + _COLUMNS]).T
        return np.round(np.maximum(cosine, 0.0), _DECIMALS)

    def _unit(self, tokens):
        return self.features[tokens].astype(np.float64) * self.inverse_norms[tokens, None]
