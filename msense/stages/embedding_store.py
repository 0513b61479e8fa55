"""Unit files as clustering sees them: ranges of rows in, sampled points and exemplars' places out.

Holds the rows that are asked for (20 + 2 D bytes each).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from msense import storage
from msense.exemplars import PLACE, nearest
from msense.kmeans import KMeansConfig
from msense.occurrences import read_rows, record_type
from msense.run_folder import RunFolder


@dataclass(frozen=True)
class ClusterSettings:
    """What the tasks of this stage need to know."""

    run: RunFolder
    dim: int
    store_dtype: str
    max_occurrences: int
    max_points_per_part: int
    exemplars: int
    kmeans: KMeansConfig  # its k is used where `senses_by_token` is false
    senses_by_token: bool  # each token's K is in the run's file `senses`
    device: str  # "cuda" or "cpu"


@dataclass(frozen=True)
class Range:
    """Rows [start, stop) of a unit file."""

    unit: int
    start: int
    stop: int


def read_ranges(settings: ClusterSettings, ranges: Sequence[Range]) -> tuple[np.ndarray, np.ndarray]:
    """Read rows of several units: records [n], and the unit of each, int32 [n]."""
    records = np.empty(sum(r.stop - r.start for r in ranges), record_type(settings.dim))
    unit = np.empty(len(records), dtype=np.int32)
    start = 0
    for r in ranges:
        stop = start + r.stop - r.start
        records[start:stop] = read_rows(settings.run.unit_file(r.unit), settings.dim, r.start, r.stop)
        unit[start:stop] = r.unit
        start = stop
    return records, unit


def shard_ranges(settings: ClusterSettings, shard: int) -> tuple[list[Range], int]:
    """Return where a shard's rows lie in every unit, and how many there are."""
    offsets = storage.load_arrays(settings.run.offsets, ("offsets",))["offsets"]
    ranges = [Range(unit, int(row[shard]), int(row[shard + 1])) for unit, row in enumerate(offsets)]
    return ranges, sum(r.stop - r.start for r in ranges)


def senses_of(settings: ClusterSettings, tokens: np.ndarray) -> np.ndarray:
    """Return the number of senses that each token is to have: int64 [T], of token ids int64 [T]."""
    if not settings.senses_by_token:
        return np.full(len(tokens), settings.kmeans.k)
    numbers: np.ndarray = storage.load_arrays(settings.run.senses, ("senses",))["senses"][tokens]
    return numbers


def sample(keys: np.ndarray, tokens: np.ndarray, max_occurrences: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the points of every token: the first `max_occurrences` by key, ties in corpus order.

    Args:
        keys: uint64 [n] of the rows of a shard, units one after another.
        tokens: int32 [n].
        max_occurrences: 0 = all.

    Returns:
        The chosen rows, int64 [m], by token and corpus order; and the rank of each by key within its token, int64 [m].
    """
    by_key = np.lexsort((keys, tokens))  # stable: equal keys stay in corpus order
    starts = np.flatnonzero(np.r_[True, np.diff(tokens[by_key]) != 0]) if len(by_key) else np.zeros(0, dtype=np.int64)
    rank = np.arange(len(by_key)) - np.repeat(starts, np.diff(np.r_[starts, len(by_key)]))
    if max_occurrences:
        by_key, rank = by_key[rank < max_occurrences], rank[rank < max_occurrences]
    corpus_order = np.lexsort((by_key, tokens[by_key]))
    return by_key[corpus_order], rank[corpus_order]


def stored(embeddings: np.ndarray, dtype: str) -> torch.Tensor:
    """View stored bits, uint16 [n, D], as what they are: float16 or bfloat16 [n, D]."""
    return torch.from_numpy(embeddings).view(getattr(torch, dtype))


def as_stored(centroids: np.ndarray, dtype: str) -> np.ndarray:
    """Round centroids float32 [S, D] to the stored dtype and return its bits, uint16 [S, D]."""
    return torch.from_numpy(centroids).to(getattr(torch, dtype)).view(torch.uint16).numpy()


def exemplar_places(
    found: tuple[np.ndarray, np.ndarray],
    senses: np.ndarray,
    points: np.ndarray,
    places: dict[str, np.ndarray],
    count: int,
) -> dict[str, np.ndarray]:
    """Find the points nearest to every sense.

    Args:
        found: sense of each point inside its token, int32 [n], and the squared distance to it, float32 [n].
        senses: int64 [T], senses of each token.
        points: int64 [T], points of each token, sum n.
        places: token, unit, row and position of each point.
        count: how many a sense.

    Returns:
        The columns of `exemplars.PLACE`, each named `exemplar_...`; distances stay squared.
    """
    assignment, distance = found
    sense = assignment + np.repeat(np.cumsum(senses) - senses, points)
    chosen, rank = nearest(sense, distance, count)
    columns = {name: column[chosen] for name, column in places.items()}
    columns |= {"sense": assignment[chosen], "rank": rank, "distance": distance[chosen]}
    return {f"exemplar_{name}": columns[name] for name in PLACE}
