"""Helpers to read corpora in tests."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from msense.corpus import BadDocument, Document, InputSplit, count_rows, cut_splits, list_files, number_splits
from msense.corpus.readers import read_documents


def splits_of(*uris: object, split_bytes: int = 16 << 20) -> list[InputSplit]:
    splits = cut_splits(list_files([str(uri) for uri in uris]), split_bytes)
    return number_splits(splits, [count_rows(split) for split in splits])


def read(*uris: object, split_bytes: int = 16 << 20, **options: object) -> list[Document | BadDocument]:
    return [row for split in splits_of(*uris, split_bytes=split_bytes) for row in read_documents(split, **options)]


def pairs(rows: list[Document | BadDocument]) -> list[tuple[str, str]]:
    """Return (id, text) of good rows, (id, reason) of bad ones."""
    return [(row.id, row.text if isinstance(row, Document) else row.reason) for row in rows]


def zstd(raw: bytes) -> bytes:
    return pa.compress(raw, codec="zstd", asbytes=True)


def write_table(path: Path, row_group_size: int = 1000, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path
