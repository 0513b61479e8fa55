"""Exemplars: places of the points nearest to each centroid in, their contexts out.

Clustering keeps (unit, row, position) of the nearest points; here their passages are read again, a unit at a time and
once each, and decoded around the token. A task holds one unit's passages; the last one all exemplars (about 300 bytes
each).
"""

from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from msense import storage
from msense.dictionary.lookup import exemplar_schema
from msense.occurrences import Duplicates, Unit
from msense.resume import Journal, finished
from msense.run_folder import RunFolder
from msense.runtime import Resources, map_tasks, run_task
from msense.tokens import open_parquet

ROW_GROUP = 1 << 16  # a look at one token reads the row groups that hold it
LONGEST_TEXT = 4096  # characters
WINDOW = 24  # tokens of context on each side
PLACE = ("token", "sense", "rank", "distance", "unit", "row", "position")


def nearest(sense: np.ndarray, distance: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the points nearest to each centroid.

    Args:
        sense: int [n], the sense of each point.
        distance: float32 [n], its distance.
        count: how many to keep a sense; ties go to the earlier point.

    Returns:
        Places of the chosen points int64 [m], by sense and distance, and the rank of each, int32 [m].
    """
    order = np.lexsort((distance, sense))
    starts = np.flatnonzero(np.r_[True, np.diff(sense[order]) != 0]) if len(order) else np.zeros(0, dtype=np.int64)
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    chosen = rank < count
    return order[chosen], rank[chosen].astype(np.int32)


def resolve(
    run: RunFolder, centroid_files: list[str], units: list[Unit], resources: Resources, journal: Journal
) -> list[str]:
    """Decode the contexts of all exemplars, a file a unit.

    Args:
        run: the run folder.
        centroid_files: files of stage 4.
        units: the run's units.
        resources: how many tasks at a time.
        journal: where to note what is kept of earlier drivers and what is made.

    Returns:
        The files.
    """
    index = run.contexts_index
    unknown = finished("exemplars", run, [index], resources, journal) == [None]
    if unknown:
        run_task(_write_index, run, centroid_files, len(units))
    files = [run.contexts_file(unit.number) for unit in units]
    done = finished("exemplars", run, files, resources, journal)
    todo = [asdict(unit) for unit, f in zip(units, done, strict=True) if f is None]
    for _ in map_tasks("exemplars", _resolve_unit, todo, resources, run, index):
        pass
    journal.add("exemplars", made=len(todo) + unknown)
    return files


def _write_index(run: RunFolder, centroid_files: list[str], units: int) -> None:
    """Sort the places of all exemplars by unit, a row group a unit."""
    names = tuple(f"exemplar_{name}" for name in PLACE)
    arrays = [storage.load_arrays(file, names) for file in centroid_files]
    columns = {name: np.concatenate([a[f"exemplar_{name}"] for a in arrays]) for name in PLACE}
    order = np.argsort(columns["unit"], kind="stable")
    table = pa.table({name: column[order] for name, column in columns.items()})
    borders = np.searchsorted(columns["unit"][order], np.arange(units + 1)).tolist()

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, table.schema) as writer:
            for start, stop in pairwise(borders):
                writer.write_table(table.slice(start, stop - start), row_group_size=max(1, stop - start))

    run.publish(run.contexts_index, write)


def _resolve_unit(item: dict[str, Any], run: RunFolder, index: str) -> dict[str, Any]:
    """Decode the contexts of one unit's exemplars."""
    unit = Unit(**item)
    tokenizer = Tokenizer.from_str(storage.read_text(run.tokenizer))
    places = open_parquet(index).read_row_group(unit.number)
    rows = places.column("row").to_numpy()
    documents, passages = _passages(run, unit, rows)
    contexts = [
        _context(tokenizer, passages[r], p)
        for r, p in zip(rows.tolist(), places.column("position").to_pylist(), strict=True)
    ]
    left, word, right = ([c[i] for c in contexts] for i in range(3))
    columns = [places.column(n).combine_chunks() for n in ("token", "sense", "rank", "distance")]
    columns[3] = pc.sqrt(columns[3])  # squared until here: roots of unequal squares may be equal
    identities = [documents[r] for r in rows.tolist()]
    cut = (
        [t[-LONGEST_TEXT:] for t in left],
        *([t[:LONGEST_TEXT] for t in texts] for texts in (word, right, identities)),
    )
    texts = [pa.array(texts, pa.string()) for texts in cut]
    schema = exemplar_schema()
    table = pa.Table.from_arrays([c.cast(f.type) for c, f in zip(columns + texts, schema, strict=True)], schema=schema)

    def write(path: Path) -> None:
        pq.write_table(table, path)

    run.publish(run.contexts_file(unit.number), write)
    return {}


def _passages(run: RunFolder, unit: Unit, rows: np.ndarray) -> tuple[dict[int, str], dict[int, list[int]]]:
    """Read document ids and token ids of some passages of a unit, by row."""
    dropped = Duplicates(run)
    wanted = np.unique(rows)
    documents: dict[int, str] = {}
    ids: dict[int, list[int]] = {}
    start = 0
    for piece, block in zip(unit.pieces, unit.blocks, strict=True):
        table = open_parquet(run.passages_file(piece)).read_row_group(block, columns=["document_id", "input_ids"])
        kept = np.delete(np.arange(len(table)), dropped.of(piece, block))
        mine = wanted[(wanted >= start) & (wanted < start + len(kept))]
        chosen = table.take(kept[mine - start])
        documents.update(zip(mine.tolist(), chosen.column("document_id").to_pylist(), strict=True))
        ids.update(zip(mine.tolist(), chosen.column("input_ids").to_pylist(), strict=True))
        start += len(kept)
    return documents, ids


def _context(tokenizer: Tokenizer, ids: list[int], position: int) -> tuple[str, str, str]:
    """Decode a token and the text around it: (left, token, right).

    The three are cut out of growing decodings of the same window, so that spaces stay where the text has them.
    """
    start, stop = max(0, position - WINDOW), position + 1 + WINDOW
    special = bool(tokenizer.decode([ids[position]], skip_special_tokens=True) == "")
    left = tokenizer.decode(ids[start:position])
    upto = tokenizer.decode(ids[start : position + 1], skip_special_tokens=not special)
    whole = tokenizer.decode(ids[start:stop], skip_special_tokens=not special)
    if upto.startswith(left) and whole.startswith(upto) and len(upto) > len(left):
        return left, upto[len(left) :], whole[len(upto) :]
    return (
        left,
        tokenizer.decode([ids[position]], skip_special_tokens=False),
        tokenizer.decode(ids[position + 1 : stop]),
    )


def collect(files: list[str], target: Path) -> None:
    """Bring the contexts of all units together in one local file, by token, sense and rank."""
    table = pa.concat_tables([open_parquet(file).read() for file in files])
    table = table.sort_by([("token", "ascending"), ("sense", "ascending"), ("rank", "ascending")])
    pq.write_table(table, target, compression="zstd", row_group_size=ROW_GROUP, write_statistics=["token"])
