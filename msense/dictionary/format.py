"""Streaming writer and memory-mapping loader of a dictionary folder; see `layout` for its files.

The writer renames each file from a temporary name, config.json last; it holds the small arrays, one chunk of centroids and,
for int8, all scales. The loader trusts nothing: a file is mapped only after its header matches the config and its size
matches the header; the small arrays are read.
"""

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msense.constants import MAX_SENSES
from msense.dictionary import layout
from msense.dictionary.card import model_card
from msense.dictionary.checks import as_tensor, check_arrays, check_range
from msense.dictionary.layout import ARRAYS, DICTIONARY, Arrays, DictionaryConfig, DictionaryFiles, file_layout
from msense.errors import DictionaryError
from msense.io.scratch import atomic_path
from msense.io.untrusted import ITEM_BYTES, FrozenModel, TensorSpecs, printable

SHARD_BYTES = 4_000_000_000  # larger centroids are split into several files
_REMEDY = "copy or build the dictionary again"
_Size = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Index(FrozenModel):
    """The file of each tensor and the rows of each slice of the centroids."""

    weight_map: dict[str, str]
    row_ranges: dict[str, tuple[_Size, _Size]]


def write_dictionary(
    folder: Path | str,
    config: DictionaryConfig,
    offsets: np.ndarray,
    counts: np.ndarray,
    rms_distance: np.ndarray,
    token_counts: np.ndarray,
    centroid_chunks: Iterable[np.ndarray | Tensor],
) -> None:
    """Write a dictionary from a stream of centroids, which need not fit in memory.

    Exemplars and tokenizer must already be in the folder, under the names of `DictionaryFiles`. An existing dictionary is
    replaced, and is lost if this fails. The small arrays are those of `Arrays`; the chunks are [n_i, D] of any n_i, [S, D]
    when concatenated, and are stored in the config's dtype.

    Raises:
        DictionaryError: the arrays contradict each other or the config, or a centroid overflows the stored dtype.
    """
    integers = [np.ascontiguousarray(a, np.int64) for a in (offsets, counts, token_counts)]
    arrays = Arrays(integers[0], integers[1], np.ascontiguousarray(rms_distance, np.float32), integers[2])
    check_arrays(arrays, config)
    files = DictionaryFiles(Path(folder))
    files.folder.mkdir(parents=True, exist_ok=True)
    files.config.unlink(missing_ok=True)
    slice_rows = max(1, SHARD_BYTES // (config.dim * ITEM_BYTES[layout.STORED[config.dtype]]))
    borders = [*range(0, max(len(arrays.counts), 1), slice_rows), len(arrays.counts)]
    parts = file_layout(files, config, borders)
    chunks = (_stored(chunk, config) for chunk in centroid_chunks)
    held: deque[Tensor] = deque()
    for i, (path, tensors) in enumerate(parts):
        senses = borders[i + 1] - borders[i]
        with atomic_path(path) as scratch, scratch.open("wb") as file:
            file.write(_header(tensors))
            for name in tensors:
                if name in ARRAYS:
                    file.write(getattr(arrays, ARRAYS[name]).data)
            _write_rows(file, _take(chunks, held, senses), senses, config)
    if any(len(rows) for rows in (*held, *chunks)):
        raise DictionaryError(f"there are more centroids than the {len(arrays.counts)} senses of the offsets")
    current = {path for path, _ in parts}
    if len(parts) > 1:
        current.add(files.index)
        ranges = {f"centroids.{i + 1:05d}": [borders[i], borders[i + 1]] for i in range(len(parts))}
        index = {"weight_map": layout.weight_map(parts), "row_ranges": ranges}
        _write_text(files.index, json.dumps(index, indent=1))
    for old in files.array_files() - current:  # those of an older dictionary that was split differently
        old.unlink(missing_ok=True)
    _write_text(files.card, model_card(config, arrays))
    added = {"attention"} if config.attention == "auto" else set()  # older versions read no other fields
    _write_text(files.config, config.model_dump_json(indent=1, exclude=added))


def write_tokenizer(folder: Path | str, tokenizer_json: str) -> None:
    """Write the text of the teacher's tokenizer.json, used to look up words."""
    path = DictionaryFiles(Path(folder)).tokenizer
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_text(path, tokenizer_json)


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as scratch:
        scratch.write_text(text + "\n", encoding="utf-8")


def _write_rows(file: BinaryIO, chunks: Iterable[Tensor], senses: int, config: DictionaryConfig) -> None:
    """Write centroids; those of int8 are quantized, and their scales are written last into a gap left before them."""
    gap, scales = file.tell(), []
    if config.dtype == "int8":
        file.seek(gap + 4 * senses)
    for rows in chunks:
        values = rows
        if config.dtype == "int8":
            values, own = layout.quantize(rows)
            scales.append(own)
        file.write(values.contiguous().view(torch.uint8).numpy().data)
    file.seek(gap)
    file.writelines(own.numpy().data for own in scales)


def _header(tensors: TensorSpecs) -> bytes:
    """Return the bytes of a safetensors header; the library only writes whole files."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stored(chunk: np.ndarray | Tensor, config: DictionaryConfig) -> Tensor:
    """Return a chunk of centroids in the stored dtype (float32 for int8) on the CPU."""
    rows = as_tensor(chunk)
    if rows.ndim != 2 or rows.shape[1] != config.dim:
        raise DictionaryError(f"centroids have shape {tuple(rows.shape)}, but the dictionary has width {config.dim}")
    rows = rows.to("cpu", layout.DTYPES.get(config.dtype, torch.float32))
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


def open_dictionary(folder: Path) -> tuple[DictionaryConfig, Arrays, tuple[Tensor, ...], Tensor | None]:
    """Validate and memory-map a dictionary folder, or raise DictionaryError; centroids are not checked for finite values.

    Returns config, small arrays, centroids [S_i, D] of each file, and scales float32 [S] of int8 centroids.
    """
    files = DictionaryFiles(folder)
    if not files.config.is_file():
        raise DictionaryError(f"{folder} has no config.json: give the folder of a finished dictionary or of its run")
    config = DICTIONARY.read_config(files.inside(files.config), DictionaryConfig)
    loaded: dict[str, Tensor] = {}
    for path, tensors in _checked_layout(files, config):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                loaded |= {name: file.get_tensor(name) for name in tensors}
        except (SafetensorError, RuntimeError, MemoryError) as error:  # RuntimeError: torch lacks address space
            raise DictionaryError(f"cannot map {path}: {error}; {_REMEDY}") from error
    arrays = Arrays(**{field: loaded.pop(name).numpy() for name, field in ARRAYS.items()})
    check_arrays(arrays, config)
    scales = [loaded.pop(name) for name in list(loaded) if name.startswith("scales")]
    for own in scales:
        check_range("scales", own.numpy(), 1e-45)
    return config, arrays, tuple(loaded.values()), torch.cat(scales) if scales else None


def _checked_layout(files: DictionaryFiles, config: DictionaryConfig) -> list[tuple[Path, TensorSpecs]]:
    """Return the layout of a folder after validating the header and the size of each file."""
    borders = _read_borders(files, config)
    if borders[-1] > config.vocab_size * MAX_SENSES:
        most = f"{config.vocab_size} tokens have at most {MAX_SENSES} each"
        raise DictionaryError(f"{files.folder} declares {borders[-1]} senses, but {most}: {_REMEDY}")
    parts = file_layout(files, config, borders)
    for path, expected in parts:
        header = DICTIONARY.header(files.inside(path))[0]
        for name in sorted(header.keys() | expected.keys()):
            if header.get(name) != expected.get(name):
                difference = f"{printable(name)} is {header.get(name)}, but should be {expected.get(name)}"
                raise DictionaryError(f"{path}: {difference} according to config.json and counts: {_REMEDY}")
    return parts


def _read_borders(files: DictionaryFiles, config: DictionaryConfig) -> list[int]:
    """Return the first row of each slice of the centroids, followed by S."""
    if not os.path.lexists(files.index):
        shape = DICTIONARY.header(files.inside(files.arrays))[0].get("counts", ("", ()))[1]
        if len(shape) != 1:
            raise DictionaryError(f"{files.arrays} has no one-dimensional counts: {_REMEDY}")
        return [0, *shape]
    index = DICTIONARY.valid(files.index, _Index, DICTIONARY.read_json(files.inside(files.index)))
    ranges = [index.row_ranges.get(f"centroids.{i + 1:05d}", (-1, -1)) for i in range(len(index.row_ranges))]
    borders = [0, *(end for _, end in ranges)]
    contiguous = all(own == (start, max(start, own[1])) for own, start in zip(ranges, borders, strict=False))
    # equal maps also mean that no name leads out of the folder
    if len(ranges) < 2 or not contiguous or index.weight_map != layout.weight_map(file_layout(files, config, borders)):
        raise DictionaryError(f"{files.index} does not list the files of contiguous slices of the centroids: {_REMEDY}")
    return borders
