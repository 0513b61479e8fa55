"""Stage 2: decide which passages the teacher must read.

Two passes over the passages (count, then select), each in a few tasks whose results are merged as they arrive. A task
holds one histogram and one block, a merge five histograms.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msense.config.build import PlanOptions
from msense.constants import MAX_INT32
from msense.corpus.passages import Passages, PassageSpec, read_block
from msense.errors import InputError
from msense.io import storage
from msense.io.arrays import open_parquet, save_arrays
from msense.run.folder import RunFolder
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import Stage
from msense.stages.embedding_store import Duplicates, cut_shards
from msense.stages.sampling import Histogram, duplicate_rows, select, thresholds

KEYS_AT_A_TIME = 32 << 20
_ROW = ("piece", "block", "passages", "tokens", "needed", "needed_tokens", "stored")


@dataclass(frozen=True)
class PlanStats:
    """The outcome of a plan."""

    passages: int
    tokens: int
    needed: int  # passages that the teacher reads
    needed_tokens: int
    stored: int  # occurrences that the teacher writes
    points: int  # occurrences that are clustered
    kinds: int  # different tokens with a point


@dataclass(frozen=True)
class PlanInput:
    """Settings of the tasks of the plan."""

    run: RunFolder
    spec: PassageSpec
    options: PlanOptions
    vocab_size: int
    dim: int
    scale: float = 1.0  # share of the corpus that these passages are
    max_points_per_part: int = MAX_INT32  # of a token that shares a shard


@dataclass
class Tally:
    """Mergeable results for a part of the corpus."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # int64 [n], added up
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # int64 [m, columns], in any order

    def merge(self, other: "Tally") -> None:
        """Add another part of the corpus."""
        self.counts = self.counts + other.counts
        self.rows = np.concatenate([self.rows, other.rows])


class PlanStage(Stage[PlanStats]):
    """Writes the plan of a run."""

    name = "plan"

    def __init__(self, given: PlanInput, blocks: Sequence[int]) -> None:
        """Plan the passages files with these numbers of blocks."""
        run = given.run  # the first file has the stats
        super().__init__(run, [run.thresholds, run.blocks] + ([run.duplicates] if given.options.dedup else []))
        self.given, self.blocks = given, blocks

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Make the whole plan; raise InputError if two documents have the same id."""
        _find_duplicates(self.given, self.blocks, executor)
        slices = sliced(self.blocks, 2 * executor.resources.tasks)
        histogram = executor.reduce("plan: count", _count, slices, self.given)
        options = self.given.options
        cap = options.max_occurrences * self.given.scale  # of a sample, in a dry run on one
        threshold = executor.put(executor.run(thresholds, histogram, cap, options.coverage))
        selected = executor.reduce("plan: select", _select, slices, self.given, threshold)
        yield {"number": 0, **executor.run(_write, selected, histogram, threshold, self.given)}

    def reduce(self, executor: Executor, stats: list[Row]) -> PlanStats:
        """Return the stats of the plan."""
        return PlanStats(**{name: stats[0][name] for name in PlanStats.__dataclass_fields__})


def sliced(blocks: Sequence[int], tasks: int) -> list[list[tuple[int, int]]]:
    """Distribute passages files with these numbers of blocks over at most `tasks` tasks: (file, blocks) of each."""
    splits = [(split, count) for split, count in enumerate(blocks) if count]
    return [some for first in range(tasks) if (some := splits[first::tasks])]


def iter_blocks(run: RunFolder, splits: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, Passages]]:
    """Yield the blocks of passages files without duplicates: file, block number, passages."""
    dropped = Duplicates(run)
    for split, count in splits:
        for block in range(count):
            yield split, block, read_block(run.passages_file(split), block).without(dropped.of(split, block))


def write_blocks(rows: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Write int64 rows [n, len(names)], sorted by the first two columns, as a parquet table."""
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    pq.write_table(pa.table({name: rows[:, i] for i, name in enumerate(names)}), path)


def _count(splits: list[tuple[int, int]], given: PlanInput) -> Histogram:
    histogram = Histogram.empty(given.vocab_size)
    for _, _, passages in iter_blocks(given.run, splits):
        histogram.add(passages, given.spec, given.options.per_passage)
    return histogram


def _select(splits: list[tuple[int, int]], given: PlanInput, threshold: np.ndarray) -> Tally:
    stored = np.zeros(len(threshold), dtype=np.int64)
    rows = []
    for split, block, passages in iter_blocks(given.run, splits):
        flat = select(passages, threshold, given.spec, given.options.per_passage)
        stored += np.bincount(passages.ids[flat], minlength=len(stored))
        needed = np.unique(passages.rows()[flat])
        needed_tokens = passages.lengths[needed].sum()
        rows.append((split, block, len(passages.keys), len(passages.ids), len(needed), needed_tokens, len(flat)))
    return Tally(stored, np.array(rows, dtype=np.int64))


def _write(selected: Tally, histogram: Histogram, threshold: np.ndarray, given: PlanInput) -> Row:
    """Write the plan's files and return its stats."""
    given.run.publish(given.run.blocks, partial(write_blocks, selected.rows, _ROW))
    points = np.minimum(selected.counts, given.options.max_occurrences or selected.counts)
    stats = dict(zip(_ROW[2:], selected.rows[:, 2:].sum(axis=0).tolist(), strict=True))
    stats |= {"points": int(points.sum()), "kinds": int((points > 0).sum())}
    arrays = {
        "threshold": threshold,
        "token_counts": histogram.token_counts,
        "stored": selected.counts,
        "shards": cut_shards(selected.counts, given.dim, given.max_points_per_part),
    }
    return given.run.publish(given.run.thresholds, lambda path: save_arrays(path, arrays), stats)


def _find_duplicates(given: PlanInput, blocks: Sequence[int], executor: Executor) -> None:
    """Find passages with equal keys: equal content with `--dedup` (recorded, to be skipped), else a repeated document id.

    A task processes a range of about KEYS_AT_A_TIME keys and needs at most about 2 GB.
    """
    run, files = given.run, [given.run.passages_file(split) for split, count in enumerate(blocks) if count]
    passages = sum(storage.stats_of(file)["passages"] for file in files)  # type: ignore[index]
    ranges = max(1, -(-passages // KEYS_AT_A_TIME))
    work = [(n, ranges) for n in range(ranges)]
    places = executor.get(executor.reduce("plan: duplicates", _duplicates, work, blocks, given)).rows
    if given.options.dedup:
        places = places[np.lexsort(places.T[::-1])].astype(np.int32)
        arrays = dict(zip(("piece", "block", "row"), places.T, strict=True))
        run.publish(run.duplicates, lambda path: save_arrays(path, arrays))


def _duplicates(key_range: tuple[int, int], blocks: Sequence[int], given: PlanInput) -> Tally:
    """Return piece, block and row of the passages whose key, in one range of keys, an earlier passage has."""
    number, ranges = key_range
    keys, places = [], []
    for split, count in sliced(blocks, 1)[0]:
        file = open_parquet(given.run.passages_file(split))
        for block in range(count):
            column = file.read_row_group(block, columns=["key"]).column("key").to_numpy()
            mine = np.flatnonzero(column % np.uint64(ranges) == number)
            keys.append(column[mine])
            places.append(np.stack(np.broadcast_arrays(split, block, mine), axis=1).astype(np.int32))
    all_keys, all_places = np.concatenate(keys), np.concatenate(places)
    later = duplicate_rows(all_keys)
    for place in [] if given.options.dedup else later.tolist():
        first = int(np.flatnonzero(all_keys == all_keys[place])[0])
        if (name := _identity(given.run, all_places[place])) == _identity(given.run, all_places[first]):
            raise InputError(
                f"document id {name[0]!r} occurs twice: make ids unique, choose another --id-column, or number the rows "
                "with --id-column none"
            )
    return Tally(rows=all_places[later].astype(np.int64))


def _identity(run: RunFolder, place: np.ndarray) -> tuple[str, int]:
    """Return (document id, index) of a passage; if those differ, equal keys are a collision of the hash."""
    split, block, row = place.tolist()
    table = open_parquet(run.passages_file(split)).read_row_group(block, columns=["document_id", "index"])
    return str(table.column("document_id")[row]), int(table.column("index")[row].as_py())
