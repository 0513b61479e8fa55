"""On-disk format of a dictionary: file names, config, array layout and a streaming writer; `reader` loads it.

Each file is written to a temporary name and renamed, config.json last. The writer holds the small arrays, one chunk of
centroids and, for int8, all scales.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from msense.dictionary.arguments import as_tensor
from msense.dictionary.card import model_card
from msense.dictionary.checks import check_arrays
from msense.dictionary.layout import (
    _STORED,
    ARRAYS,
    DTYPES,
    SHARD_BYTES,
    Arrays,
    DictionaryConfig,
    DictionaryFiles,
    centroid_tensor_name,
    file_layout,
    weight_map,
)
from msense.dictionary.quantised import quantize
from msense.errors import DictionaryError
from msense.io.atomic import atomic_path
from msense.io.untrusted import ITEM_BYTES, TensorSpecs


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

    Exemplars and tokenizer must already be in the folder, under the names of `DictionaryFiles`.

    Args:
        folder: created if missing. An existing dictionary is replaced, and is lost if this fails.
        config: its dtype is the one in which centroids are stored.
        offsets: int64 [V+1], where each token's senses start.
        counts: int64 [S], points clustered into each sense.
        rms_distance: float32 [S], RMS distance of these points.
        token_counts: int64 [V], occurrences in the whole corpus.
        centroid_chunks: arrays [n_i, D] of any n_i, [S, D] when concatenated.

    Raises:
        DictionaryError: the arrays contradict each other or the config, or a centroid overflows the stored dtype.
    """
    integers = [np.ascontiguousarray(a, np.int64) for a in (offsets, counts, token_counts)]
    arrays = Arrays(integers[0], integers[1], np.ascontiguousarray(rms_distance, np.float32), integers[2])
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
                if name in ARRAYS:
                    file.write(getattr(arrays, ARRAYS[name]).data)
            if config.dtype == "int8":
                _write_quantised(file, _take(chunks, held, senses), senses)
            else:
                _write_rows(file, _take(chunks, held, senses))
    if any(len(rows) for rows in (*held, *chunks)):
        raise DictionaryError(f"there are more centroids than the {len(arrays.counts)} senses of the offsets")
    if len(layout) > 1:
        ranges = {centroid_tensor_name(i): [borders[i], borders[i + 1]] for i in range(len(layout))}
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
        values, own = quantize(rows)
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
