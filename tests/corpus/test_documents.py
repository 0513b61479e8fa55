"""Documents of every format: bad documents, long documents, samples, and independence from the input splits."""

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents import pairs, read, splits_of, write_table, zstd
from fsspec import AbstractFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from msense.corpus import BadDocument, count_rows, cut_splits, list_files, number_splits, readers, tables
from msense.corpus.readers import read_documents

Patch = pytest.MonkeyPatch
Pack = Callable[[bytes], bytes]


def test_bad_lines_of_txt(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"\xff\n \t\n0123456789\r\n0123456789a\nend")
    rows = read(tmp_path / "a.txt")
    assert [text for _, text in pairs(rows)] == ["not UTF-8", "empty", "0123456789", "too long", "end"]
    assert "can't decode byte 0xff in position 0" in rows[0].detail
    assert rows[3] == BadDocument("a.txt:3", "too long", "more than 10 bytes")


def test_bad_lines_of_jsonl(tmp_path: Path) -> None:
    lines = {
        b'{"text": "ok", "id": "first"}': "ok",
        b'{"text": ': "bad JSON",
        b"[1]": "bad JSON",
        b'{"id": "x"}': "no text",
        b'{"text": 3}': "no text",
        b'{"text": "\\ud800"}': "not UTF-8",
        b'{"text": "ok", "id": "\\ud800"}': "not UTF-8",
        b'{"text": "\xff"}': "not UTF-8",
        b'{"text": " "}': "empty",
        b"[" * 100_000: "bad JSON",
        b"": "empty",
        b'{"text": "\\ud83d\\ude00"}': "😀",
    }
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = read(tmp_path / "a.jsonl")
    assert [text for _, text in pairs(rows)] == list(lines.values())
    assert rows[2] == BadDocument("a.jsonl:2", "bad JSON", "a list, not an object")
    assert rows[3] == BadDocument("a.jsonl:3", "no text", "NoneType instead of a string")
    assert [row.id for row in rows] == ["first", *(f"a.jsonl:{i}" for i in range(1, len(lines)))]


def test_bad_rows_of_csv_and_parquet(tmp_path: Path, monkeypatch: Patch) -> None:
    rows = b'n,text\n1,good\n2,a\rb\n3,\xff\n4\n5, \n6,"caf\xc3\xa9"\n7,5" pipe\n8,"open\nto the end\n'
    (tmp_path / "a.csv").write_bytes(rows)
    expected = ["good", "bad CSV row", "not UTF-8", "no text", "empty", "café", '5" pipe', "bad CSV row"]
    assert [text for _, text in pairs(read(tmp_path / "a.csv"))] == expected
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 10)
    broken = pa.array([b"\xff", b"good"]).view(pa.string())  # Arrow does not validate it when writing
    texts = pa.concat_arrays([broken, pa.array([None, " ", "x" * 11, "é" * 5])])
    rows = read(write_table(tmp_path / "a.parquet", text=texts))
    assert [text for _, text in pairs(rows)] == ["not UTF-8", "good", "no text", "empty", "too long", "é" * 5]


def traced_peak(work: Callable[[], object]) -> tuple[object, int]:
    """Return the result of a call and its peak memory in bytes."""
    tracemalloc.start()
    result, peak = work(), tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, peak


LONG = 12 << 20


@pytest.mark.parametrize(
    ("name", "before", "long", "after", "pack"),
    [
        ("a.txt", b"one\n", b"x" * LONG, b"\ntwo\n", bytes),
        ("a.txt.gz", b"one\n", b"x" * LONG, b"\ntwo\n", gzip.compress),
        ("a.jsonl", b'{"text": "one"}\n{"text": "', b"x" * LONG, b'"}\n{"text": "two"}\n', bytes),
        ("a.csv", b"id,text\n,one\n,plain", b"x" * LONG, b"\n,two\n", bytes),
        ("a.csv", b'id,text\n,one\n,"a ""q""\n', b"x" * LONG, b'\n,"",\nb","c"\n,two\n', bytes),
        ("a.csv", b'id,text\n,one\n,"', b'a line, ""with"" quotes\n' * (LONG // 24), b'b","c"\n,two\n', bytes),
    ],
    ids=["txt", "gz", "jsonl", "csv", "csv in quotes", "csv of many lines"],
)
def test_a_long_line_is_skipped_in_bounded_memory(
    tmp_path: Path, monkeypatch: Patch, name: str, before: bytes, long: bytes, after: bytes, pack: Pack
) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1 << 16)
    (tmp_path / name).write_bytes(pack(before + long + after))
    rows, peak = traced_peak(lambda: pairs(read(tmp_path / name)))
    assert rows == [(f"{name}:0", "one"), (f"{name}:1", "too long"), (f"{name}:2", "two")]
    assert peak < LONG / 2


def test_a_large_row_group_is_read_in_bounded_memory(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(readers, "_BATCH_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{i:01000}" for i in range(LONG // 1000)]}), path, compression="none")
    (split,) = splits_of(path)
    characters, peak = traced_peak(lambda: sum(len(row.text) for row in read_documents(split)))
    assert characters == LONG // 1000 * 1000
    assert peak < LONG / 2


def test_a_split_does_not_read_past_its_end_for_a_long_line(memory: AbstractFileSystem, monkeypatch: Patch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 10)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 7)
    memory.pipe("/d/a.txt", b"x" * 1000 + b"\nlast")
    for start, rows in [(0, 1), (100, 0)]:
        stream = io.BufferedReader(memory.open("/d/a.txt"))
        assert len(list(readers._lines(stream, start, start + 100))) == rows
        assert start + 100 <= stream.tell() < start + 107
    assert pairs(read("memory://d", split_bytes=100)) == [("a.txt:0", "too long"), ("a.txt:1", "last")]


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(st.tuples(st.text("ab é😀\r\ufeff", max_size=9), st.sampled_from(["\n", "\r\n"])), max_size=12),
    last=st.sampled_from(["", "end", "é"]),
    split_bytes=st.integers(1, 40),
    limit=st.sampled_from([4, 1000]),
)
def test_splits_of_txt_equal_the_whole(lines: list[tuple[str, str]], last: str, split_bytes: int, limit: int) -> None:
    raw = ("".join(text + end for text, end in lines) + last).encode()
    fsspec.filesystem("memory").pipe("/splits/a.txt", raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "MAX_DOCUMENT_BYTES", limit)
        whole = read("memory://splits/a.txt")
        assert read("memory://splits/a.txt", split_bytes=split_bytes) == whole
    expected = [line.removesuffix(b"\r") for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    expected = expected if expected[-1] or raw == b"\xef\xbb\xbf" else expected[:-1]
    assert [row.id for row in whole] == [f"a.txt:{i}" for i in range(len(expected))]
    if limit == 1000:
        reasons = ["empty" if not line.decode().strip() else line.decode() for line in expected]
        assert [text for _, text in pairs(whole)] == reasons
    splits = cut_splits(list_files(["memory://splits/a.txt"]), split_bytes)
    if len(splits) > 1:
        assert sum(count_rows(split) for split in splits) == len(expected)
        assert (splits[0].start, splits[-1].stop) == (0, len(raw))
        assert [p.stop for p in splits[:-1]] == [p.start for p in splits[1:]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.sampled_from(['{"text": "a"}', '{"id": "x", "text": "é"}', "", "{", '{"n": 1}']), max_size=12),
    split_bytes=st.integers(1, 60),
)
def test_splits_of_jsonl_equal_the_whole(rows: list[str], split_bytes: int) -> None:
    # The first record has the text, so later ones without it are bad documents in every split.
    raw = "\n".join(['{"text": "first"}', *rows]).encode()
    fsspec.filesystem("memory").pipe("/splits/a.jsonl", raw)
    assert read("memory://splits/a.jsonl", split_bytes=split_bytes) == read("memory://splits/a.jsonl")


def test_rows_are_numbered_per_file_and_small_files_stay_whole(memory: AbstractFileSystem) -> None:
    memory.pipe({"/d/a.txt": b"1\n2\n3\n4", "/d/b.txt.gz": gzip.compress(b"x\ny"), "/d/c.txt": b"5\n\n7\n8\n"})
    splits = cut_splits(list_files(["memory://d"]), split_bytes=4)
    assert [p.first_row for p in splits] == [0, -1, 0, 0, -1]
    counts = [count_rows(p) for p in splits]
    assert counts == [2, 2, -1, 3, 1]
    assert [p.first_row for p in number_splits(splits, counts)] == [0, 2, 0, 0, 3]
    with pytest.raises(ValueError, match=r"no row number; call number_splits"):
        list(read_documents(splits[1]))
    memory.pipe({"/e/a.txt.zst": zstd(b"x\n" * 99), "/e/b.csv": b"text\nx\n", "/e/c.txt": b"x\n"})
    assert [(p.start, p.stop, p.first_row) for p in splits_of("memory://e", split_bytes=2)] == [(0, -1, 0)] * 3


def test_a_sample_has_about_the_fraction_and_depends_on_ids_only(memory: AbstractFileSystem) -> None:
    memory.pipe("/d/a.txt", b"".join(b"line %d\n" % i for i in range(4000)))
    whole, kept = read("memory://d"), read("memory://d", sample=0.25, seed=3)
    assert 850 < len(kept) < 1150
    assert set(kept) < set(whole)
    assert read("memory://d", split_bytes=777, sample=0.25, seed=3) == kept
    assert read("memory://d", sample=0.25, seed=4) != kept
    assert set(kept) <= set(read("memory://d", sample=0.5, seed=3))
    assert read("memory://d", sample=1.0) == whole
    assert read("memory://d", sample=0.0) == []
    lines = [json.dumps({"text": "x", "id": f"doc{i}"}) for i in range(200)]
    memory.pipe({"/e/a.jsonl": "\n".join(lines).encode(), "/f/b.jsonl": "\n".join(lines[::-1]).encode()})
    one, other = ({row.id for row in read(uri, sample=0.3)} for uri in ("memory://e", "memory://f"))
    assert 0 < len(one) < 200
    assert one == other


@pytest.mark.parametrize("index", [2, -1])
def test_a_dictionary_index_out_of_range_is_rejected(index: int) -> None:
    """Arrow reads such a file without an error."""
    words = pa.array(["river", "bank"])
    valid = pa.DictionaryArray.from_arrays(pa.array([1, None, 0], pa.int32()), words)
    assert list(tables.iter_values(valid)) == [b"bank", None, b"river"]
    corrupted = pa.DictionaryArray.from_arrays(pa.array([1, index], pa.int32()), words, safe=False)
    with pytest.raises(pa.ArrowInvalid, match=rf"index {index} of 2"):
        list(tables.iter_values(corrupted))
