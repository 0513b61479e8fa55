"""Stage 4, first half: choose the number of senses of each token (K) on Ray, for `--senses auto` and `mcl`.

One task per shard examines the first points by key of each token and writes variance curves (auto) or K itself (mcl);
one last task merges them, for auto by allocating the budget. A shard's task holds its rows twice (only the sample, if
the shard is one large token); the last task needs the memory of `allocation` and 150 bytes per token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from msense.clustering.allocation import Curves, allocate
from msense.clustering.kmeans import CURVE_POINTS, GRID, variance_curves
from msense.clustering.mcl import MCL_POINTS, MclConfig, mcl_senses
from msense.io.arrays import load_arrays, save_arrays
from msense.run.journal import Journal
from msense.run.resume import finished
from msense.runtime.ray_executor import map_tasks, run_task
from msense.runtime.resources import Resources
from msense.stages.distributed_kmeans import first_by_key
from msense.stages.embedding_store import ClusterSettings, read_ranges, sample, shard_ranges, stored


@dataclass(frozen=True)
class SenseSettings:
    """Settings of this stage's tasks."""

    clustering: ClusterSettings
    budget: int  # total number of senses, for auto
    mcl: MclConfig | None  # None: auto


def count_senses(
    settings: SenseSettings, shards: np.ndarray, resources: Resources, journal: Journal | None = None
) -> dict[str, Any]:
    """Choose the number of senses of every token and write it to the run folder.

    Args:
        settings: run folder and rule.
        shards: int64 [shards + 1], first token of each shard.
        resources: limit of concurrent tasks.
        journal: records how many outputs are reused and how many are new.

    Returns:
        Stats: `senses` in total, and those of the token with most (`largest`).
    """
    run = settings.clustering.run
    files = [run.curves_file(number) for number in range(len(shards) - 1)]
    *done, whole = finished("senses", run, [*files, run.senses], resources, journal)
    todo = [
        {"shard": number, "first": int(shards[number]), "last": int(shards[number + 1])}
        for number, stats in enumerate(done)
        if stats is None
    ]
    if todo or whole is None:
        for _ in map_tasks("senses", shard_sense_counts, todo, resources, settings, needs=resources.clustering):
            pass
        whole = run_task(_merge_shards, files, settings)
        if journal is not None:
            journal.add("senses", made=len(todo) + 1)
    return {name: whole[name] for name in ("senses", "largest")}


def shard_sense_counts(item: dict[str, int], settings: SenseSettings) -> dict[str, Any]:
    """Write the variance curves, or with mcl the numbers of senses, of a shard's tokens."""
    own, shard = settings.clustering, item["shard"]
    wanted = CURVE_POINTS if settings.mcl is None else MCL_POINTS
    cap = min(wanted, own.max_occurrences or wanted)
    ranges, rows = shard_ranges(own, shard)
    alone = item["last"] - item["first"] == 1
    records, _ = read_ranges(own, first_by_key(own, ranges, cap) if alone else ranges)
    rows_of_tokens = np.array([rows]) if alone else np.unique(records["token"], return_counts=True)[1]
    chosen, key_rank = sample(records["key"], records["token"], cap)
    chosen = chosen[np.lexsort((key_rank, records["token"][chosen]))]  # by key within each token
    tokens, sizes = np.unique(records["token"][chosen], return_counts=True)
    points = stored(records["embedding"][chosen], own.store_dtype)
    arrays = {
        "tokens": tokens.astype(np.int64),
        "points": np.minimum(rows_of_tokens, own.max_occurrences or rows_of_tokens)[: len(tokens)],
    }
    if settings.mcl is None:
        arrays["variance"] = variance_curves(points, sizes, tokens, own.kmeans, device=own.device)
    else:
        arrays["senses"] = mcl_senses(points, sizes, settings.mcl, token_ids=tokens, device=own.device)
    return own.run.publish(own.run.curves_file(shard), lambda path: save_arrays(path, arrays))


def _merge_shards(files: list[str], settings: SenseSettings) -> dict[str, Any]:
    """Write the file of all numbers and return its stats."""
    own = settings.clustering
    by_shard = [load_arrays(file) for file in files]
    arrays = {name: np.concatenate([shard[name] for shard in by_shard]) for name in by_shard[0]}
    tokens, occurrences = arrays["tokens"], load_arrays(own.run.thresholds, ("token_counts",))["token_counts"]
    if settings.mcl is None:
        curves = Curves(arrays["points"], occurrences[tokens], arrays["variance"])
        numbers = allocate(curves, GRID, settings.budget, own.dim)
    else:
        numbers = arrays["senses"]
    senses = np.zeros(len(occurrences), np.int64)
    senses[tokens] = numbers
    stats = {"senses": int(numbers.sum()), "largest": int(numbers.max(initial=0))}
    return own.run.publish(own.run.senses, lambda path: save_arrays(path, {"senses": senses}), stats)
