"""Streaming of the documents of one input split.

Every row (line, parquet row, csv record, docstring) yields a `Document` or a `BadDocument`; only errors of a whole file
are raised. The result does not depend on the split borders. Memory: about two documents of at most
`MAX_DOCUMENT_BYTES`, or one batch of a parquet row group.
"""

import csv
import io
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from msense.corpus import tables
from msense.corpus.files import corpus_filesystem, read_errors
from msense.corpus.pydocs import PARSE_ERRORS, docstrings, source_files
from msense.corpus.splits import UNKNOWN, WHOLE, InputSplit
from msense.corpus.streams import CHUNK_BYTES, open_text
from msense.errors import InputError
from msense.io.filesystems import display_uri
from msense.io.hashing import hash64

MAX_PROMPT = 1 << 16  # characters, as in the config of a student
MAX_DOCUMENT_BYTES = 16 << 20  # of UTF-8; in jsonl and csv also of the line or record that contains the text
ID, NO_ID = "id", "none"  # id columns: the default, which is used if present; none, rows are then numbered
_BATCH_BYTES, _BATCH_ROWS = 8 << 20, 256
_CHECKED_RECORDS = 1000  # of jsonl, which together must have the columns, as some writers leave out what is null
_BOM = b"\xef\xbb\xbf"
_SPACED_QUOTE = re.compile(' +"')


@dataclass(frozen=True)
class Document:
    """A non-blank UTF-8 text; its id is "name:row", or its value in the id column ("name#id" if there are several files)."""

    id: str
    text: str
    prompt: str | None = None  # its instruction, "" for none; None: that of all documents


@dataclass(frozen=True)
class BadDocument:
    """A row without usable text."""

    id: str  # "name:row", even if there is an id column; of a prompt without room for text, the document's
    # "empty", "not UTF-8", "too long", "no text", "bad JSON", "bad CSV row", "unparsable source", "bad prompt" or "long prompt"
    reason: str
    detail: str


class Fault(NamedTuple):
    """Stands for the text or the prompt of a row that has none."""

    reason: str
    detail: str


# id and text as str or UTF-8 bytes, or any other value; the same of the prompt; None: missing
_Row = tuple[object, object, object]
_Keep = Callable[[str], bool]


def read_documents(
    split: InputSplit,
    text_column: str = "text",
    sample: float = 1.0,
    seed: int = 0,
    id_column: str = ID,
    prompt_column: str | None = None,
) -> Iterator[Document | BadDocument]:
    """Yield the documents of an input split in file order.

    Args:
        split: input split with its `first_row`.
        text_column: column (key) of the text in parquet, csv and jsonl.
        sample: fraction of the documents to keep, chosen by a hash of (seed, id); for pydocs, of the source files.
        seed: seed of the sample.
        id_column: column of ids, of any type but lists and objects; "id" is used if present, "none" numbers the rows.
        prompt_column: column of the documents' prompts, if they have their own.

    Raises:
        InputError: the file is missing, not readable, corrupted, or has no such column.
    """
    if split.first_row == UNKNOWN:
        raise ValueError(f"{split.name}: the input split at byte {split.start} has no row number; call number_splits")
    limit = int(sample * 2**64)

    def keep(name: str) -> bool:
        return hash64(f"{seed} {name}".encode("utf-8", "surrogatepass")) < limit

    with read_errors(split.uri, split.format):
        if split.format == "pydocs":
            yield from _read_package(split, keep)
            return
        rows = _read_rows(split, _Columns(split, text_column, id_column, prompt_column))
        for row, (value, text, prompt) in enumerate(rows, split.first_row):
            automatic = f"{split.name}:{row}"
            own_id = None if value is None else _id_text(value)
            name = f"{split.name}#{own_id}" if own_id and split.qualify_ids else own_id or automatic
            if keep(name):
                yield _checked(automatic, name, text, prompt)


def _id_text(value: object) -> str | None:
    """Return an id as text; None if it is missing."""
    match value:
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return value.hex()
        case bool():
            return str(value).lower()
        case float():  # pandas stores integers with gaps as floats
            return None if math.isnan(value) else str(int(value) if value.is_integer() else value)
        case dict() | list():
            return None
    return str(value)


def _checked(automatic: str, name: str, text: object, prompt: object = None) -> Document | BadDocument:
    """Return the document of a row, or what is wrong with it."""
    if isinstance(text, Fault):
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
    own = _checked_prompt(prompt)
    return BadDocument(automatic, *own) if isinstance(own, Fault) else Document(name, text, own)


def _checked_prompt(prompt: object) -> str | Fault | None:
    """Return the prompt of a row, None if it is missing, or what is wrong with it."""
    if prompt is None:
        return None
    if not isinstance(prompt, str | bytes):
        return Fault("bad prompt", f"{type(prompt).__name__} instead of a string")
    try:
        text = prompt.decode() if isinstance(prompt, bytes) else prompt.encode().decode()
    except UnicodeError as error:
        return Fault("bad prompt", f"not UTF-8: {error}")
    return text if len(text) <= MAX_PROMPT else Fault("long prompt", f"more than {MAX_PROMPT} characters")


def _too_long() -> Fault:
    return Fault("too long", f"more than {MAX_DOCUMENT_BYTES} bytes")


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


def _read_rows(split: InputSplit, columns: "_Columns") -> Iterator[_Row]:
    """Yield every row of a split, good or bad, so that the position in the stream is the row number."""
    kind, _, codec = split.format.partition(".")
    filesystem, path = corpus_filesystem(split.uri)
    with filesystem.open(path, "rb") as raw:
        if kind == "parquet":
            yield from _parquet_rows(raw, split, columns)
            return
        # Unlike those of fsspec and Arrow, the `readline` of a BufferedReader takes a limit.
        stream = io.BufferedReader(raw, CHUNK_BYTES) if split.start else open_text(raw, codec, display_uri(split.uri))
        if kind == "csv":
            yield from _csv_rows(stream, columns)
        elif kind == "jsonl":
            yield from _json_rows(_lines(stream, split.start, split.stop), split, columns)
        else:
            yield from ((None, line, None) for line in _lines(stream, split.start, split.stop))


def _lines(stream: io.BufferedReader, start: int, stop: int) -> Iterator[bytes | Fault]:
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


def _json_rows(lines: Iterable[bytes | Fault], split: InputSplit, columns: "_Columns") -> Iterator[_Row]:
    seen: dict[str, None] = {}
    unchecked = _CHECKED_RECORDS if split.start == 0 else 0
    for line in lines:
        record = line if isinstance(line, Fault) or not line.strip() else parsed(line)
        if not isinstance(record, dict):
            yield None, record, None
            continue
        if unchecked:
            seen |= dict.fromkeys(record)
            columns.has_scalar_ids(not isinstance(record.get(columns.id), dict | list))
            unchecked = 0 if columns.are_in(seen) else unchecked - 1
            if not unchecked:
                columns.check(list(seen))
        yield columns.row(record)
    if unchecked and seen:
        columns.check(list(seen))


def parsed(line: bytes) -> dict[str, object] | Fault:
    """Return the JSON object of a line, or what is wrong with it."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Fault("not UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return Fault("bad JSON", str(error))
    return record if isinstance(record, dict) else Fault("bad JSON", f"a {type(record).__name__}, not an object")


class _RecordError(Exception):
    """A skipped csv record; the argument is its `Fault`."""


def csv_records(stream: io.BufferedReader, limit: int) -> Iterator[list[str] | Fault]:
    """Yield the records of a csv file, the header first; what is wrong with a record, or its size if over `limit` bytes.

    Bytes that are not UTF-8 are escaped as surrogates. A blank line is an empty list, none of which come before the header.
    """
    csv.field_size_limit(sys.maxsize)  # the module's limit is global to the process; _record_lines has its own
    if stream.peek(3).startswith(_BOM):
        stream.read(3)
    record: list[str] | Fault | None = []
    is_header = True
    while record is not None:
        lines: list[str] = []
        try:
            record = next(csv.reader(_record_lines(stream, limit, lines), strict=True), None)
            if record and any(_SPACED_QUOTE.match(cell) for cell in record):
                record = _without_spaces(record, lines)
        except _RecordError as error:
            record = error.args[0]
        except csv.Error as error:
            record = Fault("bad CSV row", str(error))
        if record or (record is not None and not is_header):
            is_header = False
            yield record


def _without_spaces(record: list[str], lines: list[str]) -> list[str]:
    """Return a record whose quotes may follow a space, as in `1, "a, b"`.

    Raises:
        csv.Error: such a quote is not closed, or not at the end of its cell, so that the cells are in doubt.
    """
    try:
        others = list(csv.reader(lines, strict=True, skipinitialspace=True))
    except csv.Error:
        others = []
    if len(others) == 1:
        same = [cell.lstrip(" ") for cell in record] == [cell.lstrip(" ") for cell in others[0]]
        return record if same else others[0]
    if all(cell.count('"') % 2 == 0 for cell in record):  # as in ` "Hello" she said`
        return record
    raise csv.Error('a quote after a space is not closed at the end of its cell: write the cell as "...", quotes as ""')


def _record_lines(stream: io.BufferedReader, limit: int, lines: list[str]) -> Iterator[str]:
    """Yield the lines of one csv record to `csv.reader`, which requests another line only while a quote is open.

    So a record that is too long can be skipped without buffering it: it ends with the first line that makes the number
    of quotes even. The lines are added to `lines`.
    """
    size = 0
    while line := stream.readline(limit + 2):
        is_cut = len(line) == limit + 2 and not line.endswith(b"\n")
        if is_cut or size > limit:
            quotes = (size > 0) + line.count(b'"')
            while line and (quotes % 2 or not line.endswith(b"\n")):
                line = stream.readline(CHUNK_BYTES)
                quotes += line.count(b'"')
            raise _RecordError(_too_long())
        size += len(line)
        lines.append(line.decode("utf-8", "surrogateescape"))  # invalid bytes are reported when the text is checked
        yield lines[-1]
    if size:
        raise _RecordError(Fault("bad CSV row", "the file ends inside a quoted field"))


def _csv_rows(stream: io.BufferedReader, columns: "_Columns") -> Iterator[_Row]:
    records = csv_records(stream, MAX_DOCUMENT_BYTES)
    names = next(records, None)
    if names is None:  # an empty file, as writers of many parts leave
        return
    if isinstance(names, Fault):
        raise InputError(f"{columns.shown}: its header is no csv row ({names.detail}): correct it")
    columns.check(names)
    place = names.index(columns.text)
    for record in records:
        if isinstance(record, Fault) or not record:
            yield None, record or "", None
        elif len(record) > len(names) or len(record) == place + 1 < len(names):  # commas or line ends outside quotes
            yield None, Fault("bad CSV row", f"{len(record)} cells, but the header has {len(names)}"), None
        else:
            yield columns.row(dict(zip(names, record, strict=False)))


def _parquet_rows(raw: io.RawIOBase, split: InputSplit, columns: "_Columns") -> Iterator[_Row]:
    table = tables.open_parquet(raw, columns.shown)
    kinds = dict(zip(table.schema_arrow.names, table.schema_arrow.types, strict=True))
    columns.check(table.schema_arrow.names)
    texts = [name for name in (columns.text, columns.prompt) if name is not None]
    for name in texts:
        if not tables.is_text(kinds[name]):
            raise InputError(f"{columns.shown}: column {name!r} holds {kinds[name]}, not text; cast it")
    has_ids = columns.id in kinds and columns.has_scalar_ids(tables.is_scalar(kinds[columns.id]))
    names = list(dict.fromkeys([*texts, columns.id] if has_ids else texts))
    for number in range(split.start, split.stop):
        group = table.metadata.row_group(number)
        rows = min(_BATCH_ROWS, max(1, group.num_rows * _BATCH_BYTES // max(1, group.total_byte_size)))
        for batch in tables.iter_batches(raw, table, names, rows, number):
            read = (columns.id if has_ids else None, columns.text, columns.prompt)
            none = [None] * len(batch)
            yield from zip(*(tables.iter_values(batch.column(n)) if n else none for n in read), strict=True)


@dataclass(frozen=True)
class _Columns:
    """Names of the columns of texts, ids and prompts."""

    split: InputSplit
    text: str
    id: str
    prompt: str | None

    @property
    def shown(self) -> str:
        return display_uri(self.split.uri)

    @property
    def _wanted(self) -> dict[str, str]:
        """The flags of the columns that a file must have."""
        wanted = {self.text: "--text-column"}
        wanted |= {} if self.id in (ID, NO_ID, *wanted) else {self.id: "--id-column"}
        return wanted | ({} if self.prompt is None or self.prompt in wanted else {self.prompt: "--prompt-column"})

    def are_in(self, names: Collection[str]) -> bool:
        """Return whether names are those of all columns that a file must have."""
        return all(name in names for name in self._wanted)

    def check(self, names: list[str]) -> None:
        """Raise if a column is missing that must be there, or a column is there twice."""
        for name, flag in self._wanted.items():
            if name not in names:
                raise tables.missing_column(self.shown, name, names, f"one with {flag}")
        for name in (self.text, self.id, *([] if self.prompt is None else [self.prompt])):
            if (count := names.count(name)) > 1:
                raise InputError(f"{self.shown}: {count} columns are named {name!r}; rename or drop some")

    def row(self, record: Mapping[str, object]) -> _Row:
        """Return id, text and prompt of a record."""
        return record.get(self.id), record.get(self.text), None if self.prompt is None else record.get(self.prompt)

    def has_scalar_ids(self, scalar: bool) -> bool:
        """Return `scalar`; raise if a column of other values was chosen for ids (the default column is then ignored)."""
        if not scalar and self.id != ID:
            raise InputError(
                f"{self.shown}: column {self.id!r} holds lists or objects, not ids; choose another --id-column"
            )
        return scalar
