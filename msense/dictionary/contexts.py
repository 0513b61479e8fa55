"""Reader of exemplars.parquet from an untrusted dictionary; loads only the row groups that contain the requested token.

Texts stay dictionary-encoded until their decoded size is known: a few bytes can repeat a long text a million times.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from msense.constants import MAX_EXEMPLARS
from msense.dictionary.layout import DictionaryFiles
from msense.errors import DictionaryError
from msense.io.parquet_pages import Group, check_pages, read_footer
from msense.io.untrusted import printable

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_GROUP_ROWS = 1 << 16  # the writer's row group size
_TEXT_BYTES = 1 << 16  # limit of one text
_ALL_TEXT_BYTES, _TEXT_RATIO = 64 << 20, 100  # limit of all texts: a constant plus a multiple of their stored size
_ROW_BYTES = 32  # of a row without its texts
_TOKEN_ROWS = 1 << 18  # limit per token
_FOOTER_BYTES, _FOOTER_BYTES_A_SENSE, _MAX_FOOTER_BYTES = 1 << 16, 4, 4 << 20  # parsing takes 500 times as much memory
_NUMBERS = ("token", "sense", "rank", "distance")
_TEXTS = ("left", "word", "right", "document_id")
_TYPES = (1, 1, 1, 4, 6, 6, 6, 6)  # Parquet's INT32, FLOAT, BYTE_ARRAY


def exemplar_schema() -> "pa.Schema":
    """Return the Arrow schema of exemplars.parquet."""
    import pyarrow as pa

    numbers = [("token", pa.int32()), ("sense", pa.int32()), ("rank", pa.int32()), ("distance", pa.float32())]
    return pa.schema(numbers + [(name, pa.string()) for name in _TEXTS])


def read_exemplars(files: DictionaryFiles, offsets: np.ndarray, token: int | None = None) -> "pa.Table":
    """Load the exemplars of one token, or of all tokens if `token` is None.

    Args:
        files: a dictionary folder that contains exemplars.parquet.
        offsets: int64 [V+1], where each token's senses start.
        token: token id.

    Raises:
        DictionaryError: the file is truncated, has other columns, links out of the folder, refers to missing senses, or
            decompresses to far more than its size.
    """
    import pyarrow as pa

    path = files.inside(files.exemplars)
    try:
        with pa.memory_map(str(path)) as source:
            return _read(source, offsets, token)
    except DictionaryError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DictionaryError(f"cannot read {path}: {printable(error)}; copy or build the dictionary again") from error


def _read(source: "pa.MemoryMappedFile", offsets: np.ndarray, token: int | None) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.compute as pc

    file, groups = _open(source, int(offsets[-1]))
    limit = int(offsets[-1]) * MAX_EXEMPLARS
    if token is not None:
        limit = min(int(offsets[token + 1] - offsets[token]) * MAX_EXEMPLARS, _TOKEN_ROWS)
    tables = [exemplar_schema().empty_table()]
    rows = size = stored = 0
    for group, group_bytes in _groups(source, groups, len(offsets) - 1, token):
        table = file.read_row_group(group, use_threads=False)
        table.validate(full=True)  # rejects invalid UTF-8
        if token is not None:
            table = table.filter(pc.equal(table["token"], token))
        _check_numbers(table, offsets)
        rows, size, stored = rows + len(table), size + _text_bytes(table), stored + group_bytes
        if rows > limit:
            raise ValueError(f"it holds more than {limit} exemplars, the limit at {MAX_EXEMPLARS} per sense")
        if size + _ROW_BYTES * rows > _ALL_TEXT_BYTES + _TEXT_RATIO * stored:
            raise ValueError(f"{stored} bytes decompress to {rows} rows with {size} bytes of text")
        tables.append(table.cast(exemplar_schema()))
    return pa.concat_tables(tables)


def _open(source: "pa.MemoryMappedFile", senses: int) -> "tuple[pq.ParquetFile, list[Group]]":
    """Return the opened file and its row groups after checking the size of the footer and the columns."""
    import pyarrow.parquet as pq

    size = source.size()
    tail = source.read_at(8, size - 8) if size >= 12 else b""
    length = int.from_bytes(tail[:4], "little")
    limit = min(_FOOTER_BYTES + _FOOTER_BYTES_A_SENSE * senses, _MAX_FOOTER_BYTES)
    if tail[4:] != b"PAR1" or length > size - 12:
        raise ValueError("it is truncated or not a Parquet file")
    if length > limit:
        raise ValueError(f"its footer has {length} bytes, but the limit is {limit}")
    groups = read_footer(memoryview(source.read_at(length, size - 8 - length)), _TYPES)
    metadata = pq.read_metadata(source)
    if not metadata.schema.to_arrow_schema().equals(exemplar_schema()):
        raise ValueError("it does not have the columns of exemplars")
    return pq.ParquetFile(source, metadata=metadata, read_dictionary=list(_TEXTS), pre_buffer=False), groups


def _groups(
    source: "pa.MemoryMappedFile", groups: list[Group], vocabulary: int, token: int | None
) -> Iterator[tuple[int, int]]:
    """Yield (number, stored bytes of texts) of each row group that may contain the token, after checking its pages."""
    last = 0
    for number, group in enumerate(groups):
        if group.rows == 0:
            continue
        least, most = group.columns[0].least, group.columns[0].most
        if not 0 < group.rows <= _GROUP_ROWS or most == -1 < least:
            raise ValueError(f"row group {number} has {group.rows} rows, not 1 to {_GROUP_ROWS}, or no statistics")
        if not last <= least <= most < vocabulary:
            raise ValueError(f"row group {number} holds tokens {least} to {most}, which are out of order or vocabulary")
        last = most
        if token is None or least <= token <= most:
            for column in group.columns:
                if not (0 <= column.start <= source.size() and 0 <= column.size <= source.size() - column.start):
                    raise ValueError("a column lies outside the file")
                source.seek(column.start)
                check_pages(memoryview(source.read_buffer(column.size)).cast("B"))
            yield number, sum(column.size for column in group.columns[len(_NUMBERS) :])


def _check_numbers(table: "pa.Table", offsets: np.ndarray) -> None:
    """Raise ValueError for rows with missing values or of senses that do not exist."""
    for name in table.column_names:
        if table[name].null_count:
            raise ValueError(f"{name} has missing values")
    token, sense, rank, distance = (table[name].to_numpy() for name in _NUMBERS)
    if len(token) and not 0 <= token.min() <= token.max() < len(offsets) - 1:
        raise ValueError("it holds tokens outside the vocabulary")
    invalid = (sense < 0) | (sense >= offsets[token + 1] - offsets[token]) | (rank < 0)
    if invalid.any():
        row = int(invalid.argmax())
        raise ValueError(f"sense {sense[row]}, rank {rank[row]} of token {token[row]} does not exist")
    if not np.isfinite(distance).all():
        raise ValueError("a distance is NaN or infinite")


def _text_bytes(table: "pa.Table") -> int:
    """Return the total decoded size of all texts."""
    import pyarrow.compute as pc

    total = 0
    for name in _TEXTS:
        for chunk in table[name].chunks:
            lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
            longest = pc.max(lengths).as_py() or 0
            total += pc.sum(lengths).as_py() or 0
            if longest > _TEXT_BYTES:
                raise ValueError(f"{name} holds a text of {longest} bytes, but the limit is {_TEXT_BYTES}")
    return total


class Exemplar(NamedTuple):
    """Context of one of the points nearest to a sense, rank 0 first."""

    sense: int
    rank: int
    distance: float
    left: str
    word: str
    right: str
    document_id: str
