"""The actor that holds chunks of large tokens and computes their sums and counts.

It holds CHUNKS_HELD chunks (2 D + 16 bytes per point) until their tokens are finished, and reads others again for every
call. It reads and computes BLOCKS_AT_A_TIME blocks at a time (8 to 12 D bytes per row): otherwise torch's small results,
scattered over the heap, would retain as much memory as the points.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from msense.clustering.kmeans import blocks, seeding
from msense.clustering.selection import Places, exemplar_places, merge_exemplars
from msense.stages.embedding_store import ClusterSettings, Range, read_rows, stored

CHUNKS_HELD = 4  # chunks in a worker's memory
BLOCKS_AT_A_TIME = 16


@dataclass(frozen=True)
class Chunk:
    """A chunk of one token's points, in corpus order."""

    token: int
    first_row: int  # inside the token, a multiple of seeding.BLOCK_ROWS
    ranges: tuple[Range, ...]


def slice_ranges(ranges: Sequence[Range], first: int, last: int) -> Iterator[Range]:
    """Yield the ranges of rows [first, last) of the concatenated ranges."""
    at = 0
    for r in ranges:
        start, stop = max(first, at), min(last, at + len(r))
        if start < stop:
            yield Range(r.partition, r.start + start - at, r.start + stop - at)
        at += len(r)


def read_blocks(settings: ClusterSettings, ranges: Sequence[Range]) -> Iterator[np.ndarray]:
    """Read ranges in order, at most BLOCKS_AT_A_TIME blocks of rows at a time."""
    step = BLOCKS_AT_A_TIME * seeding.BLOCK_ROWS
    for r in ranges:
        for start in range(r.start, r.stop, step):
            yield read_rows(settings.run.partition_file(r.partition), settings.dim, start, min(start + step, r.stop))


class ChunkWorker:
    """An actor that holds chunks of points; each call returns the sum over the given chunks of one token."""

    def __init__(self, settings: ClusterSettings) -> None:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # as in Ray's object store
        self.settings = settings
        self.held: dict[Chunk, tuple[Any, Places]] = {}

    def do(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function with this worker's settings as the last argument."""
        return work(*arguments, self.settings)

    def partial(self, chunks: Sequence[Chunk], state: blocks.BlockedState) -> blocks.Partial:
        """Return sums, counts and inertia of one round."""
        config, device = self.settings.kmeans, self.settings.device
        total = blocks.combine(
            blocks.partial(points, state, config, device=device) for _, points, _ in self._points(chunks)
        )
        return replace(total, inertia=_exact(total.inertia))

    def farthest(self, chunks: Sequence[Chunk], state: blocks.BlockedState, count: int) -> blocks.Farthest:
        """Return the points farthest from their centroids."""
        config, device = self.settings.kmeans, self.settings.device
        results = (
            blocks.farthest(points, state, count, config, first_row=row, device=device)
            for row, points, _ in self._points(chunks)
        )
        return reduce(lambda first, second: blocks.combine_farthest([first, second], count), results)

    def finish(self, chunks: Sequence[Chunk], state: blocks.BlockedState) -> tuple[blocks.Finished, Places]:
        """Return sums of squared distances per sense and the places of the exemplars; release the chunks."""
        config, count = self.settings.kmeans, self.settings.exemplars
        squares: list[np.ndarray] = []
        exemplars: list[Places] = []
        for _, points, places in self._points(chunks):
            done = blocks.finish(points, state, config, device=self.settings.device)
            senses, rows = np.array([done.squares.shape[1]]), np.array([len(done.assignment)])
            nearest = exemplar_places(done.assignment, done.distance, senses, rows, places, count)
            exemplars = [merge_exemplars([*exemplars, nearest], count)]
            squares.append(done.squares)
        columns = [_exact(column) for column in np.concatenate(squares).T]
        exact = np.array(list(zip_longest(*columns, fillvalue=0.0)))
        for chunk in chunks:
            self.held.pop(chunk, None)
        return replace(done, assignment=done.assignment[:0], distance=done.distance[:0], squares=exact), exemplars[0]

    def _points(self, chunks: Sequence[Chunk]) -> Iterator[tuple[int, Any, Places]]:
        """Yield the first row within the token, the points and their places, a few blocks at a time."""
        step = BLOCKS_AT_A_TIME * seeding.BLOCK_ROWS
        for chunk in chunks:
            if chunk not in self.held and len(self.held) < CHUNKS_HELD:
                points, places = self._read(chunk.ranges)
                self.held[chunk] = self._on_device(points), places
            rows = sum(map(len, chunk.ranges))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                if chunk in self.held:
                    points, places = self.held[chunk]
                    block = points[start:stop], {name: column[start:stop] for name, column in places.items()}
                else:
                    block = self._read(tuple(slice_ranges(chunk.ranges, start, stop)))
                yield chunk.first_row + start, *block

    def _read(self, ranges: Sequence[Range]) -> tuple[Any, Places]:
        """Read points [n, D] as stored, and their places."""
        lengths = [len(r) for r in ranges]
        points = np.empty((sum(lengths), self.settings.dim), np.uint16)
        places = {name: np.empty(len(points), np.int32) for name in ("token", "row", "position")}
        start = 0
        for records in read_blocks(self.settings, ranges):
            rows = slice(start, start := start + len(records))
            points[rows] = records["embedding"]
            for name, column in places.items():
                column[rows] = records[name]
        places["unit"] = np.repeat(np.array([r.partition for r in ranges], np.int32), lengths)
        return stored(points, self.settings.store_dtype), places

    def _on_device(self, points: Any) -> Any:
        """Move a chunk's points to the GPU if they need at most half of its free memory: two workers may share it."""
        if self.settings.device == "cpu" or 2 * points.nbytes > torch.cuda.mem_get_info()[0]:
            return points
        return points.to(self.settings.device)


def _exact(values: np.ndarray) -> np.ndarray:
    """Return a few numbers, float64 [m], with exactly the sum of the values, so that `math.fsum` gives equal results."""
    left, few = values.tolist(), []
    while math.isfinite(total := math.fsum(left)) and total:
        few.append(total)
        left.append(-total)
    return np.array(few if math.isfinite(total) and few else [total])
