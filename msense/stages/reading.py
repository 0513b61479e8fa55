"""Batches of passages with their embeddings as stored: read by the teacher, or from the file that the embed stage kept.

Both give the same bytes, one batch in memory at a time. For every batch of the passages that the plan needs, the file of a
partition has the sentence vectors, float16 [B, D'], and the embeddings of all tokens: [n, D] in the stored dtype, or scales,
float32 [n], and int8 [n, D].
"""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from msense.constants import LARGEST_VALUE
from msense.corpus.passages import Passages, PassageSpec
from msense.dictionary.layout import dequantize, quantize
from msense.errors import MsenseError
from msense.io.filesystems import open_file, storage_errors
from msense.teacher.batching import pad_batch, token_batches
from msense.teacher.files import body_folder
from msense.teacher.fingerprint import weights_fingerprint
from msense.teacher.model import Teacher
from msense.teacher.parallel import OffloadedTeacher, ParallelTeacher
from msense.teacher.pooling import POOLINGS, load_head, sentence_dim
from msense.teacher.spec import TeacherInfo


@dataclass(frozen=True)
class EmbedSettings:
    """Settings of the teacher actors."""

    teacher: str  # name or folder
    info: TeacherInfo
    dtype: str
    device: str
    store_dtype: str
    vector_dim: int  # size D' of the sentence vectors
    per_passage: int
    spec: PassageSpec
    token_budget: int  # of a batch
    quantized: bool = False  # whether kept embeddings are int8
    ranks: int = 1  # processes with a part of the teacher each
    offload: bool = False  # whether its weights stay in host memory
    threads: int = 1  # constant: sums over another number of threads may round differently

    @property
    def kept_sizes(self) -> tuple[int, int]:
        """Bytes of a kept embedding and of a sentence vector."""
        return self.info.dim + 4 if self.quantized else 2 * self.info.dim, 2 * self.vector_dim


class Reading(NamedTuple):
    """A batch of passages that was read."""

    rows: np.ndarray  # int64 [B], their numbers
    tokens: Tensor  # [n, D] of all tokens, passage by passage
    vectors: Tensor | None  # float16 [B, D'], if the teacher's pooling is supported

    def as_kept(self, settings: EmbedSettings) -> "Reading":
        """Return the batch with the tokens rounded as in a file."""
        return self._replace(tokens=dequantize(*quantize(self.tokens))) if settings.quantized else self


def vector_dim(teacher: str, info: TeacherInfo) -> int:
    """Return the size D' of a teacher's sentence vectors; 0 if its pooling is not supported."""
    if info.pooling not in POOLINGS:
        return 0
    projections = [projection.config for projection in load_head(teacher, info).projections]
    return sentence_dim(info.dim, projections, info.truncate_dim)


def load_teacher(settings: EmbedSettings) -> Teacher:
    """Load the teacher; raise MsenseError if its weights are not those that the run was started with."""
    name, info = settings.teacher, settings.info
    given: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device, "threads": settings.threads}
    given |= {"revision": info.revision, "layer": info.layer, "attention": info.attention}
    if settings.ranks > 1:
        teacher: Teacher = ParallelTeacher(name, ranks=settings.ranks, **given)
    else:
        teacher = (OffloadedTeacher if settings.offload else Teacher)(name, **given)
    if weights_fingerprint(body_folder(name, info.revision)) != info.fingerprint:
        raise MsenseError(
            f"the weights of teacher {name!r} changed during the run, or differ on this node: restore them, or "
            "start over with another --output"
        )
    return teacher


def batches_of(passages: Passages, rows: np.ndarray, settings: EmbedSettings) -> list[np.ndarray]:
    """Return rows of similar length, int64 [B], that the teacher reads together."""
    return [rows[batch] for batch in token_batches(passages.lengths[rows], settings.token_budget)]


class TeacherReader:
    """Reads passages with the teacher.

    Example:
        >>> for reading in TeacherReader(settings)(passages, batches_of(passages, np.arange(9), settings)):
        ...     reading.tokens.shape
    """

    def __init__(self, settings: EmbedSettings) -> None:
        """Load the teacher; see `load_teacher`."""
        self.settings, self.teacher = settings, load_teacher(settings)
        self.head = load_head(settings.teacher, settings.info).to(settings.device) if settings.vector_dim else None

    def __call__(self, passages: Passages, batches: Iterable[np.ndarray]) -> Iterator[Reading]:
        """Yield the batches in the stored dtype.

        Raises:
            MsenseError: an embedding that is sampled or labelled cannot be stored.
        """
        eligible, dtype = passages.eligible(self.settings.spec), getattr(torch, self.settings.store_dtype)
        for rows in batches:
            ids, given = pad_batch([passages.row(row) for row in rows])
            hidden = self.teacher.embed(ids, given)
            mask = torch.from_numpy(given).to(hidden.device)
            with torch.no_grad():
                vectors = self._vectors(hidden, mask, passages, rows)
            used = torch.from_numpy(eligible[passages.places(rows)]).to(hidden.device)
            tokens = (read := hidden[mask]).to(dtype)
            if len(chosen := tokens[used]) and not float(chosen.abs().max()) <= LARGEST_VALUE:  # also false for NaN
                raise MsenseError(_problem(float(read[used].abs().max()), self.settings))
            yield Reading(rows, tokens, vectors)

    def _vectors(self, hidden: Tensor, mask: Tensor, passages: Passages, rows: np.ndarray) -> Tensor | None:
        """Return the sentence vectors of a batch, float16 [B, D'], each without the passage's own prompt if none counts."""
        if self.head is None:
            return None
        own = skipped(passages, self.settings.info)
        vectors: Tensor = self.head(hidden, mask, None if own is None else torch.from_numpy(own[rows]).to(mask.device))
        return vectors.half()


def skipped(passages: Passages, info: TeacherInfo) -> np.ndarray | None:
    """Return the tokens at the start of each passage that are not pooled, int64 [P]; None: as many of all, `info.skip`."""
    return None if passages.prompts is None or info.pools_all else passages.prompts.astype(np.int64)


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


def write_reading(file: BinaryIO, reading: Reading, settings: EmbedSettings) -> None:
    """Append a batch to the file of a partition."""
    values, scales = quantize(reading.tokens) if settings.quantized else (reading.tokens, None)
    for part in (reading.vectors, scales, values):
        if part is not None:
            file.write(
                part.contiguous().view(torch.uint8).cpu().numpy().data
            )  # numpy's tofile hides errors of the system


def read_kept(
    uri: str, passages: Passages, batches: Iterable[np.ndarray], wanted: np.ndarray, settings: EmbedSettings
) -> Iterator[Reading]:
    """Yield the batches that have a wanted passage, bool [P], from a file of all of them."""
    dim, dtype = settings.info.dim, getattr(torch, settings.store_dtype)
    with storage_errors(uri), open_file(uri) as file:
        for rows in batches:
            count = int(passages.lengths[rows].sum())
            token, vector = settings.kept_sizes
            if not wanted[rows].any():
                file.seek(count * token + len(rows) * vector, os.SEEK_CUR)
                continue
            vectors = _read(file, len(rows) * vector, torch.float16).view(len(rows), -1) if vector else None
            if settings.quantized:
                scales = _read(file, 4 * count, torch.float32)
                tokens = dequantize(_read(file, count * dim, torch.int8).view(count, dim), scales)
            else:
                tokens = _read(file, count * token, dtype).view(count, dim)
            yield Reading(rows, tokens, vectors)


def _read(file: BufferedIOBase, size: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(file.read(size)), dtype=dtype)


def bits(tensor: Tensor) -> np.ndarray:
    """Return the bits of a 16-bit tensor on any device, uint16."""
    return tensor.contiguous().view(torch.uint16).cpu().numpy()
