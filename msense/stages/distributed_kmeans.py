"""Cluster tokens that are too large for one worker: their points are split into chunks held by several actors.

In each round every worker sums its chunks per cluster, the driver adds the workers' sums and sends out new centroids,
and writes them to the run folder while the workers compute, so that a later run resumes there. Tokens converge
independently of each other.

For N points of width D and K senses, a round costs about N x D x K multiplications, and sends 4 K D bytes to and 8 K D
bytes from each worker; no traffic grows with N. A worker holds up to CHUNKS_HELD chunks (2 D + 16 bytes per point, on
the GPU where they fit) and reads others again in every round. The driver holds 32 K D bytes per active token, and needs
SEED_POINTS (6 D + 60) bytes more to prepare one.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from msense.clustering.kmeans import blocks, seeding
from msense.clustering.nearest import Places, merge_exemplars
from msense.io import storage
from msense.io.arrays import load_arrays, save_arrays
from msense.runtime import Executor
from msense.runtime.executor import Row, Worker
from msense.runtime.progress import track
from msense.stages.base import Stage
from msense.stages.distributed_kmeans_worker import CHUNKS_HELD, Chunk, ChunkWorker, read_blocks, slice_ranges
from msense.stages.embedding_store import ClusterSettings, Range, as_stored, read_ranges, sense_counts, stored

logger = logging.getLogger(__name__)
WINDOW = 64  # rows on each side of the expected cut, in addition to four standard deviations, in which it is searched


@dataclass(frozen=True)
class Prepared:
    """A token split into chunks, with its initial centroids."""

    chunks: tuple[Chunk, ...]
    state: blocks.BlockedState


class LargeTokenStage(Stage[list[str]]):
    """Clusters tokens of more than `max_points_per_part` points; the result is their centroids files."""

    name = "large tokens"

    def __init__(self, settings: ClusterSettings, large: dict[int, list[Range]]) -> None:
        """Cluster tokens with these rows in the partitions, in corpus order."""
        super().__init__(settings.run)
        self.settings, self.large = settings, large

    def outputs(self) -> list[str]:
        """Return one centroids file per token."""
        return [self.run.token_file(token) for token in sorted(self.large)]

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Cluster the missing tokens, as many at a time as the workers can hold."""
        if not missing:
            return
        tokens = sorted(self.large)
        waiting = {tokens[number]: self.large[tokens[number]] for number in missing}
        with executor.clustering_workers(ChunkWorker, self.settings) as workers:
            for token in track(self.name, run_rounds(executor, workers, waiting, self.settings), len(waiting)):
                yield {"number": tokens.index(token)}

    def reduce(self, executor: Executor, stats: list[Row]) -> list[str]:
        """Remove the files of finished rounds and return the centroids files."""
        for name in storage.names(self.run.centroids):
            if self.run.is_round(name):
                storage.remove(storage.join(self.run.centroids, name))
        return self.outputs()


def run_rounds(
    executor: Executor, workers: Sequence[Worker], waiting: dict[int, list[Range]], settings: ClusterSettings
) -> Iterator[int]:
    """Run rounds until every token has converged; yield each token when it is finished.

    A token starts as soon as the workers can hold its chunks; one with more chunks than that runs alone.
    """
    room, load = CHUNKS_HELD * len(workers), [0] * len(workers)
    prepared = _prepared(executor, waiting, workers)
    following = next(prepared, None)
    working: deque[_Token] = deque()
    while working or following:
        while following and (not working or sum(load) + len(following.chunks) <= room):
            working.append(_start(following, settings, executor, workers, load))
            following = next(prepared, None)
        token = working.popleft()
        if token.close_round(settings):
            working.append(token)
            continue
        for number, _, chunks in token.homes:
            load[number] -= chunks
        yield token.state.token_id


def _prepared(executor: Executor, waiting: dict[int, list[Range]], workers: Sequence[Worker]) -> Iterator[Prepared]:
    """Prepare tokens on the workers, which hold all GPUs, one per worker at a time; yield them in order."""
    running: deque[Any] = deque()
    for number, (token, ranges) in enumerate(sorted(waiting.items())):
        running.append(workers[number % len(workers)].call("do", prepare, token, ranges))
        if len(running) >= len(workers):
            yield executor.get(running.popleft())
    while running:
        yield executor.get(running.popleft())


def prepare(token: int, ranges: list[Range], settings: ClusterSettings) -> Prepared:
    """Select a token's points (the first `max_occurrences` by key), split them into chunks and choose the seeds."""
    chosen = first_by_key(settings, ranges, settings.max_occurrences) if settings.max_occurrences else ranges
    records, _ = read_ranges(settings, first_by_key(settings, chosen, seeding.SEED_POINTS))
    embeddings = records["embedding"][np.argsort(records["key"], kind="stable")]
    del records
    config = replace(settings.kmeans, k=int(sense_counts(settings, np.array([token]))[0]))
    state = blocks.seed_centroids(stored(embeddings, settings.store_dtype), token, config, device=settings.device)
    rows = max(1, settings.max_points_per_part // seeding.BLOCK_ROWS) * seeding.BLOCK_ROWS
    total = sum(r.stop - r.start for r in chosen)
    chunks = [Chunk(token, first, tuple(slice_ranges(chosen, first, first + rows))) for first in range(0, total, rows)]
    return Prepared(tuple(chunks), state)


def first_by_key(settings: ClusterSettings, ranges: list[Range], count: int) -> list[Range]:
    """Shorten a token's ranges to its first `count` rows by key, ties in corpus order.

    The rows of a partition are sorted by key, and keys are random, so the position of the cut in each range is almost
    known. Only a window of rows around it is read, and widened where it does not contain the cut.
    """
    rows = np.array([r.stop - r.start for r in ranges])
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


@dataclass
class _Token:
    """The driver's view of a token whose rounds are in progress."""

    state: blocks.BlockedState
    homes: list[tuple[int, Any, int]]  # worker's number, handle to its chunks in order, their number
    executor: Executor
    workers: Sequence[Worker]
    sent: Any = None  # handle to the state of the current round
    pending: deque[Any] = field(default_factory=deque)

    def begin_round(self) -> None:
        """Start a round on the workers."""
        self.sent = self.executor.put(self.state)
        self.pending = deque(self._call("partial"))

    def close_round(self, settings: ClusterSettings) -> bool:
        """Add up the results, then begin the next round or write the token's file; return whether it continues."""
        total = blocks.combine(self.executor.get(self.pending.popleft()) for _ in self.homes)
        far = None
        if empty := int((total.counts == 0).sum()):
            far = blocks.combine_farthest(self.executor.get(self._call("farthest", empty)), empty)
        self.state = state = blocks.update(self.state, total, settings.kmeans, far)
        logger.debug("token %d: round %d, inertia %.9g", state.token_id, state.rounds, state.inertia)
        if state.final is None:
            self.begin_round()
            _write_round(settings, state)  # while the workers compute
            return True
        self.sent = self.executor.put(state)
        _write_token(settings, state, self.executor.get(self._call("finish")))
        return False

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every worker with its chunks and the current state."""
        return [self.workers[w].call(method, chunks, self.sent, *arguments) for w, chunks, _ in self.homes]


def _start(
    prepared: Prepared, settings: ClusterSettings, executor: Executor, workers: Sequence[Worker], load: list[int]
) -> _Token:
    """Distribute a token's chunks over the workers with the lowest load, neighbours together; begin its first round."""
    before = list(load)
    for _ in prepared.chunks:
        load[load.index(min(load))] += 1
    counts = [after - had for after, had in zip(load, before, strict=True)]
    stops = np.cumsum(counts).tolist()
    slices = enumerate(zip(counts, stops, strict=True))
    homes = [(n, executor.put(prepared.chunks[stop - count : stop]), count) for n, (count, stop) in slices if count]
    token = _Token(_resume(settings, prepared.state.token_id) or prepared.state, homes, executor, workers)
    token.begin_round()
    return token


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
    """Write the centroids file of a finished token and remove its state file."""
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
    run, token = settings.run, state.token_id
    run.publish(run.token_file(token), lambda path: save_arrays(path, arrays))
    for name in (run.round_file(token), run.round_file(token) + storage.MARKER):
        storage.remove(name)
