"""The files and arrays of a dictionary: names, dtypes, and the contents of config.json."""

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from msense.constants import MAX_DIM, MAX_SENSES, MAX_VOCABULARY, Metric
from msense.errors import DictionaryError
from msense.io.storage import sha256_of
from msense.io.untrusted import Artefact, FrozenModel, TensorSpecs

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


# name in the files: field of `Arrays`
ARRAYS = {"offsets": "offsets", "counts": "counts", "token_counts": "token_counts", "spread": "rms_distance"}


class Arrays(NamedTuple):
    """The small arrays of a dictionary with S senses, sorted by token."""

    offsets: np.ndarray  # int64 [V+1]: senses offsets[t] to offsets[t + 1] belong to token t
    counts: np.ndarray  # int64 [S]: points clustered into each sense
    rms_distance: np.ndarray  # float32 [S]: RMS distance of these points
    token_counts: np.ndarray  # int64 [V]: occurrences in the whole corpus


def corpus_distortion(arrays: Arrays) -> float:
    """Return the mean squared distance to the nearest sense: per token, weighted by occurrences in the corpus."""
    sizes = np.diff(arrays.offsets)
    token = np.repeat(np.arange(len(sizes)), sizes)
    squares = np.bincount(
        token, weights=arrays.counts * arrays.rms_distance.astype(np.float64) ** 2, minlength=len(sizes)
    )
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


def centroid_tensor_name(i: int) -> str:
    """Return the tensor name of a slice of the centroids, counted from 0."""
    return f"centroids.{i + 1:05d}"


def weight_map(layout: list[tuple[Path, TensorSpecs]]) -> dict[str, str]:
    """Return the file name of each tensor."""
    return {name: path.name for path, tensors in layout for name in tensors}
