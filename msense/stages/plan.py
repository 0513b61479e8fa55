"""Stage 2 on Ray: passages files in, the plan's files out.

Two passes over the passages (count, then select), each in a few tasks whose results add up as they come, so that neither
the driver nor the result depends on how many tasks there were. A task holds one histogram and one block, a merge of
results five histograms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msense.config.build import BuildConfig
from msense.corpus.passages import read_block
from msense.errors import InputError
from msense.io import storage
from msense.io.arrays import open_parquet, save_arrays
from msense.run.folder import RunFolder
from msense.run.journal import Journal
from msense.run.resume import finished
from msense.runtime.ray_executor import get, reduce_tasks, run_task, submit
from msense.runtime.resources import Resources
from msense.stages.embedding_store import Duplicates, cut_shards
from msense.stages.sampling import Histogram, duplicate_rows, select, thresholds
from msense.teacher.spec import TeacherInfo

KEYS_AT_A_TIME = 32 << 20
_ROW = ("piece", "block", "passages", "tokens", "needed", "needed_tokens", "stored")


@dataclass(frozen=True)
class PlanInput:
    """What the tasks of the plan need to know."""

    run: RunFolder
    info: TeacherInfo
    config: BuildConfig
    scale: float = 1.0  # share of the corpus that these passages are


@dataclass
class Selected:
    """What the teacher must read of a part of the corpus; adds up."""

    stored: np.ndarray  # int64 [V]
    blocks: np.ndarray  # int64 [n, 7], the columns of _ROW

    def merge(self, other: "Selected") -> None:
        """Add another part of the corpus."""
        self.stored = self.stored + other.stored
        self.blocks = np.concatenate([self.blocks, other.blocks])


def make_plan(given: PlanInput, blocks: Sequence[int], resources: Resources, journal: Journal) -> dict[str, Any]:
    """Write the plan of a run, unless it is there.

    Args:
        given: run folder, teacher and config.
        blocks: number of blocks of every passages file.
        resources: how many tasks at a time.
        journal: where to note what is kept of an earlier driver's plan.

    Returns:
        Facts of the plan: passages, tokens, needed, needed_tokens, stored (occurrences written by the teacher), points
        (occurrences clustered), kinds (different tokens with a point).

    Raises:
        BadInput: two documents have the same id.
    """
    run = given.run
    files = [run.blocks, run.thresholds] + ([run.duplicates] if given.config.dedup else [])
    found = finished("plan", run, files, resources, journal)
    if all(stats is not None for stats in found):
        return dict(found[1] or {})
    splits = [(split, count) for split, count in enumerate(blocks) if count]
    _find_duplicates(given, splits, resources)
    slices = [s for i in range(2 * resources.tasks) if (s := splits[i :: 2 * resources.tasks])]
    histogram = reduce_tasks("plan: count", _count, slices, resources, given)
    threshold = submit(_thresholds, histogram, given)
    selected = reduce_tasks("plan: select", _select, slices, resources, given, threshold)
    result: dict[str, Any] = run_task(_write, selected, histogram, threshold, given)
    journal.add("plan", made=sum(stats is None for stats in found))
    return result


def _count(splits: list[tuple[int, int]], given: PlanInput) -> Histogram:
    """Count a slice of the passages files."""
    histogram = Histogram.empty(given.info.vocab_size)
    spec, dropped = given.info.passage_spec(given.config), Duplicates(given.run)
    for split, count in splits:
        for block in range(count):
            passages = read_block(given.run.passages_file(split), block).without(dropped.of(split, block))
            histogram.add(passages, spec, given.config.per_passage)
    return histogram


def _thresholds(histogram: Histogram, given: PlanInput) -> np.ndarray:
    """Return the threshold keys; a dry run on a sample reads as much less of each token as the sample is smaller."""
    config = given.config
    return thresholds(histogram, config.max_occurrences * given.scale, config.coverage)


def _select(splits: list[tuple[int, int]], given: PlanInput, threshold: np.ndarray) -> Selected:
    """Work out what the teacher must read of a slice of the passages files."""
    spec, dropped = given.info.passage_spec(given.config), Duplicates(given.run)
    stored = np.zeros(len(threshold), dtype=np.int64)
    rows = []
    for split, count in splits:
        for block in range(count):
            passages = read_block(given.run.passages_file(split), block).without(dropped.of(split, block))
            flat = select(passages, threshold, spec, given.config.per_passage)
            stored += np.bincount(passages.ids[flat], minlength=len(stored))
            needed = np.unique(passages.rows()[flat])
            rows.append(
                (
                    split,
                    block,
                    len(passages.keys),
                    len(passages.ids),
                    len(needed),
                    passages.lengths[needed].sum(),
                    len(flat),
                )
            )
    return Selected(stored, np.array(rows, dtype=np.int64))


def _write(selected: Selected, histogram: Histogram, threshold: np.ndarray, given: PlanInput) -> dict[str, Any]:
    """Write the plan's files and return its facts."""
    blocks = selected.blocks[np.lexsort((selected.blocks[:, 1], selected.blocks[:, 0]))]
    table = pa.table({name: blocks[:, i] for i, name in enumerate(_ROW)})

    def write_blocks(path: Path) -> None:
        pq.write_table(table, path)

    given.run.publish(given.run.blocks, write_blocks)
    cap = given.config.max_occurrences
    points = np.minimum(selected.stored, cap) if cap else selected.stored
    total = dict(zip(_ROW, blocks.sum(axis=0).tolist(), strict=True))
    stats = {name: total[name] for name in ("passages", "tokens", "needed", "needed_tokens", "stored")}
    stats |= {"points": int(points.sum()), "kinds": int((points > 0).sum())}
    arrays = {
        "threshold": threshold,
        "token_counts": histogram.token_counts,
        "stored": selected.stored,
        "shards": cut_shards(selected.stored, given.info.dim),
    }

    def write_plan(path: Path) -> None:
        save_arrays(path, arrays)

    return given.run.publish(given.run.thresholds, write_plan, stats)


def _find_duplicates(given: PlanInput, splits: list[tuple[int, int]], resources: Resources) -> None:
    """Find passages with equal keys: the same content (`--dedup`, written down and dropped) or the same document id.

    Keys are looked at in ranges of about 32 million, so that a task holds about 2 GB at most.
    """
    run = given.run
    passages = sum(storage.stats_of(run.passages_file(split))["passages"] for split, _ in splits)  # type: ignore[index]
    ranges = max(1, -(-passages // KEYS_AT_A_TIME))
    work = [(n, ranges) for n in range(ranges)]
    found = get(reduce_tasks("plan: duplicates", _duplicates, work, resources, splits, given))
    if not given.config.dedup:
        if found.repeated:
            raise InputError(
                f"document id {found.repeated!r} is there twice: ids must be unique (or leave the id column out)"
            )
        return
    places = found.places[np.lexsort(found.places.T[::-1])]
    arrays = {name: places[:, i].astype(np.int32) for i, name in enumerate(("piece", "block", "row"))}

    def write(path: Path) -> None:
        save_arrays(path, arrays)

    run.publish(run.duplicates, write)


@dataclass
class _Duplicates:
    """Passages whose key an earlier passage has; adds up."""

    places: np.ndarray  # int64 [n, 3]: piece, block, row
    repeated: str = ""  # a document id that is there twice

    def merge(self, other: "_Duplicates") -> None:
        self.places = np.concatenate([self.places, other.places])
        self.repeated = self.repeated or other.repeated


def _duplicates(key_range: tuple[int, int], splits: list[tuple[int, int]], given: PlanInput) -> _Duplicates:
    """Look for repeated keys in one range of keys."""
    number, ranges = key_range
    keys, places = [], []
    for split, count in splits:
        file = open_parquet(given.run.passages_file(split))
        for block in range(count):
            column = file.read_row_group(block, columns=["key"]).column("key").to_numpy()
            mine = np.flatnonzero(column % np.uint64(ranges) == number)
            keys.append(column[mine])
            places.append(
                np.stack([np.full(len(mine), split), np.full(len(mine), block), mine], axis=1).astype(np.int32)
            )
    all_keys, all_places = np.concatenate(keys), np.concatenate(places)
    later = duplicate_rows(all_keys)
    found = _Duplicates(all_places[later].astype(np.int64))
    if not given.config.dedup:
        for place in later.tolist():
            first = int(np.flatnonzero(all_keys == all_keys[place])[0])
            if (name := _identity(given.run, all_places[place])) == _identity(given.run, all_places[first]):
                found.repeated = name[0]
                break
    return found


def _identity(run: RunFolder, place: np.ndarray) -> tuple[str, int]:
    """Return (document id, index) of a passage; equal keys of unequal passages are a chance collision of the hash."""
    split, block, row = place.tolist()
    table = open_parquet(run.passages_file(split)).read_row_group(block, columns=["document_id", "index"])
    return str(table.column("document_id")[row]), int(table.column("index")[row].as_py())
