"""Input splits: the ranges into which corpus files are cut, one passages file each.

Memory: about 300 bytes per split, and the footer of one parquet file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from msense.corpus import tables
from msense.corpus.files import SourceFile, corpus_filesystem, read_errors
from msense.corpus.pydocs import source_files
from msense.corpus.streams import CHUNK_BYTES, is_plain
from msense.io.filesystems import display_uri

WHOLE = -1  # `InputSplit.stop` of a split that is a whole file
UNKNOWN = -1  # `InputSplit.first_row` before `number_splits`, and the count of a split that needs none
PYDOCS_FILES = 200  # source files per split of `pydocs`


@dataclass(frozen=True)
class InputSplit:
    """A corpus file, or a fixed range of it; see `SourceFile` for uri, name and format.

    Example:
        >>> splits = cut_splits(list_files(["data/"]))
        >>> splits = number_splits(splits, [count_rows(split) for split in splits])
    """

    uri: str
    name: str
    format: str
    start: int  # first byte (txt, jsonl), row group (parquet) or source file (pydocs)
    stop: int  # end of the range, exclusive; `WHOLE` for a whole file
    first_row: int  # number of its first row in the file; `UNKNOWN` until `number_splits`
    qualify_ids: bool = False  # several files: ids start with the file's name, as they may start anew in each


def cut_splits(files: Sequence[SourceFile], split_bytes: int = 16 << 20) -> list[InputSplit]:
    """Cut files into input splits whose borders depend on the files and `split_bytes` only.

    Parquet is cut between row groups (only footers are read), txt and jsonl by bytes; compressed files, csv, and files
    that are not UTF-8 stay whole.

    Raises:
        InputError: a parquet file without a readable footer, or a text file of an unknown encoding.
    """
    splits: list[InputSplit] = []
    for file in files:
        ranges = [(0, WHOLE, 0)]
        if file.format == "parquet":
            ranges = _row_group_ranges(file, split_bytes)
        elif file.format == "pydocs":
            count = len(source_files(file.uri.removeprefix("pydocs:")))
            ranges = [(i, min(i + PYDOCS_FILES, count), 0) for i in range(0, count, PYDOCS_FILES)]
        elif file.format in ("txt", "jsonl") and file.size > split_bytes and _is_plain(file):
            starts = range(0, file.size, split_bytes)
            ranges = [(i, min(i + split_bytes, file.size), UNKNOWN if i else 0) for i in starts]
        splits += [InputSplit(file.uri, file.name, file.format, *limits, len(files) > 1) for limits in ranges]
    return splits


def _is_plain(file: SourceFile) -> bool:
    """Return whether a text file may be read from any newline on."""
    filesystem, path = corpus_filesystem(file.uri)
    with read_errors(file.uri, file.format), filesystem.open(path, "rb") as stream:
        return is_plain(stream, display_uri(file.uri))


def count_rows(split: InputSplit) -> int:
    """Return the number of lines that start in a split's byte range; `UNKNOWN` for formats that need no count.

    Raises:
        InputError: the file cannot be read.
    """
    if split.format not in ("txt", "jsonl") or split.stop == WHOLE:
        return UNKNOWN
    # A line starts at byte 0 and after every newline, but none starts at `stop` or at the end of the file.
    first = max(split.start - 1, 0)
    rows = 1 if split.start == 0 else 0
    left = split.stop - 1 - first
    filesystem, path = corpus_filesystem(split.uri)
    with read_errors(split.uri, split.format), filesystem.open(path, "rb") as stream:
        stream.seek(first)
        while left > 0 and (chunk := stream.read(min(left, CHUNK_BYTES))):
            rows += chunk.count(b"\n")
            left -= len(chunk)
    return rows


def number_splits(splits: Sequence[InputSplit], counts: Sequence[int]) -> list[InputSplit]:
    """Fill in `first_row` from the `count_rows` of each split, in the order of `cut_splits`."""
    numbered: list[InputSplit] = []
    row = 0
    for split, count in zip(splits, counts, strict=True):
        row = row if split.first_row == UNKNOWN else split.first_row  # the first split of a file has row 0
        numbered.append(replace(split, first_row=row))
        row += count
    return numbered


def _row_group_ranges(file: SourceFile, split_bytes: int) -> list[tuple[int, int, int]]:
    """Return (start, stop, first_row) of runs of row groups, each of at most `split_bytes` uncompressed or one group."""
    filesystem, path = corpus_filesystem(file.uri)
    with read_errors(file.uri, "parquet"), filesystem.open(path, "rb") as stream:
        metadata = tables.open_parquet(stream, display_uri(file.uri)).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    ranges: list[tuple[int, int, int]] = []
    start = first_row = row = size = 0
    for i, group in enumerate(groups):
        if i > start and size + group.total_byte_size > split_bytes:
            ranges.append((start, i, first_row))
            start, first_row, size = i, row, 0
        row += group.num_rows
        size += group.total_byte_size
    return [*ranges, (start, len(groups), first_row)] if groups else []
