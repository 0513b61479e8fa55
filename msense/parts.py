"""Tokens too large for one worker: their rows' ranges in, a centroids file a token out.

A token's points are cut, in corpus order, into parts that stay on several workers. Every round each worker adds up the
float64 sums and counts of its parts, the driver adds up those of the workers, sends out the new centroids and, while
the workers compute, writes them down: a later run goes on from there. Each token goes round at its own pace.

What that costs, for N points of width D in P parts, K senses and W workers; n = N ceil(P / W) / P are the points of the
worker with most, u those of them that are in none of the PARTS_HELD parts it holds, B = 16,384 rows read at a time:

    seconds a round    a n D K + e n D + f u (20 + 2 D) + b W (12 D + 16) K + c
    bytes a round      to each worker 4 K D + 4 D + 8 K, from each K (8 D + 8), and some 500: no part, no block counts
    reads, of 20 + 2 D bytes: N once and u again every round; first SEED_POINTS and some windows
    memory of a worker (n - u) (2 D + 16) + 8 B D, or 12 B D where u > 0, + 24 K D, over what torch takes
    memory of the driver 32 K D, and about 200 for each unit and part, of each token that is under way
    of it to prepare a token: SEED_POINTS (6 D + 60) more

`jobs/bench.py parts` holds it against measurement. With D = 384 on two cores of 2026: a 1.7e-11 s, e 9.6e-10 s,
f 7e-10 s (from the system's cache; a disk of 200 MB/s has 5e-9), c 8 ms; b is that of the network. On a GPU a worker
keeps points there, 2 D bytes each, where they fit, else in its own memory, whence every round moves them.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from msense import kmeans, storage
from msense.part_worker import PARTS_HELD, Part, PartWorker, Places, add_up, cut, nearest_of, pieces
from msense.runtime import Resources, Row, get, refreshed, track
from msense.units import ClusterSettings, Range, as_stored, read_ranges, senses_of, stored

logger = logging.getLogger(__name__)

WINDOW = 64  # rows of a unit, and as many more as chance may need, that are looked at for a token's first rows by key


@dataclass(frozen=True)
class Prepared:
    """A token cut into parts and seeded."""

    parts: tuple[Part, ...]
    state: kmeans.BlockedState


def cluster_large(waiting: dict[int, list[Range]], settings: ClusterSettings, resources: Resources) -> None:
    """Cluster tokens of more than `max_points_per_part` points, as many at a time as the workers can hold.

    Args:
        waiting: by token, its rows in every unit, in corpus order.
        settings: run folder and k-means settings.
        resources: how many workers.
    """
    with part_workers(settings, resources) as workers:
        rows = cluster_on(workers, waiting, settings)
        for _ in track("clustering: large tokens", rows, len(waiting)):
            pass


@contextmanager
def part_workers(settings: ClusterSettings, resources: Resources) -> Iterator[list[Any]]:
    """Start as many actors as may cluster at a time, and end them."""
    import ray

    needs = {**resources.clustering, "max_restarts": 3, "scheduling_strategy": "SPREAD"}
    needs |= {"max_task_retries": -1}  # while Ray does not know yet that a node is gone, each try of a call counts
    count = refreshed(resources).clusterers
    workers = [ray.remote(PartWorker).options(**needs).remote(settings) for _ in range(count)]
    try:
        yield workers
    finally:
        for worker in workers:
            ray.kill(worker)


def cluster_on(workers: Sequence[Any], waiting: dict[int, list[Range]], settings: ClusterSettings) -> Iterator[Row]:
    """Run rounds until every token has converged, each at its own pace; yield once a token.

    A token is taken in as soon as the workers can hold its parts; one of more parts than they can hold has them alone.
    """
    room, load = PARTS_HELD * len(workers), [0] * len(workers)
    coming = _prepared(waiting, workers)
    following = next(coming, None)
    working: deque[_Token] = deque()
    while working or following:
        while following and (not working or sum(load) + len(following.parts) <= room):
            working.append(_take_in(following, settings, workers, load))
            following = next(coming, None)
        token = working.popleft()
        if token.close_round(settings):
            working.append(token)
            continue
        for number, _, parts in token.homes:
            load[number] -= parts
        yield {}


def _prepared(waiting: dict[int, list[Range]], workers: Sequence[Any]) -> Iterator[Prepared]:
    """Have the workers, which hold all GPUs, prepare tokens, one each at a time; yield them in order."""
    running: deque[Any] = deque()
    for number, (token, ranges) in enumerate(sorted(waiting.items())):
        running.append(workers[number % len(workers)].do.remote(prepare, token, ranges))
        if len(running) >= len(workers):
            yield get(running.popleft())
    while running:
        yield get(running.popleft())


def prepare(token: int, ranges: list[Range], settings: ClusterSettings) -> Prepared:
    """Find a token's points (the first `max_occurrences` by key), cut them into parts, and seed it."""
    chosen = first_by_key(settings, ranges, settings.max_occurrences) if settings.max_occurrences else ranges
    records, _ = read_ranges(settings, first_by_key(settings, chosen, kmeans.SEED_POINTS))
    embeddings = records["embedding"][np.argsort(records["key"], kind="stable")]
    del records
    config = replace(settings.kmeans, k=int(senses_of(settings, np.array([token]))[0]))
    state = kmeans.seed_centroids(stored(embeddings, settings.store_dtype), token, config, device=settings.device)
    rows = max(1, settings.max_points_per_part // kmeans.BLOCK_ROWS) * kmeans.BLOCK_ROWS
    total = sum(r.stop - r.start for r in chosen)
    parts = [Part(token, first, tuple(cut(chosen, first, first + rows))) for first in range(0, total, rows)]
    return Prepared(tuple(parts), state)


def first_by_key(settings: ClusterSettings, ranges: list[Range], count: int) -> list[Range]:
    """Cut a token's ranges down to its first `count` rows by key, ties in corpus order.

    Rows of a unit are in the order of their keys, and keys are random: where the cut lies in a range is nearly known.
    Only a window of rows around is read, a wider one where it holds no cut.
    """
    rows = np.array([r.stop - r.start for r in ranges])
    if count >= rows.sum():
        return ranges
    expected, chance = rows * (count / rows.sum()), WINDOW + 4 * np.sqrt(rows)
    low = np.maximum(expected - chance, 0).astype(np.int64)
    high = np.minimum(np.ceil(expected + chance), rows).astype(np.int64)
    while True:
        cuts = zip(ranges, low.tolist(), high.tolist(), strict=True)
        windows = [Range(r.unit, r.start + first, r.start + last) for r, first, last in cuts]
        keys = [records["key"].copy() for records in pieces(settings, windows)]
        by_key = np.argsort(np.concatenate(keys), kind="stable")[: count - low.sum()]
        taken = np.bincount(np.repeat(np.arange(len(ranges)), high - low)[by_key], minlength=len(ranges))
        width, below, above = high - low, (taken == 0) & (low > 0), (taken == high - low) & (high < rows)
        if not (below | above).any():
            return _prefixes(ranges, low + taken)
        low, high = low - np.minimum(width, low) * below, high + np.minimum(width, rows - high) * above


def _prefixes(ranges: list[Range], counts: np.ndarray) -> list[Range]:
    """Cut every range down to its number of rows."""
    cut = zip(ranges, counts.tolist(), strict=True)
    return [Range(r.unit, r.start, r.start + count) for r, count in cut if count]


@dataclass
class _Token:
    """A token whose rounds are under way, as the driver sees it."""

    state: kmeans.BlockedState
    homes: list[tuple[int, Any, int]]  # worker's number, reference to its parts in order, how many
    workers: Sequence[Any]
    given: Any = None  # reference to the state that the workers were asked with
    asked: deque[Any] = field(default_factory=deque)

    def ask(self) -> None:
        """Have the workers begin a round."""
        import ray

        self.given = ray.put(self.state)
        self.asked = deque(self.workers[w].partial.remote(parts, self.given) for w, parts, _ in self.homes)

    def close_round(self, settings: ClusterSettings) -> bool:
        """Add up what the workers found and begin the next round, or write the token's file; tell if it goes on."""
        import ray

        total = add_up(get(self.asked.popleft()) for _ in self.homes)
        far = None
        if empty := int((total.counts == 0).sum()):
            asked = [self.workers[w].farthest.remote(parts, self.given, empty) for w, parts, _ in self.homes]
            far = kmeans.combine_farthest(get(asked), empty)
        self.state = state = kmeans.update(self.state, total, settings.kmeans, far)
        logger.debug("token %d: round %d, inertia %.9g", state.token_id, state.rounds, state.inertia)
        if state.final is None:
            self.ask()
            _write_round(settings, state)  # while the workers compute
            return True
        self.given = ray.put(state)
        _write_token(settings, state, get([self.workers[w].finish.remote(p, self.given) for w, p, _ in self.homes]))
        return False


def _take_in(prepared: Prepared, settings: ClusterSettings, workers: Sequence[Any], load: list[int]) -> _Token:
    """Give a token's parts to the workers that have fewest, neighbours to the same one, and begin its rounds."""
    import ray

    before = list(load)
    for _ in prepared.parts:
        load[load.index(min(load))] += 1
    counts = [after - had for after, had in zip(load, before, strict=True)]
    stops = np.cumsum(counts).tolist()
    homes = [
        (worker, ray.put(prepared.parts[stop - count : stop]), count)
        for worker, (count, stop) in enumerate(zip(counts, stops, strict=True))
        if count
    ]
    state = _resume(settings, prepared.state.token_id) or prepared.state
    token = _Token(state, homes, workers)
    token.ask()
    return token


def _write_round(settings: ClusterSettings, state: kmeans.BlockedState) -> None:
    """Write down where a token stands after a round."""
    arrays = {name: np.asarray(value) for name, value in asdict(state).items() if value is not None}

    def write(path: Path) -> None:
        storage.save_arrays(path, arrays)

    settings.run.publish(settings.run.round_file(state.token_id), write)


def _resume(settings: ClusterSettings, token: int) -> kmeans.BlockedState | None:
    """Return where an earlier run left a token."""
    file = settings.run.round_file(token)
    if storage.facts_of(file, verify=True, made_of=settings.run.made_of) is None:
        return None
    arrays = storage.load_arrays(file)
    return kmeans.BlockedState(
        token_id=arrays["token_id"].item(),
        centroids=arrays["centroids"],
        shift=arrays["shift"],
        counts=arrays["counts"],
        inertia=arrays["inertia"].item(),
        rounds=arrays["rounds"].item(),
    )


def _write_token(
    settings: ClusterSettings, state: kmeans.BlockedState, parts: list[tuple[kmeans.Finished, Places]]
) -> None:
    """Write the centroids file of a finished token and forget its rounds."""
    assert state.final is not None
    counts, spread, inertia = kmeans.summary(state, [done for done, _ in parts])
    arrays = {
        "tokens": np.array([state.token_id]),
        "sizes": np.array([len(counts)]),
        "centroids": as_stored(state.final, settings.store_dtype),
        "counts": counts,
        "spread": spread,
        "inertia": np.array([inertia]),
        **nearest_of([places for _, places in parts], settings.exemplars),
    }

    def write(path: Path) -> None:
        storage.save_arrays(path, arrays)

    settings.run.publish(settings.run.token_file(state.token_id), write)
    for name in (settings.run.round_file(state.token_id), settings.run.round_file(state.token_id) + storage.MARKER):
        storage.remove(name)
