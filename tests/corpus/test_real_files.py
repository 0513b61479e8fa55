"""Files as other programs write them: column types and encodings of parquet, dialects of csv, text encodings, archives."""

import base64
import csv
import datetime
import gzip
import io
import struct
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest
from backports.zstd import CompressionParameter, ZstdFile
from documents import pairs, read, write_table, zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from msense.corpus import list_files, readers, streams
from msense.corpus.labelled import read_labelled
from msense.errors import InputError

LINES = ["The river bank is near.", "Ein Fluß, ein Café", "川の岸は近い", "one 😀 more"]
Write = Callable[[Path], None]


def texts(*uris: object, **options: object) -> list[str]:
    return [text for _, text in pairs(read(*uris, **options))]


@pytest.mark.parametrize("kind", ["int8", "int16", "uint8", "uint16", "uint32", "uint64", "float16", "bool_", "date32"])
def test_other_columns_of_a_parquet_file_may_have_any_type(tmp_path: Path, kind: str) -> None:
    other = pa.array([0, 1, None, 1], pa.int32()).cast(pa.float32() if kind == "float16" else pa.int32())
    path = write_table(tmp_path / "a.parquet", text=LINES, other=other.cast(getattr(pa, kind)()))
    assert texts(path) == LINES


@pytest.mark.parametrize(
    "options",
    [
        *[{"column_encoding": {"text": f"DELTA_{kind}"}} for kind in ("LENGTH_BYTE_ARRAY", "BYTE_ARRAY")],
        *[{"data_page_version": "2.0", "compression": name} for name in ("brotli", "lz4", "zstd", "snappy", "gzip")],
        {"write_page_index": True, "write_page_checksum": True, "store_schema": False},
    ],
    ids=str,
)
def test_parquet_encodings_and_compressions(tmp_path: Path, options: dict) -> None:
    table = pa.table({"text": LINES * 30, "label": [0, 1] * 60})
    pq.write_table(table, tmp_path / "train.parquet", use_dictionary=False, row_group_size=50, **options)
    assert texts(tmp_path / "train.parquet") == LINES * 30
    assert read_labelled(str(tmp_path), "train").first == LINES * 30


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()),
        *(pa.json_(), pa.dictionary(pa.int8(), pa.large_string()), pa.dictionary(pa.int32(), pa.binary())),
    ],
    ids=str,
)
def test_text_columns_of_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    plain = pa.array([*LINES, None])
    column = pa.ExtensionArray.from_storage(kind, plain) if isinstance(kind, pa.BaseExtensionType) else plain.cast(kind)
    write_table(tmp_path / "train.parquet", 3, text=column, label=["a"] * 5)
    assert texts(tmp_path / "train.parquet") == [*LINES, "no text"]
    write_table(tmp_path / "train.parquet", 3, text=column[:4], label=["a"] * 4)
    assert read_labelled(str(tmp_path), "train").first == LINES


def test_distinct_and_repeated_texts_of_a_row_group_are_read_alike(tmp_path: Path) -> None:
    for rows in ([f"text {n}" for n in range(6000)], LINES * 1500, [f"text {n}" for n in range(3000)] + LINES * 500):
        path = write_table(tmp_path / "a.parquet", 10_000, text=rows)
        assert texts(path) == rows


UUID = uuid.UUID(int=7)
DAY = datetime.datetime(2026, 1, 2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([1.0, None, 2.5]), ["1", None, "2.5"]),  # as pandas stores integers with gaps
        (pa.array([float("nan"), 2**52, 0.0]), [None, str(2**52), "0"]),
        (pa.array([UUID.bytes] * 3, pa.uuid()), [str(UUID)] * 3),
        (pa.array([b"\xff\x00", b"key", None]), ["ff00", "key", None]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array([DAY, None, DAY]), [str(DAY), None, str(DAY)]),
        (pa.array([2**64 - 1, 0, None], pa.uint64()), [str(2**64 - 1), "0", None]),
        (pa.array([None] * 3), [None] * 3),
        (pa.array([[1], [2], None]), [None] * 3),  # not ids: rows are numbered
    ],
    ids=str,
)
def test_ids_of_any_type(tmp_path: Path, values: pa.Array, expected: list) -> None:
    path = write_table(tmp_path / "a.parquet", text=LINES[:3], id=values, key=["x", "y", "z"])
    assert [row.id for row in read(path)] == [own or f"a.parquet:{i}" for i, own in enumerate(expected)]
    assert [row.id for row in read(path, id_column="key")] == ["x", "y", "z"]
    assert [row.id for row in read(path, id_column="none")] == [f"a.parquet:{i}" for i in range(3)]
    assert [row.id for row in read(path, id_column="text")] == LINES[:3]


def test_ids_that_start_anew_in_each_file_are_qualified(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 0, "text": "x"}\n{"text": "y"}\n')
    (tmp_path / "b.jsonl").write_text('{"id": 0, "text": "z"}\n')
    assert pairs(read(tmp_path)) == [("a.jsonl#0", "x"), ("a.jsonl:1", "y"), ("b.jsonl#0", "z")]


def test_csv_rows_are_never_cut_or_merged(tmp_path: Path) -> None:
    rows = {
        "1,short and plain": "short and plain",
        "2,a text, with a comma": "bad CSV row",
        "3,ends in a comma,": "bad CSV row",
        '4,"he said "no" to it"': "bad CSV row",
        '5,"quoted" and more': "bad CSV row",
        '6,"a ""doubled"" quote"': 'a "doubled" quote',
        '7,5" pipe': '5" pipe',
        '7, "a quote, after a space"': "a quote, after a space",
        '7, "a" and "b"': ' "a" and "b"',
        '7, "a", "b"': "bad CSV row",
        '7, "never closed': "bad CSV row",
        "7, no quote": " no quote",
        '7," a ""quote"""': ' a "quote"',
        "8": "no text",
        '9,"two\nlines"': "two\nlines",
        '10,"never closed': "bad CSV row",
    }
    (tmp_path / "a.csv").write_text("n,text\n" + "\n".join(rows))
    assert texts(tmp_path / "a.csv") == list(rows.values())
    (tmp_path / "train.csv").write_text("label,text\n" + "\n".join(rows))
    with pytest.raises(InputError, match=r"line|row"):
        read_labelled(str(tmp_path), "train")


def test_a_quote_that_is_closed_in_another_line_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1, "a,"\n2, screen 12"\n3,x\n')
    assert texts(tmp_path / "a.csv") == ["bad CSV row", "x"]


def test_csv_rows_that_end_with_the_text_may_be_cut(tmp_path: Path) -> None:
    rows = {"1,whole,x,y": "whole", "2,whole,x": "whole", "3,cut at": "bad CSV row", "its line end,x": "bad CSV row"}
    (tmp_path / "a.csv").write_text("n,text,label,more\n" + "\n".join(rows))
    assert texts(tmp_path / "a.csv") == list(rows.values())


@pytest.mark.parametrize("raw", ["", "\n\r\n", "\ufeff", "\ntext,label\n", '\ufeff"text","label"'])
def test_csv_files_without_rows(tmp_path: Path, raw: str) -> None:
    (tmp_path / "train-0.csv").write_text(raw)
    (tmp_path / "train-1.csv").write_text("\n\r\ntext,label\n\nhello,x\n")
    assert (
        [row for row in texts(tmp_path) if row != "empty"] == read_labelled(str(tmp_path), "train").first == ["hello"]
    )


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        *[("a.csv", f"id{mark}text\n1{mark}x\n", r"cells are separated by '.+': convert the file") for mark in ";\t|"],
        ("a.csv", f"id,{'x' * 10_000}\n", r"no column 'text'; available: .{2000}; choose one"),
        ("a.csv", 'text,la"bel\nx,y\n', None),
        ("a.csv", '"te"xt",label\nx,y\n', r"its header is no csv row \(',' expected after"),
        *[
            (name, "version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS")
            for name in ("a.txt", "a.parquet")
        ],
        ("a.jsonl", '{"meta": 1}\n' * 2000, "no column 'text'; available: 'meta'; choose one with --text-column"),
        ("a.jsonl", '{"meta": 1}\n' * 9 + '{"text": "x"}\n', None),  # as writers that leave out what is null
    ],
)
def test_words_for_other_dialects(tmp_path: Path, name: str, raw: str, words: str | None) -> None:
    (tmp_path / name).write_text(raw)
    if words is None:
        assert "x" in texts(tmp_path / name)
        return
    with pytest.raises(InputError, match=words):
        read(tmp_path / name)


@pytest.mark.parametrize("column", ["text", "secret"])
def test_encrypted_columns_of_parquet(tmp_path: Path, column: str) -> None:
    config = encryption.EncryptionConfiguration("footer", column_keys={"key": [column]}, plaintext_footer=True)
    factory = encryption.CryptoFactory(lambda _: KeyStore())
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), config)
    table = pa.table({"text": LINES, "label": LINES, "secret": LINES})
    with pq.ParquetWriter(tmp_path / "train.parquet", table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    if column == "secret":
        assert texts(tmp_path / "train.parquet") == read_labelled(str(tmp_path), "train").first == LINES
        return
    for work in (lambda: read(tmp_path), lambda: read_labelled(str(tmp_path), "train")):
        with pytest.raises(InputError, match=r"train\.parquet: cannot be read as parquet \(Cannot decrypt"):
            work()


class KeyStore(encryption.KmsClient):
    """Stores keys as they are."""

    def wrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64encode(key)


def test_a_parquet_column_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": LINES, "é": LINES}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xe9a"))
    for work in (lambda: read(path), lambda: read_labelled(str(tmp_path), "train")):
        with pytest.raises(InputError, match=r"train\.parquet: cannot be read as parquet \(a column name is not UTF-8"):
            work()


def test_a_column_that_changes_to_a_delta_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "a.parquet", 30, text=LINES * 20)
    read_plain = pq.ParquetFile.iter_batches

    def stop(file: pq.ParquetFile, rows: int, **options: object) -> Iterator[pa.RecordBatch]:
        for number, batch in enumerate(read_plain(file, rows, **options)):
            if number == 2 and pa.types.is_dictionary(batch.schema.field("text").type):
                raise OSError("not yet implemented")
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", stop)
    monkeypatch.setattr(readers, "_BATCH_ROWS", 7)
    assert texts(path) == LINES * 20


def test_labelled_parquet_reads_its_columns_only(tmp_path: Path) -> None:
    columns = [pa.array(LINES), pa.array([Decimal("1.5")] * 4), pa.array([1] * 4), pa.array([[1]] * 4)]
    pq.write_table(pa.table(columns, names=["text", "label", "x", "x"]), tmp_path / "train.parquet")
    assert read_labelled(str(tmp_path), "train").labels.tolist() == ["1.5"] * 4
    for names, words in ((["text", "label", "x", "label"], "2 columns are named 'label'"), (list("abcd"), "no column")):
        pq.write_table(pa.table(columns, names=names), tmp_path / "train.parquet")
        with pytest.raises(InputError, match=words):
            read_labelled(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"text,text,label\na,b,c\n", r"2 columns are named 'text'"),
        (b"text,label\ncaf\xe9,x\n", r"not UTF-8: convert it"),
        (b'text,label\na,x\n"b"c,y\n', r"row 1: bad CSV row"),
    ],
)
def test_faults_of_labelled_csv(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / "train.csv").write_bytes(raw)
    with pytest.raises(InputError, match=rf"train\.csv: .*{words}"):
        read_labelled(str(tmp_path), "train")


cells = st.text(st.sampled_from('ab ,"\n\r;é😀\t'), max_size=9)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=9), end=st.sampled_from(["\n", "\r\n"]))
def test_what_the_csv_module_writes_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list, end: str) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        quoting = csv.QUOTE_ALL if end == "\n" else csv.QUOTE_MINIMAL  # the latter does not quote every line end
        csv.writer(file, lineterminator=end, quoting=quoting).writerows([("n", "text"), *rows])
    assert texts(path) == [text if text.strip() else "empty" for _, text in rows]


def test_files_of_the_old_mac_end_lines_in_returns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\rhello,1\rworld,2\r")
    (tmp_path / "b.txt").write_bytes(b"one\rtwo\rthree")
    for size in (70_000, 700_000):  # a return in a long first line
        (tmp_path / "c.txt").write_bytes(b"a\r" + b"b" * size + b"\nc\n")
        assert texts(tmp_path / "c.txt") == ["a\r" + "b" * size, "c"]
    lines = ["first", *["x" * 999 + " ਅ Ċ"] * 50]  # characters with a byte of a newline, also after the head
    (tmp_path / "d.txt").write_bytes("\r".join(lines).encode("utf-16"))
    assert texts(tmp_path / "d.txt") == lines
    assert texts(tmp_path / "a.csv") == ["hello", "world"]
    assert texts(tmp_path / "b.txt") == texts(tmp_path / "b.txt", split_bytes=3) == ["one", "two", "three"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.csv.gz", "a.txt.zst"])
@pytest.mark.parametrize("language", [slice(0, 2), slice(2, 3), slice(0, 4)], ids=["latin", "cjk", "mixed"])
def test_text_in_wide_characters(tmp_path: Path, encoding: str, name: str, language: slice) -> None:
    lines = LINES[language] * 9
    forms = {"txt": "%s", "jsonl": '{"text": "%s"}', "csv": '"%s"'}
    form = name.split(".")[1]
    whole = "\r\n".join(["text"] * (form == "csv") + [forms[form] % line for line in lines])
    pack = {"gz": gzip.compress, "zst": zstd}.get(name.split(".")[-1], bytes)
    marked = whole if encoding in ("utf-16", "utf-32") else "\ufeff" + whole
    (tmp_path / name).write_bytes(pack(marked.encode(encoding)))
    assert texts(tmp_path / name) == texts(tmp_path / name, split_bytes=50) == lines
    if encoding not in ("utf-16", "utf-32"):
        (tmp_path / name).write_bytes(pack(whole.encode(encoding)))
        with pytest.raises(
            InputError, match=rf"{name}: its encoding looks like {encoding.upper()} .*convert it to UTF-8"
        ):
            read(tmp_path / name)


def test_broken_wide_characters_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\n".encode("utf-16-le") + b"\x00\xd8" + "\ntwo\n".encode("utf-16-le"))
    assert texts(tmp_path / "a.txt") == ["one", "not UTF-8", "two"]
    (tmp_path / "a.txt").write_bytes("\ufeffone\n".encode("utf-16-le") + b"\x00")
    with pytest.raises(InputError, match=r"cannot be read as txt .*truncated data"):
        read(tmp_path / "a.txt")


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=60), code=st.sampled_from(["utf-8", "latin-1", "cp1252", "shift_jis"]))
def test_other_text_is_taken_as_utf8(text: str, code: str) -> None:
    text = text if code == "utf-8" else text.replace("\x00", "")
    raw = ("words and words " * 5 + text + "\n").encode(code, "replace")
    assert streams.check_encoding(raw, "a")[0] == "utf-8"


def test_names_with_a_dot_or_an_underscore_are_skipped(tmp_path: Path) -> None:
    names = ["part-0.txt", "_temporary/0/part-0.txt", "_SUCCESS.txt", ".hidden.txt", "_year=2026/a.txt", "b/_x/y.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n")
    assert [file.name for file in list_files([str(tmp_path)])] == ["_year=2026/a.txt", "part-0.txt"]
    assert [file.name for file in list_files([f"{tmp_path}/*.txt"])] == ["part-0.txt"]
    assert [file.name for file in list_files([f"{tmp_path}/_SUCCESS.txt"])] == ["_SUCCESS.txt"]  # named directly
    assert [file.name for file in list_files([f"{tmp_path}/_temporary"])] == ["0/part-0.txt"]
    with pytest.raises(InputError, match=r"names that begin with \. or _ are skipped"):
        list_files([f"{tmp_path}/b"])


def test_archives_of_other_programs(tmp_path: Path) -> None:
    raw = "".join(f"{line}\n" for line in LINES * 50).encode()
    (tmp_path / "padded.txt.gz").write_bytes(gzip.compress(raw[:99]) + gzip.compress(raw[99:]) + bytes(512))
    window = {CompressionParameter.window_log: 31, CompressionParameter.enable_long_distance_matching: 1}
    with ZstdFile(tmp_path / "long.txt.zst", "w", options=window) as file:
        file.write(raw)
    (tmp_path / "frames.txt.zst").write_bytes(zstd(raw[:99]) + zstd(raw[99:]))
    for name in ("padded.txt.gz", "long.txt.zst", "frames.txt.zst"):
        assert texts(tmp_path / name) == LINES * 50
    repeated = b"the same line\n" * 200_000
    (tmp_path / "same.txt.gz").write_bytes(gzip.compress(repeated))
    assert len(texts(tmp_path / "same.txt.gz")) == 200_000


@pytest.mark.parametrize("edge", [b"", bytes(4)], ids=["empty", "text"])
def test_zstd_with_skippable_frames(tmp_path: Path, edge: bytes) -> None:
    skipped = struct.pack("<II", 0x184D2A50, len(edge)) + edge  # as pzstd writes them
    (tmp_path / "a.txt.zst").write_bytes(skipped + zstd(b"one\ntw") + skipped + zstd(b"o\n") + skipped)
    assert texts(tmp_path / "a.txt.zst") == ["one", "two"]


def test_labelled_csv_with_long_texts_and_wide_characters(tmp_path: Path) -> None:
    table = io.StringIO()
    csv.writer(table).writerows([("text", "label"), ("word " * 40_000, "x"), (LINES[2], "y")])
    (tmp_path / "train.csv").write_bytes(table.getvalue().encode("utf-16"))
    assert read_labelled(str(tmp_path), "train").first == ["word " * 40_000, LINES[2]]
