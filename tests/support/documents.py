"""Helpers to read corpora in tests."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from msense.corpus import (
    BadDocument,
    Document,
    InputSplit,
    count_rows,
    cut_splits,
    list_files,
    number_splits,
    read_documents,
)


def pieces_of(*uris: object, piece_bytes: int = 16 << 20) -> list[InputSplit]:
    pieces = cut_splits(list_files([str(uri) for uri in uris]), piece_bytes)
    return number_splits(pieces, [count_rows(piece) for piece in pieces])


def read(*uris: object, piece_bytes: int = 16 << 20, **options: object) -> list[Document | BadDocument]:
    return [row for piece in pieces_of(*uris, piece_bytes=piece_bytes) for row in read_documents(piece, **options)]


def pairs(rows: list[Document | BadDocument]) -> list[tuple[str, str]]:
    """Return (id, text) of good rows, (id, reason) of bad ones."""
    return [(row.id, row.text if isinstance(row, Document) else row.reason) for row in rows]


def zstd(raw: bytes) -> bytes:
    return pa.compress(raw, codec="zstd", asbytes=True)


def write_table(path: Path, row_group_size: int = 1000, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path
