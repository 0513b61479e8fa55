"""Opening a dictionary folder that nobody vouches for.

Comes in: a folder. Goes out: the config, the small arrays and the memory-mapped centroids. Holds the small arrays; a
file is mapped only once its header is what the config asks for and its size is what the header says.
"""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msense.config import MAX_SENSES
from msense.dictionary.checks import check_arrays, check_scales, shown
from msense.dictionary.format import (
    FORMAT_VERSION,
    ITEM_BYTES,
    Arrays,
    DictionaryConfig,
    DictionaryFiles,
    FrozenModel,
    TensorSpecs,
    file_layout,
    slice_name,
    weight_map,
)
from msense.errors import DictionaryError

_JSON_BYTES = 4 << 20
_HEADER_BYTES = 1 << 20
_Size = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Entry(FrozenModel):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: Annotated[tuple[_Size, ...], Field(max_length=2)]
    data_offsets: tuple[_Size, _Size]


class _Index(FrozenModel):
    """Which file holds which tensor, and which rows of the centroids each slice has."""

    weight_map: dict[str, str]
    row_ranges: dict[str, tuple[_Size, _Size]]


_HEADER = TypeAdapter(dict[str, _Entry])


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


def _read_json(path: Path) -> bytes:
    size = path.stat().st_size
    if size > _JSON_BYTES:
        raise DictionaryError(
            f"{path} has {size} bytes; no dictionary has such a file of over {_JSON_BYTES}: copy or build it again"
        )
    return path.read_bytes()


def _read_config(files: DictionaryFiles) -> DictionaryConfig:
    if not files.folder.is_dir():
        raise DictionaryError(f"there is no folder {files.folder}: give a dictionary, or a run folder that holds one")
    if not files.config.is_file():
        raise DictionaryError(
            f"{files.folder} has no {files.config.name}: it is not a dictionary, or its build never ended"
        )
    raw = _read_json(files.inside(files.config))
    try:
        given = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DictionaryError(
            f"{files.config} is not JSON ({shown(error)}): copy or build the dictionary again"
        ) from error
    version = given.get("format_version") if isinstance(given, dict) else None
    if version is None:
        raise DictionaryError(
            f"{files.config} is not the config of a sense dictionary: it states no format_version; give another folder"
        )
    if version != FORMAT_VERSION or type(version) is not int:  # True and 1.0 equal 1
        raise DictionaryError(
            f"{files.config} has format version {shown(repr(version))}, this msense reads {FORMAT_VERSION}: update it"
        )
    try:
        return DictionaryConfig.model_validate_json(raw, strict=True)
    except ValidationError as error:
        raise DictionaryError(
            f"{files.config} is wrong: {_all_errors(error)}; copy or build the dictionary again"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; where a key comes twice, two readers may see two different files."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice!r} comes twice")
    return found


def _all_errors(error: ValidationError) -> str:
    """Return the first faults of a file, each with its place in it."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)[:5]
    return "; ".join(f"{shown('.'.join(map(str, e['loc']))) or 'all of it'}: {shown(e['msg'])}" for e in errors)


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
        header = _read_header(files.inside(path))
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
    shape = _read_header(files.inside(files.arrays)).get("counts", ("", ()))[1]
    if len(shape) != 1:
        raise DictionaryError(f"{files.arrays} holds no list of counts: it is a foreign file; copy or build it again")
    return shape[0]


def _read_borders(files: DictionaryFiles, config: DictionaryConfig) -> list[int]:
    try:
        index = _Index.model_validate_json(_read_json(files.inside(files.index)), strict=True)
    except ValidationError as error:
        raise DictionaryError(
            f"{files.index} is wrong: {_all_errors(error)}; copy or build the dictionary again"
        ) from error
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


def _read_header(path: Path) -> TensorSpecs:
    """Return the tensors of a safetensors file whose size is exactly what its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_BYTES):
            raise DictionaryError(f"{path} ({size} bytes) is cut off or no safetensors file: copy or build it again")
        raw = file.read(length)
    try:
        header = _HEADER.validate_json(raw, strict=True)
    except ValidationError as error:
        raise DictionaryError(f"{path} has a foreign header: {_all_errors(error)}; copy or build it again") from error
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
        needed = ITEM_BYTES.get(entry.dtype, 0)
        for length in entry.shape:
            needed *= length  # Python integers: nothing overflows
        if entry.dtype not in ITEM_BYTES or entry.data_offsets != (end, end + needed):
            raise DictionaryError(
                f"{path}: the bytes of {shown(name)} ({shown(entry.dtype)} {entry.shape}) are not where they should be: "
                "copy or build it again"
            )
        end += needed
    if 8 + len(raw) + end != size:
        raise DictionaryError(
            f"{path} has {size} bytes, its header speaks of {8 + len(raw) + end}: it is cut off; copy it again"
        )
    return {name: (entry.dtype, entry.shape) for name, entry in header.items()}
