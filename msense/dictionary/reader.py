"""Opening a dictionary folder that nobody vouches for.

Comes in: a folder. Goes out: the config, the small arrays and the memory-mapped centroids. Holds the small arrays; a
file is mapped only once its header is what the config asks for and its size is what the header says.
"""

import os
import re
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msense.artefact import FrozenModel, TensorSpecs, shown
from msense.config import MAX_SENSES
from msense.dictionary.checks import check_arrays, check_scales
from msense.dictionary.format import (
    DICTIONARY,
    FORMAT_VERSION,
    Arrays,
    DictionaryConfig,
    DictionaryFiles,
    file_layout,
    slice_name,
    weight_map,
)
from msense.errors import DictionaryError

_Size = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Index(FrozenModel):
    """Which file holds which tensor, and which rows of the centroids each slice has."""

    weight_map: dict[str, str]
    row_ranges: dict[str, tuple[_Size, _Size]]


class Opened(NamedTuple):
    """What lies in a dictionary's folder."""

    config: DictionaryConfig
    arrays: Arrays
    centroids: tuple[Tensor, ...]  # mapped, [S_i, D] one after the other
    scales: Tensor | None  # float32 [S], of centroids in int8


def open_dictionary(folder: Path) -> Opened:
    """Check a dictionary folder and map it; nothing is allocated for a file whose size is not what its header says.

    Values of the centroids are not read here: whoever uses one checks that it is finite.

    Raises:
        DictionaryError: a file is missing, truncated, foreign, leads out of the folder or contradicts another.
    """
    try:
        return _open(DictionaryFiles(folder))
    except OSError as error:
        raise DictionaryError(
            f"{folder} cannot be read ({error}): see to its files and rights, or copy it again"
        ) from error


def _open(files: DictionaryFiles) -> Opened:
    config = _read_config(files)
    found: dict[str, Tensor] = {}
    for path, tensors in _checked_layout(files, config):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                mapped = {name: file.get_tensor(name) for name in tensors}
        except (SafetensorError, RuntimeError, MemoryError) as error:  # torch's word for too little address space
            raise DictionaryError(f"{path} cannot be mapped ({error}): copy or build it again") from error
        found.update(mapped)
    arrays = Arrays(**{name: found.pop(name).numpy() for name in Arrays._fields})
    check_arrays(arrays, config)
    scales = [tensor for name, tensor in found.items() if name.startswith("scales")]
    for own in scales:
        check_scales(own.numpy())
    centroids = tuple(tensor for name, tensor in found.items() if name.startswith("centroids"))
    return Opened(config, arrays, centroids, torch.cat(scales) if scales else None)


def _read_config(files: DictionaryFiles) -> DictionaryConfig:
    if not files.folder.is_dir():
        raise DictionaryError(f"there is no folder {files.folder}: give a dictionary, or a run folder that holds one")
    if not files.config.is_file():
        raise DictionaryError(
            f"{files.folder} has no {files.config.name}: it is not a dictionary, or its build never ended"
        )
    return DICTIONARY.read_config(files.inside(files.config), DictionaryConfig, FORMAT_VERSION)


def _checked_layout(files: DictionaryFiles, config: DictionaryConfig) -> list[tuple[Path, TensorSpecs]]:
    """Return the layout of a folder after comparing the header and the size of each file with it."""
    sharded = os.path.lexists(files.index)
    borders = _read_borders(files, config) if sharded else [0, _count_senses(files)]
    if borders[-1] > config.vocab_size * MAX_SENSES:
        raise DictionaryError(
            f"{files.folder} speaks of {borders[-1]} senses, but {config.vocab_size} tokens have at most "
            f"{MAX_SENSES} each: its files do not belong together; copy or build it again"
        )
    layout = file_layout(files, config, borders)
    for path, expected in layout:
        header = DICTIONARY.header(files.inside(path))[0]
        if header.keys() != expected.keys():
            raise DictionaryError(
                f"{path} holds the tensors {shown(sorted(header))}, not {sorted(expected)}: it is a foreign file; "
                "copy or build the dictionary again"
            )
        for name, wanted in expected.items():
            if header[name] != wanted:
                raise DictionaryError(
                    f"{path}: {name} is {header[name]}, but should be {wanted} by config.json and counts: "
                    "copy or build the dictionary again"
                )
    return layout


def _count_senses(files: DictionaryFiles) -> int:
    shape = DICTIONARY.header(files.inside(files.arrays))[0].get("counts", ("", ()))[1]
    if len(shape) != 1:
        raise DictionaryError(f"{files.arrays} holds no list of counts: it is a foreign file; copy or build it again")
    return shape[0]


def _read_borders(files: DictionaryFiles, config: DictionaryConfig) -> list[int]:
    raw = DICTIONARY.read_json(files.inside(files.index))
    index = DICTIONARY.valid(files.index, lambda: _Index.model_validate_json(raw, strict=True))
    for name in index.weight_map.values():
        if not re.fullmatch(r"dictionary-\d{5}-of-\d{5}\.safetensors", name):
            raise DictionaryError(
                f"{files.index} names the file {shown(name)!r}; only dictionary-*-of-*.safetensors in its folder may be: "
                "copy or build the dictionary again"
            )
    ranges = [index.row_ranges.get(slice_name(i), (-1, -1)) for i in range(len(index.row_ranges))]
    borders = [0, *(end for _, end in ranges)]
    whole = len(ranges) > 1 and all(
        r == (a, b) for r, a, b in zip(ranges, borders, borders[1:], strict=False) if a <= b
    )
    if not whole or borders != sorted(borders) or index.weight_map != weight_map(file_layout(files, config, borders)):
        raise DictionaryError(
            f"{files.index} does not list slices of the centroids that follow one another: it is damaged; "
            "copy or build the dictionary again"
        )
    return borders
