"""The files and arrays of a dictionary: names, dtypes, int8 quantization, and the contents of config.json."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from msense.constants import MAX_DIM, MAX_SENSES, MAX_VOCABULARY, Metric
from msense.errors import DictionaryError
from msense.io.storage import sha256_of
from msense.io.untrusted import Artefact, FrozenModel, TensorSpecs

FORMAT_VERSION: Literal[1] = 1
DICTIONARY = Artefact("dictionary", "copy or build it again", DictionaryError)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}  # int8: from float32
Stored = Literal["float16", "bfloat16", "float32", "int8"]
STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int8": "I8"}  # safetensors dtypes
_LARGEST = 127  # of int8 values
_SMALLEST_SCALE = 2.0**-126  # the smallest normal float32; also the scale of an all-zero row
_DROPPED_BITS = 0x7F  # the last seven bits of a float32 mantissa
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
    attention: Literal["auto", "causal", "bidirectional"] = Field("auto", description="the setting of the build")
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
    inertia = arrays.counts * arrays.rms_distance.astype(np.float64) ** 2
    squares = np.bincount(token, weights=inertia, minlength=len(sizes))
    points = np.bincount(token, weights=arrays.counts, minlength=len(sizes))
    occurrences = np.where(points > 0, arrays.token_counts, 0)
    return float(occurrences @ (squares / np.maximum(points, 1)) / max(1, occurrences.sum()))


class DictionaryFiles:
    """Paths of all files of a dictionary folder.

    Example:
        >>> DictionaryFiles(Path("runs/mine/dictionary")).config
        PosixPath('runs/mine/dictionary/config.json')
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.json"  # written last: a folder without it is incomplete
        self.arrays = folder / "dictionary.safetensors"  # all arrays of an unsplit dictionary
        self.index = folder / "dictionary.safetensors.index.json"  # the rows of each file of a split one
        self.exemplars = folder / "exemplars.parquet"  # contexts of the points nearest to each sense; optional
        self.tokenizer = folder / "tokenizer" / "tokenizer.json"  # the teacher's; optional
        self.card = folder / "README.md"

    def present(self) -> list[Path]:
        """Return the existing files, sorted by name."""
        every = (self.config, self.exemplars, self.tokenizer, self.card, *self.array_files())
        return sorted(path for path in every if path.is_file())

    def fingerprint(self) -> str:
        """Return the hexadecimal SHA-256 of config and arrays."""
        files = sorted(p for p in (self.config, *self.array_files()) if p.is_file())
        return hashlib.sha256(json.dumps([(p.name, sha256_of(p)) for p in files]).encode()).hexdigest()

    def inside(self, path: Path) -> Path:
        """Return the path of a file; raise DictionaryError unless it is a regular file within the folder."""
        return DICTIONARY.inside(path, self.folder)

    def array_files(self) -> set[Path]:
        """Return the possible files of arrays, split or not."""
        return {self.arrays, self.index, *self.folder.glob("dictionary-*-of-*.safetensors")}


def file_layout(files: DictionaryFiles, config: DictionaryConfig, borders: list[int]) -> list[tuple[Path, TensorSpecs]]:
    """Return each file with its tensors in storage order; `borders` are the first row of each slice, followed by S."""
    senses, vocabulary, slices = borders[-1], config.vocab_size, len(borders) - 1
    tensors: TensorSpecs = {
        "offsets": ("I64", (vocabulary + 1,)),
        "counts": ("I64", (senses,)),
        "token_counts": ("I64", (vocabulary,)),
        "spread": ("F32", (senses,)),
    }
    layout = []
    for i, (start, end) in enumerate(pairwise(borders), 1):
        suffix = f".{i:05d}" if slices > 1 else ""
        if config.dtype == "int8":  # before the centroids, which keeps the scales aligned
            tensors[f"scales{suffix}"] = ("F32", (end - start,))
        tensors[f"centroids{suffix}"] = (STORED[config.dtype], (end - start, config.dim))
        name = f"dictionary-{i:05d}-of-{slices:05d}.safetensors" if slices > 1 else files.arrays.name
        layout.append((files.folder / name, tensors))
        tensors = {}
    return layout


def weight_map(layout: list[tuple[Path, TensorSpecs]]) -> dict[str, str]:
    """Return the file name of each tensor."""
    return {name: path.name for path, tensors in layout for name in tensors}


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values [M, D] and float32 scales [M] of floating-point rows [M, D] that are finite in float32.

    The absolute error of each number is at most half a scale. The scale is the row's absolute maximum over 127, rounded up to
    17 significant bits: value times scale is then exact in float32, and quantizing a dequantized row again changes nothing.
    """
    rows = rows.float()
    largest = rows.abs().amax(1) if rows.numel() else rows.new_zeros(len(rows))
    scales = (largest / _LARGEST).clamp(min=_SMALLEST_SCALE)
    scales = ((scales.view(torch.int32) + _DROPPED_BITS) & ~_DROPPED_BITS).view(torch.float32)
    return (rows / scales[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scales


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """Return float32 rows [M, D] of int8 values [M, D] and float32 scales [M]."""
    return values.float().mul_(scales[:, None])
