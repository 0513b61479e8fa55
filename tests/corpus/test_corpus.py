"""Corpus listing and reading by format, and the errors for invalid corpora."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents import pairs, read, splits_of, write_table, zstd
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from msense.corpus import Document, list_files, read_documents
from msense.corpus.readers import MAX_PROMPT
from msense.errors import InputError, MsenseError

Patch = pytest.MonkeyPatch
Pack = Callable[[bytes], bytes]


def two_members(raw: bytes) -> bytes:
    """Compress as `cat a.gz b.gz` would."""
    return gzip.compress(raw[:30]) + gzip.compress(raw[30:])


# bytes of a file; its documents, with the number of a row without an id
TXT = "\ufeffone\r\n\nthrée \x00 x\nlast".encode(), [(0, "one"), (1, "empty"), (2, "thrée \x00 x"), (3, "last")]
JSONL = (
    b'{"text": "one", "id": 7}\n{"text": "two"}\n{"text": "three", "id": "x"}\n{"text": "four", "id": null}\n',
    [("7", "one"), (1, "two"), ("x", "three"), (3, "four")],
)
CSV = (
    b'\xef\xbb\xbftext,id\r\n"a ""b"",\r\nc",7\r\nplain,\r\n\r\nx,y\r\n',
    [("7", 'a "b",\r\nc'), (1, "plain"), (2, "empty"), ("y", "x")],
)


@pytest.mark.parametrize(
    ("name", "pack", "content"),
    [
        *[("a.txt", bytes, TXT), ("a.txt.gz", gzip.compress, TXT), ("a.txt.zst", zstd, TXT), ("a.csv", bytes, CSV)],
        *[("a.jsonl", bytes, JSONL), ("a.jsonl.gz", gzip.compress, JSONL), ("a.JSONL.zst", zstd, JSONL)],
        ("b.jsonl.gz", two_members, JSONL),
    ],
)
def test_texts_and_ids_of_lines_and_records(tmp_path: Path, name: str, pack: Pack, content: tuple) -> None:
    raw, rows = content
    (tmp_path / name).write_bytes(pack(raw))
    expected = [(own if isinstance(own, str) else f"{name}:{own}", text) for own, text in rows]
    assert pairs(read(tmp_path / name)) == expected


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_text_types_row_groups_and_ids(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"text {i}" for i in range(10)]
    path = write_table(tmp_path / "a.parquet", 3, body=pa.array(texts).cast(kind), other=list(range(10)))
    splits = splits_of(path, split_bytes=1)
    assert [(p.start, p.stop, p.first_row) for p in splits] == [(0, 1, 0), (1, 2, 3), (2, 3, 6), (3, 4, 9)]
    metadata = pq.ParquetFile(path).metadata
    two = max(metadata.row_group(i).total_byte_size for i in range(4)) * 2
    assert [(p.start, p.stop, p.first_row) for p in splits_of(path, split_bytes=two)] == [(0, 2, 0), (2, 4, 6)]
    expected = [(f"a.parquet:{i}", text) for i, text in enumerate(texts)]
    assert pairs(read(path, split_bytes=1, text_column="body")) == expected
    assert pairs(read(path, text_column="body")) == expected
    for ids, first in (([5, None], "5"), (["x", None], "x")):
        write_table(path, text=["one", "two"], id=ids)
        assert pairs(read(path)) == [(first, "one"), ("a.parquet:1", "two")]


def test_folders_and_globs_are_recursive_sorted_and_selective(tmp_path: Path) -> None:
    for name in ["b/z.txt", "b/a.jsonl", "a.txt", "readme.md", ".cache/x.txt", "b/._y.txt"]:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text('{"text": "x"}\n')
    assert [file.name for file in list_files([f"{tmp_path}/data/"])] == ["a.txt", "b/a.jsonl", "b/z.txt"]
    assert [file.name for file in list_files([f"{tmp_path}/data/**/*.txt"])] == ["a.txt", "b/z.txt"]
    assert [file.name for file in list_files([f"{tmp_path}/*"])] == ["data/a.txt", "data/b/a.jsonl", "data/b/z.txt"]


def test_paths_may_be_relative_or_contain_glob_characters(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a[1]#?.txt").write_text("x\n")
    (file,) = list_files(["./a[1]#?.txt"])
    assert (file.name, file.uri) == ("a[1]#?.txt", f"{tmp_path}/a[1]#?.txt")
    assert list_files(["*.txt"]) == list_files([f"file://{tmp_path}"]) == [file]


def test_names_of_several_corpora_start_with_the_base_name_of_their_root(tmp_path: Path) -> None:
    for folder in ["old/news", "new/news", "books"]:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("x\n")
    roots = [f"{tmp_path}/old/news", f"{tmp_path}/books/a.txt", "pydocs:fsspec"]
    assert [file.name for file in list_files(roots)] == ["books/a.txt", "news/a.txt", "pydocs/fsspec"]
    assert list_files(roots[::-1]) == list_files(roots)
    with pytest.raises(InputError, match=r"'news/a.txt'.*: .*old/news/a.txt and .*new/news/\*?a.txt"):
        list_files([f"{tmp_path}/old/news", f"{tmp_path}/new/news/*.txt"])


def test_remote_folder_file_glob_and_fingerprint(memory: AbstractFileSystem, monkeypatch: Patch) -> None:
    memory.pipe({"/d/b.txt": b"two\n", "/d/sub/a.txt": b"one\n"})
    expected = [("b.txt:0", "two"), ("sub/a.txt:0", "one")]
    assert pairs(read("memory://d")) == pairs(read("memory://d/**/*.txt")) == expected
    assert pairs(read("memory://d/b.txt")) == [("b.txt:0", "two")]
    info = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda self, path, **kw: info(self, path, **kw) | {"ETag": '"abc"'})
    assert list_files(["memory://d/b.txt"])[0].fingerprint == "abc"


def test_fingerprints_change_with_the_content_and_contain_no_path(tmp_path: Path) -> None:
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
    with pytest.raises(InputError, match=r"links/b.txt: no such file"):
        list_files([f"{tmp_path}/links"])


def test_a_missing_storage_package_is_named(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"gs://b/a.txt: gs:// needs .* not installed: pip install \"msense\[gcs\]\"$"):
        list_files(["gs://b/a.txt"])


def test_missing_s3_credentials_are_reported(monkeypatch: Patch, tmp_path: Path) -> None:
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(
        InputError, match=r"s3://b/x.txt: S3 denied access .*locate credentials\): set credentials: AWS_"
    ):
        list_files(["s3://b/x.txt"])


def test_storage_errors_name_the_file(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    (split,) = splits_of(f"{tmp_path}/a.txt")
    for error, kind, message in [
        (PermissionError("no"), InputError, r"a.txt: no permission to read it \(no\); grant access"),
        (ConnectionResetError("gone"), MsenseError, r"a.txt: the connection was lost \(gone\); run the same command"),
        (FileNotFoundError("none"), InputError, r"a.txt: no such file"),
    ]:
        monkeypatch.setattr(LocalFileSystem, "_open", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(kind, match=message):
            list(read_documents(split))


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "data" / "closed").mkdir(parents=True)
    (tmp_path / "data" / "a.txt").write_text("x\n")
    scandir = os.scandir

    def fail(path: object) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    for uri in [tmp_path, tmp_path / "**" / "*.txt", tmp_path / "*"]:
        with pytest.raises(InputError, match=r"no permission to read it \(.*closed"):
            list_files([str(uri)])
    assert len(list_files([f"{tmp_path}/data/*.txt"])) == 1


@pytest.mark.parametrize(
    ("name", "raw", "form"),
    [
        ("a.txt.gz", gzip.compress(b"some text\n" * 99)[:-12], "txt.gz .*ended before"),
        ("a.jsonl.gz", b"not gzip", "jsonl.gz .*Not a gzipped file"),
        ("a.txt.zst", zstd(b"some text\n")[:-3], "txt.zst .*ended before"),
        ("a.parquet", b"PAR1 nothing of the kind PAR1", "parquet"),
        ("a.parquet", b"", "parquet"),  # corrupted pages
    ],
    ids=["cut gz", "not gz", "cut zst", "parquet", "pages"],
)
def test_corrupted_files_are_rejected(tmp_path: Path, name: str, raw: bytes, form: str) -> None:
    if not raw:
        whole = write_table(tmp_path / name, text=[f"text number {i}" for i in range(999)]).read_bytes()
        raw = whole[:40] + b"\xff" * 1960 + whole[2000:]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(
        InputError, match=rf"{name}: cannot be read as {form}.*corrupted .* restore, convert or exclude it"
    ):
        read(tmp_path / name)


def test_missing_and_unsuitable_columns_are_rejected(tmp_path: Path) -> None:
    for name, raw, columns in (
        ("a.jsonl", b'broken\n{"body": "x", "n": 1}\n', "'body', 'n'"),
        ("a.csv", b"# by x\n", "'# by x'"),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(InputError, match=rf"{name}: no column 'text'; available: {columns}; .*--text-column"):
            read(tmp_path / name)
    path = write_table(tmp_path / "a.parquet", body=["x"], number=[1], id=[[1]])
    for options, message in [
        ({}, r"no column 'text'; available: 'body', 'number', 'id'; choose one with --text-column"),
        ({"text_column": "number"}, r"column 'number' holds int64, not text; cast it"),
        ({"text_column": "body", "id_column": "key"}, r"no column 'key'; .* choose one with --id-column"),
    ]:
        with pytest.raises(InputError, match=message):
            read(path, **options)
    (tmp_path / "b.jsonl").write_text('{"text": "x", "meta": {"n": 1}}\n')
    with pytest.raises(InputError, match=r"column 'meta' holds lists or objects, not ids"):
        read(tmp_path / "b.jsonl", id_column="meta")
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, names=["text", "text"]), path)
    with pytest.raises(InputError, match=r"2 columns are named 'text'"):
        read(path)


PROMPTED: list[dict[str, object]] = [
    {"text": "a", "task": "sort: "},
    {"text": "b", "task": ""},
    {"text": "c", "task": None},
    {"text": " ", "task": "sort: "},
    {"text": "e", "task": "x" * (MAX_PROMPT + 1)},
    {"text": "f", "task": "\t"},
]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_documents_have_the_prompts_of_their_column(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in [*PROMPTED, {"text": "g"}, {"text": "h", "task": 3}]))
    elif kind == "csv":
        cells = [[str(row[name] or "") for name in ("text", "task")] for row in PROMPTED]
        path.write_text("text,task\n" + "".join(",".join(row) + "\n" for row in cells[:2] + cells[3:]) + "g\n")
    else:
        write_table(path, **{name: [row[name] for row in PROMPTED] for name in ("text", "task")})
    rows = read(path, prompt_column="task")
    found = [row.prompt if isinstance(row, Document) else row.reason for row in rows]
    expected: list[object] = ["sort: ", "", None, "empty", "long prompt", "\t"]
    if kind == "csv":  # a cell that is left out, at the end of a record, is a missing one
        del expected[2]
        assert found == [*expected, "bad CSV row"]
        (tmp_path / "b.csv").write_text("text,task,more\na,x,1\nb,y\n")
        assert [row.prompt for row in read(tmp_path / "b.csv", prompt_column="more")] == ["1", None]
    else:
        assert found == expected + ([None, "bad prompt"] if kind == "jsonl" else [])
    assert all(row.prompt is None for row in read(path) if isinstance(row, Document))


def test_invalid_prompts_are_listed_and_missing_columns_of_prompts_are_rejected(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", text=["x", "y"], task=[b"\xff", b"ok"], number=[1, 2])
    assert pairs(read(tmp_path / "a.parquet", prompt_column="task")) == [
        ("a.parquet:0", "bad prompt"),
        ("a.parquet:1", "y"),
    ]
    (tmp_path / "a.jsonl").write_text('{"text": "x", "n": 1}\n')
    (tmp_path / "a.csv").write_text("text,n\nx,1\n")
    for name, column, message in [
        *(
            (f"a.{kind}", "job", "no column 'job'; .*; choose one with --prompt-column")
            for kind in ("parquet", "jsonl", "csv")
        ),
        ("a.parquet", "number", "column 'number' holds int64, not text; cast it"),
    ]:
        with pytest.raises(InputError, match=message):
            read(tmp_path / name, prompt_column=column)
    (tmp_path / "a.txt").write_text("one\n")  # has no columns
    assert [row.prompt for row in read(tmp_path / "a.txt", prompt_column="job")] == [None]
    assert [row.prompt for row in read(tmp_path / "a.parquet", text_column="task", prompt_column="task")[1:]] == ["ok"]


def test_reading_a_corpus_does_not_import_torch() -> None:
    """It would cost every task of the passages stage two seconds and 180 MB."""
    code = "import sys, msense.corpus.passages, msense.stages.passages; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_missing_zstd_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"some text\n"))
    monkeypatch.setattr("msense.io.extras._is_installed", lambda package: "zstd" not in package)
    with pytest.raises(
        InputError, match=r'reading a .zst file needs .*backports.zstd.*: pip install "msense\[build\]"'
    ):
        read(tmp_path)
