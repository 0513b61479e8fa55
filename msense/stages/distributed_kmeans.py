"""Cluster tokens that are too large for one worker: their points are split into chunks held by several actors.

In each round every worker sums its chunks per cluster, the driver adds the workers' sums and sends out new centroids,
and writes them to the run folder while the workers compute, so that a later run resumes there. Tokens converge
independently of each other.

For N points of width D and K senses, a round costs about N x D x K multiplications, and sends 4 K D bytes to and 8 K D
bytes from each worker; no traffic grows with N. A worker holds up to PARTS_HELD chunks (2 D + 16 bytes per point, on
the GPU where they fit) and reads others again in every round. The driver holds 32 K D bytes per active token, and needs
SEED_POINTS (6 D + 60) bytes more to prepare one.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from msense.clustering import kmeans
from msense.clustering.nearest import Places, merge_exemplars
from msense.io import storage
from msense.io.arrays import load_arrays, save_arrays
from msense.runtime.executor import Row
from msense.runtime.progress import track
from msense.runtime.ray_executor import get, refreshed
from msense.runtime.resources import Resources
from msense.stages.distributed_kmeans_worker import (
    CHUNKS_HELD,
    Chunk,
    ChunkWorker,
    read_blocks,
    slice_ranges,
    sum_partials,
)
from msense.stages.embedding_store import ClusterSettings, Range, as_stored, read_ranges, sense_counts, stored

logger = logging.getLogger(__name__)
WINDOW = 64  # rows on each side of the expected cut, in addition to four standard deviations, in which it is searched


@dataclass(frozen=True)
class Prepared:
    """A token split into chunks, with its initial centroids."""

    chunks: tuple[Chunk, ...]
    state: kmeans.BlockedState


def cluster_large(waiting: dict[int, list[Range]], settings: ClusterSettings, resources: Resources) -> None:
    """Cluster tokens of more than `max_points_per_part` points, as many at a time as the workers can hold.

    `waiting` holds the rows of each token in every partition, in corpus order.
    """
    with chunk_workers(settings, resources) as workers:
        rows = run_rounds(workers, waiting, settings)
        for _ in track("clustering: large tokens", rows, len(waiting)):
            pass


@contextmanager
def chunk_workers(settings: ClusterSettings, resources: Resources) -> Iterator[list[Any]]:
    """Start the actors that cluster large tokens; they are killed on exit."""
    import ray

    needs = {**resources.clustering, "max_restarts": 3, "scheduling_strategy": "SPREAD"}
    needs |= {"max_task_retries": -1}  # until Ray notices that a node is gone, every attempt of a call would count
    count = refreshed(resources).clusterers
    workers = [ray.remote(ChunkWorker).options(**needs).remote(settings) for _ in range(count)]
    try:
        yield workers
    finally:
        for worker in workers:
            ray.kill(worker)


def run_rounds(workers: Sequence[Any], waiting: dict[int, list[Range]], settings: ClusterSettings) -> Iterator[Row]:
    """Run rounds until every token has converged; yield once per finished token.

    A token starts as soon as the workers can hold its chunks; one with more chunks than that runs alone.
    """
    room, load = CHUNKS_HELD * len(workers), [0] * len(workers)
    prepared = _prepared(waiting, workers)
    following = next(prepared, None)
    working: deque[_Token] = deque()
    while working or following:
        while following and (not working or sum(load) + len(following.chunks) <= room):
            working.append(_start(following, settings, workers, load))
            following = next(prepared, None)
        token = working.popleft()
        if token.close_round(settings):
            working.append(token)
            continue
        for number, _, chunks in token.homes:
            load[number] -= chunks
        yield {}


def _prepared(waiting: dict[int, list[Range]], workers: Sequence[Any]) -> Iterator[Prepared]:
    """Prepare tokens on the workers, which hold all GPUs, one per worker at a time; yield them in order."""
    running: deque[Any] = deque()
    for number, (token, ranges) in enumerate(sorted(waiting.items())):
        running.append(workers[number % len(workers)].do.remote(prepare, token, ranges))
        if len(running) >= len(workers):
            yield get(running.popleft())
    while running:
        yield get(running.popleft())


def prepare(token: int, ranges: list[Range], settings: ClusterSettings) -> Prepared:
    """Select a token's points (the first `max_occurrences` by key), split them into chunks and choose the seeds."""
    chosen = first_by_key(settings, ranges, settings.max_occurrences) if settings.max_occurrences else ranges
    records, _ = read_ranges(settings, first_by_key(settings, chosen, kmeans.SEED_POINTS))
    embeddings = records["embedding"][np.argsort(records["key"], kind="stable")]
    del records
    config = replace(settings.kmeans, k=int(sense_counts(settings, np.array([token]))[0]))
    state = kmeans.seed_centroids(stored(embeddings, settings.store_dtype), token, config, device=settings.device)
    rows = max(1, settings.max_points_per_part // kmeans.BLOCK_ROWS) * kmeans.BLOCK_ROWS
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
            return _prefixes(ranges, low + taken)
        low, high = low - np.minimum(width, low) * below, high + np.minimum(width, rows - high) * above


def _prefixes(ranges: list[Range], counts: np.ndarray) -> list[Range]:
    """Shorten every range to its number of rows; empty ones are dropped."""
    slice_ranges = zip(ranges, counts.tolist(), strict=True)
    return [Range(r.partition, r.start, r.start + count) for r, count in slice_ranges if count]


@dataclass
class _Token:
    """The driver's view of a token whose rounds are in progress."""

    state: kmeans.BlockedState
    homes: list[tuple[int, Any, int]]  # worker's number, reference to its chunks in order, their number
    workers: Sequence[Any]
    state_ref: Any = None  # reference to the state of the current round
    pending: deque[Any] = field(default_factory=deque)

    def begin_round(self) -> None:
        """Start a round on the workers."""
        import ray

        self.state_ref = ray.put(self.state)
        self.pending = deque(self.workers[w].partial.remote(chunks, self.state_ref) for w, chunks, _ in self.homes)

    def close_round(self, settings: ClusterSettings) -> bool:
        """Add up the results, then begin the next round or write the token's file; return whether it continues."""
        import ray

        total = sum_partials(get(self.pending.popleft()) for _ in self.homes)
        far = None
        if empty := int((total.counts == 0).sum()):
            results = [self.workers[w].farthest.remote(chunks, self.state_ref, empty) for w, chunks, _ in self.homes]
            far = kmeans.combine_farthest(get(results), empty)
        self.state = state = kmeans.update(self.state, total, settings.kmeans, far)
        logger.debug("token %d: round %d, inertia %.9g", state.token_id, state.rounds, state.inertia)
        if state.final is None:
            self.begin_round()
            _write_round(settings, state)  # while the workers compute
            return True
        self.state_ref = ray.put(state)
        results = [self.workers[w].finish.remote(chunks, self.state_ref) for w, chunks, _ in self.homes]
        _write_token(settings, state, get(results))
        return False


def _start(prepared: Prepared, settings: ClusterSettings, workers: Sequence[Any], load: list[int]) -> _Token:
    """Distribute a token's chunks over the workers with the lowest load, neighbours together; begin its first round."""
    import ray

    before = list(load)
    for _ in prepared.chunks:
        load[load.index(min(load))] += 1
    counts = [after - had for after, had in zip(load, before, strict=True)]
    stops = np.cumsum(counts).tolist()
    homes = [
        (worker, ray.put(prepared.chunks[stop - count : stop]), count)
        for worker, (count, stop) in enumerate(zip(counts, stops, strict=True))
        if count
    ]
    token = _Token(_resume(settings, prepared.state.token_id) or prepared.state, homes, workers)
    token.begin_round()
    return token


def _write_round(settings: ClusterSettings, state: kmeans.BlockedState) -> None:
    """Write a token's state, for `_resume`."""
    arrays = {name: np.asarray(value) for name, value in asdict(state).items() if value is not None}
    settings.run.publish(settings.run.round_file(state.token_id), lambda path: save_arrays(path, arrays))


def _resume(settings: ClusterSettings, token: int) -> kmeans.BlockedState | None:
    """Return a token's state at the end of an earlier run, if any."""
    file = settings.run.round_file(token)
    if storage.stats_of(file, verify=True, inputs_hash=settings.run.inputs_hash) is None:
        return None
    values: dict[str, Any] = load_arrays(file)
    return kmeans.BlockedState(**{name: value if value.ndim else value.item() for name, value in values.items()})


def _write_token(
    settings: ClusterSettings, state: kmeans.BlockedState, chunks: list[tuple[kmeans.Finished, Places]]
) -> None:
    """Write the centroids file of a finished token and remove its state file."""
    assert state.final is not None
    counts, rms_distance, inertia = kmeans.summary(state, [done for done, _ in chunks])
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
