"""On-disk format of a dictionary: file names, config, array layout and a streaming writer; `reader` loads it.

Each file is written to a temporary name and renamed, config.json last. The writer holds the small arrays, one chunk of
centroids and, for int8, all scales.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from msense.artefact import ITEM_BYTES, Artefact, FrozenModel, TensorSpecs
from msense.config import MAX_DIM, MAX_SENSES, MAX_VOCABULARY, Metric
from msense.dictionary.arguments import as_tensor
from msense.dictionary.card import model_card
from msense.dictionary.checks import check_arrays
from msense.dictionary.quantised import quantise
from msense.errors import DictionaryError
from msense.scratch import scratch_name
from msense.storage import sha256_of

FORMAT_VERSION: Literal[1] = 1
DICTIONARY = Artefact("dictionary", "copy or build it again", DictionaryError)
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}  # int8 is quantized from float32
Stored = Literal["float16", "bfloat16", "float32", "int8"]
_STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int8": "I8"}  # safetensors dtypes
SHARD_BYTES = 4_000_000_000  # larger centroids are split into several files

_Name = Annotated[str, Field(max_length=4096)]
_Text = Annotated[str, Field(max_length=1 << 16)]
_Int64 = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
_Natural = Annotated[int, Field(ge=0, lt=1 << 63)]


class TeacherName(FrozenModel):
    """Identity of the model whose embeddings were clustered."""

    name: _Name
    revision: _Name | None = None
    fingerprint: _Name = ""


class DictionaryConfig(FrozenModel):
    """Contents of config.json."""

    format_version: Literal[1] = FORMAT_VERSION
    teacher: TeacherName
    tokenizer_fingerprint: _Name
    layer: _Int64 = Field(description="hidden layer of the teacher, -1 = last")
    dim: int = Field(gt=0, le=MAX_DIM, description="width D of embeddings and senses")
    vocab_size: int = Field(gt=0, le=MAX_VOCABULARY, description="tokens V, with and without senses")
    senses: Annotated[int, Field(ge=1, le=MAX_SENSES)] | Literal["auto", "mcl"] = Field(
        description="the setting of the build, not the resulting number"
    )
    dtype: Stored = Field(default="float16", description="of the centroids; int8 with one scale per sense")
    metric: Metric = "l2"
    temperature_unit: float = Field(ge=0, le=1e77, description="mean squared distance of a point to its sense")
    special_tokens: Literal["include", "exclude"] = "include"
    excluded_token_ids: tuple[Annotated[int, Field(ge=0, lt=MAX_VOCABULARY)], ...] = Field((), max_length=1 << 16)
    pooling: _Name = Field(default="mean", description="a mode of sentence-transformers: mean, cls, lasttoken, ...")
    normalize: bool = Field(default=False, description="whether the teacher normalizes sentence vectors")
    prompt: _Text = ""
    max_length: _Natural = Field(default=0, description="maximum passage length in tokens, 0 = unknown")
    max_occurrences: _Natural = Field(description="limit of occurrences clustered per token, 0 = all")
    seed: _Int64 = 0
    quality: dict[_Name, float] = Field(default_factory=dict, max_length=100)


class Arrays(NamedTuple):
    """The small arrays of a dictionary with S senses, sorted by token."""

    offsets: np.ndarray  # int64 [V+1]: senses offsets[t] to offsets[t + 1] belong to token t
    counts: np.ndarray  # int64 [S]: points clustered into each sense
    spread: np.ndarray  # float32 [S]: RMS distance of these points
    token_counts: np.ndarray  # int64 [V]: occurrences in the whole corpus


def corpus_distortion(arrays: Arrays) -> float:
    """Return the mean squared distance to the nearest sense: per token, weighted by occurrences in the corpus."""
    sizes = np.diff(arrays.offsets)
    token = np.repeat(np.arange(len(sizes)), sizes)
    squares = np.bincount(token, weights=arrays.counts * arrays.spread.astype(np.float64) ** 2, minlength=len(sizes))
    points = np.bincount(token, weights=arrays.counts, minlength=len(sizes))
    occurrences = np.where(points > 0, arrays.token_counts, 0)
    return float(occurrences @ (squares / np.maximum(points, 1)) / max(1, occurrences.sum()))


@dataclass(frozen=True)
class DictionaryFiles:
    """Paths of all files of a dictionary folder.

    Example:
        >>> DictionaryFiles(Path("runs/mine/dictionary")).config
        PosixPath('runs/mine/dictionary/config.json')
    """

    folder: Path

    @property
    def config(self) -> Path:
        """The config, written last: a folder without it is incomplete."""
        return self.folder / "config.json"

    @property
    def arrays(self) -> Path:
        """All arrays of an unsplit dictionary."""
        return self.folder / "dictionary.safetensors"

    @property
    def index(self) -> Path:
        """The rows of each file of a split dictionary."""
        return self.folder / "dictionary.safetensors.index.json"

    def shard(self, number: int, of: int) -> Path:
        """Return the file of a slice of the centroids, counted from 1; the first also holds the small arrays."""
        return self.folder / f"dictionary-{number:05d}-of-{of:05d}.safetensors"

    @property
    def exemplars(self) -> Path:
        """Contexts of the points nearest to each sense; optional."""
        return self.folder / "exemplars.parquet"

    @property
    def tokenizer(self) -> Path:
        """The teacher's tokenizer; optional."""
        return self.folder / "tokenizer" / "tokenizer.json"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.folder / "README.md"

    def present(self) -> list[Path]:
        """Return the existing files, sorted by name."""
        return sorted(
            p for p in (self.config, self.exemplars, self.tokenizer, self.card, *self._arrays()) if p.is_file()
        )

    def fingerprint(self) -> str:
        """Return the hexadecimal SHA-256 of config and arrays."""
        files = sorted(p for p in (self.config, *self._arrays()) if p.is_file())
        return hashlib.sha256(json.dumps([(p.name, sha256_of(p)) for p in files]).encode()).hexdigest()

    def inside(self, path: Path) -> Path:
        """Return the path of a file; raise DictionaryError unless it is a regular file within the folder."""
        return DICTIONARY.inside(path, self.folder)

    def _arrays(self) -> set[Path]:
        """Return the possible files of arrays, split or not."""
        return {self.arrays, self.index, *self.folder.glob("dictionary-*-of-*.safetensors")}


def file_layout(files: DictionaryFiles, config: DictionaryConfig, borders: list[int]) -> list[tuple[Path, TensorSpecs]]:
    """Return each file of arrays with its tensors in storage order.

    `borders` are the first row of each slice of the centroids, followed by S.
    """
    senses, vocabulary = borders[-1], config.vocab_size
    small: TensorSpecs = {
        "offsets": ("I64", (vocabulary + 1,)),
        "counts": ("I64", (senses,)),
        "token_counts": ("I64", (vocabulary,)),
        "spread": ("F32", (senses,)),
    }
    slices = len(borders) - 1
    if slices == 1:
        return [(files.arrays, small | _slice(config, senses, ""))]
    return [
        (files.shard(i, slices), (small if i == 1 else {}) | _slice(config, end - start, f".{i:05d}"))
        for i, (start, end) in enumerate(pairwise(borders), 1)
    ]


def _slice(config: DictionaryConfig, senses: int, suffix: str) -> TensorSpecs:
    """Return the tensors of a slice of the centroids; the scales come first, which keeps them aligned."""
    scales: TensorSpecs = {f"scales{suffix}": ("F32", (senses,))} if config.dtype == "int8" else {}
    return {**scales, f"centroids{suffix}": (_STORED[config.dtype], (senses, config.dim))}


def slice_name(i: int) -> str:
    """Return the tensor name of a slice of the centroids, counted from 0."""
    return f"centroids.{i + 1:05d}"


def weight_map(layout: list[tuple[Path, TensorSpecs]]) -> dict[str, str]:
    """Return the file name of each tensor."""
    return {name: path.name for path, tensors in layout for name in tensors}


def write_dictionary(
    folder: Path | str,
    config: DictionaryConfig,
    offsets: np.ndarray,
    counts: np.ndarray,
    spread: np.ndarray,
    token_counts: np.ndarray,
    centroid_chunks: Iterable[np.ndarray | Tensor],
) -> None:
    """Write a dictionary from a stream of centroids, which need not fit in memory.

    Exemplars and tokenizer must already be in the folder, under the names of `DictionaryFiles`.

    Args:
        folder: created if missing. An existing dictionary is replaced, and is lost if this fails.
        config: its dtype is the one in which centroids are stored.
        offsets: int64 [V+1], where each token's senses start.
        counts: int64 [S], points clustered into each sense.
        spread: float32 [S], RMS distance of these points.
        token_counts: int64 [V], occurrences in the whole corpus.
        centroid_chunks: arrays [n_i, D] of any n_i, [S, D] when concatenated.

    Raises:
        DictionaryError: the arrays contradict each other or the config, or a centroid overflows the stored dtype.
    """
    integers = [np.ascontiguousarray(a, np.int64) for a in (offsets, counts, token_counts)]
    arrays = Arrays(integers[0], integers[1], np.ascontiguousarray(spread, np.float32), integers[2])
    check_arrays(arrays, config)
    files = DictionaryFiles(Path(folder))
    files.folder.mkdir(parents=True, exist_ok=True)
    files.config.unlink(missing_ok=True)
    borders = _borders(len(arrays.counts), config)
    layout = file_layout(files, config, borders)
    chunks = (_stored(chunk, config) for chunk in centroid_chunks)
    held: deque[Tensor] = deque()
    for i, (path, tensors) in enumerate(layout):
        senses = borders[i + 1] - borders[i]
        with atomic_path(path) as scratch, scratch.open("wb") as file:
            file.write(_header(tensors))
            for name in tensors:
                if name in Arrays._fields:
                    file.write(getattr(arrays, name).data)
            if config.dtype == "int8":
                _write_quantised(file, _take(chunks, held, senses), senses)
            else:
                _write_rows(file, _take(chunks, held, senses))
    if any(len(rows) for rows in (*held, *chunks)):
        raise DictionaryError(f"there are more centroids than the {len(arrays.counts)} senses of the offsets")
    if len(layout) > 1:
        ranges = {slice_name(i): [borders[i], borders[i + 1]] for i in range(len(layout))}
        _write_text(files.index, json.dumps({"weight_map": weight_map(layout), "row_ranges": ranges}, indent=1))
    for path in files._arrays() - {path for path, _ in layout} - ({files.index} if len(layout) > 1 else set()):
        path.unlink(missing_ok=True)  # arrays of an older dictionary that was split differently
    _write_text(files.card, model_card(config, arrays))
    _write_text(files.config, config.model_dump_json(indent=1))


def write_tokenizer(folder: Path | str, tokenizer_json: str) -> None:
    """Write the text of the teacher's tokenizer.json, used to look up words."""
    path = DictionaryFiles(Path(folder)).tokenizer
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_text(path, tokenizer_json)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder that replaces `path` on exit, unless an exception is raised."""
    scratch = scratch_name(path)
    scratch.unlink(missing_ok=True)  # a symbolic link left there would redirect the bytes
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def copy_file(source: Path | None, target: Path) -> None:
    """Copy a file atomically; without a source, remove the target."""
    if source is None:
        target.unlink(missing_ok=True)
    elif source.resolve() != target.resolve():
        target.parent.mkdir(exist_ok=True)
        with atomic_path(target) as scratch:
            shutil.copyfile(source, scratch)


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as scratch:
        scratch.write_text(text + "\n", encoding="utf-8")


def _write_rows(file: BinaryIO, chunks: Iterable[Tensor]) -> None:
    for rows in chunks:
        file.write(rows.contiguous().view(torch.uint8).numpy().data)


def _write_quantised(file: BinaryIO, chunks: Iterable[Tensor], senses: int) -> None:
    """Write int8 centroids, then their scales into the gap left before them."""
    gap, scales = file.tell(), []
    file.seek(gap + 4 * senses)
    for rows in chunks:
        values, own = quantise(rows)
        _write_rows(file, [values])
        scales.append(own)
    file.seek(gap)
    _write_rows(file, scales)


def _borders(senses: int, config: DictionaryConfig) -> list[int]:
    """Return the first row of each slice of the centroids, followed by S."""
    rows = max(1, SHARD_BYTES // (config.dim * ITEM_BYTES[_STORED[config.dtype]]))
    return [*range(0, max(senses, 1), rows), senses]


def _header(tensors: TensorSpecs) -> bytes:
    """Return a safetensors header: its length in 8 bytes, then JSON, padded to align the data."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + int(np.prod(shape, dtype=object)) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stored(chunk: np.ndarray | Tensor, config: DictionaryConfig) -> Tensor:
    """Return a chunk of centroids in the stored dtype (float32 for int8) on the CPU."""
    rows = as_tensor(chunk)
    if rows.ndim != 2 or rows.shape[1] != config.dim:
        raise DictionaryError(f"centroids have shape {tuple(rows.shape)}, but the dictionary has width {config.dim}")
    rows = rows.to("cpu", DTYPES.get(config.dtype, torch.float32))
    if not torch.isfinite(rows).all():
        raise DictionaryError(f"centroids are NaN, infinite or too large for {config.dtype}: use bfloat16 or float32")
    return rows


def _take(chunks: Iterator[Tensor], held: deque[Tensor], rows: int) -> Iterator[Tensor]:
    """Yield exactly `rows` rows; `held` keeps the rest of a chunk for the next file."""
    while rows:
        chunk = held.popleft() if held else next(chunks, None)
        if chunk is None:
            raise DictionaryError(f"{rows} centroids are missing: offsets and centroids do not belong together")
        if len(chunk) > rows:
            held.append(chunk[rows:])
            chunk = chunk[:rows]
        rows -= len(chunk)
        yield chunk
