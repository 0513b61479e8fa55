"""Text columns of parquet files: which types hold text, and their values as raw bytes.

Memory: one page, one batch, and the different texts of a row group in which most are repeated.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from msense.corpus.streams import check_pointer
from msense.errors import InputError

_OPTIONS: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20}  # else Arrow reads whole column chunks
_TRIED, _PLAIN_ROWS = 2048, 64  # rows read before texts count as distinct; rows of a batch of plain texts
_ERRORS = (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError)
_TEXT_TYPES = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary),
)


def open_parquet(raw: Any, shown: str) -> pq.ParquetFile:
    """Open a parquet file.

    Column chunks are never looked up in its metadata, as Arrow ends the process if one of them is encrypted or corrupted.

    Args:
        raw: seekable binary file.
        shown: the file in messages.

    Raises:
        InputError: the file is the pointer of Git LFS.
        OSError, ArrowInvalid, ArrowNotImplementedError: the file is corrupted or not a parquet file.
    """
    check_pointer(raw, shown)
    try:
        return pq.ParquetFile(raw, **_OPTIONS)
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"a column name is not UTF-8: {error}") from error


def iter_batches(
    raw: Any, file: pq.ParquetFile, names: Sequence[str], rows: int, group: int
) -> Iterator[pa.RecordBatch]:
    """Yield the columns of a row group in batches; texts as dictionaries, which hold a repeated text once.

    The rest of a row group is read as plain text once its texts prove to be mostly distinct, as a dictionary grows until the
    end, or when Arrow reaches a delta encoding, which it cannot read as a dictionary.

    Args:
        raw: the seekable binary file.
        file: the same, opened.
        names: columns, each of which is in the file once.
        rows: the most rows of a batch.
        group: number of the row group.

    Raises:
        OSError, ArrowInvalid, ArrowNotImplementedError: the row group is corrupted.
    """
    options = {"row_groups": [group], "columns": list(names), "use_threads": False}
    texts = [name for name in names if is_text(file.schema_arrow.field(name).type)]
    done = 0
    try:
        encoded = pq.ParquetFile(raw, metadata=file.metadata, read_dictionary=texts, **_OPTIONS)
        for batch in encoded.iter_batches(rows, **options):
            yield batch
            done += len(batch)
            if done > _TRIED and any(len(batch.column(name).dictionary) > done // 2 for name in texts):
                raise pa.ArrowNotImplementedError("mostly distinct texts, which a dictionary would collect")
    except _ERRORS:
        for batch in file.iter_batches(min(rows, _PLAIN_ROWS), **options):
            if len(batch) > done:
                yield batch.slice(done)
            done = max(0, done - len(batch))


def missing_column(shown: str, name: str, names: Sequence[str], flags: str) -> InputError:
    """Return the error for a column that a file lacks, with the names of those that it has."""
    known = ", ".join(map(repr, names[:50]))[:2000] or "none"
    mark = separator(names)
    remedy = f"cells are separated by {mark}: convert the file to commas" if mark else f"choose {flags}"
    return InputError(f"{shown}: no column {name!r}; available: {known}; {remedy}")


def separator(header: Sequence[str]) -> str:
    """Return, quoted, what seems to separate the cells of a csv file instead of commas; empty if nothing does."""
    return "" if len(header) != 1 else next((repr(mark) for mark in ";\t|" if mark in header[0]), "")


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column type holds text: strings or bytes, dictionary-encoded or not."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if isinstance(kind, pa.BaseExtensionType):  # such as arrow.json
        return pa.types.is_string(kind.storage_type) or pa.types.is_large_string(kind.storage_type)
    return any(is_type(kind) for is_type in _TEXT_TYPES)


def is_scalar(kind: pa.DataType) -> bool:
    """Return whether a column type holds single values: text, numbers, dates, UUIDs."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return not pa.types.is_nested(kind)


def iter_values(column: pa.Array) -> Iterator[object]:
    """Yield the values of a column of scalars; texts as their raw bytes, which may be invalid UTF-8.

    Raises:
        ArrowInvalid: the column is corrupted.
    """
    if not pa.types.is_dictionary(column.type):
        yield from (value.as_py() for value in _raw(column))
        return
    values = column.dictionary
    known: dict[int | None, object] = {None: None}
    for index in column.indices.to_pylist():
        if index not in known:
            if not 0 <= index < len(values):  # Arrow does not check this
                raise pa.ArrowInvalid(f"dictionary index {index} of {len(values)} values")
            known[index] = _raw(values.slice(index, 1))[0].as_py()
        yield known[index]


def _raw(values: pa.Array) -> pa.Array:
    """Return texts as bytes, other values as they are."""
    if not is_text(values.type):
        return values
    values = values.storage if isinstance(values, pa.ExtensionArray) else values
    return values.cast(pa.large_binary())
