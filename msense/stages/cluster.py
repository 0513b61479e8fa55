"""Stage 4, second half: cluster the tokens of each shard and write one file of centroids per shard.

A task holds its shard twice (rows and points). A large token, the only one of its shard and of more than
`max_points_per_part` points, is left to `distributed_kmeans`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from msense.clustering import kmeans
from msense.clustering.mcl import MCL_POINTS
from msense.clustering.selection import exemplar_places, first_by_key
from msense.config.build import BuildConfig
from msense.io.arrays import load_arrays, save_arrays
from msense.run.folder import RunFolder
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import Stage
from msense.stages.distributed_kmeans_worker import CHUNKS_HELD
from msense.stages.embedding_store import (
    ClusterSettings,
    as_stored,
    read_ranges,
    read_sense_counts,
    record_type,
    shard_items,
    shard_ranges,
    stored,
)


class ClusterStage(Stage[dict[int, int]]):
    """Clusters the tokens of every shard; the result is the shard of each large token, which the next stage clusters."""

    name = "clustering"

    def __init__(self, settings: ClusterSettings, shards: np.ndarray) -> None:
        """Cluster shards, int64 [shards + 1] with the first token of each."""
        super().__init__(settings.run, [settings.run.shard_file(shard) for shard in range(len(shards) - 1)])
        self.settings, self.shards = settings, shards

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Cluster the missing shards."""
        items, needs = shard_items(self.shards, missing), executor.resources.clustering
        return executor.map(self.name, cluster_shard, items, self.settings, needs=needs)

    def reduce(self, executor: Executor, stats: list[Row]) -> dict[int, int]:
        """Return the shard of every large token, by token id."""
        return {int(self.shards[shard]): shard for shard, row in enumerate(stats) if row["large"]}


def cluster_shard(item: Row, settings: ClusterSettings) -> Row:
    """Cluster one shard; return whether it is a large token, of which nothing is read."""
    run, shard = settings.run, item["number"]
    ranges = shard_ranges(settings, shard)
    points = clustered_points(sum(map(len, ranges)), settings)
    large = bool(item["last"] - item["first"] == 1 and points > settings.max_points_per_part)
    arrays = _clustered(*read_ranges(settings, [] if large else ranges), settings)
    return run.publish(run.shard_file(shard), lambda path: save_arrays(path, arrays), {"number": shard, "large": large})


def _clustered(records: np.ndarray, partition: np.ndarray, settings: ClusterSettings) -> dict[str, np.ndarray]:
    """Cluster the tokens of records [n] from partitions int32 [n]; return the arrays of a centroids file."""
    order, key_order = first_by_key(records["key"], records["token"], settings.max_occurrences)
    tokens, sizes = np.unique(records["token"][order], return_counts=True)
    points, senses = stored(records["embedding"][order], settings.store_dtype), read_sense_counts(settings, tokens)
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


def clustered_points(stored: Any, config: BuildConfig | ClusterSettings) -> Any:
    """Return how many of a token's stored occurrences are clustered, for numbers or arrays of them."""
    return np.minimum(stored, config.max_occurrences) if config.max_occurrences else stored
