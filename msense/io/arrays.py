"""Arrays in safetensors and parquet files."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from msense.io.filesystems import filesystem, is_local, open_file, storage_errors
from msense.io.scratch import scratch_folder
from msense.io.storage import absolute

_CHUNK = 1 << 16  # numbers checked at a time


def open_parquet(uri: str) -> pq.ParquetFile:
    """Open a parquet file on any storage, memory-mapped if local."""
    return pq.ParquetFile(absolute(uri), memory_map=True) if is_local(uri) else pq.ParquetFile(open_file(uri))


def row_blocks(array: np.ndarray, overlap: int = 0) -> Iterator[np.ndarray]:
    """Yield blocks of a memory-mapped array, so that a fault near its start is detected before the rest is read."""
    for start in range(0, len(array) - overlap, _CHUNK):
        yield array[start : start + _CHUNK + overlap]


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays to a safetensors file."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def load_arrays(uri: str, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of a safetensors file, by default all."""
    from safetensors import safe_open

    if not is_local(uri):
        with scratch_folder() as scratch:
            fs, path = filesystem(uri)
            with storage_errors(uri):
                fs.get_file(path, f"{scratch}/file")
            return load_arrays(f"{scratch}/file", names)
    with safe_open(absolute(uri), framework="numpy") as file:
        return {name: file.get_tensor(name) for name in names or file.keys()}


def read_columns(uri: str, columns: list[str]) -> dict[str, np.ndarray]:
    """Read columns of a parquet file of numbers."""
    table = open_parquet(uri).read(columns=columns)
    return {name: table.column(name).to_numpy() for name in columns}
