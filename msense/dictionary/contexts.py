"""Writer of exemplars.parquet, and its reader from an untrusted dictionary, which loads only the row groups of a token.

Texts stay dictionary-encoded until their decoded size is known: a few bytes can repeat a long text a million times.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from msense.constants import MAX_EXEMPLARS
from msense.dictionary.layout import DictionaryFiles
from msense.errors import DictionaryError
from msense.io.untrusted import printable

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_GROUP_ROWS = 1 << 16  # limit of a row group
_LEAST_GROUP_ROWS = 1 << 12  # written to a row group, of which each takes 700 bytes of the footer
_GROUPS, _SENSES_A_GROUP, _MAX_GROUPS = (
    32,
    1 << 10,
    1 << 11,
)  # limits of the groups written: a constant and one per senses
_BATCH_ROWS = 1024  # read at once
_ALL_TEXT_BYTES, _TEXT_RATIO = 64 << 20, 100  # limit of all texts: a constant plus a multiple of their stored size
_ROW_BYTES = 32  # of a row without its texts
_TOKEN_ROWS = 1 << 18  # limit per token
_FOOTER_BYTES, _FOOTER_BYTES_A_SENSE, _MAX_FOOTER_BYTES = 1 << 16, 4, 4 << 20  # parsing takes 500 times as much memory
_NUMBERS = ("token", "sense", "rank", "distance")
_TEXTS = ("left", "word", "right", "document_id")
_ENCODINGS = {"PLAIN", "PLAIN_DICTIONARY", "RLE", "RLE_DICTIONARY", "BIT_PACKED"}  # others repeat texts without limit


def exemplar_schema() -> "pa.Schema":
    """Return the Arrow schema of exemplars.parquet."""
    import pyarrow as pa

    numbers = [("token", pa.int32()), ("sense", pa.int32()), ("rank", pa.int32()), ("distance", pa.float32())]
    return pa.schema(numbers + [(name, pa.string()) for name in _TEXTS])


def write_exemplars(table: "pa.Table", path: Path) -> None:
    """Write exemplars, sorted by token, sense and rank, in small row groups, as reading a token loads those with it."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    senses = pc.sum(pc.equal(table["rank"], 0)).as_py() or 0
    groups = min(_GROUPS + senses // _SENSES_A_GROUP, _MAX_GROUPS)  # the footer's size is limited
    rows = min(max(-(-len(table) // groups), _LEAST_GROUP_ROWS), _GROUP_ROWS)
    pq.write_table(table, path, compression="zstd", row_group_size=rows, write_statistics=["token"])


def read_exemplars(files: DictionaryFiles, offsets: np.ndarray, token: int | None = None) -> "pa.Table":
    """Load the exemplars of one token, or of all tokens if None, of a dictionary with these offsets, int64 [V+1].

    Raises DictionaryError for a file that is truncated, has other columns, links out of the folder, refers to missing
    senses, or decompresses to far more than its size.
    """
    import pyarrow as pa

    path = files.inside(files.exemplars)
    try:
        with pa.memory_map(str(path)) as source:
            return _read(source, offsets, token)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DictionaryError(f"cannot read {path}: {printable(error)}; copy or build the dictionary again") from error


def _read(source: "pa.MemoryMappedFile", offsets: np.ndarray, token: int | None) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.compute as pc

    file = _open(source, int(offsets[-1]))
    limit = int(offsets[-1]) * MAX_EXEMPLARS
    if token is not None:
        limit = min(int(offsets[token + 1] - offsets[token]) * MAX_EXEMPLARS, _TOKEN_ROWS)
    tables = [exemplar_schema().empty_table()]
    rows = size = stored = 0
    for group, group_bytes in _groups(file.metadata, source.size(), len(offsets) - 1, token):
        stored += group_bytes
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], use_threads=False):
            batch.validate(full=True)  # rejects invalid UTF-8
            table = pa.Table.from_batches([batch])
            if token is not None:
                table = table.filter(pc.equal(table["token"], token))
            _check_numbers(table, offsets)
            rows, size = rows + len(table), size + _text_bytes(table)
            if rows > limit:
                raise ValueError(f"it holds more than {limit} exemplars, the limit at {MAX_EXEMPLARS} per sense")
            if size + _ROW_BYTES * rows > _ALL_TEXT_BYTES + _TEXT_RATIO * stored:
                raise ValueError(f"{stored} bytes decompress to more than {size} bytes of text")
            tables.append(table.cast(exemplar_schema()))
    return pa.concat_tables(tables)


def _open(source: "pa.MemoryMappedFile", senses: int) -> "pq.ParquetFile":
    """Open the file after checking the size of its footer, then its columns."""
    import pyarrow.parquet as pq

    size = source.size()
    tail = source.read_at(8, size - 8) if size >= 12 else b""
    length = int.from_bytes(tail[:4], "little")
    limit = min(_FOOTER_BYTES + _FOOTER_BYTES_A_SENSE * senses, _MAX_FOOTER_BYTES)
    if tail[4:] != b"PAR1" or length > size - 12:
        raise ValueError("it is truncated or not a Parquet file")
    if length > limit:
        raise ValueError(f"its footer has {length} bytes, but the limit is {limit}")
    metadata = pq.read_metadata(source)
    if not metadata.schema.to_arrow_schema().equals(exemplar_schema()):
        raise ValueError("it does not have the columns of exemplars")
    return pq.ParquetFile(source, metadata=metadata, read_dictionary=list(_TEXTS), pre_buffer=False)


def _groups(
    metadata: "pq.FileMetaData", file_bytes: int, vocabulary: int, token: int | None
) -> Iterator[tuple[int, int]]:
    """Yield (number, stored bytes of texts) of each row group that may contain the token, after checking its columns."""
    last = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if group.num_rows == 0:
            continue
        columns = [group.column(column) for column in range(group.num_columns)]
        for column, expected in zip(columns, metadata.schema, strict=True):
            _check_column(column, expected.physical_type, file_bytes)
        statistics = columns[0].statistics
        if not 0 < group.num_rows <= _GROUP_ROWS or statistics is None or not statistics.has_min_max:
            raise ValueError(f"row group {number} has {group.num_rows} rows, not 1 to {_GROUP_ROWS}, or no statistics")
        least, most = statistics.min, statistics.max
        if not last <= least <= most < vocabulary:
            raise ValueError(f"row group {number} holds tokens {least} to {most}, which are out of order or vocabulary")
        last = most
        if token is None or least <= token <= most:
            texts = columns[len(_NUMBERS) :]
            stored = sum(column.total_compressed_size for column in texts)
            if sum(column.total_uncompressed_size for column in texts) > _ALL_TEXT_BYTES + _TEXT_RATIO * stored:
                raise ValueError(f"row group {number} decompresses {stored} bytes to far more text")
            yield number, stored


def _check_column(column: "pq.ColumnChunkMetaData", physical_type: str, file_bytes: int) -> None:
    """Raise ValueError for a column chunk of another type, for which Arrow ends the process, encoding or place."""
    if column.physical_type != physical_type:
        raise ValueError("its row groups do not have the columns of exemplars")
    if unknown := set(column.encodings) - _ENCODINGS:
        raise ValueError(f"a column has the unsupported encoding {min(unknown)}")
    start = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    if not (0 <= start <= file_bytes and 0 <= column.total_compressed_size <= file_bytes - start):
        raise ValueError("a column lies outside the file")


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

    chunks = (chunk for name in _TEXTS for chunk in table[name].chunks)
    return sum(pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0 for chunk in chunks)


class Exemplar(NamedTuple):
    """Context of one of the points nearest to a sense, rank 0 first."""

    sense: int
    rank: int
    distance: float
    left: str
    word: str
    right: str
    document_id: str
