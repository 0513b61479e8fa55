"""Stage 3: run the teacher over the needed passages and store the embeddings of the sampled occurrences.

The file of a partition is an array of records sorted by (token, key, passage, position), so that the rows of any shard or
token are contiguous. A second file may keep the embeddings of all tokens, for labels. Memory of an actor: the teacher, one
partition's token ids, its records (about `PARTITION_BYTES`) and one batch.
"""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from msense.corpus.passages import Passages, PassageSpec
from msense.io.arrays import load_arrays, save_arrays
from msense.run.folder import RunFolder
from msense.run.resume import finished
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import Stage, StageContext
from msense.stages.embedding_store import Duplicates, Partition, longest_first, partition_passages, record_type
from msense.stages.reading import EmbedSettings, TeacherReader, batches_of, bits, write_reading
from msense.stages.sampling import select


@dataclass(frozen=True)
class EmbedStats:
    """What the teacher read and wrote."""

    forwarded: int  # tokens that the teacher read
    occurrences: int
    kept_bytes: int  # of the embeddings of all tokens


def select_occurrences(
    passages: Passages, threshold: np.ndarray, spec: PassageSpec, per_passage: int, dim: int = 0
) -> np.ndarray:
    """Return the records of a partition, sorted by token, key, passage and position, with undefined embeddings."""
    flat = select(passages, threshold, spec, per_passage)
    rows, tokens = passages.rows()[flat], passages.ids[flat]
    columns = {"key": passages.keys[rows], "token": tokens, "row": rows, "position": passages.positions()[flat]}
    order = np.lexsort((columns["key"], tokens))  # stable: passages and positions are already in order
    records = np.empty(len(flat), record_type(dim))
    for name, column in columns.items():
        records[name] = column[order]
    return records


class EmbedActor:
    """Loads the teacher once, and writes the files of each partition it is called with."""

    def __init__(self, run: RunFolder, settings: EmbedSettings) -> None:
        """Load the teacher and the plan of a run; raise MsenseError if the teacher's weights changed."""
        self.run, self.settings = run, settings
        plan = load_arrays(run.thresholds)
        self.threshold, self.shards = plan["threshold"], plan["shards"]
        self.duplicates = Duplicates(run)
        began = time.time()
        self.reader = TeacherReader(settings)
        self.start_seconds = time.time() - began

    def __call__(self, item: Row) -> Row:
        """Write one partition; return its stats: counts, offsets of the shards in rows, clock times."""
        partition, settings, began = Partition(**item), self.settings, time.time()
        passages = partition_passages(self.run, partition, self.duplicates)
        limits = self.threshold, settings.spec, settings.per_passage
        records = select_occurrences(passages, *limits, settings.info.dim)
        needed = np.unique(records["row"])
        stats = {
            "number": partition.number,
            "occurrences": len(records),
            "passages": len(needed),
            "tokens": int(passages.lengths[needed].sum()),
            "offsets": np.searchsorted(records["token"], self.shards).tolist(),
            "kept_bytes": partition.kept_bytes(*settings.kept_sizes) if partition.kept else 0,
        }
        if partition.kept:

            def keep(path: Path) -> None:
                with path.open("wb") as file:
                    self._embed(passages, records, file)

            counts = {name: stats[name] for name in ("passages", "tokens")}
            self.run.publish(self.run.embeddings_file(partition.number), keep, counts)
        else:
            self._embed(passages, records)

        def write(path: Path) -> Row:
            with path.open("wb") as file:
                file.write(records.data)  # numpy's tofile hides errors of the system
            actor = f"{socket.gethostname()}-{os.getpid()}"
            return {"actor": actor, "began": began, "ended": time.time(), "start_seconds": self.start_seconds}

        return self.run.publish(self.run.partition_file(partition.number), write, stats)

    def _embed(self, passages: Passages, records: np.ndarray, file: BinaryIO | None = None) -> None:
        """Run the teacher, fill in the embeddings of a partition's records, and write those of all tokens."""
        by_row = np.argsort(records["row"], kind="stable")
        needed, starts = np.unique(records["row"][by_row], return_index=True)
        stops = np.r_[starts[1:], len(by_row)]
        for reading in self.reader(passages, batches_of(passages, needed, self.settings)):
            place = np.searchsorted(needed, reading.rows)
            target = np.concatenate([by_row[starts[p] : stops[p]] for p in place])
            lengths = passages.lengths[reading.rows]
            first = np.repeat(np.cumsum(lengths) - lengths, (stops - starts)[place])
            flat = torch.from_numpy(first + records["position"][target]).to(reading.tokens.device)
            records["embedding"][target] = bits(reading.tokens.index_select(0, flat))
            if file is not None:
                write_reading(file, reading, self.settings)


class EmbedStage(Stage[EmbedStats]):
    """Writes the partition files and the index of all of them."""

    name = "embed"

    def __init__(self, run: RunFolder, settings: EmbedSettings, partitions: Sequence[Partition]) -> None:
        super().__init__(run, [run.partition_file(partition.number) for partition in partitions])
        self.settings, self.partitions = settings, partitions

    def finished(self, context: StageContext) -> list[Row | None]:
        """Return the stats of finished partitions; those with kept embeddings need their file as well."""
        done = super().finished(context)
        kept = [number for number, stats in enumerate(done) if stats and stats.get("kept_bytes")]
        files = finished(self.name, self.run, [self.run.embeddings_file(number) for number in kept], context.executor)
        for number, stats in zip(kept, files, strict=True):
            done[number] = done[number] if stats is not None else None
        return done

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Run the missing partitions through teacher actors, longest first."""
        items = [asdict(partition) for partition in longest_first([self.partitions[number] for number in missing])]
        return executor.map_actors(self.name, EmbedActor, {"run": self.run, "settings": self.settings}, items)

    def reduce(self, executor: Executor, stats: list[Row]) -> EmbedStats:
        """Write the offset of every shard in every partition, int64 [partitions, shards + 1]; add up the counts."""
        executor.run(_write_index, self.run, [row["offsets"] for row in stats])
        return EmbedStats(*(sum(row[name] for row in stats) for name in ("tokens", "occurrences", "kept_bytes")))


def _write_index(run: RunFolder, offsets: list[list[int]]) -> None:
    run.publish(run.offsets, lambda path: save_arrays(path, {"offsets": np.array(offsets, dtype=np.int64)}))
