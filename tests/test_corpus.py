"""Corpus URIs, pieces and the reading of documents: every form, every bad input, and pieces that change nothing."""

import gzip
import importlib.metadata
import io
import json
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from msense.corpus import (
    BadDocument,
    Document,
    Piece,
    SourceFile,
    count_rows,
    cut_pieces,
    display_uri,
    files,
    list_files,
    number_pieces,
    read_documents,
    readers,
)
from msense.corpus.pydocs import docstrings
from msense.errors import BadInput, MsenseError

Patch = pytest.MonkeyPatch
Pack = Callable[[bytes], bytes]


def pieces_of(*uris: object, piece_bytes: int = 16 << 20) -> list[Piece]:
    pieces = cut_pieces(list_files([str(uri) for uri in uris]), piece_bytes)
    return number_pieces(pieces, [count_rows(piece) for piece in pieces])


def read(*uris: object, piece_bytes: int = 16 << 20, **options: object) -> list[Document | BadDocument]:
    return [row for piece in pieces_of(*uris, piece_bytes=piece_bytes) for row in read_documents(piece, **options)]


def pairs(rows: list[Document | BadDocument]) -> list[tuple[str, str]]:
    """(id, text) of good rows, (id, reason) of bad ones."""
    return [(row.id, row.text if isinstance(row, Document) else row.reason) for row in rows]


def zstd(raw: bytes) -> bytes:
    return pa.compress(raw, codec="zstd", asbytes=True)


def write_table(path: Path, row_group_size: int = 1000, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


@pytest.fixture
def memory() -> Iterator[AbstractFileSystem]:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


# --- what files there are


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("txt", bytes), ("txt.gz", gzip.compress), ("txt.zst", zstd)],
)
def test_txt_is_a_document_a_line(tmp_path: Path, suffix: str, pack: Pack) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(pack("\ufeffone\r\n\nthrée \x00 x\nlast".encode()))
    assert pairs(read(path)) == [
        (f"a.{suffix}:0", "one"),
        (f"a.{suffix}:1", "empty"),
        (f"a.{suffix}:2", "thrée \x00 x"),
        (f"a.{suffix}:3", "last"),
    ]


@pytest.mark.parametrize(
    ("suffix", "pack"), [("jsonl", bytes), ("jsonl.gz", gzip.compress), ("JSONL.zst", zstd), ("jsonl.gz", None)]
)
def test_jsonl_text_and_id(tmp_path: Path, suffix: str, pack: Pack | None) -> None:
    raw = b'{"text": "one", "id": 7}\n{"text": "two"}\n{"text": "three", "id": "x"}\n{"text": "four", "id": null}\n'
    pack = pack or (lambda raw: gzip.compress(raw[:30]) + gzip.compress(raw[30:]))  # two members, as `cat` makes them
    (tmp_path / f"a.{suffix}").write_bytes(pack(raw))
    expected = [("7", "one"), (f"a.{suffix}:1", "two"), ("x", "three"), (f"a.{suffix}:3", "four")]
    assert pairs(read(tmp_path / f"a.{suffix}")) == expected


def test_csv_quotes_newlines_and_id(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,id\r\n"a ""b"",\r\nc",7\r\nplain,\r\n\r\nx,y\r\n')
    expected = [("7", 'a "b",\r\nc'), ("a.csv:1", "plain"), ("a.csv:2", "empty"), ("y", "x")]
    assert pairs(read(tmp_path / "a.csv")) == expected


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_text_types_row_groups_and_first_rows(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"text {i}" for i in range(10)]
    path = write_table(tmp_path / "a.parquet", 3, body=pa.array(texts).cast(kind), other=list(range(10)))
    pieces = pieces_of(path, piece_bytes=1)
    assert [(p.start, p.stop, p.first_row) for p in pieces] == [(0, 1, 0), (1, 2, 3), (2, 3, 6), (3, 4, 9)]
    metadata = pq.ParquetFile(path).metadata
    two = max(metadata.row_group(i).total_byte_size for i in range(4)) * 2
    assert [(p.start, p.stop, p.first_row) for p in pieces_of(path, piece_bytes=two)] == [(0, 2, 0), (2, 4, 6)]
    expected = [(f"a.parquet:{i}", text) for i, text in enumerate(texts)]
    assert pairs(read(path, piece_bytes=1, text_column="body")) == expected
    assert pairs(read(path, text_column="body")) == expected


@pytest.mark.parametrize(("ids", "first"), [([5, None], "5"), (["x", None], "x")])
def test_parquet_ids(tmp_path: Path, ids: list[object], first: str) -> None:
    path = write_table(tmp_path / "a.parquet", text=["one", "two"], id=ids)
    assert pairs(read(path)) == [(first, "one"), ("a.parquet:1", "two")]


def test_folder_and_glob_are_recursive_sorted_and_selective(tmp_path: Path) -> None:
    for name in ["b/z.txt", "b/a.jsonl", "a.txt", "readme.md", ".cache/x.txt", "b/._y.txt"]:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text('{"text": "x"}\n')
    assert [file.name for file in list_files([f"{tmp_path}/data/"])] == ["a.txt", "b/a.jsonl", "b/z.txt"]
    assert [file.name for file in list_files([f"{tmp_path}/data/**/*.txt"])] == ["a.txt", "b/z.txt"]
    assert [file.name for file in list_files([f"{tmp_path}/*"])] == ["data/a.txt", "data/b/a.jsonl", "data/b/z.txt"]


def test_paths_may_be_relative_or_hold_glob_characters(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a[1]#?.txt").write_text("x\n")
    (file,) = list_files(["./a[1]#?.txt"])
    assert (file.name, file.uri) == ("a[1]#?.txt", f"{tmp_path}/a[1]#?.txt")
    assert list_files(["*.txt"]) == list_files([f"file://{tmp_path}"]) == [file]


def test_several_corpora_are_told_apart_by_the_base_name_of_their_root(tmp_path: Path) -> None:
    for folder in ["old/news", "books"]:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("x\n")
    roots = [f"{tmp_path}/old/news", f"{tmp_path}/books/a.txt", "pydocs:numpy"]
    assert [file.name for file in list_files(roots)] == ["books/a.txt", "news/a.txt", "pydocs/numpy"]
    assert list_files(roots[::-1]) == list_files(roots)
    (tmp_path / "new" / "news").mkdir(parents=True)
    (tmp_path / "new" / "news" / "a.txt").write_text("y\n")
    with pytest.raises(BadInput, match=r"'news/a.txt': .*old/news/a.txt and .*new/news/\*?a.txt"):
        list_files([f"{tmp_path}/old/news", f"{tmp_path}/new/news/*.txt"])


def test_memory_storage_folder_file_and_glob(memory: AbstractFileSystem) -> None:
    memory.pipe({"/d/b.txt": b"two\n", "/d/sub/a.txt": b"one\n"})
    expected = [("b.txt:0", "two"), ("sub/a.txt:0", "one")]
    assert pairs(read("memory://d")) == pairs(read("memory://d/**/*.txt")) == expected
    assert pairs(read("memory://d/b.txt")) == [("b.txt:0", "two")]


def test_fingerprints_follow_content_and_hide_places(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n")
    before = list_files([str(path)])
    assert list_files([str(path)]) == before
    assert str(tmp_path) not in before[0].fingerprint
    path.write_text("two\n")
    assert list_files([str(path)])[0].fingerprint != before[0].fingerprint
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b.txt").symlink_to(path)
    linked = list_files([f"{tmp_path}/links"])
    assert (linked[0].size, linked[0].fingerprint) == (4, list_files([str(path)])[0].fingerprint)
    path.unlink()
    with pytest.raises(BadInput, match=r"links/b.txt: no such file"):
        list_files([f"{tmp_path}/links"])


def test_a_store_hash_beats_a_time(memory: AbstractFileSystem, monkeypatch: Patch) -> None:
    memory.pipe("/d/a.txt", b"x\n")
    info = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda self, path, **kw: info(self, path, **kw) | {"ETag": '"abc"'})
    assert list_files(["memory://d/a.txt"])[0].fingerprint == "abc"


def test_display_uri_hides_credentials() -> None:
    assert display_uri("s3://key:se/cret@bucket/a?b".replace("/c", "c")) == "s3://bucket/a"
    assert display_uri("https://u:p#?@host/a.txt?token=1#x") == "https://host/a.txt"
    assert display_uri("hf://datasets/a/b@refs%2Fconvert/x") == "hf://datasets/a/b@refs%2Fconvert/x"
    assert display_uri("/data/C# notes?.txt") == "/data/C# notes?.txt"
    assert display_uri("pydocs:numpy") == "pydocs:numpy"


# --- what is refused


def test_uris_that_are_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(BadInput, match=r"a.pdf: not a kind .* accepted are \*.txt and .*parquet.*hf://.*pydocs"):
        list_files([f"{tmp_path}/a.pdf"])
    with pytest.raises(BadInput, match=r"no file there that can be read; accepted are"):
        list_files([str(tmp_path)])
    with pytest.raises(BadInput, match=r"no file there that can be read; accepted are"):
        list_files([f"{tmp_path}/*.txt"])
    with pytest.raises(BadInput, match=r"none.txt: no such file or folder; check the path"):
        list_files([f"{tmp_path}/none.txt"])
    with pytest.raises(BadInput, match=r"ftpx://h/a.txt: Protocol not known.*give a local path"):
        list_files(["ftpx://u:secret@h/a.txt"])
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(BadInput, match=r"gs://b/a.txt: gs:// needs .* not installed: pip install gcsfs$"):
        list_files(["gs://b/a.txt"])


def test_faults_of_storage_name_the_file(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    (piece,) = pieces_of(f"{tmp_path}/a.txt")

    def refuse(error: Exception) -> None:
        def fail(*args: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(LocalFileSystem, "_open", fail)

    refuse(PermissionError("no"))
    with pytest.raises(BadInput, match=r"a.txt: no permission to read it \(no\); allow it"):
        list(read_documents(piece))
    refuse(ConnectionResetError("gone"))
    with pytest.raises(MsenseError, match=r"a.txt: the connection was lost \(gone\); run the same command again"):
        list(read_documents(piece))
    monkeypatch.undo()
    (tmp_path / "a.txt").unlink()
    with pytest.raises(BadInput, match=r"a.txt: no such file"):
        list(read_documents(piece))


def test_a_folder_that_may_not_be_listed_is_not_passed_over(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "data" / "closed").mkdir(parents=True)
    (tmp_path / "data" / "a.txt").write_text("x\n")
    scandir = os.scandir

    def fail(path: object) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    for uri in [tmp_path, tmp_path / "**" / "*.txt", tmp_path / "*"]:
        with pytest.raises(BadInput, match=r"no permission to read it \(.*closed"):
            list_files([str(uri)])
    assert len(list_files([f"{tmp_path}/data/*.txt"])) == 1


def test_missing_s3_credentials_are_bad_input(monkeypatch: Patch) -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    s3fs = pytest.importorskip("s3fs")

    def fail(*args: object, **options: object) -> None:
        raise exceptions.NoCredentialsError

    monkeypatch.setattr(s3fs.S3FileSystem, "info", fail)
    with pytest.raises(BadInput, match=r"s3://b/a.txt: S3 refused \(Unable to locate credentials\); give credentials"):
        list_files(["s3://b/a.txt"])


@pytest.mark.parametrize(
    ("name", "raw", "form"),
    [
        ("a.txt.gz", gzip.compress(b"some text\n" * 99)[:-12], "txt.gz .*Truncated"),
        ("a.jsonl.gz", b"not gzip", "jsonl.gz .*inflate failed"),
        ("a.txt.zst", zstd(b"some text\n")[:-3], "txt.zst .*Truncated"),
        ("a.parquet", b"PAR1 nothing of the kind PAR1", "parquet"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, raw: bytes, form: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(BadInput, match=rf"{name}: cannot be read as {form}.*damaged .* restore it or leave it out"):
        read(tmp_path / name)


def test_damaged_parquet_pages(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", text=[f"text number {i}" for i in range(999)])
    raw = bytearray(path.read_bytes())
    raw[40:2000] = b"\xff" * 1960
    path.write_bytes(raw)
    with pytest.raises(BadInput, match=r"a.parquet: cannot be read as parquet"):
        read(path)


@pytest.mark.parametrize(
    ("name", "raw", "there"),
    [
        ("a.jsonl", b'broken\n{"body": "x", "n": 1}\n', "'body', 'n'"),
        ("a.csv", b"body,n\nx,1\n", "'body', 'n'"),
        ("a.csv", b"", "none"),
    ],
)
def test_missing_column_names_those_that_are_there(tmp_path: Path, name: str, raw: bytes, there: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(BadInput, match=rf"{name}: no column 'text'; it has {there}: choose with --text-column"):
        read(tmp_path / name)


def test_parquet_columns_that_are_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", body=["x"], blob=[b"x"], id=[1.5])
    with pytest.raises(BadInput, match=r"no column 'text'; it has 'body', 'blob', 'id'"):
        read(path)
    with pytest.raises(BadInput, match=r"column 'blob' holds binary, not strings; cast it"):
        read(path, text_column="blob")
    with pytest.raises(BadInput, match=r"column 'id' holds double, not strings or integers"):
        read(path, text_column="body")
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, names=["text", "text"]), path)
    with pytest.raises(BadInput, match=r"2 columns are named 'text'"):
        read(path)


# --- bad documents


def test_bad_lines_of_txt(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"\xff\n \t\n0123456789\r\n0123456789a\nend")
    rows = read(tmp_path / "a.txt")
    assert [text for _, text in pairs(rows)] == ["not UTF-8", "empty", "0123456789", "too long", "end"]
    assert rows[0] == BadDocument(
        "a.txt:0", "not UTF-8", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
    )
    assert rows[3] == BadDocument("a.txt:3", "too long", "more than 10 bytes")


def test_bad_lines_of_jsonl(tmp_path: Path) -> None:
    lines = [
        b'{"text": "ok", "id": "first"}',
        b'{"text": ',
        b"[1]",
        b'{"id": "x"}',
        b'{"text": null}',
        b'{"text": 3}',
        b'{"text": "\\ud800"}',
        b'{"text": "ok", "id": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": " "}',
        b"[" * 100_000,
        b"",
        b'{"text": "\\ud83d\\ude00"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = read(tmp_path / "a.jsonl")
    assert [text for _, text in pairs(rows)] == [
        *["ok", "bad JSON", "bad JSON", "no text", "no text", "no text", "not UTF-8", "not UTF-8", "not UTF-8"],
        *["empty", "bad JSON", "empty", "😀"],
    ]
    assert rows[2] == BadDocument("a.jsonl:2", "bad JSON", "a list, not an object")
    assert rows[3] == BadDocument("a.jsonl:3", "no text", "NoneType instead of a string")
    assert [row.id for row in rows] == ["first", *(f"a.jsonl:{i}" for i in range(1, 13))]


def test_bad_rows_of_csv(tmp_path: Path) -> None:
    rows = b'n,text\n1,good\n2,a\rb\n3,\xff\n4\n5, \n6,"caf\xc3\xa9"\n7,"open\nto the end\n'
    (tmp_path / "a.csv").write_bytes(rows)
    assert [text for _, text in pairs(read(tmp_path / "a.csv"))] == [
        *["good", "bad CSV row", "not UTF-8", "no text", "empty", "café", "bad CSV row"]
    ]


def test_bad_rows_of_parquet(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 10)
    broken = pa.array([b"\xff", b"good"]).view(pa.string())  # written as it is: Arrow does not look
    texts = pa.concat_arrays([broken, pa.array([None, " ", "x" * 11, "é" * 5])])
    rows = read(write_table(tmp_path / "a.parquet", text=texts))
    assert [text for _, text in pairs(rows)] == ["not UTF-8", "good", "no text", "empty", "too long", "é" * 5]


LONG = 20 << 20


@pytest.mark.parametrize(
    ("name", "raw", "pack"),
    [
        ("a.txt", b"one\n" + b"x" * LONG + b"\ntwo\n", bytes),
        ("a.txt.gz", b"one\n" + b"x" * LONG + b"\ntwo\n", gzip.compress),
        ("a.jsonl", b'{"text": "one"}\n{"text": "' + b"x" * LONG + b'"}\n{"text": "two"}\n', bytes),
        ("a.csv", b"id,text\n,one\n,plain" + b"x" * LONG + b"\n,two\n", bytes),
        ("a.csv", b'id,text\n,one\n,"a ""q""\n' + b"x" * LONG + b'\n,"",\nb","c"\n,two\n', bytes),
        ("a.csv", b'id,text\n,one\n,"' + b'a line, ""with"" quotes\n' * (LONG // 24) + b'b","c"\n,two\n', bytes),
    ],
)
def test_a_long_line_is_skipped_with_bounded_memory(
    tmp_path: Path, monkeypatch: Patch, name: str, raw: bytes, pack: Pack
) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1 << 16)
    (tmp_path / name).write_bytes(pack(raw))
    tracemalloc.start()
    rows = pairs(read(tmp_path / name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == [(f"{name}:0", "one"), (f"{name}:1", "too long"), (f"{name}:2", "two")]
    assert peak < LONG / 4


def test_a_large_row_group_is_read_with_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{i:01000}" for i in range(LONG // 1000)]}), path, compression="none")
    (piece,) = pieces_of(path)
    tracemalloc.start()
    assert sum(len(row.text) for row in read_documents(piece)) == LONG // 1000 * 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > LONG * 0.9
    assert peak < LONG / 4


def test_no_piece_reads_past_its_end_for_a_long_line(memory: AbstractFileSystem, monkeypatch: Patch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 10)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 7)
    memory.pipe("/d/a.txt", b"x" * 1000 + b"\nlast")
    for start, rows in [(0, 1), (100, 0)]:
        stream = io.BufferedReader(memory.open("/d/a.txt"))
        assert len(list(readers._lines(stream, start, start + 100))) == rows
        assert start + 100 <= stream.tell() < start + 107
    assert pairs(read("memory://d", piece_bytes=100)) == [("a.txt:0", "too long"), ("a.txt:1", "last")]


# --- pieces change nothing


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(st.tuples(st.text("ab é😀\r\x00\ufeff", max_size=9), st.sampled_from(["\n", "\r\n"])), max_size=12),
    last=st.sampled_from(["", "end", "é"]),
    piece_bytes=st.integers(1, 40),
    limit=st.sampled_from([4, 1000]),
)
def test_pieces_of_txt_equal_the_whole(lines: list[tuple[str, str]], last: str, piece_bytes: int, limit: int) -> None:
    raw = ("".join(text + end for text, end in lines) + last).encode()
    fsspec.filesystem("memory").pipe("/pieces/a.txt", raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "MAX_DOCUMENT_BYTES", limit)
        whole = read("memory://pieces/a.txt")
        assert read("memory://pieces/a.txt", piece_bytes=piece_bytes) == whole
    expected = [line.removesuffix(b"\r") for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    expected = expected if expected[-1] or raw == b"\xef\xbb\xbf" else expected[:-1]
    assert [row.id for row in whole] == [f"a.txt:{i}" for i in range(len(expected))]
    if limit == 1000:
        reasons = ["empty" if not line.decode().strip() else line.decode() for line in expected]
        assert [text for _, text in pairs(whole)] == reasons
    pieces = cut_pieces(list_files(["memory://pieces/a.txt"]), piece_bytes)
    if len(pieces) > 1:
        assert sum(count_rows(piece) for piece in pieces) == len(expected)
        assert (pieces[0].start, pieces[-1].stop) == (0, len(raw))
        assert [p.stop for p in pieces[:-1]] == [p.start for p in pieces[1:]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.sampled_from(['{"text": "a"}', '{"id": "x", "text": "é"}', "", "{", '{"n": 1}']), max_size=12),
    piece_bytes=st.integers(1, 60),
)
def test_pieces_of_jsonl_equal_the_whole(rows: list[str], piece_bytes: int) -> None:
    # A first record that has the text: later ones without it are bad documents in every piece.
    raw = "\n".join(['{"text": "first"}', *rows]).encode()
    fsspec.filesystem("memory").pipe("/pieces/a.jsonl", raw)
    assert read("memory://pieces/a.jsonl", piece_bytes=piece_bytes) == read("memory://pieces/a.jsonl")


def test_rows_are_numbered_in_each_file_of_several(memory: AbstractFileSystem) -> None:
    memory.pipe({"/d/a.txt": b"1\n2\n3\n4", "/d/b.txt.gz": gzip.compress(b"x\ny"), "/d/c.txt": b"5\n\n7\n8\n"})
    pieces = cut_pieces(list_files(["memory://d"]), piece_bytes=4)
    assert [p.first_row for p in pieces] == [0, -1, 0, 0, -1]
    counts = [count_rows(p) for p in pieces]
    assert counts == [2, 2, -1, 3, 1]
    assert [p.first_row for p in number_pieces(pieces, counts)] == [0, 2, 0, 0, 3]
    with pytest.raises(ValueError, match=r"no row number; see number_pieces"):
        list(read_documents(pieces[1]))


def test_small_and_compressed_files_are_one_piece(memory: AbstractFileSystem) -> None:
    memory.pipe({"/d/a.txt.zst": zstd(b"x\n" * 99), "/d/b.csv": b"text\nx\n", "/d/c.txt": b"x\n"})
    assert [(p.start, p.stop, p.first_row) for p in pieces_of("memory://d", piece_bytes=2)] == [(0, -1, 0)] * 3


# --- samples


def test_sample_is_about_the_share_and_the_same_for_any_pieces(memory: AbstractFileSystem) -> None:
    memory.pipe("/d/a.txt", b"".join(b"line %d\n" % i for i in range(4000)))
    whole, kept = read("memory://d"), read("memory://d", sample=0.25, seed=3)
    assert 850 < len(kept) < 1150
    assert set(kept) < set(whole)
    assert read("memory://d", piece_bytes=777, sample=0.25, seed=3) == kept
    assert read("memory://d", sample=0.25, seed=4) != kept
    assert set(kept) <= set(read("memory://d", sample=0.5, seed=3))
    assert read("memory://d", sample=1.0) == whole
    assert read("memory://d", sample=0.0) == []


def test_sample_goes_by_the_id_column(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x", "id": f"doc{i}"}) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(reversed(lines)))
    kept = {row.id for row in read(tmp_path / "a.jsonl", sample=0.3)}
    assert 0 < len(kept) < 200
    assert {row.id for row in read(tmp_path / "b.jsonl", sample=0.3)} == kept


# --- pydocs

PACKAGE = {
    "__init__.py": '"""The package."""\nraise RuntimeError("imported")\n',
    "broken.py": "def f(:\n",
    "nul.py": '"""x"""\0',
    "sub/deep.py": '''
class Outer:
    """Outer   text.

        Indented.
    Last.
    """

    class Inner:
        """Inner."""

        async def method(self):
            """Method."""

            def local():
                "Local."

    @property
    def size(self):
        """Get."""

    @size.setter
    def size(self, value):
        """Set."""

    def silent(self):
        pass


if True:
    try:
        pass
    except ValueError:

        def fallback():
            """   """
''',
}


@pytest.fixture
def tiny_package(tmp_path: Path, monkeypatch: Patch) -> None:
    for name, source in PACKAGE.items():
        (tmp_path / "tinydocs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tinydocs" / name).write_text(source)
    (tmp_path / "tinymodule.py").write_text('"""A module."""\n')
    monkeypatch.syspath_prepend(tmp_path)


def test_pydocs_reads_docstrings_without_import(tiny_package: None) -> None:
    rows = read("pydocs:tinydocs")
    assert pairs(rows) == [
        ("tinydocs/__init__.py", "The package."),
        ("tinydocs/broken.py", "unparsable source"),
        ("tinydocs/nul.py", "unparsable source"),
        ("tinydocs/sub/deep.py:Outer", "Outer   text.\n\n    Indented.\nLast."),
        ("tinydocs/sub/deep.py:Outer.Inner", "Inner."),
        ("tinydocs/sub/deep.py:Outer.Inner.method", "Method."),
        ("tinydocs/sub/deep.py:Outer.Inner.method.local", "Local."),
        ("tinydocs/sub/deep.py:Outer.size", "Get."),
        ("tinydocs/sub/deep.py:Outer.size#2", "Set."),
        ("tinydocs/sub/deep.py:fallback", "empty"),
    ]
    assert "SyntaxError" in rows[1].detail
    assert "tinydocs" not in sys.modules


def test_pydocs_pieces_names_and_samples(tiny_package: None, monkeypatch: Patch) -> None:
    monkeypatch.setattr(files, "PYDOCS_FILES", 3)
    uris = ["pydocs:tinydocs", "pydocs:tinymodule,numpy"]
    pieces = [p for p in pieces_of(*uris) if p.name != "pydocs/numpy"]
    assert [(p.name, p.start, p.stop) for p in pieces] == [
        ("pydocs/tinydocs", 0, 3),
        ("pydocs/tinydocs", 3, 4),
        ("pydocs/tinymodule", 0, 1),
    ]
    assert pairs(list(read_documents(pieces[2]))) == [("pydocs/tinymodule.py", "A module.")]
    assert len(read("pydocs:tinydocs")) == 10
    samples = [[row.id.split(":")[0] for row in read("pydocs:tinydocs", sample=0.5, seed=i)] for i in range(20)]
    # A source file is in with all its documents, or out.
    assert {names.count("tinydocs/sub/deep.py") for names in samples} == {0, 7}
    assert {names.count("tinydocs/broken.py") for names in samples} == {0, 1}


def test_pydocs_fingerprint_is_the_version(tiny_package: None) -> None:
    files = list_files(["pydocs:sklearn,tinydocs"])
    assert files[0].fingerprint == importlib.metadata.version("scikit-learn")
    assert files[1].fingerprint.startswith("changed ")
    assert files[1].size == sum(len(source) for source in PACKAGE.values())


@pytest.mark.parametrize("name", ["nosuchpackage", "numpy.linalg", "specless"])
def test_pydocs_of_a_missing_package(name: str, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "specless", ModuleType("specless"))
    with pytest.raises(BadInput, match=rf"no package '{name}' is installed here; pip install it"):
        list_files([f"pydocs:numpy,{name}"])


def test_pydocs_without_source_or_defaults(monkeypatch: Patch) -> None:
    with pytest.raises(BadInput, match="'sys' has no Python source here"):
        list_files(["pydocs:sys"])
    monkeypatch.setattr("msense.corpus.pydocs.DEFAULT_PACKAGES", ("nosuchpackage", "numpy"))
    assert [file.name for file in list_files(["pydocs"])] == ["numpy"]
    monkeypatch.setattr("msense.corpus.pydocs.DEFAULT_PACKAGES", ("nosuchpackage",))
    with pytest.raises(BadInput, match="none of nosuchpackage is installed"):
        list_files(["pydocs"])


def test_docstrings_take_no_warnings_and_name_repeats() -> None:
    source = b'"""\\d"""\ndef f():\n    "1"\ndef f():\n    "2"\ndef f():\n    "3"\n'
    assert docstrings(source) == [("", "\\d"), ("f", "1"), ("f#2", "2"), ("f#3", "3")]


# --- hf://


class FakeHub(DirFileSystem):
    """A local folder that answers like the Hub's filesystem, with a commit in expanded listings."""

    def ls(self, path: str, detail: bool = True, expand_info: bool = False, **options: object) -> list:
        infos = super().ls(path, detail=detail, **options)
        return [info | {"last_commit": SimpleNamespace(oid="c0ffee")} for info in infos] if expand_info else infos


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Patch) -> Callable[..., None]:
    root = tmp_path / "datasets" / "org" / "name@refs%2Fconvert%2Fparquet"
    monkeypatch.setattr(files, "hub_filesystem", lambda: FakeHub(str(tmp_path), LocalFileSystem()))

    def add(place: str, *texts: str) -> None:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        write_table(root / place, text=list(texts))

    return add


def test_hub_dataset_with_one_config(hub: Callable[..., None]) -> None:
    hub("plain/train/0001.parquet", "two")
    hub("plain/train/0000.parquet", "one")
    hub("plain/test/0000.parquet", "test")
    assert pairs(read("hf://org/name")) == [
        ("plain/train/0000.parquet:0", "one"),
        ("plain/train/0001.parquet:0", "two"),
    ]
    assert pairs(read("hf://org/name::test")) == [("plain/test/0000.parquet:0", "test")]
    (file,) = list_files(["hf://org/name:plain:test"])
    assert file.fingerprint.startswith("c0ffee ")
    assert file.uri == "hf://datasets/org/name@refs%2Fconvert%2Fparquet/plain/test/0000.parquet"
    names = {file.name for file in list_files(["hf://org/name", "pydocs:numpy"])}
    assert names == {"name/plain/train/0000.parquet", "name/plain/train/0001.parquet", "pydocs/numpy"}


def test_hub_configs_and_splits_are_listed_when_unclear(hub: Callable[..., None]) -> None:
    hub("a/train/0000.parquet", "a")
    hub("b/validation/0000.parquet", "b")
    with pytest.raises(BadInput, match="hf://org/name: no config 'default'; name one of a, b: hf://org/name:CONFIG"):
        list_files(["hf://org/name"])
    with pytest.raises(BadInput, match="no split 'train'; name one of validation: hf://org/name:b:SPLIT"):
        list_files(["hf://org/name:b"])
    with pytest.raises(BadInput, match=r"hf://org/none: the Hub gives no parquet files of it .*hf auth login"):
        list_files(["hf://org/none"])
    with pytest.raises(BadInput, match="write hf://dataset"):
        list_files(["hf://org/name:a:train:x"])
    hub("default/train/0000.parquet", "default")
    assert [text for _, text in pairs(read("hf://org/name"))] == ["default"]


def test_dataclasses_are_values() -> None:
    piece = Piece("u", "n", "txt", 0, 5, 0)
    assert replace(piece, first_row=3).first_row == 3
    assert len({piece, Piece("u", "n", "txt", 0, 5, 0), SourceFile("u", "n", "txt", 5, "f")}) == 2
