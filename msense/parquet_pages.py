"""Parquet files that nobody vouches for: what reading them would take, before a library opens or unpacks anything.

Comes in: the bytes of a footer or a column chunk. Goes out: where the columns lie, or ValueError. A page says in its
header how large it will be; the sizes in the footer may say otherwise, and some encodings repeat a text without end.
Holds one footer or header.

Both are Thrift structs in the compact protocol, https://github.com/apache/thrift/blob/master/doc/specs.
"""

from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

MAX_CHUNK_BYTES = 64 << 20  # unpacked, of one column in one row group
_MAX_PAGES = 1000
_MAX_DEPTH = 10
_PLAIN_OR_DICTIONARY = {0, 2, 8}  # PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY
_DETAILS = {0: (5, 2), 2: (7, 2), 3: (8, 4)}  # page type: its struct in the header, and the field of the encoding there
_CHUNK_FIELDS = {2, 3, 4, 5, 6, 7}  # of a column, without another file's name and keys
_TRUE, _FALSE, _BYTE, _I64, _BINARY, _LIST, _STRUCT = 1, 2, 3, 6, 8, 9, 12


class Column(NamedTuple):
    """Where a column of a row group lies in the file."""

    start: int
    size: int
    least: int  # of an int32 column with statistics; else 0, -1
    most: int


class Group(NamedTuple):
    """A row group."""

    rows: int
    columns: list[Column]


def read_footer(footer: memoryview, types: Sequence[int] | None = None) -> list[Group]:
    """Read the row groups of a footer; arrow's own objects end the process at a column of a wrong type.

    Args:
        footer: its bytes.
        types: parquet's numbers of the columns' physical types; None: those of its own schema.

    Raises:
        ValueError: in words for the middle of a sentence.
    """
    try:
        found, end = _struct(footer, 0, 0)
        groups = [Group(index(group[3]), [_column(c) for c in group[1]]) for group in found[4]]
        foreign = "it does not have the columns of exemplars: it is a foreign file"
        if types is None:  # a group of columns has children (5) and no type (1)
            foreign = "its row groups do not have the columns of its schema"
            types = [element[1] for element in found[2] if not element.get(5)] if groups else []
        stored = [[column[3][1] for column in group[1]] for group in found[4]]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("its footer is damaged") from error
    if end != len(footer):
        raise ValueError("its footer is damaged")
    if any(own != list(types) for own in stored):
        raise ValueError(foreign)
    return groups


def _column(chunk: dict[int, Any]) -> Column:
    """Take a column's place and statistics out of the footer."""
    if chunk.keys() - _CHUNK_FIELDS:
        raise ValueError("a column lies in another file or is encrypted")
    about = chunk[3]
    dictionary, start, size = index(about.get(11, 0)), index(about[9]), index(about[7])
    statistics = about.get(12, {})
    low, high = statistics.get(6, b""), statistics.get(5, b"")
    least, most = (
        (int.from_bytes(x, "little", signed=True) for x in (low, high)) if len(low) == len(high) == 4 else (0, -1)
    )
    return Column(dictionary if 0 < dictionary < start else start, size, least, most)


def check_pages(chunk: memoryview) -> None:
    """Refuse a column chunk that unpacks to more than any of ours.

    Raises:
        ValueError: in words for the middle of a sentence.
    """
    position = pages = total = 0
    while position < len(chunk):
        try:
            header, position = _struct(chunk, position, 0)
            size, packed = index(header[2]), index(header[3])
            struct, field = _DETAILS[index(header[1])]
            encoding = index(header[struct][field])
        except (LookupError, TypeError) as error:
            raise ValueError("it has a damaged header") from error
        if encoding not in _PLAIN_OR_DICTIONARY:
            raise ValueError(f"a page has the foreign encoding {encoding}")
        pages, total = pages + 1, total + size
        if size < 0 or not 0 <= packed <= len(chunk) - position:
            raise ValueError("a page is cut off")
        if total > MAX_CHUNK_BYTES or pages > _MAX_PAGES:
            raise ValueError(f"a column has {pages} pages of {total} bytes, at most {MAX_CHUNK_BYTES} are read")
        position += packed


def _struct(data: memoryview, position: int, depth: int) -> tuple[dict[int, Any], int]:
    """Read a struct: its fields by number, each once and in order, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while data[position]:
        step, kind = data[position] >> 4, data[position] & 15
        position += 1
        number += step
        if step == 0:  # the long form, which lets a field come twice
            raise ValueError("it has a foreign header")
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], position = _value(data, position, kind, depth)
    return fields, position + 1


def _value(data: memoryview, position: int, kind: int, depth: int) -> tuple[Any, int]:
    """Read what is neither true nor false: a whole number, bytes, a list or a struct."""
    if depth > _MAX_DEPTH:
        raise ValueError("it has a damaged header")
    if kind == _STRUCT:
        return _struct(data, position, depth + 1)
    if kind in (_TRUE, _FALSE):  # in a list
        return data[position] == _TRUE, position + 1
    if kind == _BINARY:
        length, position = _number(data, position)
        return data[position : position + length], position + length
    if kind == _LIST:
        length, kind = data[position] >> 4, data[position] & 15
        position += 1
        if length == 15:
            length, position = _number(data, position)
        items = []
        for _ in range(length):  # each takes a byte at least
            item, position = _value(data, position, kind, depth + 1)
            items.append(item)
        return items, position
    if _BYTE < kind <= _I64:
        value, position = _number(data, position)
        return (value >> 1) ^ -(value & 1), position
    raise ValueError("it has a foreign header")


def _number(data: memoryview, position: int) -> tuple[int, int]:
    """Read an unsigned number of seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("it has a damaged header")
