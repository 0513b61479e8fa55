"""Safe reading of untrusted parquet files: the footer is validated first, and repeated texts are stored once.

Memory: the footer and one page, of at most 2 GB by the format.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from msense.io.parquet_pages import read_footer
from msense.io.untrusted import printable

_FOOTER_BYTES = 64 << 20
_CHECKED_BYTES = 8 << 20  # longer footers are not parsed here, which takes a second per megabyte


def open_untrusted_parquet(raw: Any, dictionaries: Sequence[str] | None = ()) -> pq.ParquetFile:
    """Open an untrusted parquet file.

    Args:
        raw: seekable binary file.
        dictionaries: text columns (None: all) to read as dictionaries, which need memory for the distinct values only.

    Raises:
        OSError: the file is truncated, or its footer is corrupted, too long or inconsistent with the file.
    """
    size = raw.seek(0, 2)
    raw.seek(max(0, size - 8))
    tail = raw.read(8)
    length = int.from_bytes(tail[:4], "little")
    if size < 12 or tail[4:] != b"PAR1" or length > size - 12:
        raise OSError("truncated or not a parquet file")
    if length > _FOOTER_BYTES:
        raise OSError(f"the footer has {length} bytes, more than the limit of {_FOOTER_BYTES}")
    try:
        if length <= _CHECKED_BYTES:
            raw.seek(size - 8 - length)
            for group in read_footer(memoryview(raw.read(length))):
                if any(not (0 <= c.start <= size and 0 <= c.size <= size - c.start) for c in group.columns):
                    raise ValueError("a column lies outside the file")
        raw.seek(0)
        file = pq.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20)  # else it reads whole column chunks
        schema = file.schema_arrow
        texts = [name for name, kind in zip(schema.names, schema.types, strict=True) if is_text(kind)]
        texts = [name for name in texts if dictionaries is None or name in dictionaries]
        if not texts or len(set(schema.names)) < len(schema.names):  # the caller rejects duplicate names
            return file
        return pq.ParquetFile(raw, metadata=file.metadata, read_dictionary=texts, pre_buffer=False, buffer_size=1 << 20)
    except ValueError as error:  # includes names that are not UTF-8
        raise OSError(printable(error)) from error


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column type holds text, dictionary-encoded or not."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def iter_values(column: pa.Array) -> Iterator[object]:
    """Yield the values of a column, strings as their raw bytes, which may be invalid UTF-8.

    Raises:
        ArrowInvalid: the column is corrupted.
    """
    encoded = pa.types.is_dictionary(column.type)
    values = column.dictionary if encoded else column
    values = values.cast(pa.large_binary()) if is_text(column.type) else values
    if not encoded:
        yield from (value.as_py() for value in values)
        return
    known: dict[int | None, object] = {None: None}
    for index in column.indices.to_pylist():
        if index not in known:
            if not 0 <= index < len(values):  # Arrow does not check this
                raise pa.ArrowInvalid(f"dictionary index {index} of {len(values)} values")
            known[index] = values[index].as_py()
        yield known[index]
