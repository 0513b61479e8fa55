"""Stage 2: decide which passages the teacher must read.

Two passes over the passages (count, then select), each in a few tasks whose results are merged as they arrive. A task
holds one histogram and one block, a merge five histograms.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msense.config.build import PlanOptions
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


@dataclass
class Selected:
    """Mergeable numbers of what the teacher must read."""

    stored: np.ndarray  # int64 [V]
    blocks: np.ndarray  # int64 [n, 7], the columns of _ROW

    def merge(self, other: "Selected") -> None:
        """Add another part of the corpus."""
        self.stored = self.stored + other.stored
        self.blocks = np.concatenate([self.blocks, other.blocks])


class PlanStage(Stage[PlanStats]):
    """Writes the plan of a run."""

    name = "plan"

    def __init__(self, given: PlanInput, blocks: Sequence[int]) -> None:
        """Plan the passages files with these numbers of blocks."""
        super().__init__(given.run)
        self.given = given
        self.splits = [(split, count) for split, count in enumerate(blocks) if count]

    def outputs(self) -> list[str]:
        """Return the files of the plan, the one with the stats first."""
        return [self.run.thresholds, self.run.blocks] + ([self.run.duplicates] if self.given.options.dedup else [])

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Make the whole plan if any of its files is missing.

        Raises:
            InputError: two documents have the same id.
        """
        if not missing:
            return
        _find_duplicates(self.given, self.splits, executor)
        slices = sliced(self.splits, 2 * executor.resources.tasks)
        histogram = executor.reduce("plan: count", _count, slices, self.given)
        threshold = executor.submit(_thresholds, histogram, self.given)
        selected = executor.reduce("plan: select", _select, slices, self.given, threshold)
        yield {"number": 0, **executor.run(_write, selected, histogram, threshold, self.given)}

    def reduce(self, executor: Executor, stats: list[Row]) -> PlanStats:
        """Return the stats of the plan."""
        return PlanStats(**{name: stats[0][name] for name in PlanStats.__dataclass_fields__})


def sliced(splits: Sequence[tuple[int, int]], tasks: int) -> list[Sequence[tuple[int, int]]]:
    """Distribute the passages files over at most `tasks` tasks."""
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
    """Count a slice of the passages files."""
    histogram = Histogram.empty(given.vocab_size)
    for _, _, passages in iter_blocks(given.run, splits):
        histogram.add(passages, given.spec, given.options.per_passage)
    return histogram


def _thresholds(histogram: Histogram, given: PlanInput) -> np.ndarray:
    """Return the threshold keys; in a dry run on a sample the cap on occurrences shrinks with the sample."""
    options = given.options
    return thresholds(histogram, options.max_occurrences * given.scale, options.coverage)


def _select(splits: list[tuple[int, int]], given: PlanInput, threshold: np.ndarray) -> Selected:
    """Return what the teacher must read in a slice of the passages files."""
    stored = np.zeros(len(threshold), dtype=np.int64)
    rows = []
    for split, block, passages in iter_blocks(given.run, splits):
        flat = select(passages, threshold, given.spec, given.options.per_passage)
        stored += np.bincount(passages.ids[flat], minlength=len(stored))
        needed = np.unique(passages.rows()[flat])
        needed_tokens = passages.lengths[needed].sum()
        rows.append((split, block, len(passages.keys), len(passages.ids), len(needed), needed_tokens, len(flat)))
    return Selected(stored, np.array(rows, dtype=np.int64))


def _write(selected: Selected, histogram: Histogram, threshold: np.ndarray, given: PlanInput) -> Row:
    """Write the plan's files and return its stats."""
    given.run.publish(given.run.blocks, partial(write_blocks, selected.blocks, _ROW))
    cap = given.options.max_occurrences
    points = np.minimum(selected.stored, cap) if cap else selected.stored
    stats = dict(zip(_ROW[2:], selected.blocks[:, 2:].sum(axis=0).tolist(), strict=True))
    stats |= {"points": int(points.sum()), "kinds": int((points > 0).sum())}
    arrays = {
        "threshold": threshold,
        "token_counts": histogram.token_counts,
        "stored": selected.stored,
        "shards": cut_shards(selected.stored, given.dim),
    }
    return given.run.publish(given.run.thresholds, lambda path: save_arrays(path, arrays), stats)


def _find_duplicates(given: PlanInput, splits: list[tuple[int, int]], executor: Executor) -> None:
    """Find passages with equal keys: equal content with `--dedup` (recorded, to be skipped), else a repeated document id.

    Keys are processed in ranges of about 32 million, so that a task needs at most about 2 GB.
    """
    run = given.run
    passages = sum(storage.stats_of(run.passages_file(split))["passages"] for split, _ in splits)  # type: ignore[index]
    ranges = max(1, -(-passages // KEYS_AT_A_TIME))
    work = [(n, ranges) for n in range(ranges)]
    result = executor.get(executor.reduce("plan: duplicates", _duplicates, work, splits, given))
    if not given.options.dedup:
        if result.repeated:
            raise InputError(f"document id {result.repeated!r} occurs twice: make ids unique, or remove the id column")
        return
    places = result.places[np.lexsort(result.places.T[::-1])]
    arrays = {name: places[:, i].astype(np.int32) for i, name in enumerate(("piece", "block", "row"))}
    run.publish(run.duplicates, lambda path: save_arrays(path, arrays))


@dataclass
class _Duplicates:
    """Mergeable list of the passages whose key an earlier passage has."""

    places: np.ndarray  # int64 [n, 3]: piece, block, row
    repeated: str = ""  # a document id that occurs twice

    def merge(self, other: "_Duplicates") -> None:
        self.places = np.concatenate([self.places, other.places])
        self.repeated = self.repeated or other.repeated


def _duplicates(key_range: tuple[int, int], splits: list[tuple[int, int]], given: PlanInput) -> _Duplicates:
    """Find repeated keys in one range of keys."""
    number, ranges = key_range
    keys, places = [], []
    for split, count in splits:
        file = open_parquet(given.run.passages_file(split))
        for block in range(count):
            column = file.read_row_group(block, columns=["key"]).column("key").to_numpy()
            mine = np.flatnonzero(column % np.uint64(ranges) == number)
            keys.append(column[mine])
            places.append(np.stack(np.broadcast_arrays(split, block, mine), axis=1).astype(np.int32))
    all_keys, all_places = np.concatenate(keys), np.concatenate(places)
    later = duplicate_rows(all_keys)
    result = _Duplicates(all_places[later].astype(np.int64))
    if not given.options.dedup:
        for place in later.tolist():
            first = int(np.flatnonzero(all_keys == all_keys[place])[0])
            if (name := _identity(given.run, all_places[place])) == _identity(given.run, all_places[first]):
                result.repeated = name[0]
                break
    return result


def _identity(run: RunFolder, place: np.ndarray) -> tuple[str, int]:
    """Return (document id, index) of a passage; if those differ, equal keys are a collision of the hash."""
    split, block, row = place.tolist()
    table = open_parquet(run.passages_file(split)).read_row_group(block, columns=["document_id", "index"])
    return str(table.column("document_id")[row]), int(table.column("index")[row].as_py())
