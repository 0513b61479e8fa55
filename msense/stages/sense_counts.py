"""Stage 4, first half: choose the number of senses of each token (K), for `--senses auto` and `mcl`.

One task per shard examines the first points by key of each token and writes variance curves (auto) or K itself (mcl);
one last task merges them, for auto by allocating the budget. A shard's task holds its rows twice (only the sample, if
the shard is one large token); the last task needs the memory of `allocation` and 150 bytes per token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from msense.clustering.allocation import Curves, allocate
from msense.clustering.kmeans import CURVE_POINTS, GRID, variance_curves
from msense.clustering.mcl import MCL_POINTS, MclConfig, mcl_senses
from msense.clustering.nearest import sample
from msense.io.arrays import load_arrays, save_arrays
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import Stage
from msense.stages.distributed_kmeans import first_by_key
from msense.stages.embedding_store import ClusterSettings, read_ranges, shard_items, shard_ranges, stored


@dataclass(frozen=True)
class SenseSettings:
    """Settings of this stage's tasks."""

    clustering: ClusterSettings
    budget: int  # total number of senses, for auto
    mcl: MclConfig | None  # None: auto


@dataclass(frozen=True)
class SenseCountStats:
    """The numbers of senses to compute."""

    senses: int  # in total
    largest: int  # of the token with most


class SenseCountStage(Stage[SenseCountStats]):
    """Chooses the number of senses of every token and writes it to the run folder."""

    name = "senses"

    def __init__(self, settings: SenseSettings, shards: np.ndarray) -> None:
        """Choose for shards, int64 [shards + 1] with the first token of each."""
        super().__init__(settings.clustering.run)
        self.settings, self.shards = settings, shards
        self.curves = [self.run.curves_file(number) for number in range(len(shards) - 1)]

    def outputs(self) -> list[str]:
        """Return one file per shard, and the file of all numbers."""
        return [*self.curves, self.run.senses]

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Examine the missing shards, then choose the numbers of all tokens again."""
        if not missing:
            return
        items = shard_items(self.shards, [number for number in missing if number < len(self.curves)])
        needs = executor.resources.clustering
        yield from executor.map(self.name, shard_sense_counts, items, self.settings, needs=needs)
        yield {"number": len(self.curves), **executor.run(_merge_shards, self.curves, self.settings)}

    def reduce(self, executor: Executor, stats: list[Row]) -> SenseCountStats:
        """Return the totals."""
        return SenseCountStats(stats[-1]["senses"], stats[-1]["largest"])


def shard_sense_counts(item: Row, settings: SenseSettings) -> Row:
    """Write the variance curves, or with mcl the numbers of senses, of a shard's tokens."""
    own, shard = settings.clustering, item["number"]
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
    return own.run.publish(own.run.curves_file(shard), lambda path: save_arrays(path, arrays), {"number": shard})


def _merge_shards(files: list[str], settings: SenseSettings) -> Row:
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
