"""Tokens too large for one worker: their rows' ranges in, a centroids file a token out.

A token's points are cut, in corpus order, into parts that stay on several workers. Every round each worker returns
float64 sums and counts of its parts (K x (8 D + 8) bytes a part), they are added up in part order, and the new centroids
go back; the driver writes them down, and a later run goes on from there. A worker holds `PARTS_HELD` parts at most and
reads others anew each round; the driver holds the sums of one round.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from msense import kmeans, storage
from msense.exemplars import PLACE, nearest
from msense.runtime import Resources, Row, get, submit, track
from msense.units import ClusterSettings, Range, as_stored, exemplar_places, read_ranges, senses_of, stored

PARTS_HELD = 4
ROWS_AT_A_TIME = 1 << 16


@dataclass(frozen=True)
class Part:
    """A slice of one token's points, in corpus order."""

    token: int
    first_row: int  # inside the token, a multiple of kmeans.BLOCK_ROWS
    ranges: tuple[Range, ...]


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
    import ray

    actors = [
        ray.remote(PartWorker)
        .options(
            **resources.clustering,
            max_restarts=3,
            max_task_retries=3,
            scheduling_strategy="SPREAD",
        )
        .remote(settings)
        for _ in range(resources.tasks)
    ]
    try:
        for _ in track("clustering: large tokens", _waves(waiting, settings, resources, actors), len(waiting)):
            pass
    finally:
        for actor in actors:
            ray.kill(actor)


def prepare(token: int, ranges: list[Range], settings: ClusterSettings) -> Prepared:
    """Find a token's points (the first `max_occurrences` by key), cut them into parts, and seed it.

    Reads the token's rows once; holds 8 bytes a row and the seeding points.
    """
    keys, range_of = [], []
    for number, r in enumerate(ranges):
        for start in range(r.start, r.stop, ROWS_AT_A_TIME):
            records, _ = read_ranges(settings, [Range(r.unit, start, min(start + ROWS_AT_A_TIME, r.stop))])
            keys.append(records["key"].copy())
        range_of.append(np.full(r.stop - r.start, number, dtype=np.int32))
    all_keys, all_ranges = np.concatenate(keys), np.concatenate(range_of)
    by_key = np.argsort(all_keys, kind="stable")[: settings.max_occurrences or None]
    # rows of a unit are in the order of their keys, so the first by key are the first of every range
    chosen = _prefixes(ranges, all_ranges[by_key])
    seeding = _prefixes(ranges, all_ranges[by_key[: kmeans.SEED_POINTS]])
    records, _ = read_ranges(settings, seeding)
    order = np.argsort(records["key"], kind="stable")
    config = replace(settings.kmeans, k=int(senses_of(settings, np.array([token]))[0]))
    points = stored(records["embedding"][order], settings.store_dtype)
    state = kmeans.seed_centroids(points, token, config, device=settings.device)
    rows = max(1, settings.max_points_per_part // kmeans.BLOCK_ROWS) * kmeans.BLOCK_ROWS
    parts = [Part(token, first, tuple(_slice(chosen, first, first + rows))) for first in range(0, len(by_key), rows)]
    return Prepared(tuple(parts), state)


def _prefixes(ranges: list[Range], chosen: np.ndarray) -> list[Range]:
    """Cut every range down to its number of chosen rows."""
    counts = np.bincount(chosen, minlength=len(ranges)).tolist()
    return [Range(r.unit, r.start, r.start + count) for r, count in zip(ranges, counts, strict=True) if count]


def _slice(ranges: list[Range], first: int, last: int) -> Iterator[Range]:
    """Cut rows [first, last) out of ranges laid end to end."""
    at = 0
    for r in ranges:
        start, stop = max(first, at), min(last, at + r.stop - r.start)
        if start < stop:
            yield Range(r.unit, r.start + start - at, r.start + stop - at)
        at += r.stop - r.start


class PartWorker:
    """An actor that keeps its parts' points in memory and answers the driver's questions about them."""

    def __init__(self, settings: ClusterSettings) -> None:
        import torch

        torch.set_num_threads(1)
        self.settings = settings
        self.held: dict[Part, tuple[Any, dict[str, np.ndarray]]] = {}

    def partial(self, part: Part, state: kmeans.BlockedState) -> kmeans.Partial:
        """Return sums and counts of one round."""
        return kmeans.partial(self._points(part)[0], state, self.settings.kmeans, device=self.settings.device)

    def farthest(self, part: Part, state: kmeans.BlockedState, count: int) -> kmeans.Farthest:
        """Return the points farthest from their centroids."""
        points, settings = self._points(part)[0], self.settings
        return kmeans.farthest(points, state, count, settings.kmeans, first_row=part.first_row, device=settings.device)

    def finish(self, part: Part, state: kmeans.BlockedState) -> tuple[kmeans.Finished, dict[str, np.ndarray]]:
        """Return squared distances per block and sense (but not per point), and the places of the part's exemplars."""
        points, places = self._points(part)
        done = kmeans.finish(points, state, self.settings.kmeans, device=self.settings.device)
        senses, rows = np.array([done.squares.shape[1]]), np.array([len(done.assignment)])
        nearest_places = exemplar_places(
            (done.assignment, done.distance), senses, rows, places, self.settings.exemplars
        )
        return replace(done, assignment=done.assignment[:0], distance=done.distance[:0]), nearest_places

    def _points(self, part: Part) -> tuple[Any, dict[str, np.ndarray]]:
        if part not in self.held:
            if len(self.held) >= PARTS_HELD:
                self.held.pop(next(iter(self.held)))
            records, unit = read_ranges(self.settings, list(part.ranges))
            places = {name: records[name].copy() for name in ("token", "row", "position")} | {"unit": unit}
            self.held[part] = stored(np.ascontiguousarray(records["embedding"]), self.settings.store_dtype), places
        return self.held[part]


def _waves(
    waiting: dict[int, list[Range]], settings: ClusterSettings, resources: Resources, actors: list[Any]
) -> Iterator[Row]:
    """Work through the tokens in groups whose parts the actors can hold; yield once a token."""
    room = PARTS_HELD * len(actors)
    wave: dict[int, Prepared] = {}
    for token, prepared in _prepared(waiting, settings, resources):
        if wave and sum(len(p.parts) for p in wave.values()) + len(prepared.parts) > room:
            yield from _cluster_wave(wave, settings, actors)
            wave = {}
        wave[token] = prepared
    if wave:
        yield from _cluster_wave(wave, settings, actors)


def _prepared(
    waiting: dict[int, list[Range]], settings: ClusterSettings, resources: Resources
) -> Iterator[tuple[int, Prepared]]:
    """Prepare the tokens a few at a time; yield them in order."""
    running: deque[tuple[int, Any]] = deque()
    for token, ranges in sorted(waiting.items()):
        running.append((token, submit(prepare, token, ranges, settings, needs=resources.clustering)))
        if len(running) >= resources.tasks:
            first, reference = running.popleft()
            yield first, get(reference)
    for last, reference in running:
        yield last, get(reference)


def _cluster_wave(wave: dict[int, Prepared], settings: ClusterSettings, actors: list[Any]) -> Iterator[Row]:
    """Run rounds until every token of the wave has converged; a converged token leaves the rounds."""
    import ray

    home = {part: actors[i % len(actors)] for i, part in enumerate(p for t in wave.values() for p in t.parts)}
    states = {token: _resume(settings, token) or prepared.state for token, prepared in wave.items()}
    while states:
        asked = {}
        for token, state in states.items():
            given = ray.put(state)
            asked[token] = given, [home[part].partial.remote(part, given) for part in wave[token].parts]
        for token, (given, references) in asked.items():
            parts = wave[token].parts
            total = kmeans.combine(get(references))
            far = None
            if empty := int((total.counts == 0).sum()):
                found = get([home[part].farthest.remote(part, given, empty) for part in parts])
                far = kmeans.combine_farthest(found, empty)
            state = kmeans.update(states[token], total, settings.kmeans, far)
            if state.final is None:
                states[token] = state
                _write_round(settings, state)
                continue
            del states[token]
            final = ray.put(state)
            _write_token(settings, state, get([home[part].finish.remote(part, final) for part in parts]))
            yield {}


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
    settings: ClusterSettings, state: kmeans.BlockedState, parts: list[tuple[kmeans.Finished, dict[str, np.ndarray]]]
) -> None:
    """Write the centroids file of a finished token and forget its rounds."""
    assert state.final is not None
    counts, spread, inertia = kmeans.summary(state, [done for done, _ in parts])
    places = {f"exemplar_{name}": np.concatenate([p[f"exemplar_{name}"] for _, p in parts]) for name in PLACE}
    chosen, rank = nearest(places["exemplar_sense"], places["exemplar_distance"], settings.exemplars)
    places = {name: column[chosen] for name, column in places.items()} | {"exemplar_rank": rank}
    arrays = {
        "tokens": np.array([state.token_id]),
        "sizes": np.array([len(counts)]),
        "centroids": as_stored(state.final, settings.store_dtype),
        "counts": counts,
        "spread": spread,
        "inertia": np.array([inertia]),
        **places,
    }

    def write(path: Path) -> None:
        storage.save_arrays(path, arrays)

    settings.run.publish(settings.run.token_file(state.token_id), write)
    for name in (settings.run.round_file(state.token_id), settings.run.round_file(state.token_id) + storage.MARKER):
        storage.remove(name)
