"""Checks of untrusted parquet footers and column chunks, before a library opens or decompresses anything.

Only page headers state the real decompressed size, and some encodings repeat a text without limit. Headers and footers
are Thrift structs in the compact protocol, https://github.com/apache/thrift/blob/master/doc/specs. Errors are phrases for
the middle of a sentence.
"""

from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

MAX_CHUNK_BYTES = 64 << 20  # decompressed, per column chunk
_INVALID = "it has an invalid header"
_MAX_PAGES = 1000
_MAX_DEPTH = 10
_PLAIN_OR_DICTIONARY = {0, 2, 8}  # PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY
_DETAILS = {0: (5, 2), 2: (7, 2), 3: (8, 4)}  # page type: field of its struct, and of the encoding in that
_CHUNK_FIELDS = {2, 3, 4, 5, 6, 7}  # of a column chunk, without file path and encryption keys
_TRUE, _FALSE, _BYTE, _I64, _BINARY, _LIST, _STRUCT = 1, 2, 3, 6, 8, 9, 12


class Column(NamedTuple):
    """Location of a column chunk in the file, and the range of an int32 column with statistics (else 0, -1)."""

    start: int
    size: int
    least: int
    most: int


class Group(NamedTuple):
    """A row group."""

    rows: int
    columns: list[Column]


def read_footer(footer: memoryview, types: Sequence[int] | None = None) -> list[Group]:
    """Return the row groups of a footer; Arrow would abort the process at a column of a wrong type.

    Args:
        footer: bytes of the footer.
        types: expected parquet physical types of the columns; None: those of the footer's own schema.

    Raises:
        ValueError: the footer is corrupted, or its columns have other types.
    """
    try:
        fields, end = _struct(footer, 0, 0)
        groups = [Group(index(group[3]), [_column(c) for c in group[1]]) for group in fields[4]]
        mismatch = "it does not have the columns of exemplars"
        if types is None:  # a group of columns has children (5) and no type (1)
            mismatch = "its row groups do not have the columns of its schema"
            types = [element[1] for element in fields[2] if not element.get(5)] if groups else []
        stored = [[column[3][1] for column in group[1]] for group in fields[4]]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("its footer is corrupted") from error
    if end != len(footer):
        raise ValueError("its footer is corrupted")
    if any(own != list(types) for own in stored):
        raise ValueError(mismatch)
    return groups


def _column(chunk: dict[int, Any]) -> Column:
    """Return the location and statistics of a column chunk."""
    if chunk.keys() - _CHUNK_FIELDS:
        raise ValueError("a column lies in another file or is encrypted")
    meta = chunk[3]
    dictionary, start, size = index(meta.get(11, 0)), index(meta[9]), index(meta[7])
    statistics = meta.get(12, {})
    low, high = statistics.get(6, b""), statistics.get(5, b"")
    least, most = (
        (int.from_bytes(x, "little", signed=True) for x in (low, high)) if len(low) == len(high) == 4 else (0, -1)
    )
    return Column(dictionary if 0 < dictionary < start else start, size, least, most)


def check_pages(chunk: memoryview) -> None:
    """Raise for a column chunk that decompresses to more than `MAX_CHUNK_BYTES` or uses another encoding.

    Raises:
        ValueError: the chunk is rejected or corrupted.
    """
    position = pages = total = 0
    while position < len(chunk):
        try:
            header, position = _struct(chunk, position, 0)
            size, packed = index(header[2]), index(header[3])
            struct, field = _DETAILS[index(header[1])]
            encoding = index(header[struct][field])
        except (LookupError, TypeError) as error:
            raise ValueError(_INVALID) from error
        if encoding not in _PLAIN_OR_DICTIONARY:
            raise ValueError(f"a page has the unsupported encoding {encoding}")
        pages, total = pages + 1, total + size
        if size < 0 or not 0 <= packed <= len(chunk) - position:
            raise ValueError("a page is truncated")
        if total > MAX_CHUNK_BYTES or pages > _MAX_PAGES:
            raise ValueError(f"a column has {pages} pages of {total} bytes, more than the limit of {MAX_CHUNK_BYTES}")
        position += packed


def _struct(data: memoryview, position: int, depth: int) -> tuple[dict[int, Any], int]:
    """Read a struct: its fields by number, each once and in order, and its end."""
    fields: dict[int, Any] = {}
    number = 0
    while data[position]:
        step, kind = data[position] >> 4, data[position] & 15
        position += 1
        number += step
        if step == 0:  # the long form, which would allow duplicate fields
            raise ValueError(_INVALID)
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], position = _value(data, position, kind, depth)
    return fields, position + 1


def _value(data: memoryview, position: int, kind: int, depth: int) -> tuple[Any, int]:
    """Read an integer, bytes, a list, a struct, or a boolean in a list, and its end."""
    if depth > _MAX_DEPTH:
        raise ValueError(_INVALID)
    if kind == _STRUCT:
        return _struct(data, position, depth + 1)
    if kind in (_TRUE, _FALSE):
        return data[position] == _TRUE, position + 1
    if kind == _BINARY:
        length, position = _varint(data, position)
        return data[position : position + length], position + length
    if kind == _LIST:
        length, kind = data[position] >> 4, data[position] & 15
        length, position = _varint(data, position + 1) if length == 15 else (length, position + 1)
        items = []
        for _ in range(length):  # each takes at least one byte
            item, position = _value(data, position, kind, depth + 1)
            items.append(item)
        return items, position
    if _BYTE < kind <= _I64:
        value, position = _varint(data, position)
        return (value >> 1) ^ -(value & 1), position
    raise ValueError(_INVALID)


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Read an unsigned integer of seven bits per byte, and its end."""
    value = 0
    for length in range(10):
        byte = data[position + length]
        value |= (byte & 127) << 7 * length
        if byte < 128:
            return value, position + length + 1
    raise ValueError(_INVALID)
