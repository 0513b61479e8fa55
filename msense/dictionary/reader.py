"""Opening a dictionary folder that nobody vouches for.

Comes in: a folder. Goes out: the config, the small arrays and the memory-mapped centroids. Holds the small arrays; a
file is mapped only once its header is what the config asks for and its size is what the header says.
"""

import json
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msense.dictionary.format import (
    FORMAT_VERSION,
    ITEM_BYTES,
    Arrays,
    DictionaryConfig,
    DictionaryFiles,
    FrozenModel,
    TensorSpecs,
    check_arrays,
    file_layout,
    slice_name,
    weight_map,
)
from msense.errors import DictionaryError

_JSON_BYTES = 16 << 20
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


def open_dictionary(folder: Path) -> tuple[DictionaryConfig, Arrays, tuple[Tensor, ...]]:
    """Check a dictionary folder and map it; nothing is allocated for a file whose size is not what its header says.

    Values of the centroids are not read here: whoever uses one checks that it is finite.

    Returns:
        The config, the small arrays, and the centroids as memory-mapped tensors [S_i, D] one after the other.

    Raises:
        DictionaryError: a file is missing, truncated, foreign, leads out of the folder or contradicts another.
    """
    files = DictionaryFiles(folder)
    config = _read_config(files)
    layout = _checked_layout(files, config)
    found: dict[str, Tensor] = {}
    parts = []
    for path, tensors in layout:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                mapped = {name: file.get_tensor(name) for name in tensors}
        except SafetensorError as error:
            raise DictionaryError(f"{path} is no safetensors file ({error}): copy or build it again") from error
        found.update(mapped)
        parts += [tensor for name, tensor in mapped.items() if name not in Arrays._fields]
    arrays = Arrays(**{name: found[name].numpy() for name in Arrays._fields})
    check_arrays(arrays, config)
    return config, arrays, tuple(parts)


def _read_json(path: Path) -> bytes:
    if path.stat().st_size > _JSON_BYTES:
        raise DictionaryError(
            f"{path} has {path.stat().st_size} bytes; no dictionary has such a file of over {_JSON_BYTES}"
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
        given = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DictionaryError(f"{files.config} is not JSON ({error}): copy or build the dictionary again") from error
    version = given.get("format_version") if isinstance(given, dict) else None
    if version is None:
        raise DictionaryError(f"{files.config} is not the config of a sense dictionary: it states no format_version")
    if version != FORMAT_VERSION or not isinstance(version, int):
        raise DictionaryError(
            f"{files.config} has format version {version!r}, this msense reads {FORMAT_VERSION}: update it"
        )
    try:
        return DictionaryConfig.model_validate_json(raw)
    except ValidationError as error:
        raise DictionaryError(f"{files.config} is wrong: {_all_errors(error)}") from error


def _all_errors(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'all of it'}: {e['msg']}" for e in error.errors()[:10])


def _checked_layout(files: DictionaryFiles, config: DictionaryConfig) -> list[tuple[Path, TensorSpecs]]:
    """Return the layout of a folder after comparing the header and the size of each file with it."""
    sharded = files.index.is_file()
    borders = _read_borders(files) if sharded else [0, _count_senses(files)]
    layout = file_layout(files, config, borders)
    for path, expected in layout:
        header = _read_header(files.inside(path))
        if header.keys() != expected.keys():
            raise DictionaryError(
                f"{path} holds the tensors {sorted(header)}, not {sorted(expected)}: it is a foreign file"
            )
        for name, wanted in expected.items():
            if header[name] != wanted:
                raise DictionaryError(
                    f"{path}: {name} is {header[name]}, but should be {wanted} by config.json and counts"
                )
    return layout


def _count_senses(files: DictionaryFiles) -> int:
    shape = _read_header(files.inside(files.arrays)).get("counts", ("", ()))[1]
    if len(shape) != 1:
        raise DictionaryError(f"{files.arrays} holds no list of counts: it is a foreign file")
    return shape[0]


def _read_borders(files: DictionaryFiles) -> list[int]:
    try:
        index = _Index.model_validate_json(_read_json(files.inside(files.index)))
    except ValidationError as error:
        raise DictionaryError(f"{files.index} is wrong: {_all_errors(error)}") from error
    for name in index.weight_map.values():
        if not re.fullmatch(r"dictionary-\d{5}-of-\d{5}\.safetensors", name):
            raise DictionaryError(
                f"{files.index} names the file {name!r}; only dictionary-*-of-*.safetensors in its folder may be"
            )
    ranges = [index.row_ranges.get(slice_name(i), (-1, -1)) for i in range(len(index.row_ranges))]
    borders = [0, *(end for _, end in ranges)]
    whole = len(ranges) > 1 and all(
        r == (a, b) for r, a, b in zip(ranges, borders, borders[1:], strict=False) if a <= b
    )
    if not whole or borders != sorted(borders) or index.weight_map != weight_map(files, len(ranges)):
        raise DictionaryError(
            f"{files.index} does not list slices of the centroids that follow one another: it is damaged"
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
        header = _HEADER.validate_json(raw)
    except ValidationError as error:
        raise DictionaryError(f"{path} has a foreign header: {_all_errors(error)}") from error
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
        needed = ITEM_BYTES.get(entry.dtype, 0)
        for length in entry.shape:
            needed *= length  # Python integers: nothing overflows
        if entry.dtype not in ITEM_BYTES or entry.data_offsets != (end, end + needed):
            raise DictionaryError(
                f"{path}: the bytes of {name} ({entry.dtype} {entry.shape}) are not where they should be"
            )
        end += needed
    if 8 + len(raw) + end != size:
        raise DictionaryError(
            f"{path} has {size} bytes, its header speaks of {8 + len(raw) + end}: it is cut off; copy it again"
        )
    return {name: (entry.dtype, entry.shape) for name, entry in header.items()}
