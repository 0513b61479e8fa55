"""Streaming of the documents of one input split.

Every row (line, parquet row, csv record, docstring) yields a `Document` or a `BadDocument`; only errors of a whole file
are raised. The result does not depend on the split borders. Memory: about two documents of at most
`MAX_DOCUMENT_BYTES`, or one batch of a parquet row group.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import xxhash

from msense.corpus import tables
from msense.corpus.files import corpus_filesystem, read_errors
from msense.corpus.pydocs import PARSE_ERRORS, docstrings, source_files
from msense.corpus.splits import CHUNK_BYTES, UNKNOWN, WHOLE, InputSplit
from msense.errors import InputError
from msense.io.filesystems import display_uri

MAX_DOCUMENT_BYTES = 16 << 20  # of UTF-8; in jsonl and csv also of the line or record that contains the text
_BATCH_BYTES = 8 << 20
_MIN_UNPACKED_BYTES, _MAX_RATIO = 64 << 20, 200  # decompression-bomb limits; text compresses 3 to 20 times
_CODECS = {"gz": "gzip", "zst": "zstd"}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """A non-blank UTF-8 text; its id is "name:row", or its value in the `id` column."""

    id: str
    text: str


@dataclass(frozen=True)
class BadDocument:
    """A row without usable text."""

    id: str  # "name:row", even if there is an `id` column
    reason: str  # "empty", "not UTF-8", "too long", "no text", "bad JSON", "bad CSV row" or "unparsable source"
    detail: str


class _Fault(NamedTuple):
    """Stands for the text of a row that has none."""

    reason: str
    detail: str


_Row = tuple[object, object]  # value in the `id` column (None: missing); text as str or UTF-8 bytes, or any other value
_Keep = Callable[[str], bool]


def read_documents(
    split: InputSplit, text_column: str = "text", sample: float = 1.0, seed: int = 0
) -> Iterator[Document | BadDocument]:
    """Yield the documents of an input split in file order.

    Args:
        split: input split with its `first_row`.
        text_column: column (key) of the text in parquet, csv and jsonl.
        sample: fraction of the documents to keep, chosen by a hash of (seed, id); for pydocs, of the source files.
        seed: seed of the sample.

    Raises:
        InputError: the file is missing, not readable, corrupted, or has no such column.
    """
    if split.first_row == UNKNOWN:
        raise ValueError(f"{split.name}: the input split at byte {split.start} has no row number; call number_splits")
    limit = int(sample * 2**64)

    def keep(name: str) -> bool:
        return xxhash.xxh3_64_intdigest(f"{seed} {name}".encode("utf-8", "surrogatepass")) < limit

    with read_errors(split.uri, split.format):
        if split.format == "pydocs":
            yield from _read_package(split, keep)
            return
        for row, (own_id, text) in enumerate(_read_rows(split, text_column), split.first_row):
            automatic = f"{split.name}:{row}"
            name = automatic if own_id in (None, "") else str(own_id)
            if keep(name):
                yield _checked(automatic, name, text)


def _checked(automatic: str, name: str, text: object) -> Document | BadDocument:
    """Return the document of a row, or what is wrong with it."""
    if isinstance(text, _Fault):
        return BadDocument(automatic, *text)
    if not isinstance(text, str | bytes):
        return BadDocument(automatic, "no text", f"{type(text).__name__} instead of a string")
    try:
        name.encode()  # fails on lone surrogates
        raw = text.encode() if isinstance(text, str) else text
        text = raw.decode()
    except UnicodeError as error:
        return BadDocument(automatic, "not UTF-8", str(error))
    if len(raw) > MAX_DOCUMENT_BYTES:
        return BadDocument(automatic, *_too_long())
    if not text.strip():
        return BadDocument(automatic, "empty", "nothing but white space")
    return Document(name, text)


def _too_long() -> _Fault:
    return _Fault("too long", f"more than {MAX_DOCUMENT_BYTES} bytes")


def _read_package(split: InputSplit, keep: _Keep) -> Iterator[Document | BadDocument]:
    package = split.uri.removeprefix("pydocs:")
    prefix = split.name.removesuffix(package)
    for name, path in source_files(package)[split.start : split.stop]:
        if not keep(prefix + name):
            continue
        try:
            named = docstrings(path.read_bytes())
        except PARSE_ERRORS as error:
            yield BadDocument(prefix + name, "unparsable source", f"{type(error).__name__}: {error}")
            continue
        for qualified, text in named:
            document_id = f"{prefix}{name}:{qualified}".rstrip(":")  # a module's docstring has the file name alone
            yield _checked(document_id, document_id, text)


def _read_rows(split: InputSplit, text_column: str) -> Iterator[_Row]:
    """Yield every row of a split, good or bad, so that the position in the stream is the row number."""
    kind, _, codec = split.format.partition(".")
    filesystem, path = corpus_filesystem(split.uri)
    with filesystem.open(path, "rb") as raw, ExitStack() as stack:
        if kind == "parquet":
            yield from _parquet_rows(raw, split, text_column)
            return
        # Unlike those of fsspec and Arrow, the `readline` of a BufferedReader takes a limit.
        unpacked = _Unpacked(stack.enter_context(pa.CompressedInputStream(raw, _CODECS[codec])), raw) if codec else raw
        stream = io.BufferedReader(unpacked, CHUNK_BYTES)
        if kind == "csv":
            yield from _csv_rows(stream, split, text_column)
        elif kind == "jsonl":
            yield from _json_rows(_lines(stream, split.start, split.stop), split, text_column)
        else:
            yield from ((None, line) for line in _lines(stream, split.start, split.stop))


class _Unpacked(io.RawIOBase):
    """A decompressed stream that raises an error when it is far larger than text could be."""

    def __init__(self, stream: Any, packed: io.RawIOBase) -> None:
        self._stream, self._packed, self._size = stream, packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._stream.read(len(buffer))
        buffer[: len(chunk)] = chunk
        self._size += len(chunk)
        if self._size > _MIN_UNPACKED_BYTES + _MAX_RATIO * self._packed.tell():
            raise OSError(f"decompressed size exceeds {_MAX_RATIO} times the file size")
        return len(chunk)


def _lines(stream: io.BufferedReader, start: int, stop: int) -> Iterator[bytes | _Fault]:
    """Yield the lines that start in bytes [start, stop), without line ends; a fault for each that is too long."""
    position = start
    if start:  # the line of the byte before belongs to the previous split
        stream.seek(start - 1)
        position = _skip_line(stream, start - 1, stop)
    while (stop == WHOLE or position < stop) and (line := stream.readline(MAX_DOCUMENT_BYTES + 2)):
        at_start = position == 0
        position += len(line)
        if len(line) == MAX_DOCUMENT_BYTES + 2 and not line.endswith(b"\n"):
            yield _too_long()
            position = _skip_line(stream, position, stop)
        else:
            line = line.removeprefix(_BOM) if at_start else line
            yield line.removesuffix(b"\n").removesuffix(b"\r")


def _skip_line(stream: io.BufferedReader, position: int, stop: int) -> int:
    """Read to the end of a line, but not past `stop` however long the line is; return the new position."""
    while stop == WHOLE or position < stop:
        chunk = stream.readline(CHUNK_BYTES)
        position += len(chunk)
        if not chunk or chunk.endswith(b"\n"):
            break
    return position


def _json_rows(lines: Iterable[bytes | _Fault], split: InputSplit, text_column: str) -> Iterator[_Row]:
    unchecked = split.start == 0  # only the file's first record must have the column, whatever the split borders
    for line in lines:
        record = line if isinstance(line, _Fault) or not line.strip() else _parsed(line)
        if not isinstance(record, dict):
            yield None, record
            continue
        if unchecked:
            _check_columns(split, text_column, list(record))
            unchecked = False
        yield record.get("id"), record.get(text_column)


def _parsed(line: bytes) -> dict[str, object] | _Fault:
    """Return the JSON object of a line, or what is wrong with it."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _Fault("not UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return _Fault("bad JSON", str(error))
    return record if isinstance(record, dict) else _Fault("bad JSON", f"a {type(record).__name__}, not an object")


class _RecordError(Exception):
    """A skipped csv record; the argument is its `_Fault`."""


def _csv_records(stream: io.BufferedReader) -> Iterator[list[str] | _Fault]:
    """Yield the records of a csv file, the header first."""
    csv.field_size_limit(sys.maxsize)  # the module's limit is global to the process; _record_lines has its own
    if stream.peek(3).startswith(_BOM):
        stream.read(3)
    record: list[str] | _Fault | None = []
    while record is not None:
        try:
            record = next(csv.reader(_record_lines(stream)), None)
        except _RecordError as error:
            record = error.args[0]
        except csv.Error as error:
            record = _Fault("bad CSV row", str(error))
        if record is not None:
            yield record


def _record_lines(stream: io.BufferedReader) -> Iterator[str]:
    """Yield the lines of one csv record to `csv.reader`, which requests another line only while a quote is open.

    So a record that is too long can be skipped without buffering it: it ends with the first line that makes the number
    of quotes even.
    """
    size = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 2):
        is_cut = len(line) == MAX_DOCUMENT_BYTES + 2 and not line.endswith(b"\n")
        if is_cut or size > MAX_DOCUMENT_BYTES:
            quotes = (size > 0) + line.count(b'"')
            while line and (quotes % 2 or not line.endswith(b"\n")):
                line = stream.readline(CHUNK_BYTES)
                quotes += line.count(b'"')
            raise _RecordError(_too_long())
        size += len(line)
        yield line.decode("utf-8", "surrogateescape")  # invalid bytes are reported when the text is checked
    if size:
        raise _RecordError(_Fault("bad CSV row", "the file ends inside a quoted field"))


def _csv_rows(stream: io.BufferedReader, split: InputSplit, text_column: str) -> Iterator[_Row]:
    records = _csv_records(stream)
    header = next(records, [])
    names = [] if isinstance(header, _Fault) else header
    _check_columns(split, text_column, names)
    for record in records:
        if isinstance(record, _Fault) or not record:  # csv returns an empty list for a blank line
            yield None, record or ""
        else:
            row = dict(zip(names, record, strict=False))
            yield row.get("id"), row.get(text_column)


def _parquet_rows(raw: io.RawIOBase, split: InputSplit, text_column: str) -> Iterator[_Row]:
    table = tables.open_untrusted_parquet(raw, dictionaries=(text_column, "id"))
    names = table.schema_arrow.names
    _check_columns(split, text_column, names)
    columns = [text_column, "id"] if "id" in names else [text_column]
    for name in columns:
        kind = table.schema_arrow.types[names.index(name)]
        if not (tables.is_text(kind) or (name == "id" and (pa.types.is_integer(kind) or pa.types.is_null(kind)))):
            expected = "strings or integers" if name == "id" else "strings"
            raise InputError(f"{display_uri(split.uri)}: column {name!r} holds {kind}, not {expected}; cast it")
    for number in range(split.start, split.stop):
        group = table.metadata.row_group(number)
        rows = min(1024, max(1, group.num_rows * _BATCH_BYTES // max(1, group.total_byte_size)))
        for batch in table.iter_batches(rows, row_groups=[number], columns=columns, use_threads=False):
            texts = tables.iter_values(batch.column(text_column))
            ids = tables.iter_values(batch.column("id")) if "id" in names else [None] * len(batch)
            for own_id, text in zip(ids, texts, strict=True):
                yield own_id.decode("utf-8", "surrogateescape") if isinstance(own_id, bytes) else own_id, text


def _check_columns(split: InputSplit, text_column: str, names: list[str]) -> None:
    """Raise if the text column is missing, or it or the `id` column is there twice."""
    shown = display_uri(split.uri)
    if text_column not in names:
        columns = ", ".join(map(repr, names[:50])) or "none"
        raise InputError(f"{shown}: no column {text_column!r}; available: {columns}; choose one with --text-column")
    for name in (text_column, "id"):
        if (count := names.count(name)) > 1:
            raise InputError(f"{shown}: {count} columns are named {name!r}; rename or drop some")
