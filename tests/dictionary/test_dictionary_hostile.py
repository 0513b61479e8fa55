"""Untrusted dictionary folders: each corruption raises its own error, at once and with little memory."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hostile_folders import CONFIG, DATA, HOSTILE, HOSTILE_INDEX, HOSTILE_INT8, SIZES, edit_array, move_out
from hostile_parts import EXEMPLARS, HOSTILE_EXEMPLARS, HOSTILE_TOKENIZERS, parquet, rows_of
from tiny import exemplars, make, with_tokenizer, word_piece

from msense.__main__ import main
from msense.dictionary import SenseDictionary
from msense.dictionary import format as dictionary_format
from msense.errors import DictionaryError
from msense.io import scratch
from msense.io.parquet_pages import check_pages


def small(folder: Path, dtype: str | None = None) -> None:
    make([2, 0, 4]).save(folder, dtype)


def in_two_files(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dictionary_format, "SHARD_BYTES", 3 * 3 * 2)
        small(folder)


def full(folder: Path) -> None:
    """Write a dictionary with tokenizer and exemplars; token 2 is `bank`."""
    with_tokenizer(word_piece(), folder, [2, 0, 3, 0, 1, 1, 1, 4])
    pq.write_table(exemplars([(0, 0, 0), (2, 1, 0), (2, 1, 1), (7, 3, 0)]), folder / EXEMPLARS)


TABLES: dict[str, tuple[Callable[[Path], None], dict, Callable[[SenseDictionary], object]]] = {
    "folder": (small, HOSTILE, len),
    "sizes": (small, SIZES, len),
    "int8": (lambda f: small(f, "int8"), HOSTILE_INT8, len),
    "index": (in_two_files, HOSTILE_INDEX, len),
    "exemplars": (full, HOSTILE_EXEMPLARS, lambda d: d.exemplars(2)),
    "tokenizer": (full, HOSTILE_TOKENIZERS, lambda d: d.lookup("bank")),
}


def memory(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


@pytest.mark.parametrize(("table", "case"), [(table, case) for table in TABLES for case in TABLES[table][1]])
def test_corrupted_folders_are_rejected_with_little_memory(tmp_path: Path, table: str, case: str) -> None:
    write, cases, use = TABLES[table]
    corrupt, message = cases[case]
    folder = tmp_path / "dictionary"
    write(folder)
    use(SenseDictionary.load(folder))  # valid before
    corrupt(folder)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory("VmRSS")
    tracemalloc.start()
    with pytest.raises(DictionaryError, match=message) as caught:
        use(SenseDictionary.load(folder))
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(traced, memory("VmHWM") - before) < 96 << 20
    assert len(str(caught.value)) < 1500
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "case"), [("folder", "escapes in a dtype"), ("exemplars", "link out"), ("tokenizer", "panics")]
)
def test_show_reports_a_corrupted_dictionary_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str, case: str
) -> None:
    folder = tmp_path / "dictionary"
    full(folder)
    TABLES[table][1][case][0](folder)
    assert main(["show", str(folder), "bank"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "\x1b" not in error


def test_files_of_other_kinds_are_never_opened(tmp_path: Path) -> None:
    full(tmp_path / "a")
    for name in ("pytorch_model.bin", "modeling.py", "tokenizer/tokenizer_config.json", "README.md"):
        (tmp_path / "a" / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / "a" / name)  # opening it would block forever
    d = SenseDictionary.load(tmp_path / "a")
    assert d.lookup("bank").found
    assert len(d.exemplars(2)) == 2
    d.save(tmp_path / "b")
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"README.md", CONFIG, DATA, EXEMPLARS, "tokenizer"}


def test_merge_and_save_check_the_exemplars(tmp_path: Path) -> None:
    full(tmp_path / "a")
    d = SenseDictionary.load(tmp_path / "a")
    parquet(rows_of(1, token=2, sense=9))(tmp_path / "a")
    with pytest.raises(DictionaryError, match="sense 9, rank 0 of token 2"):
        d.merge(d)
    move_out(tmp_path / "a", EXEMPLARS)
    with pytest.raises(DictionaryError, match="outside the dictionary"):
        d.save(tmp_path / "b")


def test_save_follows_no_link_out_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_unique", lambda: "0123abcd")  # a temporary name known in advance
    full(tmp_path / "a")
    d = SenseDictionary.load(tmp_path / "a")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "b").mkdir()
    for name in (CONFIG, DATA, EXEMPLARS, f".{DATA}.0123abcd.part"):
        (tmp_path / "b" / name).symlink_to(outside / name)
    d.save(tmp_path / "b")
    assert SenseDictionary.load(tmp_path / "b").exemplars(2) == d.exemplars(2)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "tokenizer").symlink_to(outside)
    with pytest.raises(DictionaryError, match="outside the folder: remove that link"):
        d.save(tmp_path / "c")
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("unit", [5e-324, 1e-44, 1e77])
def test_a_temperature_unit_beyond_float32_gives_finite_results(unit: float) -> None:
    d = make([4, 2], temperature_unit=unit)
    ids, x = np.array([0, 1]), np.ones((2, 3), np.float32)
    replaced = d.replace(ids, x, 1.0)
    expected = d.replace(ids, x) if unit < 1 else np.stack([d.senses(t).centroids.numpy().mean(0) for t in (0, 1)])
    np.testing.assert_allclose(replaced, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "page",
    [
        b"\x15",
        b"\x18\x01x\x15\x00\x15\x00\x00",  # text in place of a number
        b"\x19\xf5" + b"\xff" * 4 + b"\x0f",  # an unbounded list
        b"\x05\x02\x00\x15\x00\x00",  # a field in long form, which allows duplicates
        b"\x17" + bytes(9),  # a floating-point number
        b"\x1c" * 60,
        b"\x15\x00\x15\x10\x15\x10\x2c\x15\x02\x15\x00\x00\x00",  # eight missing bytes
        b"\x15\x00\x15\x01\x15\x00\x2c\x15\x02\x15\x00\x00\x00",  # a size of -1
        b"\x15\x02\x15\x00\x15\x00\x00",  # an index page
    ],
)
def test_corrupted_page_headers_are_rejected(page: bytes) -> None:
    check_pages(memoryview(b"\x15\x00\x15\x00\x15\x00\x2c\x15\x02\x15\x00\x00\x00" * 3))
    with pytest.raises(ValueError, match=r"it has an invalid header|a page is truncated"):
        check_pages(memoryview(page))


def test_centroids_are_checked_for_finite_values_on_use(tmp_path: Path) -> None:
    make([2, 0, 4]).save(tmp_path)
    edit_array(tmp_path, "centroids", [1.0, float("nan")])
    d = SenseDictionary.load(tmp_path)
    with pytest.raises(DictionaryError, match="token 0 is NaN"):
        d.senses(0)
    with pytest.raises(DictionaryError, match="sense row 0"):
        d.assign(np.array([2, 0]), np.ones((2, 3), np.float32))
    assert len(d.senses(2).centroids) == 4
