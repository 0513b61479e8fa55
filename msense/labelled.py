"""Labelled texts: one part (train, test, ...) of a data set, from files or the Hugging Face Hub.

Comes in: a folder (local, s3://, ...) with `PART*.csv`, `.jsonl` or `.parquet`, or `hf://dataset[:config]`. Goes out: texts and
their labels, both as text. Holds the whole part.
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

from msense.artefact import shown
from msense.corpus import list_files, tables
from msense.corpus.files import SourceFile, display_uri, filesystem_of, reading
from msense.errors import BadInput

_LARGEST = 1 << 30  # bytes of a file
_FORMATS = ("csv", "jsonl", "parquet")


class Columns(NamedTuple):
    """Where texts and labels are; a pair of texts has two columns."""

    texts: tuple[str, ...] = ("text",)
    label: str = "label"


@dataclass(frozen=True)
class Labelled:
    """Texts with a label each.

    Attributes:
        texts: P of them; a tuple for each column that was asked for.
        labels: str [P].
        fingerprints: of the files, with their names: what tells that data have changed.
    """

    texts: list[tuple[str, ...]]
    labels: np.ndarray
    fingerprints: tuple[str, ...]

    @property
    def first(self) -> list[str]:
        """The texts of the first column."""
        return [row[0] for row in self.texts]


def part_files(source: str, part: str) -> list[SourceFile]:
    """Return the files of a part of a data set.

    Args:
        source: a folder, or `hf://dataset[:config]`.
        part: such as train; of a folder all files whose names begin with it.

    Raises:
        BadInput: it is not there; says what to download and where to put it.
    """
    if source.startswith("hf://"):
        dataset, _, config = source.removeprefix("hf://").partition(":")
        try:
            return list_files((f"hf://{dataset}:{config}:{part}",))
        except BadInput as error:
            raise BadInput(
                f"{error}\nWithout the Hub: elsewhere, `hf download --repo-type dataset {dataset} --local-dir DIR`; then give "
                f"DIR{f'/{config}' if config else ''} in place of {source}, with files named {part}*.csv, .jsonl or .parquet"
            ) from error
    named = re.compile(
        rf"{re.escape(part)}([-_][0-9]+.*)?\.({'|'.join(_FORMATS)})"
    )  # train.csv, train-00000-of-00002.parquet
    files = [file for file in list_files((source,)) if named.fullmatch(file.name.rpartition("/")[2])]
    if not files:
        raise BadInput(
            f"{display_uri(source)} holds no {part}*.csv, .jsonl or .parquet: put the data set's part {part!r} there "
            "under such a name"
        )
    if len({(file.format, file.name.rpartition("/")[0]) for file in files}) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise BadInput(
            f"{display_uri(source)} holds {part!r} in several formats or folders ({names}): leave one, or name one"
        )
    return files


def read_labelled(source: str, part: str, columns: Columns | None = None) -> Labelled:
    """Read a part of a data set.

    Args:
        source: a folder, or `hf://dataset[:config]`.
        part: such as train.
        columns: of texts and labels; default: text and label.

    Raises:
        BadInput: it is not there, damaged or empty, lacks a column, or a text or label is missing.
    """
    columns = columns or Columns()
    if columns.label in columns.texts:
        raise BadInput(
            f"column {columns.label!r} cannot be both of the text and of the label: choose with --text-column, --label-column"
        )
    files = part_files(source, part)
    wanted = [*columns.texts, columns.label]
    tables = [_table(file, wanted) for file in files]
    table = pd.concat(tables, ignore_index=True)
    if not len(table):
        raise BadInput(f"{display_uri(source)}: part {part!r} is empty; give one with texts")
    lacking = table[wanted].isna().any(axis=1) | (table[columns.label].astype(str).str.strip() == "")
    if lacking.any():
        raise BadInput(
            f"{display_uri(source)}: row {int(lacking.to_numpy().argmax())} of part {part!r} lacks a text or label: mend "
            "or remove it"
        )
    for name in wanted:
        if not table[name].map(lambda value: isinstance(value, str | int | float)).all():
            raise BadInput(f"{display_uri(source)}: column {name!r} of part {part!r} holds more than texts and numbers")
    texts = list(zip(*(_as_text(table[name]) for name in columns.texts), strict=True))
    labels = np.array(_as_text(table[columns.label]))
    return Labelled(texts, labels, tuple(f"{file.name} {file.size} {file.fingerprint}" for file in files))


def _table(file: SourceFile, wanted: Sequence[str]) -> pd.DataFrame:
    """Read the columns that are wanted of a file."""
    if file.size > _LARGEST:
        raise BadInput(f"{display_uri(file.uri)} has {file.size} bytes, at most {_LARGEST} are read: cut it")
    with reading(file.uri, file.format):
        filesystem, path = filesystem_of(file.uri)
        with filesystem.open(path, "rb") as opened:
            table = _parsed(file, opened)
    if missing := [name for name in wanted if name not in table.columns]:
        there = ", ".join(map(repr, list(table.columns)[:50])) or "none"
        raise BadInput(
            f"{display_uri(file.uri)}: no column {missing[0]!r}; it has {there}: choose with --text-column, --label-column"
        )
    return table[list(wanted)]


def _parsed(file: SourceFile, opened: Any) -> pd.DataFrame:  # noqa: ANN401 - a file
    try:
        if file.format == "csv":
            return _csv(file, opened)
        return pd.DataFrame(_json(opened) if file.format == "jsonl" else _parquet(opened), dtype=object)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(
            f"{display_uri(file.uri)}: cannot be read as {file.format} ({shown(error)}): restore it"
        ) from error


def _json(opened: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - a file
    """Read the objects of a file, a line each."""
    rows = [json.loads(line.decode("utf-8-sig")) for line in opened if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no JSON object")
    return rows


def _parquet(opened: Any) -> dict[str, list[Any]]:  # noqa: ANN401 - a file
    """Read the columns of a parquet file that hold texts, numbers or truths."""
    names = tables.opened(opened).schema_arrow.names
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    table = tables.opened(opened, dictionaries=names)
    found: dict[str, list[Any]] = {
        name: [] for name, kind in zip(names, table.schema_arrow.types, strict=True) if _is_plain(kind)
    }
    for batch in table.iter_batches(1024, columns=list(found), use_threads=False):
        for name, values in found.items():
            told = tables.values(batch.column(name))
            values += [value.decode() if isinstance(value, bytes) else value for value in told]
    return found


def _is_plain(kind: pa.DataType) -> bool:
    of = pa.types
    return bool(
        tables.is_text(kind) or of.is_integer(kind) or of.is_floating(kind) or of.is_boolean(kind) or of.is_null(kind)
    )


def _csv(file: SourceFile, opened: Any) -> pd.DataFrame:  # noqa: ANN401 - a file
    """Read a csv file whose rows have exactly the fields of its header."""
    reader = csv.DictReader(io.TextIOWrapper(opened, "utf-8-sig", newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise BadInput(f"{display_uri(file.uri)}: line {reader.line_num} is no csv ({error}): restore it") from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise BadInput(f"{display_uri(file.uri)}: row {number} has not as many fields as the header: mend it")
    return pd.DataFrame(rows, columns=list(reader.fieldnames or []))


def _as_text(column: pd.Series) -> list[str]:
    return [value if isinstance(value, str) else str(value) for value in column.tolist()]
