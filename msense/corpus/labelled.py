"""Labelled texts: one split (train, test, ...) of a data set, from files or the Hugging Face Hub.

Sources are folders (local, s3://, ...) with `SPLIT*.csv`, `.jsonl` or `.parquet`, and `hf://dataset[:config]`. Memory:
the whole split.
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from msense.corpus import list_files, tables
from msense.corpus.files import SourceFile, corpus_filesystem, read_errors
from msense.errors import InputError
from msense.io.filesystems import display_uri
from msense.io.untrusted import printable

_MAX_BYTES = 1 << 30  # per file
_FORMATS = ("csv", "jsonl", "parquet")
_SCALARS = (tables.is_text, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)


class Columns(NamedTuple):
    """Names of the columns of texts and labels; two text columns for pairs of texts."""

    texts: tuple[str, ...] = ("text",)
    label: str = "label"


@dataclass(frozen=True)
class Labelled:
    """P texts (a tuple with a text per column) with a label each.

    Example:
        >>> data = read_labelled("data/sst2", "train", Columns(("sentence",), "label"))
        >>> data.first[0], data.labels[0]
    """

    texts: list[tuple[str, ...]]
    labels: np.ndarray  # str [P]
    fingerprints: tuple[str, ...]  # of the files, with their names

    @property
    def first(self) -> list[str]:
        """The texts of the first column."""
        return [row[0] for row in self.texts]


def split_files(source: str, part: str) -> list[SourceFile]:
    """Return the files of one split of a data set.

    Args:
        source: a folder, or `hf://dataset[:config]`.
        part: name of the split, such as train; in a folder, the prefix of its file names.

    Raises:
        InputError: the split is missing; the message says what to download and where to put it.
    """
    if source.startswith("hf://"):
        dataset, _, config = source.removeprefix("hf://").partition(":")
        try:
            return list_files((f"hf://{dataset}:{config}:{part}",))
        except InputError as error:
            raise InputError(
                f"{error}\nWithout access to the Hub: run `hf download --repo-type dataset {dataset} --local-dir DIR` on a "
                f"machine with access, and replace {source} by DIR{f'/{config}' if config else ''}, with files named "
                f"{part}*.csv, .jsonl or .parquet"
            ) from error
    shown = display_uri(source)
    # for example train.csv or train-00000-of-00002.parquet
    pattern = re.compile(rf"{re.escape(part)}([-_][0-9]+.*)?\.({'|'.join(_FORMATS)})")
    files = [file for file in list_files((source,)) if pattern.fullmatch(file.name.rpartition("/")[2])]
    if not files:
        raise InputError(
            f"{shown} has no {part}*.csv, .jsonl or .parquet: put the split {part!r} of the data set there"
        )
    if len({(file.format, file.name.rpartition("/")[0]) for file in files}) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise InputError(f"{shown} has split {part!r} in several formats or folders ({names}): keep one of them")
    return files


def read_labelled(source: str, part: str, columns: Columns | None = None) -> Labelled:
    """Read columns (default: text and label) of one split of a data set; see `split_files` for `source` and `part`.

    Raises:
        InputError: the split is missing, corrupted or empty, lacks a column, or a text or label is missing.
    """
    columns = columns or Columns()
    if columns.label in columns.texts:
        raise InputError(
            f"column {columns.label!r} cannot be both text and label: choose with --text-column, --label-column"
        )
    files = split_files(source, part)
    names = [*columns.texts, columns.label]
    table = pd.concat([_read_file(file, names) for file in files], ignore_index=True)
    where = f"{display_uri(source)}, split {part!r}"
    if not len(table):
        raise InputError(f"{where} is empty; provide labelled texts")
    lacking = table[names].isna().any(axis=1) | (table[columns.label].astype(str).str.strip() == "")
    if lacking.any():
        raise InputError(f"{where}: row {int(lacking.to_numpy().argmax())} lacks a text or label: fix or remove it")
    for name in names:
        if not table[name].map(lambda value: isinstance(value, str | int | float)).all():
            raise InputError(f"{where}: column {name!r} has values other than texts and numbers: convert them")
    *texts, labels = ([str(value) for value in table[name].tolist()] for name in names)
    fingerprints = tuple(f"{file.name} {file.size} {file.fingerprint}" for file in files)
    return Labelled(list(zip(*texts, strict=True)), np.array(labels), fingerprints)


def _read_file(file: SourceFile, names: Sequence[str]) -> pd.DataFrame:
    """Read columns of a file."""
    shown = display_uri(file.uri)
    if file.size > _MAX_BYTES:
        raise InputError(f"{shown} has {file.size} bytes, more than the limit of {_MAX_BYTES}: split it")
    filesystem, path = corpus_filesystem(file.uri)
    with read_errors(file.uri, file.format), filesystem.open(path, "rb") as stream:
        try:
            table = {"csv": _csv, "jsonl": _json, "parquet": _parquet}[file.format](stream)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{shown}: cannot be read as {file.format} ({printable(error)}): correct it") from error
    if missing := [name for name in names if name not in table.columns]:
        available = ", ".join(map(repr, list(table.columns)[:50])) or "none"
        raise InputError(
            f"{shown}: no column {missing[0]!r}; available: {available}; choose with --text-column, --label-column"
        )
    return table[list(names)]


def _json(stream: Any) -> pd.DataFrame:
    """Read the objects of a file, one per line."""
    rows = [json.loads(line.decode("utf-8-sig")) for line in stream if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not a JSON object")
    return pd.DataFrame(rows, dtype=object)


def _parquet(stream: Any) -> pd.DataFrame:
    """Read the columns of a parquet file that hold texts, numbers or booleans."""
    table = tables.open_untrusted_parquet(stream, dictionaries=None)
    names, kinds = table.schema_arrow.names, table.schema_arrow.types
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    columns: dict[str, list[Any]] = {
        name: [] for name, kind in zip(names, kinds, strict=True) if any(check(kind) for check in _SCALARS)
    }
    for batch in table.iter_batches(1024, columns=list(columns), use_threads=False):
        for name, values in columns.items():
            raw = tables.iter_values(batch.column(name))
            values += [value.decode() if isinstance(value, bytes) else value for value in raw]
    return pd.DataFrame(columns, dtype=object)


def _csv(stream: Any) -> pd.DataFrame:
    """Read a csv file whose rows have exactly the fields of its header."""
    reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has not as many fields as the header")
    return pd.DataFrame(rows, columns=list(reader.fieldnames or []))
