"""Stage 4, second half: cluster the tokens of each shard on Ray and write one file of centroids per shard.

A task holds its shard twice (rows and points). Tokens of more than `max_points_per_part` points go to `msense.parts`.
"""

from typing import Any

import numpy as np

from msense.clustering import kmeans
from msense.clustering.mcl import MCL_POINTS
from msense.clustering.nearest import exemplar_places
from msense.config.build import BuildConfig
from msense.io import storage
from msense.io.arrays import load_arrays, save_arrays
from msense.run.folder import RunFolder
from msense.run.journal import Journal
from msense.run.resume import finished
from msense.runtime.ray_executor import map_tasks
from msense.runtime.resources import Resources
from msense.stages.distributed_kmeans import cluster_large
from msense.stages.distributed_kmeans_worker import CHUNKS_HELD
from msense.stages.embedding_store import (
    ClusterSettings,
    Range,
    as_stored,
    read_ranges,
    record_type,
    sample,
    sense_counts,
    shard_ranges,
    stored,
)


def cluster(
    settings: ClusterSettings, shards: np.ndarray, resources: Resources, journal: Journal | None = None
) -> list[str]:
    """Cluster every token that has occurrences.

    Args:
        settings: run folder and k-means settings.
        shards: int64 [shards + 1], first token of each shard.
        resources: limit of concurrent tasks.
        journal: records how many outputs are reused and how many are new.

    Returns:
        The centroid files, in shard order, then those of large tokens.
    """
    run, total = settings.run, len(shards) - 1
    files = [run.shard_file(shard) for shard in range(total)]
    stats = dict(enumerate(finished("clustering", run, files, resources, journal)))
    todo = [
        {"shard": shard, "first": int(shards[shard]), "last": int(shards[shard + 1])}
        for shard, done in stats.items()
        if done is None
    ]
    for row in map_tasks("clustering", cluster_shard, todo, resources, settings, needs=resources.clustering):
        stats[row["shard"]] = row
    large = {
        int(token): [Range(*r) for r in ranges]
        for row in stats.values()
        if row
        for token, ranges in row["large"].items()
    }
    token_files = [run.token_file(token) for token in sorted(large)]
    done = finished("clustering", run, token_files, resources, journal)
    waiting = {token: large[token] for token, row in zip(sorted(large), done, strict=True) if row is None}
    if waiting:
        cluster_large(waiting, settings, resources)
    for name in storage.names(run.centroids):
        if run.is_round(name):  # left over from a finished token
            storage.remove(storage.join(run.centroids, name))
    if journal is not None:
        journal.add("clustering", made=len(todo) + len(waiting))
    return files + token_files


def cluster_shard(item: dict[str, int], settings: ClusterSettings) -> dict[str, Any]:
    """Cluster one shard; large tokens are only returned, as `large`, with their rows in every partition."""
    run, shard = settings.run, item["shard"]
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
    records, partition = records[kept], partition[kept]
    arrays = _clustered(records, partition, settings)
    stats = {"shard": shard, "large": large}
    return run.publish(run.shard_file(shard), lambda path: save_arrays(path, arrays), stats)


def _clustered(records: np.ndarray, partition: np.ndarray, settings: ClusterSettings) -> dict[str, np.ndarray]:
    """Cluster the tokens of records [n] from partitions int32 [n]; return the arrays of a centroids file."""
    order, key_order = sample(records["key"], records["token"], settings.max_occurrences)
    tokens, sizes = np.unique(records["token"][order], return_counts=True)
    clusters = kmeans.cluster_tokens(
        stored(records["embedding"][order], settings.store_dtype),
        sizes,
        tokens,
        settings.kmeans,
        senses=sense_counts(settings, tokens),
        device=settings.device,
        key_order=key_order,
    )
    places = {name: records[name][order] for name in ("token", "row", "position")} | {"unit": partition[order]}
    assigned = (clusters.assignment, clusters.distance)
    return {
        "tokens": tokens.astype(np.int64),
        "sizes": clusters.sizes,
        "centroids": as_stored(clusters.centroids, settings.store_dtype),
        "counts": clusters.counts,
        "spread": clusters.rms_distance,
        "inertia": clusters.inertia,
        **exemplar_places(assigned, clusters.sizes, sizes, places, settings.exemplars),
    }


def _are_large(counts: np.ndarray, settings: ClusterSettings) -> np.ndarray:
    """Return which tokens of so many rows have more points than a chunk may have."""
    return np.minimum(counts, settings.max_occurrences or counts) > settings.max_points_per_part


def clustering_memory(run: RunFolder, config: BuildConfig, dim: int, scale: float = 1.0) -> float:
    """Return the most bytes that a task or worker holds: a shard twice and a graph of mcl, or parts of a large token.

    Args:
        run: with a finished plan.
        config: the build's settings.
        dim: D of the teacher.
        scale: how many times more text there is than the plan has seen.
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


def clustered_points(stored: np.ndarray, config: BuildConfig) -> np.ndarray:
    """Return how many points of each token are clustered."""
    return np.minimum(stored, config.max_occurrences) if config.max_occurrences else stored
