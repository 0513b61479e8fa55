"""Checked, memory-mapped reader of a run's labels, and deterministic training batches over them.

Memory: 18 bytes per passage, 8 more while an epoch is laid out, and one batch. Never imports Ray.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from msense.constants import MAX_DIM, MAX_SENSES, MAX_VOCABULARY, NO_SENSE
from msense.corpus.spans import KINDS, SPANS
from msense.dictionary.layout import TeacherName
from msense.errors import InputError
from msense.io import storage
from msense.io.arrays import row_blocks
from msense.io.untrusted import Artefact, FrozenModel, TensorSpecs, printable
from msense.run.folder import RunFolder
from msense.teacher.batching import pad_batch, token_batches

POOL_BATCHES = 64  # batches whose passages are sorted by length together
_LONGEST = 1 << 24  # tokens of a passage
_DTYPES = {"I64": "<i8", "I32": "<i4", "U16": "<u2", "F16": "<f2", "U8": "|u1"}
_SUM_TOLERANCE = 0.01  # of the sum of weights stored in float16
LABELS = Artefact("set of labels", "run `msense distill` again to regenerate it", InputError)
_SPANS = [KINDS.index(name) for name in SPANS]
_PER_PASSAGE = ("offsets", "held_out", "kind", "pooled", "skip")
HeldOutBy = Literal["documents", "passages"]
HELD_OUT_BY: tuple[HeldOutBy, ...] = get_args(HeldOutBy)
_Count = Annotated[int, Field(ge=0, lt=1 << 60)]


class LabelPartition(FrozenModel):
    """Counts and checksum of one label file (one partition)."""

    passages: _Count = Field(description="rows: passages, spans of passages, and queries")
    spans: _Count = Field(0, description="rows that are not passages")
    tokens: _Count
    labelled: _Count = Field(description="tokens that have a sense")
    held_out_passages: _Count
    size: _Count
    sha256: str


class LabelManifest(FrozenModel):
    """Settings that the labels were generated with, and their files."""

    format_version: Literal[1] = 1
    inputs_hash: str = Field(alias="made_of")
    dictionary: str = Field(description="fingerprint")
    teacher: TeacherName
    tokenizer_fingerprint: str
    vocab_size: int = Field(gt=0, le=MAX_VOCABULARY)
    dim: int = Field(gt=0, le=MAX_DIM)
    metric: Literal["l2", "dot", "cosine"]
    temperature_unit: float = Field(ge=0, le=1e77)
    temperature: float | None = Field(gt=0, description="of the weights of soft targets, if any")
    train_tokens: _Count | None
    held_out: float = Field(ge=0, lt=1, description="share of the text")
    held_out_by: HeldOutBy = "documents"
    held_out_salt: int
    soft_targets: int = Field(ge=0, le=MAX_SENSES)
    spans: dict[str, float] | None = Field(None, description="share by kind; null: files without the column `kind`")
    skips: bool = Field(
        default=False, description="whether files have the column `skip`: prompts that differ are not pooled"
    )
    pooled: bool
    pooled_dim: int | None = Field(default=None, gt=0, le=MAX_DIM, description="of a sentence vector; null: dim")
    pooling: str
    normalize: bool
    partitions: tuple[LabelPartition, ...] = Field(min_length=1, alias="units")

    def total(self, name: str) -> int:
        """Return the sum of a count over all partitions."""
        return sum(getattr(partition, name) for partition in self.partitions)


def label_columns(
    passages: int, tokens: int, dim: int, soft_targets: int, *, kinds: bool = True, skips: bool = False
) -> TensorSpecs:
    """Return the tensors of a file of P passages and N tokens; `dim` 0 means no pooled embeddings.

    `offsets` [P + 1] delimits the passages in `ids`, `senses` (65535 = none), `soft_senses`, `soft_weights` [N, ...]. `kind`
    is 0 for a passage, 1 for a sentence of one, 2 for a run of sentences, 3 for a title or first line, 4 for a query. `skip`
    are the tokens at the start of a passage that are not pooled, if they differ.
    """
    columns: TensorSpecs = {
        "offsets": ("I64", (passages + 1,)),
        "ids": ("I32", (tokens,)),
        "senses": ("U16", (tokens,)),
        "held_out": ("U8", (passages,)),
    }
    columns |= {"kind": ("U8", (passages,))} if kinds else {}
    columns |= {"skip": ("I32", (passages,))} if skips else {}
    if soft_targets:
        columns |= {"soft_senses": ("U16", (tokens, soft_targets)), "soft_weights": ("F16", (tokens, soft_targets))}
    return columns | ({"pooled": ("F16", (passages, dim))} if dim else {})


def label_size(passages: Any, tokens: Any, dim: int, soft_targets: int) -> Any:
    """Return the size in bytes of labels for these counts; `dim` 0 means no pooled embeddings."""
    return tokens * (6 + 4 * soft_targets) + passages * (10 + 2 * dim)


class LabelBatch(NamedTuple):
    """Padded passages with their labels."""

    ids: Tensor  # int64 [B, L], 0 on padding
    mask: Tensor  # bool [B, L]
    senses: Tensor  # int64 [B, L], -1 = none
    pooled: Tensor | None  # float32 [B, D']
    soft_senses: Tensor | None  # int64 [B, L, M], -1 = none
    soft_weights: Tensor | None  # float32 [B, L, M], sums to about 1 for each token with a sense
    spans: Tensor | None = None  # bool [B], whether a row is a part of a passage; None: none is
    skip: Tensor | None = None  # int64 [B], tokens at the start that are not pooled; None: as many as the student skips

    def without_spans(self) -> tuple[Tensor, "LabelBatch"]:
        """Return the rows that are no spans, int64 [B'], and the batch of these; spans repeat the senses of passages."""
        if self.spans is None or not self.spans.any():
            return torch.arange(len(self.ids)), self
        rows = torch.nonzero(~self.spans)[:, 0]
        return rows, LabelBatch(*(None if part is None else part[rows] for part in self))


class LabelSet:
    """The labels of a run: P passages, numbered in the order of the partitions.

    Spans of passages and queries count as passages. `lengths` int32 [P] are their tokens, `kinds` uint8 [P] what they are
    (see `label_columns`).

    Example:
        >>> labels = LabelSet.open("runs/student")
        >>> for passages in labels.batches(epoch=0, seed=0, tokens_per_batch=8192):
        ...     batch = labels.read(passages)  # ids, mask, senses, ...
    """

    def __init__(self, manifest: LabelManifest, folder: Path, sizes: np.ndarray) -> None:
        """Map the label files of a folder; `sizes` is the number of senses of every token, int32 [V]."""
        self.manifest = manifest
        self._sizes = sizes
        self._files = [folder / Path(RunFolder("").label_file(n)).name for n in range(len(manifest.partitions))]
        self._columns = [_map_partition(f, p, manifest) for f, p in zip(self._files, manifest.partitions, strict=True)]
        self._first = np.cumsum([0, *(partition.passages for partition in manifest.partitions)])
        self.lengths = np.concatenate([np.diff(columns["offsets"]).astype(np.int32) for columns in self._columns])
        self._held_out = np.concatenate([columns["held_out"] for columns in self._columns]).astype(bool)
        none = np.zeros(len(self.lengths), np.uint8)
        self.kinds = none if manifest.spans is None else np.concatenate([columns["kind"] for columns in self._columns])

    @classmethod
    def open(cls, run: str, verify: bool = False) -> "LabelSet":
        """Open the labels of a run folder or URI (copied to the user's cache); with `verify`, check all checksums.

        The run of a student names the folder of its labels.

        Raises InputError if there are no labels, or a file is missing, truncated, foreign or inconsistent.
        """
        names = RunFolder(storage.absolute(run))
        if not storage.exists(names.label_manifest) and (
            place := storage.read_json(names.labels_place, {"folder": str})
        ):
            names = RunFolder(place["folder"])
        stored = storage.read_json(names.label_manifest)
        if stored is None:
            problem = "corrupted labels" if storage.exists(names.label_manifest) else "no finished labels"
            raise InputError(f"{run} has {problem} (labels/labels.json): run `msense distill` on it again")
        manifest = LABELS.valid(Path(names.label_manifest), LabelManifest, json.dumps(stored).encode())
        folder = storage.local_copy(names.labels)
        file = folder / Path(names.label_senses).name
        sizes = _map_columns(file, {"senses": ("I32", (manifest.vocab_size,))})["senses"]
        if verify and storage.stats_of(names.label_senses, verify=True, inputs_hash=manifest.inputs_hash) is None:
            raise _corrupted(file, "checksum mismatch")
        labels = cls(manifest, folder, np.array(sizes))
        for path, partition in zip(labels._files, manifest.partitions, strict=True) if verify else ():
            if storage.sha256_of(path) != partition.sha256:
                raise _corrupted(path, "checksum mismatch")
        return labels

    def batches(self, epoch: int, seed: int, tokens_per_batch: int) -> Iterator[np.ndarray]:
        """Yield the passages of each step of an epoch, int64 [B]; the number of steps varies slightly between epochs.

        Every training passage occurs once, in an order determined by (seed, epoch): shuffled, sorted by length within
        pools of `POOL_BATCHES` batches, then the batches of each pool are shuffled. A batch has at most
        `tokens_per_batch` padded tokens; a longer passage forms a batch of its own.
        """
        rng = np.random.Generator(np.random.PCG64([seed, epoch]))
        order = np.flatnonzero(~self._held_out)
        rng.shuffle(order)
        number = np.cumsum(self.lengths[order], dtype=np.int64) // (POOL_BATCHES * tokens_per_batch)
        for pool in np.split(order, np.flatnonzero(np.diff(number)) + 1) if len(order) else ():
            batches = [pool[batch] for batch in token_batches(self.lengths[pool], tokens_per_batch)]
            yield from (batches[number] for number in rng.permutation(len(batches)))

    def token_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the counts of each token in the training and the held-out passages, int64 [V]; reads all ids."""
        counts = np.zeros((2, self.manifest.vocab_size), np.int64)
        for file, columns in zip(self._files, self._columns, strict=True):
            ids = columns["ids"]
            _check_ids(ids, counts.shape[1], file)
            is_held_out = np.repeat(columns["held_out"], np.diff(columns["offsets"]))
            for part in (0, 1):
                counts[part] += np.bincount(ids[is_held_out == part], minlength=counts.shape[1])
        return counts[0], counts[1]

    def held_out(self) -> np.ndarray:
        """Return the held-out passages, int64 [H], in file order."""
        return np.flatnonzero(self._held_out)

    def read(self, passages: np.ndarray) -> LabelBatch:
        """Read passages int64 [B], B >= 1, padded on the right; raise InputError if a file has invalid content."""
        if not len(passages) or passages.min() < 0 or passages.max() >= len(self.lengths):
            raise InputError(
                f"no passages, or a number outside 0 to {len(self.lengths) - 1}: pass valid passage numbers"
            )
        partition = np.searchsorted(self._first, passages, side="right") - 1
        rows: dict[str, list[Any]] = {name: [None] * len(passages) for name in self._columns[0]}
        places = zip(partition.tolist(), (passages - self._first[partition]).tolist(), strict=True)
        for place, (number, row) in enumerate(places):
            columns = self._columns[number]
            start, stop = columns["offsets"][row : row + 2].tolist()
            for name, values in columns.items():
                per_passage = name in _PER_PASSAGE
                rows[name][place] = values[row] if per_passage else values[start:stop]
        self._check(rows, self._files[int(partition[0])] if len(np.unique(partition)) == 1 else self._files[0].parent)
        ids, mask = map(torch.from_numpy, pad_batch(rows["ids"]))
        pooled = torch.from_numpy(np.stack(rows["pooled"])).float() if "pooled" in rows else None
        soft = [_padded(rows[name], mask) if name in rows else None for name in ("soft_senses", "soft_weights")]
        spans = torch.from_numpy(np.isin(self.kinds[passages], _SPANS))
        skip = torch.tensor(rows["skip"], dtype=torch.int64) if "skip" in rows else None
        return LabelBatch(ids.long(), mask, _padded(rows["senses"], mask), pooled, soft[0], soft[1], spans, skip)

    def _check(self, rows: dict[str, list[Any]], where: Path) -> None:
        """Raise InputError for out-of-range ids or senses, invalid weights, and values that are not finite."""
        values = {name: np.concatenate(rows[name]) for name in rows if name not in _PER_PASSAGE}
        _check_ids(values["ids"], len(self._sizes), where)
        for name in values.keys() & {"senses", "soft_senses"}:
            senses = values[name]
            own = self._sizes[values["ids"]].reshape(-1, *[1] * (senses.ndim - 1))
            if ((senses != NO_SENSE) & (senses >= own)).any():
                raise _corrupted(where, "a token has a sense that the dictionary does not have")
        if "soft_weights" in values:
            weights = values["soft_weights"].astype(np.float32)
            excess = weights.sum(axis=1) - (values["senses"] != NO_SENSE)
            if not (weights >= 0).all() or not (np.abs(excess) <= _SUM_TOLERANCE).all():
                raise _corrupted(where, "sense weights are negative or do not sum to 1")
        if "pooled" in rows and not np.isfinite(np.stack(rows["pooled"])).all():
            raise _corrupted(where, "a passage embedding is NaN or infinite")
        if min(rows.get("skip", ()), default=0) < 0:
            raise _corrupted(where, "a passage skips a negative number of tokens")


def _check_ids(ids: np.ndarray, vocabulary: int, where: Path) -> None:
    if len(ids) and (ids.min() < 0 or ids.max() >= vocabulary):
        raise _corrupted(where, f"a token id is outside the vocabulary of {vocabulary}")


def _padded(rows: list[np.ndarray], mask: Tensor) -> Tensor:
    """Pad senses (int64, -1) or weights (float32, 0) of passages according to the mask: [B, L, ...]."""
    weights = rows[0].dtype == np.float16
    values = torch.from_numpy(np.concatenate(rows).astype(np.float32 if weights else np.int64))
    out = torch.full((*mask.shape, *values.shape[1:]), 0 if weights else -1, dtype=values.dtype)
    out[mask] = values if weights else values.masked_fill(values == NO_SENSE, -1)
    return out


def _map_partition(file: Path, partition: LabelPartition, manifest: LabelManifest) -> dict[str, np.ndarray]:
    """Map one label file and check its passage offsets and held-out flags."""
    dim = (manifest.pooled_dim or manifest.dim) if manifest.pooled else 0
    counts = partition.passages, partition.tokens
    added = {"kinds": manifest.spans is not None, "skips": manifest.skips}
    columns = _map_columns(file, label_columns(*counts, dim, manifest.soft_targets, **added))
    offsets, held_out = columns["offsets"], columns["held_out"]
    unequal = (offsets[0], offsets[-1]) != (0, partition.tokens)
    # read in blocks, so that a huge sparse file fails early
    if unequal or any((p[1:] <= p[:-1]).any() or np.diff(p).max(initial=0) > _LONGEST for p in row_blocks(offsets, 1)):
        raise _corrupted(file, "passage offsets do not increase from 0 to the number of tokens")
    flagged = int(held_out.sum(dtype=np.int64))
    if any(p.max(initial=0) > 1 for p in row_blocks(held_out)) or flagged != partition.held_out_passages:
        raise _corrupted(file, "held-out flags do not match the manifest")
    if any(p.max(initial=0) >= len(KINDS) for p in row_blocks(columns.get("kind", held_out))):
        raise _corrupted(file, "a row is of an unknown kind")
    return columns


def _map_columns(file: Path, expected: TensorSpecs) -> dict[str, np.ndarray]:
    """Map a safetensors file that has exactly the expected tensors and size."""
    try:
        header, starts = LABELS.header(LABELS.inside(file, file.parent))
        if wrong := [name for name in {**expected, **header} if header.get(name) != expected.get(name)]:
            name = wrong[0]
            raise _corrupted(file, f"tensor {printable(name)} is {header.get(name)}, not {expected.get(name)}")
        return {
            name: np.asarray(np.memmap(file, np.dtype(_DTYPES[dtype]), "r", starts[name], shape))
            if all(shape)
            else np.zeros(shape, _DTYPES[dtype])  # mmap rejects empty ranges
            for name, (dtype, shape) in expected.items()
        }
    except (OSError, OverflowError, MemoryError) as error:
        raise _corrupted(file, printable(error)) from error


def _corrupted(path: Path, why: str) -> InputError:
    return InputError(f"the labels in {path} are corrupted ({why}): run `msense distill` again to regenerate them")
