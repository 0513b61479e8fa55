"""Labels as the trainer sees them: batches of passages by (seed, epoch, step), and a fast reader.

Comes in: the labels folder of a run, checked as it is read. Goes out: passages, padded. Maps the unit files; holds 17
bytes a passage (where it starts, its length, whether it is held out), 8 more while an epoch is laid out, and one batch.
Never imports Ray.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from msense import storage
from msense.artefact import Artefact, FrozenModel, all_errors, shown
from msense.config import MAX_DIM, MAX_SENSES, MAX_VOCABULARY, NO_SENSE
from msense.dictionary.checks import pieces
from msense.dictionary.format import TeacherName
from msense.errors import BadInput
from msense.run_folder import RunFolder
from msense.teacher import pad_batch, token_batches

POOL_BATCHES = 64  # batches that are sorted by length together
_LONGEST = 1 << 24  # tokens of a passage
_TYPES = {"I64": "<i8", "I32": "<i4", "U16": "<u2", "F16": "<f2", "U8": "|u1"}
_SUM_TOLERANCE = 0.01  # of weights that are stored in float16
LABELS = Artefact("set of labels", "damaged labels are made again by jobs/distill.py", BadInput)
_Count = Annotated[int, Field(ge=0, lt=1 << 60)]


class LabelUnit(FrozenModel):
    """One file of labels."""

    passages: _Count
    tokens: _Count
    labelled: _Count = Field(description="tokens that have a sense")
    held_out_passages: _Count
    size: _Count
    sha256: str


class LabelManifest(FrozenModel):
    """What the labels are of, and the files they lie in."""

    format_version: Literal[1] = 1
    made_of: str
    dictionary: str = Field(description="fingerprint")
    teacher: TeacherName
    tokenizer_fingerprint: str
    vocab_size: int = Field(gt=0, le=MAX_VOCABULARY)
    dim: int = Field(gt=0, le=MAX_DIM)
    metric: Literal["l2", "dot", "cosine"]
    temperature_unit: float = Field(ge=0, le=1e77)
    temperature: float | None = Field(gt=0, description="of the soft targets' weights, if there are any")
    train_tokens: _Count | None
    held_out: float = Field(ge=0, lt=1, description="share of the documents")
    held_out_salt: int
    soft_targets: int = Field(ge=0, le=MAX_SENSES)
    pooled: bool
    pooling: str
    normalize: bool
    units: tuple[LabelUnit, ...] = Field(min_length=1)

    @property
    def passages(self) -> int:
        """In all."""
        return sum(unit.passages for unit in self.units)

    @property
    def tokens(self) -> int:
        """In all."""
        return sum(unit.tokens for unit in self.units)


Columns = dict[str, tuple[str, tuple[int, ...]]]  # name: (safetensors dtype, shape)


def label_columns(passages: int, tokens: int, dim: int, soft_targets: int) -> Columns:
    """Return the tensors of a file of P passages and N tokens; `dim` 0 = not pooled.

    offsets [P + 1] is where each passage starts in ids, senses (65535 = none), soft_senses and soft_weights [N, ...].
    """
    columns: Columns = {
        "offsets": ("I64", (passages + 1,)),
        "ids": ("I32", (tokens,)),
        "senses": ("U16", (tokens,)),
        "held_out": ("U8", (passages,)),
    }
    if soft_targets:
        columns |= {"soft_senses": ("U16", (tokens, soft_targets)), "soft_weights": ("F16", (tokens, soft_targets))}
    return columns | ({"pooled": ("F16", (passages, dim))} if dim else {})


def label_bytes(passages: Any, tokens: Any, dim: int, soft_targets: int) -> Any:  # noqa: ANN401 - numbers or arrays
    """Return the bytes of so many passages and tokens; `dim` 0 = not pooled."""
    return tokens * (6 + 4 * soft_targets) + passages * (9 + 2 * dim)


class LabelBatch(NamedTuple):
    """Padded passages."""

    ids: Tensor  # int64 [B, L], 0 on padding
    mask: Tensor  # bool [B, L]
    senses: Tensor  # int64 [B, L], -1 = none
    pooled: Tensor | None  # float32 [B, D]
    soft_senses: Tensor | None  # int64 [B, L, M], -1 = none
    soft_weights: Tensor | None  # float32 [B, L, M], of each token with a sense they sum to about 1


class LabelSet:
    """The labels of a run: P passages, numbered in the order of the units.

    Attributes:
        manifest: what they are.
        lengths: int32 [P], tokens of each passage.
    """

    def __init__(self, manifest: LabelManifest, folder: Path, sizes: np.ndarray) -> None:
        """Map the unit files of a folder; `sizes` is the number of senses of every token, int32 [V]."""
        self.manifest = manifest
        self._sizes = sizes
        self._files = [folder / _name(RunFolder("").label_file(n)) for n in range(len(manifest.units))]
        self._units = [_map_unit(f, u, manifest) for f, u in zip(self._files, manifest.units, strict=True)]
        self._first = np.cumsum([0, *(unit.passages for unit in manifest.units)])
        self.lengths = np.concatenate([np.diff(unit["offsets"]).astype(np.int32) for unit in self._units])
        self._held_out = np.concatenate([unit["held_out"] for unit in self._units]).astype(bool)

    @classmethod
    def open(cls, run: str, verify: bool = False) -> "LabelSet":
        """Open the labels of a run folder (a remote one is copied to this user's cache).

        Args:
            run: the run folder or its URI.
            verify: also read and hash every file.

        Raises:
            BadInput: there are none, or a file is missing, cut off, foreign or contradicts another.
        """
        names = RunFolder(storage.absolute(run))
        found = storage.read_json(names.label_manifest)
        if found is None:
            there = "damaged labels" if storage.exists(names.label_manifest) else "no finished labels"
            raise BadInput(f"{run} has {there} (labels/labels.json): run jobs/distill.py on it again")
        try:
            manifest = LabelManifest.model_validate_json(json.dumps(found), strict=True)
        except ValidationError as error:
            raise BadInput(
                f"{names.label_manifest} is no manifest of labels ({all_errors(error)}): make the labels again"
            ) from error
        folder = storage.local_copy(names.labels)
        file = folder / _name(names.label_senses)
        sizes = _map_columns(file, {"senses": ("I32", (manifest.vocab_size,))})["senses"]
        if sizes.min() < 0 or sizes.max() > MAX_SENSES:
            raise _damaged(file, "a token has more senses than can be")
        if verify and storage.facts_of(names.label_senses, verify=True, made_of=manifest.made_of) is None:
            raise _damaged(file, "its bytes are not those that were written")
        labels = cls(manifest, folder, np.array(sizes))
        for path, unit in zip(labels._files, manifest.units, strict=True) if verify else ():
            if storage.sha256_of(path) != unit.sha256:
                raise _damaged(path, "its bytes are not those that were written")
        return labels

    def batches(
        self, epoch: int, seed: int, tokens_per_batch: int, world: int = 1, rank: int = 0, first_step: int = 0
    ) -> Iterator[np.ndarray]:
        """Yield what a worker reads in each step of an epoch; the global batches do not depend on `world`.

        All passages that are not held out come once, in an order of (seed, epoch): shuffled, then sorted by length in
        pools of `POOL_BATCHES` batches, whose batches are shuffled again.

        Args:
            epoch: from 0.
            seed: of the order.
            tokens_per_batch: padded tokens of a global batch at most; a longer passage is a batch of its own.
            world: number of workers.
            rank: of this one; it takes every world-th passage of a batch, which may be none of a small batch.
            first_step: steps to skip; nothing is read for them.

        Yields:
            int64 [B], numbers of passages.
        """
        for step, batch in enumerate(self._global_batches(epoch, seed, tokens_per_batch)):
            if step >= first_step:
                yield batch[rank::world]

    def steps(self, epoch: int, seed: int, tokens_per_batch: int) -> int:
        """Return how many batches an epoch has: a few more or less in each."""
        return sum(1 for _ in self._global_batches(epoch, seed, tokens_per_batch))

    def _global_batches(self, epoch: int, seed: int, budget: int) -> Iterator[np.ndarray]:
        """Yield the global batches of an epoch, int64 [B]."""
        rng = np.random.Generator(np.random.PCG64([seed, epoch]))
        order = np.flatnonzero(~self._held_out)
        rng.shuffle(order)
        number = np.cumsum(self.lengths[order], dtype=np.int64) // (POOL_BATCHES * budget)
        for pool in np.split(order, np.flatnonzero(np.diff(number)) + 1) if len(order) else ():
            batches = [pool[batch] for batch in token_batches(self.lengths[pool], budget)]
            for number in rng.permutation(len(batches)):
                yield batches[number]

    def token_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Count each token in the passages that are trained on, and in those held out, int64 [V]; reads all ids once."""
        counts = np.zeros((2, self.manifest.vocab_size), np.int64)
        for file, unit in zip(self._files, self._units, strict=True):
            ids = unit["ids"]
            if len(ids) and (ids.min() < 0 or ids.max() >= counts.shape[1]):
                raise _damaged(file, f"it has a token outside the {counts.shape[1]} of the vocabulary")
            is_held_out = np.repeat(unit["held_out"], np.diff(unit["offsets"]))
            for part in (0, 1):
                counts[part] += np.bincount(ids[is_held_out == part], minlength=counts.shape[1])
        return counts[0], counts[1]

    def held_out(self) -> np.ndarray:
        """Return the passages that are never trained on, int64 [H] in the order of the files."""
        return np.flatnonzero(self._held_out)

    def read(self, passages: np.ndarray) -> LabelBatch:
        """Read passages, padded on the right to the longest.

        Args:
            passages: int64 [B], at least one.

        Raises:
            BadInput: a number that is no passage, or a file that holds what cannot be.
        """
        if not len(passages) or passages.min() < 0 or passages.max() >= len(self.lengths):
            raise BadInput(f"no passages, or a number outside 0 to {len(self.lengths) - 1}")
        unit = np.searchsorted(self._first, passages, side="right") - 1
        found: dict[str, list[Any]] = {name: [None] * len(passages) for name in self._units[0]}
        for place, (u, row) in enumerate(zip(unit.tolist(), (passages - self._first[unit]).tolist(), strict=True)):
            columns = self._units[u]
            start, stop = columns["offsets"][row : row + 2].tolist()
            for name, values in columns.items():
                of_passage = name in ("offsets", "held_out", "pooled")
                found[name][place] = values[row] if of_passage else values[start:stop]
        ids, mask = pad_batch(found["ids"])
        self._check(found, self._files[int(unit[0])] if len(set(unit.tolist())) == 1 else self._files[0].parent)
        padded = torch.from_numpy(mask)
        pooled = torch.from_numpy(np.stack(found["pooled"])).float() if "pooled" in found else None
        soft = [_padded(found[name], padded) if name in found else None for name in ("soft_senses", "soft_weights")]
        senses = _padded(found["senses"], padded)
        return LabelBatch(torch.from_numpy(ids).long(), padded, senses, pooled, soft[0], soft[1])

    def _check(self, found: dict[str, list[Any]], where: Path) -> None:
        """Refuse ids outside the vocabulary, senses that their token has not, and values that are not finite."""
        ids = np.concatenate(found["ids"])
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self._sizes)):
            raise _damaged(where, f"it has a token outside the {len(self._sizes)} of the vocabulary")
        for name in ("senses", "soft_senses"):
            senses = np.concatenate(found[name]) if name in found else np.zeros(0, np.uint16)
            own = self._sizes[ids].reshape(-1, *[1] * (senses.ndim - 1)) if len(senses) else 0
            if ((senses != NO_SENSE) & (senses >= own)).any():
                raise _damaged(where, "a token has a sense that the dictionary does not have")
        if "soft_weights" in found:
            if min(float(rows.min()) for rows in found["soft_weights"]) < 0:
                raise _damaged(where, "a weight of a sense is below 0")
            sums = np.concatenate(found["soft_weights"]).astype(np.float32).sum(axis=1)
            told = np.concatenate(found["senses"]) != NO_SENSE
            if not (np.abs(sums - told) <= _SUM_TOLERANCE).all():
                raise _damaged(where, "weights of senses do not sum to 1")
        if "pooled" in found and not np.isfinite(np.stack(found["pooled"])).all():
            raise _damaged(where, "an embedding of a passage is NaN or infinite")


def _padded(rows: list[np.ndarray], mask: Tensor) -> Tensor:
    """Pad senses (int64, -1) or weights (float32, 0) of passages as the mask says: [B, L, ...]."""
    values = torch.from_numpy(np.concatenate(rows).astype(np.float32 if rows[0].dtype == np.float16 else np.int64))
    weights = values.dtype == torch.float32
    out = torch.full((*mask.shape, *values.shape[1:]), 0 if weights else -1, dtype=values.dtype)
    out[mask] = values if weights else values.masked_fill(values == NO_SENSE, -1)
    return out


def _map_unit(file: Path, unit: LabelUnit, manifest: LabelManifest) -> dict[str, np.ndarray]:
    """Map one unit file and check how its passages follow one another."""
    dim = manifest.dim if manifest.pooled else 0
    columns = _map_columns(file, label_columns(unit.passages, unit.tokens, dim, manifest.soft_targets))
    offsets, held_out = columns["offsets"], 0
    if offsets[0] != 0 or offsets[-1] != unit.tokens:
        raise _damaged(file, "its passages do not follow one another")
    for part in pieces(offsets, 1):  # a file of holes ends here
        lengths = np.diff(part)
        if (part[1:] <= part[:-1]).any() or lengths.max(initial=0) > _LONGEST:
            raise _damaged(file, "its passages do not follow one another")
    for part in pieces(columns["held_out"]):
        held_out += int(part.sum(dtype=np.int64))
        if part.max(initial=0) > 1:
            raise _damaged(file, "it holds out other passages than the manifest says")
    if held_out != unit.held_out_passages:
        raise _damaged(file, "it holds out other passages than the manifest says")
    return columns


def _map_columns(file: Path, expected: Columns) -> dict[str, np.ndarray]:
    """Map a safetensors file whose tensors and size are exactly those expected."""
    try:
        header, starts = LABELS.header(LABELS.inside(file, file.parent))
        if header.keys() != expected.keys():
            raise _damaged(file, "it holds more or less than its manifest says")
        wrong = next((name for name in expected if header[name] != expected[name]), None)
        if wrong is not None:
            dtype, shape = expected[wrong]
            raise _damaged(file, f"{wrong} is not {dtype} {list(shape)}")
        return {name: _mapped(file, starts[name], *spec) for name, spec in expected.items()}
    except (OSError, OverflowError, MemoryError) as error:
        raise _damaged(file, shown(error)) from error


def _mapped(file: Path, start: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Map an array of a file; nothing can be mapped of none."""
    if not all(shape):
        return np.zeros(shape, _TYPES[dtype])
    return np.asarray(np.memmap(file, np.dtype(_TYPES[dtype]), "r", start, shape))


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(f"the labels in {path} are damaged ({why}): run jobs/distill.py again, and they are made again")
