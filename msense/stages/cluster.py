"""Stage 4, second half: cluster the tokens of each shard and write one file of centroids per shard.

A task holds its shard twice (rows and points). Tokens of more than `max_points_per_part` points are left to
`distributed_kmeans`.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from msense.clustering import kmeans
from msense.clustering.mcl import MCL_POINTS
from msense.clustering.nearest import exemplar_places, sample
from msense.config.build import BuildConfig
from msense.io.arrays import load_arrays, save_arrays
from msense.run.folder import RunFolder
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import Stage
from msense.stages.distributed_kmeans_worker import CHUNKS_HELD
from msense.stages.embedding_store import (
    ClusterSettings,
    Range,
    as_stored,
    read_ranges,
    record_type,
    sense_counts,
    shard_items,
    shard_ranges,
    stored,
)


class ClusterStage(Stage[dict[int, list[Range]]]):
    """Clusters the tokens of every shard; the result is the rows of the large tokens, which are left to the next stage."""

    name = "clustering"

    def __init__(self, settings: ClusterSettings, shards: np.ndarray) -> None:
        """Cluster shards, int64 [shards + 1] with the first token of each."""
        super().__init__(settings.run)
        self.settings, self.shards = settings, shards

    def outputs(self) -> list[str]:
        """Return one centroids file per shard."""
        return [self.run.shard_file(shard) for shard in range(len(self.shards) - 1)]

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Cluster the missing shards."""
        items, needs = shard_items(self.shards, missing), executor.resources.clustering
        yield from executor.map(self.name, cluster_shard, items, self.settings, needs=needs)

    def reduce(self, executor: Executor, stats: list[Row]) -> dict[int, list[Range]]:
        """Return the rows of every large token in all partitions, by token id."""
        large = {int(token): ranges for row in stats for token, ranges in row["large"].items()}
        return {token: [Range(*r) for r in large[token]] for token in sorted(large)}


def cluster_shard(item: Row, settings: ClusterSettings) -> Row:
    """Cluster one shard; large tokens are only returned, as `large`, with their rows in every partition."""
    run, shard = settings.run, item["number"]
    ranges, rows = shard_ranges(settings, shard)
    large: dict[str, list[tuple[int, int, int]]] = {}
    if item["last"] - item["first"] == 1 and _are_large(np.array(rows), settings):
        large[str(item["first"])] = [(r.partition, r.start, r.stop) for r in ranges if r.stop > r.start]
        ranges = []
    records, partition = read_ranges(settings, ranges)
    token, count = np.unique(records["token"], return_counts=True)
    large_tokens = token[_are_large(count, settings)].tolist()
    for r in ranges if large_tokens else []:
        own = records["token"][partition == r.partition]
        for number in large_tokens:
            start, stop = np.searchsorted(own, [number, number + 1]).tolist()
            if start < stop:
                large.setdefault(str(number), []).append((r.partition, r.start + start, r.start + stop))
    kept = ~np.isin(records["token"], large_tokens)
    records, partition = records[kept], partition[kept]  # releases the rows of large tokens
    arrays = _clustered(records, partition, settings)
    stats = {"number": shard, "large": large}
    return run.publish(run.shard_file(shard), lambda path: save_arrays(path, arrays), stats)


def _clustered(records: np.ndarray, partition: np.ndarray, settings: ClusterSettings) -> dict[str, np.ndarray]:
    """Cluster the tokens of records [n] from partitions int32 [n]; return the arrays of a centroids file."""
    order, key_order = sample(records["key"], records["token"], settings.max_occurrences)
    tokens, sizes = np.unique(records["token"][order], return_counts=True)
    points, senses = stored(records["embedding"][order], settings.store_dtype), sense_counts(settings, tokens)
    clusters = kmeans.cluster_tokens(
        points, sizes, tokens, settings.kmeans, senses=senses, device=settings.device, key_order=key_order
    )
    places = {name: records[name][order] for name in ("token", "row", "position")} | {"unit": partition[order]}
    return {
        "tokens": tokens.astype(np.int64),
        "sizes": clusters.sizes,
        "centroids": as_stored(clusters.centroids, settings.store_dtype),
        "counts": clusters.counts,
        "spread": clusters.rms_distance,
        "inertia": clusters.inertia,
        **exemplar_places(clusters.assignment, clusters.distance, clusters.sizes, sizes, places, settings.exemplars),
    }


def _are_large(counts: np.ndarray, settings: ClusterSettings) -> np.ndarray:
    """Return which tokens with these numbers of rows have more points than a chunk may have."""
    return clustered_points(counts, settings) > settings.max_points_per_part


def clustering_memory(run: RunFolder, config: BuildConfig, dim: int, scale: float = 1.0) -> float:
    """Return the peak bytes of a clustering task: a shard twice and a graph of mcl, or the chunks of a large token.

    `run` has a finished plan; `dim` is the D of the teacher, `scale` the size of the corpus relative to the plan's text.
    """
    arrays = load_arrays(run.thresholds, ("stored", "shards"))
    stored = arrays["stored"] * scale
    points = clustered_points(stored, config)
    first = arrays["shards"][:-1]
    large = (np.diff(arrays["shards"]) == 1) & (points[first] > config.max_points_per_part)
    shard = 2 * record_type(dim).itemsize * np.add.reduceat(stored, first)[~large].max(initial=0)
    graph = 22 * min(MCL_POINTS, points.max()) ** 2 if config.senses == "mcl" else 0
    chunks = np.minimum(points[first][large], CHUNKS_HELD * config.max_points_per_part).max(initial=0)
    return float(max(shard + graph, chunks * (2 * dim + 16)))


def clustered_points(stored: np.ndarray, config: BuildConfig | ClusterSettings) -> np.ndarray:
    """Return the number of points of each token that are clustered."""
    return np.minimum(stored, config.max_occurrences) if config.max_occurrences else stored
