"""Stage 3: passages in, unit files out, and the layout of those files.

A unit is a fixed run of passage blocks that one teacher actor reads in one go. Its file is a plain array of records
sorted by (token, key, passage, position), so that any range of a shard's or a token's rows is one contiguous read, with
nothing to decode. Holds one unit: its token ids, and its records (about `UNIT_BYTES` at most).
"""

import math
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msense import storage
from msense.config import LARGEST_VALUE
from msense.errors import MsenseError
from msense.run_folder import RunFolder
from msense.sampling import select
from msense.teacher import TOKEN_BUDGET, Teacher, pad_batch, token_batches
from msense.teacher_folder import body_folder, weights_fingerprint
from msense.tokens import Passages, PassageSpec, open_parquet, read_block

UNIT_BYTES = (8 << 20, 768 << 20)  # least and most bytes of records a unit aims at
UNITS_WANTED = 160  # twenty for each of eight GPUs
SHARD_BYTES = (24 << 20, 256 << 20)
SHARDS_WANTED = 32


def record_type(dim: int) -> np.dtype:
    """Return the record of one occurrence: 20 + 2 D bytes.

    `row` is the passage's place in its unit, `position` the token's place in the passage, `embedding` the bits of a
    float16 or bfloat16 vector.
    """
    return np.dtype(
        [("key", "<u8"), ("token", "<i4"), ("row", "<i4"), ("position", "<i4"), ("embedding", "<u2", (dim,))]
    )


@dataclass(frozen=True)
class Unit:
    """A fixed run of passage blocks."""

    number: int
    pieces: list[int]
    blocks: list[int]
    stored: int  # occurrences; of labels: bytes
    tokens: int  # that the teacher reads, hence its time


def cut_units(blocks_file: str, dim: int) -> list[Unit]:
    """Cut the plan's blocks into units of about equal expected output; the result depends on data and config only.

    Args:
        blocks_file: the plan's table of blocks (piece, block, stored, ...).
        dim: D.
    """
    table = read_columns(blocks_file, ["piece", "block", "stored", "needed_tokens"])
    piece, block, stored, tokens = (table[name] for name in ("piece", "block", "stored", "needed_tokens"))
    size = record_type(dim).itemsize
    target = int(np.clip(stored.sum() * size // UNITS_WANTED, *UNIT_BYTES)) // size
    return group_blocks(piece, block, stored, tokens, target)


def group_blocks(
    piece: np.ndarray, block: np.ndarray, amount: np.ndarray, tokens: np.ndarray, target: int
) -> list[Unit]:
    """Put blocks that follow one another into units of about equal amounts.

    Args:
        piece: int64 [n], the passages file of each block.
        block: int64 [n], its number there.
        amount: int64 [n], what it gives to its unit.
        tokens: int64 [n], what the teacher reads of it.
        target: amount of a unit.
    """
    number = (np.cumsum(amount) - amount) // max(1, target)
    starts = np.flatnonzero(np.r_[True, number[1:] != number[:-1]]) if len(number) else np.zeros(0, dtype=np.int64)
    stops = [*starts[1:], len(number)]
    return [
        Unit(n, piece[a:b].tolist(), block[a:b].tolist(), int(amount[a:b].sum()), int(tokens[a:b].sum()))
        for n, (a, b) in enumerate(zip(starts, stops, strict=True))
    ]


def longest_first(units: list[Unit]) -> list[Unit]:
    """Return the units in the order in which actors should take them, so that none waits long for the last one.

    Longest processing time first: Graham, Bounds on multiprocessing timing anomalies, SIAM J. Appl. Math. 17 (1969).
    """
    return sorted(units, key=lambda unit: (-unit.tokens, unit.number))


def cut_shards(stored: np.ndarray, dim: int) -> np.ndarray:
    """Cut the vocabulary into shards of about equal bytes; a token larger than half a shard is a shard of its own.

    Args:
        stored: int64 [V], occurrences stored of each token (from the plan).
        dim: D.

    Returns:
        int64 [shards + 1], the first token of each shard, and V.
    """
    size = record_type(dim).itemsize
    target = max(1, int(np.clip(stored.sum() * size // SHARDS_WANTED, *SHARD_BYTES)) // size)
    large = stored > target // 2
    borders = {0, len(stored)} | set(np.flatnonzero(large).tolist()) | set((np.flatnonzero(large) + 1).tolist())
    runs = np.cumsum(np.where(large, 0, stored)) // target
    borders |= set((np.flatnonzero(runs[1:] != runs[:-1]) + 1).tolist())
    return np.array(sorted(borders), dtype=np.int64)


class Duplicates:
    """The rows that `--dedup` drops; holds 12 bytes each."""

    def __init__(self, run: RunFolder) -> None:
        found = storage.load_arrays(run.duplicates) if storage.exists(run.duplicates) else {}
        self.rows = found.get("row", np.zeros(0, dtype=np.int32))
        self.places = found.get("piece", self.rows).astype(np.int64) << 32 | found.get("block", self.rows)

    def of(self, piece: int, block: int) -> np.ndarray:
        """Return the rows to drop of one block, increasing."""
        start, stop = np.searchsorted(self.places, [piece << 32 | block, (piece << 32 | block) + 1])
        return self.rows[start:stop]


def unit_passages(run: RunFolder, unit: Unit, duplicates: Duplicates) -> Passages:
    """Read the passages of a unit; duplicates that the plan dropped are left out."""
    places = zip(unit.pieces, unit.blocks, strict=True)
    return Passages.concatenate([read_block(run.passages_file(p), b).without(duplicates.of(p, b)) for p, b in places])


def read_columns(uri: str, columns: list[str]) -> dict[str, np.ndarray]:
    """Read columns of a parquet file of numbers."""
    table = open_parquet(uri).read(columns=columns)
    return {name: table.column(name).to_numpy() for name in columns}


@dataclass(frozen=True)
class Selection:
    """What a unit stores, worked out before the teacher runs: n occurrences in the order of the file."""

    rows: np.ndarray  # int64 [n], passage in the unit
    positions: np.ndarray  # int64 [n]
    tokens: np.ndarray  # int32 [n]
    keys: np.ndarray  # uint64 [n]
    lengths: np.ndarray  # int64 [P], tokens of every passage of the unit


def select_unit(passages: Passages, threshold: np.ndarray, spec: PassageSpec, per_passage: int) -> Selection:
    """Choose a unit's occurrences and their order in the file: by token, key, passage and position."""
    flat = select(passages, threshold, spec, per_passage)
    rows, positions = passages.rows()[flat], passages.positions()[flat]
    tokens, keys = passages.ids[flat], passages.keys[rows]
    order = np.lexsort((keys, tokens))  # stable: passages and positions are already in order
    return Selection(rows[order], positions[order], tokens[order], keys[order], passages.lengths)


@dataclass(frozen=True)
class GatherSettings:
    """What an actor of this stage is made with."""

    teacher: str
    revision: str | None
    fingerprint: str
    layer: int
    dtype: str
    device: str
    store_dtype: str
    per_passage: int
    spec: PassageSpec
    dim: int
    threads: int = 1  # a constant: sums in another number of threads may round differently


def load_teacher(settings: GatherSettings) -> Teacher:
    """Load the teacher of an actor.

    Raises:
        MsenseError: its weights are not those that the run began with.
    """
    teacher = Teacher(
        settings.teacher,
        revision=settings.revision,
        layer=settings.layer,
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
    )
    if weights_fingerprint(body_folder(settings.teacher, settings.revision)) != settings.fingerprint:
        raise MsenseError(
            f"the weights of teacher {settings.teacher!r} changed, or this node has others: bring the former back, or "
            "give another --output to start afresh"
        )
    return teacher


class OccurrenceActor:
    """Loads the teacher once and writes a file for every unit it is given."""

    def __init__(self, run: RunFolder, settings: GatherSettings) -> None:
        """Load the teacher and the plan of a run.

        Raises:
            MsenseError: the teacher's weights are not those that the run began with.
        """
        self.run = run
        self.settings = settings
        plan = storage.load_arrays(self.run.thresholds)
        self.threshold, self.shards = plan["threshold"], plan["shards"]
        self.duplicates = Duplicates(self.run)
        began = time.time()
        self.teacher = load_teacher(settings)
        self.start_seconds = time.time() - began

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Write one unit; return its facts (counts, offsets of the shards in rows, clock times of its work)."""
        unit = Unit(**item)
        began = time.time()
        passages = unit_passages(self.run, unit, self.duplicates)
        selection = select_unit(passages, self.threshold, self.settings.spec, self.settings.per_passage)
        offsets = np.searchsorted(selection.tokens, self.shards)
        needed = np.unique(selection.rows)
        facts = {
            "unit": unit.number,
            "occurrences": len(selection.rows),
            "passages": len(needed),
            "tokens": int(selection.lengths[needed].sum()),
            "offsets": offsets.tolist(),
        }

        def write(path: Path) -> dict[str, Any]:
            records = self._records(passages, selection, unit)
            with path.open("wb") as file:
                file.write(records.data)  # numpy's tofile would hide the system's error
            actor = f"{socket.gethostname()}-{os.getpid()}"
            return {"actor": actor, "began": began, "ended": time.time(), "start_seconds": self.start_seconds}

        return self.run.publish(self.run.unit_file(unit.number), write, facts)

    def _records(self, passages: Passages, selection: Selection, unit: Unit) -> np.ndarray:
        """Run the teacher over the needed passages and put every stored embedding in its place."""
        import torch

        records = np.empty(len(selection.rows), dtype=record_type(self.settings.dim))
        records["key"], records["token"] = selection.keys, selection.tokens
        records["row"], records["position"] = selection.rows, selection.positions
        by_row = np.argsort(selection.rows, kind="stable")
        needed, starts = np.unique(selection.rows[by_row], return_index=True)
        stops = np.r_[starts[1:], len(by_row)]
        for batch in token_batches(selection.lengths[needed], TOKEN_BUDGET[self.settings.device]):
            ids, mask = pad_batch([passages.ids[passages.offsets[r] : passages.offsets[r + 1]] for r in needed[batch]])
            target = np.concatenate([by_row[starts[b] : stops[b]] for b in batch])
            place = np.repeat(np.arange(len(batch)), (stops - starts)[batch])
            hidden = self.teacher.embed(ids, mask)
            flat = torch.from_numpy(place * mask.shape[1] + selection.positions[target]).to(hidden.device)
            chosen = hidden.flatten(0, 1).index_select(0, flat)
            as_stored = chosen.to(getattr(torch, self.settings.store_dtype))
            if not float(as_stored.abs().max()) <= LARGEST_VALUE:  # NaN is not, either
                raise MsenseError(f"unit {unit.number}: {_unfit(float(chosen.abs().max()), self.settings)}")
            records["embedding"][target] = as_stored.view(torch.uint16).cpu().numpy()
        return records


def _unfit(largest: float, settings: GatherSettings) -> str:
    """Say what is wrong with values of which this is the largest, or NaN, and what to do."""
    if largest <= LARGEST_VALUE:
        return (
            f"an embedding is too large for {settings.store_dtype}: "
            "give --store-dtype bfloat16 (larger range), in a new output folder"
        )
    if LARGEST_VALUE < largest < math.inf:
        return (
            f"the teacher gave a value of {largest:.3g}, but k-means takes up to {LARGEST_VALUE:g}: check its weights"
        )
    remedy = "" if settings.dtype == "float32" else "give --dtype float32, in a new output folder, or "
    return f"the teacher gave NaN or infinite embeddings in {settings.dtype}: {remedy}check its weights"


def write_index(run: RunFolder, units: int) -> dict[str, int]:
    """Write where each shard's rows lie in each unit; return the number of tokens read and occurrences stored."""
    offsets, tokens, occurrences = [], 0, 0
    for unit in range(units):
        facts = storage.facts_of(run.unit_file(unit))
        if facts is None:
            raise MsenseError(f"unit file {run.unit_file(unit)} went missing: run the same command again")
        offsets.append(np.array(facts["offsets"], dtype=np.int64))
        tokens, occurrences = tokens + facts["tokens"], occurrences + facts["occurrences"]

    def write(path: Path) -> None:
        storage.save_arrays(path, {"offsets": np.stack(offsets)})

    run.publish(run.offsets, write)
    return {"tokens": tokens, "occurrences": occurrences}


def read_rows(uri: str, dim: int, start: int, stop: int) -> np.ndarray:
    """Read a range of a unit's records in one contiguous read.

    Args:
        uri: a unit file.
        dim: D.
        start: first row.
        stop: row after the last.

    Returns:
        records [stop - start].
    """
    dtype = record_type(dim)
    if start == stop:
        return np.empty(0, dtype)
    return np.frombuffer(storage.read_range(uri, start * dtype.itemsize, (stop - start) * dtype.itemsize), dtype)
