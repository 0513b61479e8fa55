"""Cluster tokens that are too large for one worker: their points are split into chunks held by several actors.

In each round every worker sums its chunks per cluster, the driver adds the workers' sums and sends out new centroids,
and writes them to the run folder while the workers compute, so that a later run resumes there.

For N points of width D and K senses, a round costs about N x D x K multiplications, and sends 4 K D bytes to and 8 K D
bytes from each worker; no traffic grows with N. The driver holds 32 K D bytes per active token; a worker needs
SEED_POINTS (6 D + 60) bytes to prepare one.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from typing import Any

import numpy as np

from msense.clustering.kmeans import blocks, seeding
from msense.clustering.selection import Places, merge_exemplars
from msense.io import storage
from msense.io.arrays import load_arrays, save_arrays
from msense.runtime import Executor
from msense.runtime.executor import Row, Worker
from msense.runtime.progress import track
from msense.stages.base import Stage
from msense.stages.distributed_kmeans_worker import CHUNKS_HELD, Chunk, ChunkWorker, read_blocks, slice_ranges
from msense.stages.embedding_store import (
    ClusterSettings,
    Range,
    as_stored,
    read_ranges,
    read_sense_counts,
    shard_ranges,
    stored,
)

logger = logging.getLogger(__name__)
WINDOW = 64  # rows on each side of the expected cut, in addition to four standard deviations, in which it is searched


class LargeTokenStage(Stage[list[str]]):
    """Clusters large tokens; the result is their centroids files."""

    name = "large tokens"

    def __init__(self, settings: ClusterSettings, large: dict[int, int]) -> None:
        """Cluster tokens, each the only one of a shard, given by token id."""
        self.settings, self.large = settings, dict(sorted(large.items()))
        super().__init__(settings.run, [settings.run.token_file(token) for token in self.large])

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Cluster the missing tokens, as many at a time as the workers can hold."""
        tokens = list(self.large)
        waiting = {tokens[number]: self.large[tokens[number]] for number in missing}
        with executor.clustering_workers(ChunkWorker, self.settings) as workers:
            rounds = Rounds(executor, workers, self.settings).run(waiting)
            for token in track(self.name, rounds, len(waiting)):
                yield {"number": tokens.index(token)}

    def reduce(self, executor: Executor, stats: list[Row]) -> list[str]:
        """Remove the files of all rounds and return the centroids files."""
        for name in storage.names(self.run.centroids):
            if "-round.safetensors" in name:
                storage.remove(storage.join(self.run.centroids, name))
        return self.outputs


@dataclass
class _Token:
    """A token whose rounds are in progress."""

    state: blocks.BlockedState
    load: np.ndarray  # int64 [workers], its chunks on each
    homes: list[tuple[Worker, Any]]  # workers that have some, with a handle to these, in order
    sent: Any = None  # handle to the state of the current round
    pending: deque[Any] = field(default_factory=deque)  # handles to its results


class Rounds:
    """Runs the rounds of several tokens on the same workers."""

    def __init__(self, executor: Executor, workers: Sequence[Worker], settings: ClusterSettings) -> None:
        self.executor, self.workers, self.settings = executor, workers, settings
        self.load = np.zeros(len(workers), np.int64)  # chunks of unfinished tokens

    def run(self, waiting: dict[int, int]) -> Iterator[int]:
        """Run rounds until every token, given with its shard, has converged; yield each token when it is finished.

        A token starts as soon as the workers can hold its chunks; one with more chunks than that runs alone.
        """
        prepared = self._prepare(waiting)
        following = next(prepared, None)
        working: deque[_Token] = deque()
        while working or following:
            while following and (not working or self.load.sum() + len(following[0]) <= CHUNKS_HELD * len(self.workers)):
                working.append(self.start(*following))
                following = next(prepared, None)
            token = working.popleft()
            if self._close_round(token):
                working.append(token)
                continue
            self.load -= token.load
            yield token.state.token_id

    def _prepare(self, waiting: dict[int, int]) -> Iterator[tuple[list[Chunk], blocks.BlockedState]]:
        """Prepare tokens on the workers, which hold all GPUs, one per worker at a time; yield them in order."""
        running: deque[Any] = deque()
        for worker, (token, shard) in zip(cycle(self.workers), waiting.items(), strict=False):
            running.append(worker("do", prepare, token, shard))
            if len(running) == len(self.workers):
                yield self.executor.get(running.popleft())
        while running:
            yield self.executor.get(running.popleft())

    def start(self, chunks: list[Chunk], state: blocks.BlockedState) -> _Token:
        """Distribute a token's chunks over the workers with the lowest load, neighbours together; begin its first round."""
        load = np.zeros_like(self.load)
        for _ in chunks:
            load[np.argmin(self.load + load)] += 1
        self.load += load
        own = [chunks[stop - count : stop] for count, stop in zip(load, np.cumsum(load), strict=True)]
        homes = [(worker, self.executor.put(part)) for worker, part in zip(self.workers, own, strict=True) if part]
        token = _Token(_resume(self.settings, state.token_id) or state, load, homes)
        self._begin_round(token)
        return token

    def _begin_round(self, token: _Token) -> None:
        token.sent = self.executor.put(token.state)
        token.pending = deque(_call(token, "partial"))

    def _close_round(self, token: _Token) -> bool:
        """Add up the results, then begin the next round or write the token's file; return whether it continues."""
        total = blocks.combine(self.executor.get(token.pending.popleft()) for _ in token.homes)
        far = None
        if empty := int((total.counts == 0).sum()):
            far = blocks.combine_farthest(self.executor.get(_call(token, "farthest", empty)), empty)
        token.state = state = blocks.update(token.state, total, self.settings.kmeans, far)
        logger.debug("token %d: round %d, inertia %.9g", state.token_id, state.rounds, state.inertia)
        if state.final is None:
            self._begin_round(token)
            _write_round(self.settings, state)  # while the workers compute
            return True
        token.sent = self.executor.put(state)
        _write_token(self.settings, state, self.executor.get(_call(token, "finish")))
        return False


def _call(token: _Token, method: str, *arguments: Any) -> list[Any]:
    """Call a method of every worker with its chunks of a token and the token's current state."""
    return [worker(method, chunks, token.sent, *arguments) for worker, chunks in token.homes]


def prepare(token: int, shard: int, settings: ClusterSettings) -> tuple[list[Chunk], blocks.BlockedState]:
    """Select a token's points (the first `max_occurrences` by key), split them into chunks and choose the seeds."""
    chosen = shard_ranges(settings, shard)
    if settings.max_occurrences:
        chosen = first_ranges_by_key(settings, chosen, settings.max_occurrences)
    records, _ = read_ranges(settings, first_ranges_by_key(settings, chosen, seeding.SEED_POINTS))
    embeddings = records["embedding"][np.argsort(records["key"], kind="stable")]
    del records
    config = replace(settings.kmeans, k=int(read_sense_counts(settings, np.array([token]))[0]))
    state = blocks.seed_centroids(stored(embeddings, settings.store_dtype), token, config, device=settings.device)
    rows = max(1, settings.max_points_per_part // seeding.BLOCK_ROWS) * seeding.BLOCK_ROWS
    starts = range(0, sum(map(len, chosen)), rows)
    return [Chunk(token, first, tuple(slice_ranges(chosen, first, first + rows))) for first in starts], state


def first_ranges_by_key(settings: ClusterSettings, ranges: list[Range], count: int) -> list[Range]:
    """Shorten a token's ranges to its first `count` rows by key, ties in corpus order.

    The rows of a partition are sorted by key, and keys are random, so the position of the cut in each range is almost
    known. Only a window of rows around it is read, and widened where it does not contain the cut.
    """
    rows = np.array([len(r) for r in ranges])
    if count >= rows.sum():
        return ranges
    expected, margin = rows * (count / rows.sum()), WINDOW + 4 * np.sqrt(rows)
    low = np.maximum(expected - margin, 0).astype(np.int64)
    high = np.minimum(np.ceil(expected + margin), rows).astype(np.int64)
    while True:
        cuts = zip(ranges, low.tolist(), high.tolist(), strict=True)
        windows = [Range(r.partition, r.start + first, r.start + last) for r, first, last in cuts]
        keys = [records["key"].copy() for records in read_blocks(settings, windows)]
        by_key = np.argsort(np.concatenate(keys), kind="stable")[: count - low.sum()]
        taken = np.bincount(np.repeat(np.arange(len(ranges)), high - low)[by_key], minlength=len(ranges))
        width, below, above = high - low, (taken == 0) & (low > 0), (taken == high - low) & (high < rows)
        if not (below | above).any():
            counts = zip(ranges, (low + taken).tolist(), strict=True)
            return [Range(r.partition, r.start, r.start + count) for r, count in counts if count]
        low, high = low - np.minimum(width, low) * below, high + np.minimum(width, rows - high) * above


def _write_round(settings: ClusterSettings, state: blocks.BlockedState) -> None:
    """Write a token's state, for `_resume`."""
    arrays = {name: np.asarray(value) for name, value in asdict(state).items() if value is not None}
    settings.run.publish(settings.run.round_file(state.token_id), lambda path: save_arrays(path, arrays))


def _resume(settings: ClusterSettings, token: int) -> blocks.BlockedState | None:
    """Return a token's state at the end of an earlier run, if any."""
    file = settings.run.round_file(token)
    if storage.stats_of(file, verify=True, inputs_hash=settings.run.inputs_hash) is None:
        return None
    values: dict[str, Any] = load_arrays(file)
    return blocks.BlockedState(**{name: value if value.ndim else value.item() for name, value in values.items()})


def _write_token(
    settings: ClusterSettings, state: blocks.BlockedState, chunks: list[tuple[blocks.Finished, Places]]
) -> None:
    """Write the centroids file of a finished token."""
    assert state.final is not None
    counts, rms_distance, inertia = blocks.summary(state, [done for done, _ in chunks])
    arrays = {
        "tokens": np.array([state.token_id]),
        "sizes": np.array([len(counts)]),
        "centroids": as_stored(state.final, settings.store_dtype),
        "counts": counts,
        "spread": rms_distance,
        "inertia": np.array([inertia]),
        **merge_exemplars([places for _, places in chunks], settings.exemplars),
    }
    settings.run.publish(settings.run.token_file(state.token_id), lambda path: save_arrays(path, arrays))
