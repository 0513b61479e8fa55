"""Loader of an untrusted dictionary folder; centroids are memory-mapped, small arrays are read.

A file is mapped only after its header matches the config and its size matches the header.
"""

import os
import re
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msense.constants import MAX_SENSES
from msense.dictionary.checks import check_arrays, check_scales
from msense.dictionary.layout import (
    ARRAYS,
    DICTIONARY,
    FORMAT_VERSION,
    Arrays,
    DictionaryConfig,
    DictionaryFiles,
    centroid_tensor_name,
    file_layout,
    weight_map,
)
from msense.errors import DictionaryError
from msense.io.untrusted import FrozenModel, TensorSpecs, printable

_Size = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Index(FrozenModel):
    """The file of each tensor and the rows of each slice of the centroids."""

    weight_map: dict[str, str]
    row_ranges: dict[str, tuple[_Size, _Size]]


class DictionaryContents(NamedTuple):
    """Contents of a dictionary folder."""

    config: DictionaryConfig
    arrays: Arrays
    centroids: tuple[Tensor, ...]  # memory-mapped [S_i, D], one per file
    scales: Tensor | None  # float32 [S] of int8 centroids


def open_dictionary(folder: Path) -> DictionaryContents:
    """Validate and memory-map a dictionary folder; whoever uses a centroid must check that it is finite.

    Raises:
        DictionaryError: a file is missing, truncated, foreign, links out of the folder or contradicts another.
    """
    try:
        return _open(DictionaryFiles(folder))
    except OSError as error:
        raise DictionaryError(f"cannot read {folder}: {error}; check its permissions, or copy it again") from error


def _open(files: DictionaryFiles) -> DictionaryContents:
    config = _read_config(files)
    loaded: dict[str, Tensor] = {}
    for path, tensors in _checked_layout(files, config):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                loaded |= {name: file.get_tensor(name) for name in tensors}
        except (SafetensorError, RuntimeError, MemoryError) as error:  # RuntimeError: torch lacks address space
            raise DictionaryError(f"cannot map {path}: {error}; copy or build the dictionary again") from error
    arrays = Arrays(**{field: loaded.pop(name).numpy() for name, field in ARRAYS.items()})
    check_arrays(arrays, config)
    scales = [tensor for name, tensor in loaded.items() if name.startswith("scales")]
    for own in scales:
        check_scales(own.numpy())
    centroids = tuple(tensor for name, tensor in loaded.items() if name.startswith("centroids"))
    return DictionaryContents(config, arrays, centroids, torch.cat(scales) if scales else None)


def _read_config(files: DictionaryFiles) -> DictionaryConfig:
    if not files.folder.is_dir():
        raise DictionaryError(f"{files.folder} does not exist: give the folder of a dictionary or of a run")
    if not files.config.is_file():
        raise DictionaryError(f"{files.folder} has no config.json: it is not a dictionary, or its build did not finish")
    return DICTIONARY.read_config(files.inside(files.config), DictionaryConfig, FORMAT_VERSION)


def _checked_layout(files: DictionaryFiles, config: DictionaryConfig) -> list[tuple[Path, TensorSpecs]]:
    """Return the layout of a folder after validating the header and the size of each file."""
    borders = _read_borders(files, config) if os.path.lexists(files.index) else [0, _count_senses(files)]
    if borders[-1] > config.vocab_size * MAX_SENSES:
        raise DictionaryError(
            f"{files.folder} declares {borders[-1]} senses, but {config.vocab_size} tokens have at most {MAX_SENSES} "
            "each: copy or build the dictionary again"
        )
    layout = file_layout(files, config, borders)
    for path, expected in layout:
        header = DICTIONARY.header(files.inside(path))[0]
        for name in sorted(header.keys() | expected.keys()):
            if header.get(name) != expected.get(name):
                raise DictionaryError(
                    f"{path}: {printable(name)} is {header.get(name)}, but should be {expected.get(name)} according to "
                    "config.json and counts: copy or build the dictionary again"
                )
    return layout


def _count_senses(files: DictionaryFiles) -> int:
    shape = DICTIONARY.header(files.inside(files.arrays))[0].get("counts", ("", ()))[1]
    if len(shape) != 1:
        raise DictionaryError(f"{files.arrays} has no one-dimensional counts: copy or build the dictionary again")
    return shape[0]


def _read_borders(files: DictionaryFiles, config: DictionaryConfig) -> list[int]:
    """Return the first row of each slice of the centroids, followed by S, from the index file."""
    raw = DICTIONARY.read_json(files.inside(files.index))
    index = DICTIONARY.valid(files.index, lambda: _Index.model_validate_json(raw, strict=True))
    for name in index.weight_map.values():
        if not re.fullmatch(r"dictionary-\d{5}-of-\d{5}\.safetensors", name):
            raise DictionaryError(
                f"{files.index} names the file {printable(name)!r}, but only dictionary-*-of-*.safetensors is allowed: "
                "copy or build the dictionary again"
            )
    ranges = [index.row_ranges.get(centroid_tensor_name(i), (-1, -1)) for i in range(len(index.row_ranges))]
    borders = [0, *(end for _, end in ranges)]
    contiguous = all(own == (start, max(start, own[1])) for own, start in zip(ranges, borders, strict=False))
    if len(ranges) < 2 or not contiguous or index.weight_map != weight_map(file_layout(files, config, borders)):
        raise DictionaryError(
            f"{files.index} does not list contiguous slices of the centroids: copy or build the dictionary again"
        )
    return borders
