"""Stage 4, second half, on Ray: unit files in, centroids out, a file a shard.

A task reads its shard's rows from every unit (one range each) and clusters its tokens. It holds the shard twice (its
rows and its points). Tokens of more than `max_points_per_part` points are left to `parts`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from msense import kmeans, storage
from msense.parts import cluster_large
from msense.resume import Journal, finished
from msense.runtime import Resources, map_tasks
from msense.units import (
    ClusterSettings,
    Range,
    as_stored,
    exemplar_places,
    read_ranges,
    sample,
    senses_of,
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
        resources: how many tasks at a time.
        journal: where to note what is kept of earlier drivers and what is made.

    Returns:
        The centroid files, in shard order (a shard may have several).
    """
    run = settings.run
    total = len(shards) - 1
    facts = dict(enumerate(finished("clustering", run, [run.shard_file(n) for n in range(total)], resources, journal)))
    todo = [
        {"shard": shard, "first": int(shards[shard]), "last": int(shards[shard + 1])}
        for shard, f in facts.items()
        if f is None
    ]
    for row in map_tasks("clustering", cluster_shard, todo, resources, settings, needs=resources.clustering):
        facts[row["shard"]] = row
    large = {
        int(token): [Range(*r) for r in ranges] for f in facts.values() if f for token, ranges in f["large"].items()
    }
    files = [run.shard_file(shard) for shard in range(total)] + [run.token_file(token) for token in sorted(large)]
    done = finished("clustering", run, files[total:], resources, journal)
    waiting = {token: large[token] for token, f in zip(sorted(large), done, strict=True) if f is None}
    if waiting:
        cluster_large(waiting, settings, resources)
    for left in storage.names(run.centroids):
        if run.is_round(left):  # of a token that is finished
            storage.remove(storage.join(run.centroids, left))
    if journal is not None:
        journal.add("clustering", made=len(todo) + len(waiting))
    return files


def cluster_shard(item: dict[str, int], settings: ClusterSettings) -> dict[str, Any]:
    """Cluster one shard; tokens that must be cut into parts are only named, with the rows they have in every unit."""
    run, shard = settings.run, item["shard"]
    ranges, rows = shard_ranges(settings, shard)
    large: dict[str, list[tuple[int, int, int]]] = {}
    if item["last"] - item["first"] == 1 and _capped(rows, settings) > settings.max_points_per_part:
        large[str(item["first"])] = [(r.unit, r.start, r.stop) for r in ranges if r.stop > r.start]
        ranges = []
    records, unit = read_ranges(settings, ranges)
    found = _large_tokens(records["token"], settings)
    for r in ranges if found else []:
        mine = records["token"][unit == r.unit]
        for token in found:
            start, stop = np.searchsorted(mine, [token, token + 1]).tolist()
            if start < stop:
                large.setdefault(str(token), []).append((r.unit, r.start + start, r.start + stop))
    kept = ~np.isin(records["token"], found)
    records, unit = records[kept], unit[kept]
    order, key_order = sample(records["key"], records["token"], settings.max_occurrences)
    tokens, sizes = np.unique(records["token"][order], return_counts=True)
    points = stored(records["embedding"][order], settings.store_dtype)
    clusters = kmeans.cluster_tokens(
        points,
        sizes,
        tokens,
        settings.kmeans,
        senses=senses_of(settings, tokens),
        device=settings.device,
        key_order=key_order,
    )
    del points
    places = {name: records[name][order] for name in ("token", "row", "position")} | {"unit": unit[order]}
    nearest_places = exemplar_places(
        (clusters.assignment, clusters.distance), clusters.sizes, sizes, places, settings.exemplars
    )
    arrays = {
        "tokens": tokens.astype(np.int64),
        "sizes": clusters.sizes,
        "centroids": as_stored(clusters.centroids, settings.store_dtype),
        "counts": clusters.counts,
        "spread": clusters.spread,
        "inertia": clusters.inertia,
        **nearest_places,
    }

    def write(path: Path) -> None:
        storage.save_arrays(path, arrays)

    return run.publish(run.shard_file(shard), write, {"shard": shard, "large": large})


def _capped(rows: int, settings: ClusterSettings) -> int:
    return min(rows, settings.max_occurrences) if settings.max_occurrences else rows


def _large_tokens(tokens: np.ndarray, settings: ClusterSettings) -> list[int]:
    """Name the tokens of more points than a part may have."""
    token, count = np.unique(tokens, return_counts=True)
    capped = np.minimum(count, settings.max_occurrences) if settings.max_occurrences else count
    return [int(t) for t in token[capped > settings.max_points_per_part]]
