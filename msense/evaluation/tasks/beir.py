"""Retrieval data in the layout of BEIR (Thakur et al. 2021): documents, queries and judgements of their relevance.

A folder has `corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`, `text`) and `qrels.tsv` or `qrels/SPLIT.tsv`
(`query-id`, `corpus-id`, `score`, or the four columns of TREC), each also as .gz or .zst; datasets of the Hub have configs
`corpus` and `queries`, and the judgements in `default`, `qrels` or the dataset `NAME-qrels`. Memory: the texts and ids.
"""

import codecs
import io
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from msense.corpus import list_files, tables
from msense.corpus.files import SourceFile, corpus_filesystem, current_fingerprint, read_errors
from msense.corpus.readers import MAX_DOCUMENT_BYTES, Fault, parsed
from msense.corpus.streams import open_text
from msense.errors import InputError
from msense.io import storage
from msense.io.filesystems import display_uri
from msense.io.untrusted import printable
from msense.text import is_utf8

logger = logging.getLogger(__name__)
_MAX_BYTES = 8 << 30  # of a file, decompressed
_MAX_SCORE = 1000  # of a judgement: trec_eval allocates a counter per grade
_TABLES = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")
_JUDGED = ("tsv", "tsv.gz", "tsv.zst", *_TABLES)
_COLUMNS = ("query-id", "corpus-id", "score")
_TREC = 4  # columns of TREC's form
Judgements = dict[str, dict[str, int]]  # score by query and document; above 0: relevant


@dataclass(frozen=True)
class RetrievalData:
    """N documents and Q judged queries."""

    document_ids: list[str]
    documents: list[str]  # title and text; empty for a document without both
    query_ids: list[str]
    queries: list[str]
    judgements: Judgements  # of these documents and queries only


def data_files(source: str, split: str = "test") -> tuple[list[SourceFile], ...]:
    """Return the files of the documents, the queries and the judgements; InputError if one of the three is missing."""
    if source.startswith("hf://"):
        return _hub_files(source, split)
    own = (f"qrels/{split}", *(["qrels"] if split == "test" else []))
    return tuple(
        [_local_file(source, stems, forms)]
        for stems, forms in ((("corpus",), _TABLES), (("queries",), _TABLES), (own, _JUDGED))
    )


def _local_file(source: str, stems: tuple[str, ...], forms: tuple[str, ...]) -> SourceFile:
    names = [(f"{stem}.{form}", form) for stem in stems for form in forms]
    found = [(name, form) for name, form in names if storage.exists(storage.join(source, *name.split("/")))]
    shown = display_uri(source)
    if not found:
        wanted = " or ".join(f"{stem}.{forms[0]}" for stem in stems)
        raise InputError(
            f"{shown} has no {wanted} (also as .gz or .zst): retrieval needs documents in corpus.jsonl, queries in "
            "queries.jsonl, and judgements in qrels.tsv or qrels/SPLIT.tsv"
        )
    if len(found) > 1:
        raise InputError(f"{shown} has {' and '.join(name for name, _ in found)}: keep one of them")
    ((name, form),) = found
    uri = storage.join(source, *name.split("/"))
    size, _, fingerprint = (current_fingerprint(uri) or "0 ").partition(" ")
    return SourceFile(uri, name, form, int(size), fingerprint)


def _hub_files(source: str, split: str) -> tuple[list[SourceFile], ...]:
    name, _, config = source.removeprefix("hf://").partition(":")
    of = f"{config}-" if config else ""
    places = [[f"{name}:{of}{part}:{own}" for own in (split, part)] for part in ("corpus", "queries")]
    judged = [f"{name}:{config}-qrels"] if config else [f"{name}:default", f"{name}:qrels", f"{name}-qrels:default"]
    try:
        return tuple(_first_listed(own) for own in (*places, [f"{place}:{split}" for place in judged]))
    except InputError as error:
        raise InputError(
            f"{error}\nRetrieval needs the configs corpus and queries, and judgements in the config default or qrels or the "
            f"dataset {name}-qrels. Without access to the Hub: download the data elsewhere, and replace {source} by a folder "
            "with corpus.jsonl, queries.jsonl and qrels.tsv"
        ) from error


def _first_listed(places: list[str]) -> list[SourceFile]:
    """Return the files of the first dataset, config and split that exists; else raise the first error."""
    errors = []
    for place in places:
        try:
            return list_files((f"hf://{place}",))
        except InputError as error:
            errors.append(error)
    raise errors[0]


def read_retrieval(source: str, split: str = "test") -> RetrievalData:
    """Read documents, queries and judgements; see `data_files`.

    Queries without judgements are left out. Judgements of unknown documents and queries are ignored with a warning.

    Raises:
        InputError: a file is missing, corrupted or empty, an id occurs twice, or no judgement can be used.
    """
    corpus, queries, judged = data_files(source, split)
    documents, texts = _read_texts(corpus), _read_texts(queries)
    judgements = _checked(_read_judgements(judged), documents, texts, display_uri(source))
    own = {query: text for query, text in texts.items() if query in judgements}
    return RetrievalData(list(documents), list(documents.values()), list(own), list(own.values()), judgements)


def _read_texts(files: list[SourceFile]) -> dict[str, str]:
    """Return title and text by id."""
    texts: dict[str, str] = {}
    for where, row in _iter_rows(files, ("_id", "id", "title", "text")):
        if (own := _id(row.get("_id", row.get("id")))) is None:
            raise InputError(f"{where}: no id in `_id`, which must be a text or a whole number: correct it")
        if own in texts:
            raise InputError(f"{where}: an earlier row has the same id {printable(own)!r}: make ids unique")
        texts[own] = f"{_text(row.get('title'), where)} {_text(row.get('text'), where)}".strip()
    if not any(texts.values()):
        state = "has no text in a column `text`" if texts else "is empty"
        raise InputError(f"{display_uri(files[0].uri)} {state}: provide one object with `_id` and `text` per line")
    return texts


def _read_judgements(files: list[SourceFile]) -> Judgements:
    judgements: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for where, row in _iter_rows(files, _COLUMNS):
        query, document, score = _id(row.get(_COLUMNS[0])), _id(row.get(_COLUMNS[1])), _score(row.get(_COLUMNS[2]))
        if query is None or document is None or score is None:
            raise InputError(
                f"{where}: not a judgement of query-id, corpus-id and score, separated by tabs, the score a whole number from "
                f"-{_MAX_SCORE} to {_MAX_SCORE}: correct it; a first line of names must be these three"
            )
        if judgements[query].setdefault(document, score) != score:
            raise InputError(
                f"{where}: query {printable(query)!r} and document {printable(document)!r} have another score in an earlier "
                "row: keep one"
            )
        judgements[query][document] = score
    return dict(judgements)


def _checked(judgements: Judgements, documents: dict[str, str], queries: dict[str, str], shown: str) -> Judgements:
    """Return the judgements of known queries and documents; InputError if none of them is above 0."""
    known = {
        query: {document: score for document, score in own.items() if document in documents}
        for query, own in judgements.items()
        if query in queries
    }
    known = {query: own for query, own in known.items() if own}
    total, used = (sum(map(len, own.values())) for own in (judgements, known))
    if not any(score > 0 for own in known.values() for score in own.values()):
        state = "none is above 0" if used else "all are of other queries or documents"
        raise InputError(f"{shown}: of {total:,} judgements, {state}: use qrels, queries and corpus of one data set")
    if used < total:
        lost = f"{total - used:,} of {total:,} judgements, of unknown queries or documents"
        logger.warning("%s: ignoring %s; %d of %d queries are left", shown, lost, len(known), len(judgements))
    return known


def _iter_rows(files: list[SourceFile], names: tuple[str, ...]) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the rows of files, each with its place for error messages."""
    for file in files:
        kind, _, codec = file.format.partition(".")
        shown = display_uri(file.uri)
        filesystem, path = corpus_filesystem(file.uri)
        with read_errors(file.uri, file.format), filesystem.open(path, "rb") as stream:
            if kind == "parquet":
                yield from ((shown, row) for row in _parquet_rows(stream, shown, names))
                continue
            columns: tuple[str, ...] = ()  # of a tsv file: those that its first line names, or the usual ones
            for number, line in _lines(open_text(stream, codec, shown), shown):
                where = f"{shown}, line {number}"
                if kind == "tsv":
                    cells = _cells(line.decode("utf-8", "replace"))
                    named = tuple(cell.strip().lower().replace("_", "-") for cell in cells)
                    if not columns and sorted(named) == sorted(names):
                        columns = named
                        continue
                    columns = columns or names
                    yield where, dict(zip(columns, cells, strict=True)) if len(cells) == len(columns) else {}
                elif isinstance(row := parsed(line), Fault):
                    raise InputError(f"{where}: {row.reason}: {printable(row.detail)}; correct it")
                else:
                    yield where, row


def _cells(line: str) -> list[str]:
    """Return the cells of a judgement, without quotes; of a line of TREC's form (query, 0, document, score) the three."""
    cells = [re.sub(r'^ *"(.*)" *$', r"\1", cell) for cell in line.split("\t")]
    words = line.split()
    if len(words) == _TREC and len(cells) in (1, _TREC) and words[1] in ("0", "Q0"):
        return [words[0], *words[2:]]
    return cells


def _parquet_rows(stream: io.BufferedIOBase, shown: str, names: tuple[str, ...]) -> Iterator[dict[str, object]]:
    file = tables.open_parquet(stream, shown)
    own = [name for name in names if name in file.schema_arrow.names]
    for name in own:
        if not tables.is_scalar(file.schema_arrow.field(name).type):
            raise InputError(f"{shown}: column {name!r} holds lists or objects, not texts or numbers; convert it")
    for group in range(file.num_row_groups):
        for batch in tables.iter_batches(stream, file, own, 1024, group):
            columns = [tables.iter_values(batch.column(name)) for name in own]
            yield from (dict(zip(own, row, strict=True)) for row in zip(*columns, strict=True))


def _lines(stream: io.BufferedReader, shown: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not blank, with their numbers; InputError if one, or the file, is too long."""
    number = size = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number, size = number + 1, size + len(line)
        if len(line) > MAX_DOCUMENT_BYTES or size > _MAX_BYTES:
            raise InputError(f"{shown}: a line has over {MAX_DOCUMENT_BYTES} bytes, or all over {_MAX_BYTES}: split it")
        if (line := line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")).strip():
            yield number, line


def _id(value: object) -> str | None:
    """Return an id as text; None if it is missing or neither a text nor a whole number."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value) if is_utf8(str(value)) and str(value).strip() else None


def _text(value: object, where: str) -> str:
    """Return a text; empty if it is missing."""
    if value is None:
        return ""
    try:
        if isinstance(value, int | float):  # as writers of tables make of texts such as 1984; NaN of a missing one
            return "" if value != value else str(value)
        text = value.decode() if isinstance(value, bytes) else value
        if not isinstance(text, str):
            raise ValueError(f"a {type(value).__name__}")
        text.encode()  # fails on lone surrogates
    except ValueError as error:
        raise InputError(f"{where}: `title` or `text` is not UTF-8 text ({printable(error)}): convert it") from error
    return text


def _score(value: object) -> int | None:
    """Return a whole number of at most `_MAX_SCORE`, written in any way; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | bytes | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() and abs(number) <= _MAX_SCORE else None
