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

from msense.constants import LARGEST_VALUE
from msense.corpus.passages import Passages, PassageSpec
from msense.errors import MsenseError
from msense.io import storage
from msense.io.arrays import load_arrays, save_arrays
from msense.run.folder import RunFolder
from msense.stages.embedding_store import Duplicates, Partition, partition_passages, record_type
from msense.stages.sampling import select
from msense.teacher.batching import TOKEN_BUDGET, pad_batch, token_batches
from msense.teacher.files import body_folder, weights_fingerprint
from msense.teacher.model import Teacher


@dataclass(frozen=True)
class Selection:
    """What a unit stores, worked out before the teacher runs: n occurrences in the order of the file."""

    rows: np.ndarray  # int64 [n], passage in the unit
    positions: np.ndarray  # int64 [n]
    tokens: np.ndarray  # int32 [n]
    keys: np.ndarray  # uint64 [n]
    lengths: np.ndarray  # int64 [P], tokens of every passage of the unit


def select_occurrences(passages: Passages, threshold: np.ndarray, spec: PassageSpec, per_passage: int) -> Selection:
    """Choose a unit's occurrences and their order in the file: by token, key, passage and position."""
    flat = select(passages, threshold, spec, per_passage)
    rows, positions = passages.rows()[flat], passages.positions()[flat]
    tokens, keys = passages.ids[flat], passages.keys[rows]
    order = np.lexsort((keys, tokens))  # stable: passages and positions are already in order
    return Selection(rows[order], positions[order], tokens[order], keys[order], passages.lengths)


@dataclass(frozen=True)
class EmbedSettings:
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


def load_teacher(settings: EmbedSettings) -> Teacher:
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


class EmbedActor:
    """Loads the teacher once and writes a file for every unit it is given."""

    def __init__(self, run: RunFolder, settings: EmbedSettings) -> None:
        """Load the teacher and the plan of a run.

        Raises:
            MsenseError: the teacher's weights are not those that the run began with.
        """
        self.run = run
        self.settings = settings
        plan = load_arrays(self.run.thresholds)
        self.threshold, self.shards = plan["threshold"], plan["shards"]
        self.duplicates = Duplicates(self.run)
        began = time.time()
        self.teacher = load_teacher(settings)
        self.start_seconds = time.time() - began

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Write one unit; return its facts (counts, offsets of the shards in rows, clock times of its work)."""
        partition = Partition(**item)
        began = time.time()
        passages = partition_passages(self.run, partition, self.duplicates)
        selection = select_occurrences(passages, self.threshold, self.settings.spec, self.settings.per_passage)
        offsets = np.searchsorted(selection.tokens, self.shards)
        needed = np.unique(selection.rows)
        stats = {
            "unit": partition.number,
            "occurrences": len(selection.rows),
            "passages": len(needed),
            "tokens": int(selection.lengths[needed].sum()),
            "offsets": offsets.tolist(),
        }

        def write(path: Path) -> dict[str, Any]:
            records = self._records(passages, selection, partition)
            with path.open("wb") as file:
                file.write(records.data)  # numpy's tofile would hide the system's error
            actor = f"{socket.gethostname()}-{os.getpid()}"
            return {"actor": actor, "began": began, "ended": time.time(), "start_seconds": self.start_seconds}

        return self.run.publish(self.run.partition_file(partition.number), write, stats)

    def _records(self, passages: Passages, selection: Selection, partition: Partition) -> np.ndarray:
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
                raise MsenseError(f"unit {partition.number}: {_unfit(float(chosen.abs().max()), self.settings)}")
            records["embedding"][target] = as_stored.view(torch.uint16).cpu().numpy()
        return records


def _unfit(largest: float, settings: EmbedSettings) -> str:
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


def write_index(run: RunFolder, partitions: int) -> dict[str, int]:
    """Write where each shard's rows lie in each unit; return the number of tokens read and occurrences stored."""
    offsets, tokens, occurrences = [], 0, 0
    for partition in range(partitions):
        stats = storage.stats_of(run.partition_file(partition))
        if stats is None:
            raise MsenseError(f"unit file {run.partition_file(partition)} went missing: run the same command again")
        offsets.append(np.array(stats["offsets"], dtype=np.int64))
        tokens, occurrences = tokens + stats["tokens"], occurrences + stats["occurrences"]

    def write(path: Path) -> None:
        save_arrays(path, {"offsets": np.stack(offsets)})

    run.publish(run.offsets, write)
    return {"tokens": tokens, "occurrences": occurrences}
