"""Stage 3: run the teacher over the needed passages and store the embeddings of the sampled occurrences.

The file of a partition is an array of records sorted by (token, key, passage, position), so that the rows of any shard or
token are contiguous. Memory of an actor: the teacher, one partition's token ids and its records (about `PARTITION_BYTES`).
"""

import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msense.constants import LARGEST_VALUE
from msense.corpus.passages import Passages, PassageSpec
from msense.errors import MsenseError
from msense.io.arrays import load_arrays, save_arrays
from msense.run.folder import RunFolder
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.base import Stage
from msense.stages.embedding_store import Duplicates, Partition, longest_first, partition_passages, record_type
from msense.stages.sampling import select
from msense.teacher.batching import TOKEN_BUDGET
from msense.teacher.files import body_folder, weights_fingerprint
from msense.teacher.model import Teacher, embed_tokens
from msense.teacher.spec import TeacherInfo


@dataclass(frozen=True)
class EmbedStats:
    """What the teacher read and wrote."""

    tokens: int
    occurrences: int


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


@dataclass(frozen=True)
class EmbedSettings:
    """Settings of the teacher actors."""

    teacher: str  # name or folder
    info: TeacherInfo
    dtype: str
    device: str
    store_dtype: str
    per_passage: int
    spec: PassageSpec
    threads: int = 1  # constant: sums over another number of threads may round differently


def load_teacher(settings: EmbedSettings) -> Teacher:
    """Load the teacher; raise MsenseError if its weights are not those that the run was started with."""
    name, info = settings.teacher, settings.info
    given: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device, "threads": settings.threads}
    teacher = Teacher(name, revision=info.revision, layer=info.layer, **given)
    if weights_fingerprint(body_folder(name, info.revision)) != info.fingerprint:
        raise MsenseError(
            f"the weights of teacher {name!r} changed during the run, or differ on this node: restore them, or "
            "start over with another --output"
        )
    return teacher


class EmbedActor:
    """Loads the teacher once, and writes the file of each partition it is called with."""

    def __init__(self, run: RunFolder, settings: EmbedSettings) -> None:
        """Load the teacher and the plan of a run; raise MsenseError if the teacher's weights changed."""
        self.run, self.settings = run, settings
        plan = load_arrays(run.thresholds)
        self.threshold, self.shards = plan["threshold"], plan["shards"]
        self.duplicates = Duplicates(run)
        began = time.time()
        self.teacher = load_teacher(settings)
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
        }

        def write(path: Path) -> Row:
            self._embed(passages, records, partition.number)
            with path.open("wb") as file:
                file.write(records.data)  # numpy's tofile hides errors of the system
            actor = f"{socket.gethostname()}-{os.getpid()}"
            return {"actor": actor, "began": began, "ended": time.time(), "start_seconds": self.start_seconds}

        return self.run.publish(self.run.partition_file(partition.number), write, stats)

    def _embed(self, passages: Passages, records: np.ndarray, partition: int) -> None:
        """Run the teacher and fill in the embeddings of a partition's records."""
        by_row = np.argsort(records["row"], kind="stable")
        needed, starts = np.unique(records["row"][by_row], return_index=True)
        stops = np.r_[starts[1:], len(by_row)]
        rows = [passages.row(number) for number in needed]
        for batch, hidden in embed_tokens(self.teacher, rows, TOKEN_BUDGET[self.settings.device]):
            target = np.concatenate([by_row[starts[b] : stops[b]] for b in batch.rows])
            place = np.repeat(np.arange(len(batch.rows)), (stops - starts)[batch.rows])
            flat = torch.from_numpy(place * batch.mask.shape[1] + records["position"][target]).to(hidden.device)
            chosen = hidden.flatten(0, 1).index_select(0, flat)
            as_stored = chosen.to(getattr(torch, self.settings.store_dtype))
            if not float(as_stored.abs().max()) <= LARGEST_VALUE:  # also false for NaN
                raise MsenseError(f"partition {partition}: {_problem(float(chosen.abs().max()), self.settings)}")
            records["embedding"][target] = as_stored.view(torch.uint16).cpu().numpy()


def _problem(largest: float, settings: EmbedSettings) -> str:
    """Return the error message for embeddings whose largest absolute value is this, or NaN."""
    if largest <= LARGEST_VALUE:
        return f"an embedding is too large for {settings.store_dtype}: use --store-dtype bfloat16 with a new --output"
    if largest < math.inf:
        return f"the teacher's embeddings reach {largest:.3g}, above the limit of {LARGEST_VALUE:g}: check its weights"
    return not_finite(settings.dtype)


def not_finite(dtype: str, problem: str = "NaN or infinite") -> str:
    """Return the error message for embeddings that a teacher computed in a dtype."""
    remedy = "" if dtype == "float32" else "use --dtype float32 with a new --output, or "
    return f"the teacher's {dtype} embeddings are {problem}: {remedy}check its weights"


class EmbedStage(Stage[EmbedStats]):
    """Writes the partition files and the index of all of them."""

    name = "embed"

    def __init__(self, run: RunFolder, settings: EmbedSettings, partitions: Sequence[Partition]) -> None:
        super().__init__(run, [run.partition_file(partition.number) for partition in partitions])
        self.settings, self.partitions = settings, partitions

    def process(self, executor: Executor, missing: Sequence[int]) -> Iterator[Row]:
        """Run the missing partitions through teacher actors, longest first."""
        items = [asdict(partition) for partition in longest_first([self.partitions[number] for number in missing])]
        return executor.map_actors(self.name, EmbedActor, {"run": self.run, "settings": self.settings}, items)

    def reduce(self, executor: Executor, stats: list[Row]) -> EmbedStats:
        """Write the offset of every shard in every partition, int64 [partitions, shards + 1]; add up the counts."""
        executor.run(_write_index, self.run, [row["offsets"] for row in stats])
        return EmbedStats(sum(row["tokens"] for row in stats), sum(row["occurrences"] for row in stats))


def _write_index(run: RunFolder, offsets: list[list[int]]) -> None:
    run.publish(run.offsets, lambda path: save_arrays(path, {"offsets": np.array(offsets, dtype=np.int64)}))
