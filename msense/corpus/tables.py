"""Parquet files of people: opened only when their footer is one, and read without repeating a text a million times.

Comes in: a file. Goes out: Arrow's reader of it, and the values of its columns. Holds the footer, and one page at a time, of
at most 2 GB as the format has it; a text that comes again and again is one object.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from msense.artefact import shown
from msense.parquet_pages import read_footer

_FOOTER_BYTES = 64 << 20
_CHECKED_BYTES = 8 << 20  # of a longer footer only the length is looked at: it takes a second a megabyte


def opened(raw: Any, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:  # noqa: ANN401 - a file
    """Open a parquet file that nobody vouches for.

    Args:
        raw: from which any part can be read.
        dictionaries: columns of texts that are read as such: their memory is that of the different ones.

    Raises:
        OSError: it is cut off, its footer is damaged or far too long, or not of the columns that it speaks of.
    """
    size = raw.seek(0, 2)
    raw.seek(max(0, size - 8))
    tail = raw.read(8)
    length = int.from_bytes(tail[:4], "little")
    if size < 12 or tail[4:] != b"PAR1" or length > size - 12:
        raise OSError("it is cut off or no parquet file")
    if length > _FOOTER_BYTES:
        raise OSError(f"its footer has {length} bytes, at most {_FOOTER_BYTES} are read")
    try:
        if length <= _CHECKED_BYTES:
            raw.seek(size - 8 - length)
            for group in read_footer(memoryview(raw.read(length))):
                if any(not (0 <= c.start <= size and 0 <= c.size <= size - c.start) for c in group.columns):
                    raise ValueError("a column lies outside of it")
        raw.seek(0)
        file = pq.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20)  # else it reads whole column chunks
        schema = file.schema_arrow
        kinds = dict(zip(schema.names, schema.types, strict=True))
        texts = [name for name in dictionaries if name in kinds and is_text(kinds[name])]
        if not texts or len(kinds) < len(schema.names):  # two of one name are refused by whoever reads them
            return file
        return pq.ParquetFile(raw, metadata=file.metadata, read_dictionary=texts, pre_buffer=False, buffer_size=1 << 20)
    except ValueError as error:  # names that are not UTF-8 among them
        raise OSError(shown(error)) from error


def is_text(kind: pa.DataType) -> bool:
    """Tell whether a column holds texts."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def values(column: pa.Array) -> Iterator[object]:
    """Yield the values of a column, strings as the bytes that the file holds: they may be no UTF-8.

    Raises:
        ArrowInvalid: the column is damaged.
    """
    if not pa.types.is_dictionary(column.type):
        texts = column.cast(pa.large_binary()) if is_text(column.type) else column
        yield from (value.as_py() for value in texts)
        return
    words = column.dictionary.cast(pa.large_binary()) if is_text(column.type) else column.dictionary
    known: dict[int, object] = {}
    for place in column.indices.to_pylist():
        if place is not None and place not in known:
            if not 0 <= place < len(words):  # Arrow looks at neither
                raise pa.ArrowInvalid(f"a value is number {place} of {len(words)}")
            known[place] = words[place].as_py()
        yield None if place is None else known[place]
