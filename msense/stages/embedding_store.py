"""Partition files: how passages are grouped into them, their records, and reading ranges of their rows.

Reading needs 20 + 2 D bytes per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from msense.clustering.kmeans import KMeansConfig
from msense.corpus.passages import Passages, read_block
from msense.io import storage
from msense.io.arrays import load_arrays, read_columns
from msense.run.folder import RunFolder

PARTITION_BYTES = (8 << 20, 768 << 20)  # smallest and largest target size of a partition's records
TARGET_PARTITIONS = 160  # twenty per GPU on eight GPUs
SHARD_BYTES = (24 << 20, 256 << 20)
TARGET_SHARDS = 32


@dataclass(frozen=True)
class ClusterSettings:
    """Settings of the clustering tasks."""

    run: RunFolder
    dim: int
    store_dtype: str
    max_occurrences: int
    max_points_per_part: int
    exemplars: int
    kmeans: KMeansConfig  # with one k for all tokens unless `senses_by_token`
    senses_by_token: bool  # read each token's K from the run's file `senses`
    device: str  # "cuda" or "cpu"


@dataclass(frozen=True)
class Range:
    """Rows [start, stop) of a partition file."""

    partition: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def read_ranges(settings: ClusterSettings, ranges: Sequence[Range]) -> tuple[np.ndarray, np.ndarray]:
    """Read rows of several partitions: records [n], and the partition of each, int32 [n]."""
    records, start = np.empty(sum(map(len, ranges)), record_type(settings.dim)), 0
    for r in ranges:
        rows = slice(start, start := start + len(r))
        records[rows] = read_rows(settings.run.partition_file(r.partition), settings.dim, r.start, r.stop)
    return records, np.repeat(np.array([r.partition for r in ranges], np.int32), [len(r) for r in ranges])


def shard_ranges(settings: ClusterSettings, shard: int) -> list[Range]:
    """Return the ranges of a shard's rows in all partitions."""
    offsets = load_arrays(settings.run.offsets, ("offsets",))["offsets"][:, shard : shard + 2]
    return [Range(partition, start, stop) for partition, (start, stop) in enumerate(offsets.tolist())]


def read_sense_counts(settings: ClusterSettings, tokens: np.ndarray) -> np.ndarray:
    """Return the number of senses to compute for each token, int64 [T], given token ids int64 [T]."""
    if not settings.senses_by_token:
        return np.full(len(tokens), settings.kmeans.k)
    return load_arrays(settings.run.senses, ("senses",))["senses"][tokens]


def stored(embeddings: np.ndarray, dtype: str) -> torch.Tensor:
    """View stored bits, uint16 [n, D], as float16 or bfloat16 [n, D]."""
    return torch.from_numpy(embeddings).view(getattr(torch, dtype))


def as_stored(centroids: np.ndarray, dtype: str) -> np.ndarray:
    """Round centroids float32 [S, D] to the stored dtype and return its bits, uint16 [S, D]."""
    return torch.from_numpy(centroids).to(getattr(torch, dtype)).view(torch.uint16).numpy()


def record_type(dim: int) -> np.dtype:
    """Return the record of one occurrence, 20 + 2 D bytes.

    `row` is the index of the passage in its partition, `position` that of the token in the passage, `embedding` the bits
    of a float16 or bfloat16 vector.
    """
    fields = [("key", "<u8"), ("token", "<i4"), ("row", "<i4"), ("position", "<i4"), ("embedding", "<u2", (dim,))]
    return np.dtype(fields)


@dataclass(frozen=True)
class Partition:
    """A fixed sequence of passage blocks."""

    number: int
    splits: list[int]
    blocks: list[int]
    stored: int = 0  # occurrences
    passages: int = 0  # that the plan needs
    tokens: int = 0  # of these passages
    kept: bool = False  # whether the embeddings of all these tokens are in a file
    queries: bool = False  # whether the blocks are those of `--queries`

    def kept_bytes(self, token: int, vector: int) -> int:
        """Return the size of the file of all embeddings and sentence vectors, given the bytes of one."""
        return self.tokens * token + self.passages * vector


def cut_partitions(blocks_file: str, dim: int) -> list[Partition]:
    """Cut the plan's table of blocks into partitions of similar expected size, which depend on data and config only."""
    table = read_columns(blocks_file, ["piece", "block", "stored", "needed", "needed_tokens"])
    split, block, stored, needed, tokens = table.values()
    size = record_type(dim).itemsize
    target = int(np.clip(stored.sum() * size // TARGET_PARTITIONS, *PARTITION_BYTES)) // size
    starts = np.unique((np.cumsum(stored) - stored) // max(1, target), return_index=True)[1]
    return [
        Partition(
            number=n,
            splits=split[a:b].tolist(),
            blocks=block[a:b].tolist(),
            stored=int(stored[a:b].sum()),
            passages=int(needed[a:b].sum()),
            tokens=int(tokens[a:b].sum()),
        )
        for n, (a, b) in enumerate(pairwise([*starts, len(split)]))
    ]


def within_budget(partitions: Sequence[Partition], token: int, vector: int, budget: float) -> list[Partition]:
    """Return the partitions, the first of them `kept`, whose files of embeddings take at most `budget` bytes."""
    sizes = np.cumsum([partition.kept_bytes(token, vector) for partition in partitions])
    return [replace(partition, kept=bool(size <= budget)) for partition, size in zip(partitions, sizes, strict=True)]


def longest_first(partitions: list[Partition]) -> list[Partition]:
    """Return the partitions in the order in which actors should process them, to shorten the wait for the last one.

    Longest processing time first: Graham, Bounds on multiprocessing timing anomalies, SIAM J. Appl. Math. 17 (1969).
    """
    return sorted(partitions, key=lambda partition: (-partition.tokens, partition.number))


def cut_shards(stored: np.ndarray, dim: int, max_points: int) -> np.ndarray:
    """Cut the vocabulary into shards of similar size, given the stored occurrences int64 [V] of each token.

    A token of more than half a shard or `max_points` gets its own. Returns the first token of each shard, and V, int64.
    """
    size = record_type(dim).itemsize
    target = max(1, int(np.clip(stored.sum() * size // TARGET_SHARDS, *SHARD_BYTES)) // size)
    large = stored > min(target // 2, max_points)
    runs, alone = np.cumsum(np.where(large, 0, stored)) // target, np.flatnonzero(large)
    return np.unique(np.r_[0, alone, alone + 1, np.flatnonzero(np.diff(runs)) + 1, len(stored)])


def shard_items(shards: np.ndarray, numbers: Sequence[int]) -> list[dict[str, int]]:
    """Return the work items of some shards, given int64 [shards + 1], the first token of each."""
    return [{"number": n, "first": int(shards[n]), "last": int(shards[n + 1])} for n in numbers]


class Duplicates:
    """The rows that `--dedup` skips, at 12 bytes each."""

    def __init__(self, run: RunFolder) -> None:
        arrays = load_arrays(run.duplicates) if storage.exists(run.duplicates) else {}
        self.rows = arrays.get("row", np.zeros(0, dtype=np.int32))
        self.places = arrays.get("piece", self.rows).astype(np.int64) << 32 | arrays.get("block", self.rows)

    def of(self, split: int, block: int) -> np.ndarray:
        """Return the rows of one block to skip, increasing."""
        start, stop = np.searchsorted(self.places, [split << 32 | block, (split << 32 | block) + 1])
        return self.rows[start:stop]


def partition_passages(run: RunFolder, partition: Partition, duplicates: Duplicates) -> Passages:
    """Read the passages of a partition without duplicates."""
    places = zip(partition.splits, partition.blocks, strict=True)
    return Passages.concatenate([read_block(run.passages_file(p), b).without(duplicates.of(p, b)) for p, b in places])


def read_rows(uri: str, dim: int, start: int, stop: int) -> np.ndarray:
    """Read rows [start, stop) of a partition file in one contiguous read."""
    dtype = record_type(dim)
    if start == stop:
        return np.empty(0, dtype)
    return np.frombuffer(storage.read_range(uri, start * dtype.itemsize, (stop - start) * dtype.itemsize), dtype)
