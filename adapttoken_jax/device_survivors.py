"""Steps 8 to 10 as compiled programs; `survivors.select` is the reference twin.

Sizes come from the settings, not from the video: groups are padded to those of the longest video that `max_frames`
allows, up to a number that few videos pass, candidates to what the budget allows, so that the second question compiles
nothing.
"""

import math

import jax
import numpy as np

from adapttoken_jax.geometry import bucket, round_up
from adapttoken_jax.run import Run, Selected
from adapttoken_jax.scan import context_size
from adapttoken_jax.selection import budget_temperature, compiled, coverage_count
from adapttoken_jax.survivors import relevance_of

_MANY_SLOTS = 8192  # two and a quarter hours at two slots a second


def select(run: Run) -> tuple[Selected, jax.Array]:
    """What `survivors.select` selects, and the features of the survivors, on the device and padded."""
    config, equal = run.config, run.method == "flexselect"
    stretches = 0 if equal else coverage_count(config.coverage, config.budget)
    with compiled.precise():
        scanned, places = _scanned(run, stretches)
        most = min(math.ceil(config.over_selection * config.budget), places)
        numbers = _numbers(run)
        found = compiled.choose_candidates(scanned, numbers, most=most, stretches=stretches)
        candidates = _coordinates(run, np.asarray(found.place), places)
        features = _padded(run.video.gather(candidates), most)
        kept = found.free
        if not equal:
            similar = features if config.similarity == "projector" else _padded(_hidden(run, candidates), most)
            positions = run.plan.clip.positions(candidates)
            kept = compiled.remove_redundant(
                similar.astype(np.float32), _padded(positions, most), found, numbers.scale, kernel=config.proximity
            )
        size = context_size(config.budget)
        chosen, survivors = compiled.gather_survivors(features, found, kept, size=size, places=places)
    visited = [v.index for v in run.scan.visits]
    weights, budgets = (np.asarray(each)[visited] for each in (found.weights, found.budgets))
    tokens = _coordinates(run, np.asarray(survivors), places)
    return Selected(weights.astype(np.float64), budgets.astype(np.int64), candidates, tokens), chosen


def _scanned(run: Run, stretches: int) -> tuple[compiled.Scanned, int]:
    """The visits as padded arrays, and the number of places in the video's order."""
    K, M, slots = run.config.slots_per_group, run.video.per_slot, run.plan.clip.grid[0]
    allowed = math.ceil(run.config.max_frames / run.plan.clip.vision.temporal_patch)
    most_slots = max(slots, min(allowed, bucket(slots, _MANY_SLOTS)))
    G, places = round_up(most_slots, K) // K, round_up(most_slots, K) * M
    relevance, stretch = np.full((G, K * M), np.nan, np.float32), np.full((G, K * M), stretches, np.int32)
    token = np.full(places, G * K * M, np.int32)
    certainty, visited = np.zeros(G), np.zeros(G, bool)
    for visit in run.scan.visits:
        own, n = visit.index, len(visit.relevance)
        relevance[own, :n] = relevance_of(run, visit)
        token[(visit.slots[:, None] * M + np.arange(M)).reshape(-1)] = own * K * M + np.arange(n)
        stretch[own, :n] = np.repeat(visit.slots * stretches // slots, M)
        certainty[own] = 0.0 if run.method == "flexselect" else visit.reply.certainty
        visited[own] = True
    return compiled.Scanned(relevance, certainty, visited, token, stretch), places


def _numbers(run: Run) -> compiled.Numbers:
    config = run.config
    if run.method == "flexselect":
        over_selection, temperature, minimum = 1.0, 1.0, 0
    else:
        certainty = [v.reply.certainty for v in sorted(run.scan.visits, key=lambda v: v.index)]
        temperature = budget_temperature(certainty, config.temperature, config.temperature_target)
        over_selection, minimum = config.over_selection, config.min_tokens_per_group
    whole, real = np.int32, np.float64
    return compiled.Numbers(
        whole(config.budget), real(over_selection), real(temperature), whole(minimum), real(config.proximity_scale)
    )


def _coordinates(run: Run, places: np.ndarray, padding: int) -> np.ndarray:
    """(slot, row, column), int64[n, 3], of places in the video's order; padding is left out."""
    slot, token = np.divmod(places[places < padding].astype(np.int64), run.video.per_slot)
    row, col = np.divmod(token, run.plan.clip.token_grid[1])
    return np.stack([slot, row, col], 1)


def _hidden(run: Run, candidates: np.ndarray) -> np.ndarray:
    """Hidden states [n, D] of the candidates at the reference layer."""
    M, cols = run.video.per_slot, run.plan.clip.token_grid[1]
    where = {int(slot): (visit, i * M) for visit in run.scan.visits for i, slot in enumerate(visit.slots)}
    return np.stack([where[s][0].hidden[where[s][1] + r * cols + c] for s, r, c in candidates.tolist()])


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    return np.pad(array, ((0, size - len(array)), (0, 0)))
