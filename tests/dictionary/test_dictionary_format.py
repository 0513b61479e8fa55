"""Dictionary folders: round trips, the streaming writer, the model card, int8, and errors of untrusted folders."""

import json
import os
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import hostile_folders
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hostile_folders import CONFIG, DATA, EXEMPLARS, edit_array, move_out, parquet, rows_of
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_same, exemplars, make, with_tokenizer, word_piece

from msense.dictionary import SenseDictionary, TeacherName, write_dictionary
from msense.dictionary import format as dictionary_format
from msense.dictionary.layout import DTYPES
from msense.errors import DictionaryError
from msense.io import scratch


def memory(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


Folders = pytest.TempPathFactory
any_sizes = st.lists(st.integers(0, 5), min_size=1, max_size=9)


@settings(max_examples=15, deadline=None)
@given(
    sizes=any_sizes, dim=st.integers(1, 5), dtype=st.sampled_from(list(DTYPES)), shard=st.sampled_from([1, 64, 1 << 30])
)
def test_round_trip(tmp_path_factory: Folders, sizes: list[int], dim: int, dtype: str, shard: int) -> None:
    folder = tmp_path_factory.mktemp("round")
    saved = make(sizes, dim, dtype, quality={"inertia": 0.25})
    chunks = [rows if i % 2 else rows.float().numpy() for i, rows in enumerate(saved.centroids.split(3))]
    arrays = (saved.offsets, saved.counts, saved.rms_distance, saved.token_counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dictionary_format, "SHARD_BYTES", shard)
        saved.save(folder / "a")
        write_dictionary(folder / "b", saved.config, *arrays, chunks)
    loaded = SenseDictionary.load(folder / "a")
    assert loaded.fingerprint == SenseDictionary.load(folder / "b").fingerprint
    assert_same(saved, loaded)
    assert len(loaded) == sum(sizes)


def test_a_large_dictionary_is_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    saved = make([4, 0, 5, 3])
    saved.save(tmp_path)
    assert torch.equal(load_file(tmp_path / "dictionary.safetensors")["centroids"], saved.centroids)
    monkeypatch.setattr(dictionary_format, "SHARD_BYTES", 5 * 3 * 2)  # five rows
    saved.save(tmp_path)
    names = [f"dictionary-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.glob("dictionary*")) == [*names, "dictionary.safetensors.index.json"]
    index = json.loads((tmp_path / "dictionary.safetensors.index.json").read_text())
    assert index["row_ranges"] == {"centroids.00001": [0, 5], "centroids.00002": [5, 10], "centroids.00003": [10, 12]}
    files = [load_file(tmp_path / name) for name in names]
    assert torch.equal(torch.cat([f[k] for f in files for k in f if k.startswith("centroids")]), saved.centroids)
    assert index["weight_map"] == {tensor: name for name, f in zip(names, files, strict=True) for tensor in f}
    monkeypatch.undo()
    SenseDictionary.load(tmp_path).save(tmp_path)  # in place, into a single file again
    assert [p.name for p in tmp_path.glob("dictionary*")] == ["dictionary.safetensors"]
    assert_same(saved, SenseDictionary.load(tmp_path))


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([np.zeros((4, 3))], "1 centroids are missing"),
        ([np.zeros((5, 3)), np.zeros((1, 3))], "more centroids than the 5"),
        ([np.zeros((5, 2))], "has width 3"),
        ([np.full((5, 3), 1e6)], "too large for float16"),
        ([np.full((5, 3), np.nan)], "NaN"),
    ],
)
def test_a_failed_write_leaves_no_dictionary(tmp_path: Path, chunks: list[np.ndarray], message: str) -> None:
    d = make([2, 3])
    d.save(tmp_path)
    with pytest.raises(DictionaryError, match=message):
        write_dictionary(tmp_path, d.config, d.offsets, d.counts, d.rms_distance, d.token_counts, chunks)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(DictionaryError, match=r"no config.json"):
        SenseDictionary.load(tmp_path)


def test_centroids_are_memory_mapped(tmp_path: Path) -> None:
    make([1 << 15] * 2, dim=256).save(tmp_path)  # 32 MB
    SenseDictionary.load(tmp_path)  # imports everything
    before = memory("VmRSS")
    d = SenseDictionary.load(tmp_path)
    assert d.centroids.shape == (1 << 16, 256)
    assert memory("VmRSS") - before < 16 << 20


def test_run_folders_and_file_uris_are_accepted(tmp_path: Path) -> None:
    d = make([1, 2])
    d.save(tmp_path / "run" / "dictionary")
    assert_same(d, SenseDictionary.load(str(tmp_path / "run")))
    assert_same(d, SenseDictionary.load(f"file://{tmp_path}/run"))


def test_values_cannot_break_out_of_the_card(tmp_path: Path) -> None:
    evil = TeacherName(name="a|b\n# evil", fingerprint="f")
    make([1, 2], teacher=evil, quality={"explained_variance": 0.75, "a |\n# evil": 1.0}).save(tmp_path / "evil")
    card = ModelCard.load(tmp_path / "evil" / "README.md")
    for row in ("teacher | a/b # evil", "explained_variance | 0.75", "a / # evil | 1", "senses | 3 of 2 tokens"):
        assert f"| {row}" in card.text.replace("  ", " ")
    assert "SenseDictionary.load" in card.text
    assert card.data.to_dict() == {"library_name": "msense", "tags": ["msense", "sense-dictionary"]}
    make([1], teacher=TeacherName(name="owner/model")).save(tmp_path / "hub")
    assert ModelCard.load(tmp_path / "hub" / "README.md").data.base_model == "owner/model"


@settings(max_examples=20, deadline=None)
@given(sizes=any_sizes, dim=st.integers(1, 5), shard=st.sampled_from([1, 7, 10**9]), power=st.integers(-30, 30))
def test_int8_has_a_bounded_error(
    tmp_path_factory: Folders, sizes: list[int], dim: int, shard: int, power: int
) -> None:
    folder = tmp_path_factory.mktemp("int8")
    exact = make(sizes, dim, "float32")
    exact.centroids.mul_(2.0**power)
    if len(exact):
        exact.centroids[0] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dictionary_format, "SHARD_BYTES", shard)
        exact.save(folder / "a", dtype="int8")
        loaded = SenseDictionary.load(folder / "a")
        loaded.save(folder / "b")
    assert loaded.config.dtype == "int8"
    assert {part.dtype for part in loaded.ragged.parts} == {torch.int8}
    assert loaded.centroids.dtype == torch.float32
    largest = exact.centroids.abs().amax(1, keepdim=True)
    assert ((loaded.centroids - exact.centroids).abs() <= largest / 253.9).all()
    again = SenseDictionary.load(folder / "b")
    assert again.fingerprint == loaded.fingerprint  # saving again changes nothing
    assert torch.equal(loaded.to("cpu").centroids, loaded.centroids)
    united = again.merge(loaded)
    assert united.config.dtype == "int8"
    assert [len(united.senses(t).centroids) for t in range(len(sizes))] == [2 * size for size in sizes]
    for token, (start, stop) in enumerate(pairwise(loaded.offsets)):
        assert torch.equal(loaded.senses(token).centroids, loaded.centroids[start:stop])


def test_int8_halves_the_size(tmp_path: Path) -> None:
    exact = make([20] * 50, 64)
    sizes = []
    for dtype in ("float16", "int8"):
        exact.save(tmp_path, dtype)
        sizes.append((tmp_path / "dictionary.safetensors").stat().st_size)
    assert sizes[1] < 0.65 * sizes[0]  # the small arrays are a fifth of the larger file


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
    "folder": (small, hostile_folders.HOSTILE, len),
    "sizes": (small, hostile_folders.SIZES, len),
    "int8": (lambda f: small(f, "int8"), hostile_folders.HOSTILE_INT8, len),
    "index": (in_two_files, hostile_folders.HOSTILE_INDEX, len),
    "exemplars": (full, hostile_folders.HOSTILE_EXEMPLARS, lambda d: d.exemplars(2)),
    "tokenizer": (full, hostile_folders.HOSTILE_TOKENIZERS, lambda d: d.lookup("bank")),
}


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


def test_centroids_are_checked_for_finite_values_on_use(tmp_path: Path) -> None:
    make([2, 0, 4]).save(tmp_path)
    edit_array(tmp_path, "centroids", [1.0, float("nan")])
    d = SenseDictionary.load(tmp_path)
    with pytest.raises(DictionaryError, match="token 0 is NaN"):
        d.senses(0)
    with pytest.raises(DictionaryError, match="sense row 0"):
        d.assign(np.array([2, 0]), np.ones((2, 3), np.float32))
    assert len(d.senses(2).centroids) == 4
