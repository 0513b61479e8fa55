"""The actor that clusters parts of large tokens: ranges of unit files in, sums and counts out.

Holds PARTS_HELD parts, 2 D + 16 bytes a point, until their tokens are finished; others it reads anew whenever it is
asked about them. It reads and computes BLOCKS_AT_A_TIME blocks at a time (8 to 12 D bytes a row of these): torch's
small results, scattered over the heap, would otherwise hold on to as much memory as the points take.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from msense import kmeans
from msense.exemplars import PLACE, nearest
from msense.occurrences import read_rows
from msense.runtime import Row
from msense.units import ClusterSettings, Range, exemplar_places, stored

PARTS_HELD = 4  # by a worker; the rows of others are read anew whenever they are asked about
BLOCKS_AT_A_TIME = 16  # of rows, when a worker reads or computes
Places = dict[str, np.ndarray]


@dataclass(frozen=True)
class Part:
    """A slice of one token's points, in corpus order."""

    token: int
    first_row: int  # inside the token, a multiple of kmeans.BLOCK_ROWS
    ranges: tuple[Range, ...]


def cut(ranges: Sequence[Range], first: int, last: int) -> Iterator[Range]:
    """Cut rows [first, last) out of ranges laid end to end."""
    at = 0
    for r in ranges:
        start, stop = max(first, at), min(last, at + r.stop - r.start)
        if start < stop:
            yield Range(r.unit, r.start + start - at, r.start + stop - at)
        at += r.stop - r.start


def pieces(settings: ClusterSettings, ranges: Sequence[Range]) -> Iterator[np.ndarray]:
    """Read ranges in order, at most BLOCKS_AT_A_TIME blocks of rows at a time."""
    step = BLOCKS_AT_A_TIME * kmeans.BLOCK_ROWS
    for r in ranges:
        for start in range(r.start, r.stop, step):
            yield read_rows(settings.run.unit_file(r.unit), settings.dim, start, min(start + step, r.stop))


class PartWorker:
    """An actor that keeps its parts' points in memory and answers the driver's questions about them.

    Each answer is about all of a token's parts that live here, added up.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        import torch

        torch.set_num_threads(1)
        self.settings = settings
        self.held: dict[Part, tuple[Any, Places]] = {}

    def do(self, work: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401 - whatever the work takes and gives
        """Do other work with this worker's settings."""
        return work(*arguments, self.settings)

    def partial(self, parts: Sequence[Part], state: kmeans.BlockedState) -> kmeans.Partial:
        """Return sums, counts and inertia of one round."""
        state, config, device = _own(state), self.settings.kmeans, self.settings.device
        found = (kmeans.partial(points, state, config, device=device) for _, points, _ in self._points(parts))
        total = add_up(found)
        return replace(total, inertia=_exact(total.inertia))

    def farthest(self, parts: Sequence[Part], state: kmeans.BlockedState, count: int) -> kmeans.Farthest:
        """Return the points farthest from their centroids."""
        state, config, device = _own(state), self.settings.kmeans, self.settings.device
        found = (
            kmeans.farthest(points, state, count, config, first_row=row, device=device)
            for row, points, _ in self._points(parts)
        )
        return reduce(lambda first, second: kmeans.combine_farthest([first, second], count), found)

    def finish(self, parts: Sequence[Part], state: kmeans.BlockedState) -> tuple[kmeans.Finished, Places]:
        """Return sums of squared distances per sense, and the places of the exemplars; let go of the parts."""
        state, config, count = _own(state), self.settings.kmeans, self.settings.exemplars
        squares: list[np.ndarray] = []
        exemplars: list[Places] = []
        for _, points, places in self._points(parts):
            done = kmeans.finish(points, state, config, device=self.settings.device)
            senses, rows = np.array([done.squares.shape[1]]), np.array([len(done.assignment)])
            found = exemplar_places((done.assignment, done.distance), senses, rows, places, count)
            exemplars = [nearest_of([*exemplars, found], count)]
            squares.append(done.squares)
        columns = [_exact(column) for column in np.concatenate(squares).T]
        exact = np.zeros((max(map(len, columns)), len(columns)))
        for number, column in enumerate(columns):
            exact[: len(column), number] = column
        for part in parts:
            self.held.pop(part, None)
        return replace(done, assignment=done.assignment[:0], distance=done.distance[:0], squares=exact), exemplars[0]

    def _points(self, parts: Sequence[Part]) -> Iterator[tuple[int, Any, Places]]:
        """Go through the points of parts, a few blocks at a time: first row inside the token, points, their places."""
        step = BLOCKS_AT_A_TIME * kmeans.BLOCK_ROWS
        for part in parts:
            if part not in self.held and len(self.held) < PARTS_HELD:
                points, places = self._read(part.ranges)
                self.held[part] = self._near(points), places
            rows = sum(r.stop - r.start for r in part.ranges)
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                if part in self.held:
                    points, places = self.held[part]
                    found = points[start:stop], {name: column[start:stop] for name, column in places.items()}
                else:
                    found = self._read(tuple(cut(part.ranges, start, stop)))
                yield part.first_row + start, *found

    def _read(self, ranges: Sequence[Range]) -> tuple[Any, Places]:
        """Read points [n, D] as stored and their places."""
        rows = sum(r.stop - r.start for r in ranges)
        points = np.empty((rows, self.settings.dim), np.uint16)
        places = {name: np.empty(rows, np.int32) for name in ("token", "row", "position")}
        start = 0
        for records in pieces(self.settings, ranges):
            stop = start + len(records)
            points[start:stop] = records["embedding"]
            for name, column in places.items():
                column[start:stop] = records[name]
            start = stop
        units = np.array([r.unit for r in ranges], np.int32)
        places["unit"] = np.repeat(units, [r.stop - r.start for r in ranges])
        return stored(points, self.settings.store_dtype), places

    def _near(self, points: Any) -> Any:  # noqa: ANN401 - tensors
        """Move a part's points to the GPU, if they take no more than half of what is free there: two workers share one."""
        import torch

        if self.settings.device == "cpu" or 2 * points.nbytes > torch.cuda.mem_get_info()[0]:
            return points
        return points.to(self.settings.device)


def _own(state: kmeans.BlockedState) -> kmeans.BlockedState:
    """Copy a state's arrays: torch warns of those in Ray's store, which are read-only."""
    arrays: Row = {name: value.copy() for name, value in vars(state).items() if isinstance(value, np.ndarray)}
    return replace(state, **arrays)


def add_up(found: Iterator[kmeans.Partial]) -> kmeans.Partial:
    """Add up results in the order of their rows, as `kmeans.combine`, but holding two at a time."""
    first = next(found)
    sums, counts, inertia = first.sums.copy(), first.counts.copy(), [first.inertia]
    for other in found:
        sums += other.sums
        counts += other.counts
        inertia.append(other.inertia)
    return kmeans.Partial(sums, counts, np.concatenate(inertia))


def _exact(values: np.ndarray) -> np.ndarray:
    """Return the few numbers float64 [m] whose exact sum is that of the values: `math.fsum` cannot tell them apart."""
    left, few = values.tolist(), []
    while math.isfinite(total := math.fsum(left)) and total:
        few.append(total)
        left.append(-total)
    return np.array(few if math.isfinite(total) and few else [total])


def nearest_of(several: Sequence[Places], count: int) -> Places:
    """Keep the exemplars nearest to each sense; ties go to the earlier ones."""
    places = {f"exemplar_{name}": np.concatenate([p[f"exemplar_{name}"] for p in several]) for name in PLACE}
    chosen, rank = nearest(places["exemplar_sense"], places["exemplar_distance"], count)
    return {name: column[chosen] for name, column in places.items()} | {"exemplar_rank": rank}
