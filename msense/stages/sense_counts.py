"""Stage 4, first half: choose the number of senses of each token (K), for `--senses auto` and `mcl`.

One task per shard examines the first points by key of each token and writes variance curves (auto) or K itself (mcl);
one last task merges them, for auto by allocating the budget. A shard's task holds its rows twice (only the sample, if
the shard is one large token); the last task needs the memory of `allocation` and 150 bytes per token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from msense.clustering.allocation import CURVE_POINTS, GRID, Allocation, Curves, variance_curves
from msense.clustering.mcl import MCL_POINTS, MclConfig, mcl_senses
from msense.clustering.selection import first_by_key
from msense.io.arrays import load_arrays, save_arrays
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import Stage
from msense.stages.cluster import clustered_points
from msense.stages.distributed_kmeans import first_ranges_by_key
from msense.stages.embedding_store import ClusterSettings, read_ranges, shard_items, shard_ranges, stored

_BUDGETS = 2.0 ** np.arange(-2, 2.5, 0.5)  # whose distortion is estimated, in parts of the budget


@dataclass(frozen=True)
class SenseCountStats:
    """The numbers of senses to compute."""

    senses: int  # in total
    largest: int  # of the token with most
    budget_curve: list[list[float]] = field(default_factory=list)  # see `Allocation.estimates`; empty with mcl


class SenseCountStage(Stage[SenseCountStats]):
    """Chooses the number of senses of every token and writes it to the run folder."""

    name = "senses"

    def __init__(self, settings: ClusterSettings, shards: np.ndarray, rule: MclConfig | int) -> None:
        """Choose for shards, int64 [shards + 1] with the first token of each, by mcl or for a total number of senses."""
        self.curves = [settings.run.curves_file(number) for number in range(len(shards) - 1)]
        super().__init__(settings.run, [*self.curves, settings.run.senses])
        self.settings, self.shards, self.rule = settings, shards, rule

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Examine the missing shards, then choose the numbers of all tokens again."""
        items = shard_items(self.shards, [number for number in missing if number < len(self.curves)])
        needs = executor.resources.clustering
        yield from executor.map(self.name, shard_sense_counts, items, self.settings, self.rule, needs=needs)
        stats = executor.run(_choose_all, self.curves, self.settings, self.rule)
        yield {"number": len(self.curves), **stats}

    def reduce(self, executor: Executor, stats: list[Row]) -> SenseCountStats:
        """Return the totals."""
        own = stats[-1]  # of an earlier version without a curve
        return SenseCountStats(own["senses"], own["largest"], own.get("budget_curve", []))


def shard_sense_counts(item: Row, settings: ClusterSettings, rule: MclConfig | int) -> Row:
    """Write the variance curves, or with mcl the numbers of senses, of a shard's tokens."""
    shard, mcl = item["number"], rule if isinstance(rule, MclConfig) else None
    wanted = MCL_POINTS if mcl else CURVE_POINTS
    cap = min(wanted, settings.max_occurrences or wanted)
    ranges = shard_ranges(settings, shard)
    alone = item["last"] - item["first"] == 1
    records, _ = read_ranges(settings, first_ranges_by_key(settings, ranges, cap) if alone else ranges)
    rows = np.array([sum(map(len, ranges))]) if alone else np.unique(records["token"], return_counts=True)[1]
    chosen, key_rank = first_by_key(records["key"], records["token"], cap)
    chosen = chosen[np.lexsort((key_rank, records["token"][chosen]))]  # by key within each token
    tokens, sizes = np.unique(records["token"][chosen], return_counts=True)
    points = stored(records["embedding"][chosen], settings.store_dtype)
    arrays = {"tokens": tokens.astype(np.int64), "points": clustered_points(rows, settings)[: len(tokens)]}
    if mcl:
        arrays["senses"] = mcl_senses(points, sizes, mcl, token_ids=tokens, device=settings.device)
    else:
        arrays["variance"] = variance_curves(points, sizes, tokens, settings.kmeans, device=settings.device)
    run = settings.run
    return run.publish(run.curves_file(shard), lambda path: save_arrays(path, arrays), {"number": shard})


def _choose_all(files: list[str], settings: ClusterSettings, rule: MclConfig | int) -> Row:
    """Write the file of all numbers and return its stats."""
    run, by_shard = settings.run, [load_arrays(file) for file in files]
    arrays = {name: np.concatenate([shard[name] for shard in by_shard]) for name in by_shard[0]}
    tokens, occurrences = arrays["tokens"], load_arrays(run.thresholds, ("token_counts",))["token_counts"]
    curve: list[list[float]] = []
    if isinstance(rule, MclConfig):
        numbers = arrays["senses"]
    else:
        curves = Curves(arrays["points"], occurrences[tokens], arrays["variance"])
        allocation = Allocation(curves, GRID, settings.dim)
        numbers = allocation.numbers(rule)
        curve = [list(own) for own in allocation.estimates((_BUDGETS * rule).astype(np.int64).tolist())]
    senses = np.zeros(len(occurrences), np.int64)
    senses[tokens] = numbers
    stats = {"senses": int(numbers.sum()), "largest": int(numbers.max(initial=0)), "budget_curve": curve}
    return run.publish(run.senses, lambda path: save_arrays(path, {"senses": senses}), stats)
