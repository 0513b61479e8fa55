"""Dictionary folders that nobody should trust: each fault is refused in its own words, at once, and with little memory."""

import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hostile_folders import CONFIG, DATA, HOSTILE, HOSTILE_INDEX, HOSTILE_INT8, MANY, SIZES, edit_array, move_out
from hostile_parts import EXEMPLARS, HOSTILE_EXEMPLARS, HOSTILE_TOKENIZERS, TOKENIZER, parquet, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import exemplars, make, with_tokenizer, word_piece

from msense import scratch
from msense.__main__ import main
from msense.dictionary import SenseDictionary
from msense.dictionary import format as dictionary_format
from msense.errors import BadInput, DictionaryError
from msense.parquet_pages import check_pages


def small(folder: Path) -> None:
    make([2, 0, 4]).save(folder)


def in_int8(folder: Path) -> None:
    make([2, 0, 4]).save(folder, dtype="int8")


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
    "int8": (in_int8, HOSTILE_INT8, len),
    "index": (in_two_files, HOSTILE_INDEX, len),
    "exemplars": (full, HOSTILE_EXEMPLARS, lambda d: d.exemplars(2)),
    "tokenizer": (full, HOSTILE_TOKENIZERS, lambda d: d.find("bank")),
}
ALL = [(table, case) for table, (_, cases, _) in TABLES.items() for case in cases]


def spoilt(folder: Path, table: str, case: str) -> tuple[Path, str, Callable[[Path], object]]:
    """Make a folder, spoil it, and return it with the refusal's words and what brings it about."""
    write, cases, use = TABLES[table]
    spoil, message = cases[case]
    write(folder)
    use(SenseDictionary.load(folder))  # it works before
    spoil(folder)
    return folder, message, lambda f: use(SenseDictionary.load(f))


@pytest.mark.parametrize(("table", "case"), ALL)
def test_hostile_folders_are_refused(tmp_path: Path, table: str, case: str) -> None:
    folder, message, use = spoilt(tmp_path / "dictionary", table, case)
    with pytest.raises(DictionaryError, match=message) as refusal:
        use(folder)
    said = str(refusal.value)
    assert len(said) < 1500
    assert "\x1b" not in said


def test_refusals_take_little_memory(tmp_path: Path, tell: Callable[[str], None]) -> None:
    slowest, largest = (0.0, ""), (0, "")
    for number, (table, case) in enumerate(ALL):
        folder, _, use = spoilt(tmp_path / f"{number}" / "dictionary", table, case)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = memory("VmRSS")
        tracemalloc.start()
        start = time.perf_counter()
        with pytest.raises(DictionaryError):
            use(folder)
        slowest = max(slowest, (1000 * (time.perf_counter() - start), f"{table}: {case}"))
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        largest = max(largest, (max(traced, memory("VmHWM") - before), f"{table}: {case}"))
    tell(f"{len(ALL)} hostile dictionary folders: all refused, the slowest in {slowest[0]:.0f} ms ({slowest[1]})")
    assert largest[0] < 96 << 20, largest[1]


def memory(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def test_show_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for table, case in (("folder", "escapes in a dtype"), ("exemplars", "link out"), ("tokenizer", "panics")):
        folder, _, _ = spoilt(tmp_path / table / "dictionary", table, case)
        assert main(["show", str(folder), "bank"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "\x1b" not in error
        assert "Traceback" not in error


def test_files_of_other_kinds_are_never_opened(tmp_path: Path) -> None:
    full(tmp_path)
    for name in ("pytorch_model.bin", "modeling.py", "tokenizer/tokenizer_config.json", "README.md"):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)  # who opened one would wait for ever
    d = SenseDictionary.load(tmp_path)
    assert d.find("bank").found
    assert len(d.exemplars(2)) == 2
    d.save(tmp_path.parent / "copy")
    assert sorted(p.name for p in (tmp_path.parent / "copy").iterdir()) == [
        "README.md",
        CONFIG,
        DATA,
        EXEMPLARS,
        "tokenizer",
    ]


def test_merge_and_save_refuse_what_the_files_hide(tmp_path: Path) -> None:
    full(tmp_path / "a")
    d = SenseDictionary.load(tmp_path / "a")
    parquet(rows_of(1, token=2, sense=9))(tmp_path / "a")
    with pytest.raises(DictionaryError, match="sense 9 and rank 0 of token 2"):
        d.merge(d)
    move_out(tmp_path / "a", EXEMPLARS)
    with pytest.raises(DictionaryError, match="outside the dictionary"):
        d.save(tmp_path / "b")


def test_save_follows_no_link_out_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_unique", lambda: "0123abcd")  # a temporary name that somebody foresaw
    full(tmp_path / "a")
    d = SenseDictionary.load(tmp_path / "a")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "b").mkdir()
    for name in (CONFIG, DATA, EXEMPLARS, f".{DATA}.0123abcd.part"):
        (tmp_path / "b" / name).symlink_to(outside / name)
    d.save(tmp_path / "b")
    assert list(outside.iterdir()) == []
    assert SenseDictionary.load(tmp_path / "b").exemplars(2) == d.exemplars(2)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "tokenizer").symlink_to(outside)
    with pytest.raises(DictionaryError, match="outside the folder: take that link away"):
        d.save(tmp_path / "c")
    assert list(outside.iterdir()) == []


def test_a_key_of_the_config_cannot_break_out_of_the_card(tmp_path: Path) -> None:
    make([1], quality={"a |\n# evil": 1.0}).save(tmp_path)
    assert "| a / # evil | 1 |" in (tmp_path / "README.md").read_text().replace("  ", " ")


@pytest.mark.parametrize("unit", [5e-324, 1e-44, 1e77])
def test_a_unit_beyond_float32_gives_numbers(unit: float) -> None:
    d = make([4, 2], temperature_unit=unit)
    ids, x = np.array([0, 1]), np.ones((2, 3), np.float32)
    replaced = d.replace(ids, x, 1.0)
    wanted = d.replace(ids, x) if unit < 1 else np.stack([d.senses(t).centroids.numpy().mean(0) for t in (0, 1)])
    np.testing.assert_allclose(replaced, wanted, rtol=1e-5)


@pytest.mark.parametrize("ids", [[1 << 40], [MANY]])
def test_fit_refuses_token_ids_without_end(ids: list[int]) -> None:
    with pytest.raises(BadInput, match="at most 4194304 tokens"):
        SenseDictionary.fit(np.array(ids), np.ones((1, 2), np.float32))


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (b"\x15", "damaged"),
        (b"\x00", "damaged"),
        (b"\x18\x01x\x15\x00\x15\x00\x00", "damaged"),  # text for a number
        (b"\x19\xf5" + b"\xff" * 4 + b"\x0f", "damaged"),  # a list without end
        (b"\x15\x00\x15\x00\x00", "damaged"),
        (b"\x15" + b"\xff" * 20, "damaged"),
        (b"\x05\x02\x00\x15\x00\x00", "foreign header"),  # a field by its number: it could come twice
        (b"\x17" + bytes(9), "foreign header"),  # a fraction
        (b"\x1c" * 60, "damaged"),
        (b"\x15\x00\x15\x10\x15\x10\x2c\x15\x02\x15\x00\x00\x00", "cut off"),  # eight bytes that do not come
        (b"\x15\x00\x15\x01\x15\x00\x2c\x15\x02\x15\x00\x00\x00", "cut off"),  # a size of -1
        (b"\x15\x02\x15\x00\x15\x00\x00", "damaged"),  # an index page
    ],
)
def test_damaged_page_headers_are_refused(page: bytes, message: str) -> None:
    check_pages(memoryview(b"\x15\x00\x15\x00\x15\x00\x2c\x15\x02\x15\x00\x00\x00" * 3))
    with pytest.raises(ValueError, match=message):
        check_pages(memoryview(page))


FILES = (CONFIG, DATA, EXEMPLARS, TOKENIZER)
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "overwrite", "cut", "insert"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=4,
)


def damage(raw: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, data in changes:
        place = int(where * len(raw))
        if kind == "flip":
            raw = raw[:place] + bytes(b ^ (1 << data[0] % 8) for b in raw[place : place + 1]) + raw[place + 1 :]
        elif kind == "overwrite":
            raw = raw[:place] + data + raw[place + len(data) :]
        elif kind == "cut":
            raw = raw[:place]
        else:
            raw = raw[:place] + data + raw[place:]
    return raw


def use_all(folder: Path) -> int:
    """Use all that a dictionary can do, and return how many of its parts worked; each gives what it should or refuses."""
    try:
        d = SenseDictionary.load(folder)
    except DictionaryError:
        return 0
    worked = 1
    ids = np.arange(-1, d.vocab_size + 1)
    x = np.ones((len(ids), d.dim), np.float32)
    for use in (
        lambda: d.find("bank").explain(),
        lambda: [d.senses(t).centroids.shape[1] == d.dim or pytest.fail("width") for t in range(d.vocab_size)],
        lambda: all(len(e) == 7 for t in range(d.vocab_size) for e in d.exemplars(t)) or pytest.fail("exemplar"),
        lambda: d.assign(ids, x).shape == ids.shape or pytest.fail("assign"),
        lambda: d.replace(ids, x, 0.5).shape == x.shape or pytest.fail("replace"),
        lambda: len(d.merge(d)) == 2 * len(d) or pytest.fail("merge"),
    ):
        try:
            assert use()
        except DictionaryError:
            continue
        except BadInput as error:
            if "overflow float32" not in str(error):  # centroids may be as large as their dtype allows
                raise
        worked += 1
    return worked


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dictionary with all its parts, in which everything works."""
    folder = tmp_path_factory.mktemp("whole") / "dictionary"
    full(folder)
    assert use_all(folder) == 7
    return folder


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(FILES), changes=edits)
def test_random_damage_is_refused_or_harmless(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[str, float, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "dictionary"
    shutil.copytree(whole, folder)
    (folder / name).write_bytes(damage((folder / name).read_bytes(), changes))
    assert use_all(folder) <= 7


def test_a_token_of_too_many_senses_is_refused(tmp_path: Path) -> None:
    make([65_534], dim=1).save(tmp_path)
    with pytest.raises(DictionaryError, match="token 1 has 65535 senses; at most 65534"):
        make([1, 65_535], dim=1).save(tmp_path)


def test_centroids_that_are_not_finite_are_refused_when_used(tmp_path: Path) -> None:
    make([2, 0, 4]).save(tmp_path)
    edit_array(tmp_path, "centroids", [1.0, float("nan")])
    d = SenseDictionary.load(tmp_path)
    with pytest.raises(DictionaryError, match="token 0 is NaN"):
        d.senses(0)
    with pytest.raises(DictionaryError, match="sense row 0"):
        d.assign(np.array([2, 0]), np.ones((2, 3), np.float32))
    assert len(d.senses(2).centroids) == 4


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match=r"there is no folder .*nowhere"):
        SenseDictionary.load(tmp_path / "nowhere")
