"""Labelled texts: one split (train, test, ...) of a data set, from files or the Hugging Face Hub.

Sources are folders (local, s3://, ...) with `SPLIT.csv`, `.jsonl` (also as `.gz` or `.zst`) or `.parquet`, or parts such as
`SPLIT-00000-of-00002.parquet`, and `hf://dataset[:config]`. Memory: the whole split.
"""

import codecs
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from msense.corpus import list_files, tables
from msense.corpus.files import SourceFile, corpus_filesystem, read_errors
from msense.corpus.readers import Fault, csv_records, parsed
from msense.corpus.streams import open_text
from msense.errors import InputError
from msense.io.filesystems import display_uri
from msense.io.untrusted import printable
from msense.text import is_utf8

if TYPE_CHECKING:
    import pandas as pd  # of an extra

_MAX_BYTES = 1 << 30  # per file
_FORMATS = r"((csv|jsonl)(\.(gz|zst))?|parquet)"
_PAIRS = (("s1", "s2"), ("sentence1", "sentence2"), ("text1", "text2"))  # usual columns of pairs of texts


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
        part: name of the split, such as train; in a folder, that of its file, or what comes before the numbers of its parts.

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
                f"{part}.csv, .jsonl or .parquet"
            ) from error
    shown = display_uri(source)
    pattern = re.compile(rf"{re.escape(part)}([-_][0-9]+.*)?\.{_FORMATS}")  # train.csv, train-00000-of-00002.parquet
    there = list_files((source,))
    files = [file for file in there if pattern.fullmatch(file.name.rpartition("/")[2])]
    if not files:
        raise InputError(
            f"{shown} has no {part}.csv, .jsonl (also as .gz or .zst) or .parquet, and no parts such as {part}-00000.parquet: "
            f"put the split {part!r} of the data set there; it has {', '.join(file.name for file in there[:5])}"
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
    import pandas as pd

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
        if not table[name].map(lambda value: isinstance(value, str | int | float | Decimal)).all():
            raise InputError(f"{where}: column {name!r} has values other than texts and numbers: convert them")
    texts = [[str(value) for value in table[name].tolist()] for name in columns.texts]
    labels = [_label(value) for value in table[columns.label].tolist()]
    fingerprints = tuple(f"{file.name} {file.size} {file.fingerprint}" for file in files)
    return Labelled(list(zip(*texts, strict=True)), np.array(labels), fingerprints)


def _label(value: Any) -> str:
    """Return a label as text; 1.0 is 1, as some writers make numbers of whole numbers beside missing ones."""
    whole = isinstance(value, float | Decimal) and value % 1 == 0
    return str(int(value) if whole else value)


def find_pair_columns(source: str, part: str, labels: Sequence[str]) -> Columns:
    """Return the columns of pairs of texts in one split of a data set, and the first of the `labels` that it has.

    Raises:
        InputError: the split is missing or corrupted, or has no such columns.
    """
    file = split_files(source, part)[0]
    own = list(_read_table(file).columns)
    texts = next((pair for pair in _PAIRS if set(pair) <= set(own)), None)
    label = next((name for name in labels if name in own), None)
    if texts is None or label is None:
        usual = ", ".join("/".join(pair) for pair in _PAIRS)
        raise InputError(
            f"{display_uri(file.uri)}: no pair of columns {usual}, or no column {' or '.join(labels)}; available: "
            f"{', '.join(map(repr, own[:50]))[:2000] or 'none'}; choose with --pair-columns FIRST SECOND LABEL"
        )
    return Columns(texts, label)


def _read_file(file: SourceFile, names: Sequence[str]) -> "pd.DataFrame":
    """Read columns of a file."""
    shown = display_uri(file.uri)
    table = _read_table(file, names)
    own = list(table.columns)
    for name in names if own else ():  # an empty file, as writers of many parts leave, has none
        if name not in own:
            flags = "with --text-column, --label-column or, for pairs, --pair-columns"
            raise tables.missing_column(shown, name, own, flags)
        if (count := own.count(name)) > 1:
            raise InputError(f"{shown}: {count} columns are named {name!r}; rename or drop some")
    return table.reindex(columns=list(names)) if not own else table[list(names)]


def _read_table(file: SourceFile, names: Sequence[str] = ()) -> "pd.DataFrame":
    """Read the columns of a file, of parquet the values of these only."""
    shown = display_uri(file.uri)
    if file.size > _MAX_BYTES:
        raise InputError(f"{shown} has {file.size} bytes, more than the limit of {_MAX_BYTES}: split it")
    filesystem, path = corpus_filesystem(file.uri)
    with read_errors(file.uri, file.format), filesystem.open(path, "rb") as stream:
        try:
            if file.format == "parquet":
                return _parquet(stream, shown, names)
            kind, _, codec = file.format.partition(".")
            return (_csv if kind == "csv" else _json)(open_text(stream, codec, shown))
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{shown}: cannot be read as {file.format} ({printable(error)}): correct it") from error


def _json(stream: io.BufferedReader) -> "pd.DataFrame":
    """Read the objects of a file, one per line."""
    import pandas as pd

    rows = []
    for number, line in enumerate(stream, 1):
        if not (line := line.removeprefix(codecs.BOM_UTF8).strip()):
            continue
        if isinstance(row := parsed(line), Fault):
            raise ValueError(f"line {number}: {row.reason}: {row.detail}")
        rows.append(row)
    return pd.DataFrame(rows, dtype=object)


def _parquet(stream: Any, shown: str, names: Sequence[str]) -> "pd.DataFrame":
    """Read columns of texts, numbers or booleans; return a table without rows if none is given, or one is not there once."""
    import pandas as pd

    file = tables.open_parquet(stream, shown)
    own = file.schema_arrow.names
    if not names or any(own.count(name) != 1 for name in names):
        return pd.DataFrame(columns=own)
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for name in names:
        if not tables.is_scalar(kind := file.schema_arrow.field(name).type):
            raise ValueError(f"column {name!r} holds {kind}, not texts or numbers")
    for group in range(file.num_row_groups):
        for batch in tables.iter_batches(stream, file, names, 1024, group):
            for name, values in columns.items():
                raw = tables.iter_values(batch.column(name))
                values += [value.decode() if isinstance(value, bytes) else value for value in raw]
    return pd.DataFrame(columns, dtype=object)


def _csv(stream: io.BufferedReader) -> "pd.DataFrame":
    """Read a csv file whose rows have exactly the fields of its header."""
    import pandas as pd

    records = csv_records(stream, _MAX_BYTES)
    header: list[str] = []
    rows = []
    for number, record in enumerate(records, -1):
        if isinstance(record, Fault):
            raise ValueError(
                f"row {number}: {record.reason}: {record.detail}" if header else f"header: {record.detail}"
            )
        if not is_utf8("".join(record)):
            raise ValueError("it is not UTF-8: convert it, for example with iconv -t utf-8")
        header = header or record
        if record and len(record) != len(header):
            if mark := tables.separator(header):
                raise ValueError(f"cells are separated by {mark}, not by commas")
            raise ValueError(f"row {number} has not as many fields as the header")
        rows += [record] if record and number >= 0 else []
    return pd.DataFrame(rows, columns=header, dtype=object)
