"""On-disk format of a dictionary: round trips, the streaming writer, the model card and int8."""

import json
import resource
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_same, make

from msense.dictionary import SenseDictionary, TeacherName, write_dictionary
from msense.dictionary import format as dictionary_format
from msense.dictionary.layout import DTYPES
from msense.errors import DictionaryError

any_sizes = st.lists(st.integers(0, 5), min_size=1, max_size=9)


@settings(max_examples=15, deadline=None)
@given(
    sizes=any_sizes, dim=st.integers(1, 5), dtype=st.sampled_from(list(DTYPES)), shard=st.sampled_from([1, 64, 10**9])
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], dim: int, dtype: str, shard: int
) -> None:
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
    ids, x = np.arange(len(sizes)), np.ones((len(sizes), dim), np.float32)
    np.testing.assert_array_equal(saved.assign(ids, x), loaded.assign(ids, x))
    np.testing.assert_array_equal(saved.replace(ids, x, 1.0), loaded.replace(ids, x, 1.0))
    for token, (start, stop) in enumerate(pairwise(saved.offsets)):
        own = loaded.senses(token)
        assert own.centroids.dtype == torch.float32
        assert torch.equal(own.centroids, saved.centroids[start:stop].float())
        np.testing.assert_array_equal(own.counts, saved.counts[start:stop])


def test_a_large_dictionary_is_split_into_files_that_safetensors_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_centroids_are_memory_mapped(tmp_path: Path) -> None:
    make([1 << 15] * 2, dim=256).save(tmp_path)  # 32 MB
    SenseDictionary.load(tmp_path)  # imports everything
    before = resident()
    d = SenseDictionary.load(tmp_path)
    assert d.centroids.shape == (1 << 16, 256)
    assert resident() - before < 16 << 20


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
    assert "license" in card.text
    assert card.data.to_dict() == {"library_name": "msense", "tags": ["msense", "sense-dictionary"]}
    make([1], teacher=TeacherName(name="owner/model")).save(tmp_path / "hub")
    assert ModelCard.load(tmp_path / "hub" / "README.md").data.base_model == "owner/model"


@settings(max_examples=20, deadline=None)
@given(sizes=any_sizes, dim=st.integers(1, 5), shard=st.sampled_from([1, 7, 10**9]), power=st.integers(-30, 30))
def test_int8_has_a_bounded_error_and_saving_again_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], dim: int, shard: int, power: int
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
    assert again.fingerprint == loaded.fingerprint
    assert torch.equal(loaded.to("cpu").centroids, loaded.centroids)
    united = again.merge(loaded)
    assert united.config.dtype == "int8"
    assert [len(united.senses(t).centroids) for t in range(len(sizes))] == [2 * size for size in sizes]
    for token, size in enumerate(sizes):
        start = sum(sizes[:token])
        assert torch.equal(loaded.senses(token).centroids, loaded.centroids[start : start + size])


def test_int8_keeps_assignments_at_half_the_size(tmp_path: Path) -> None:
    exact = make([20] * 50, 64)
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(50), 40)
    x = exact.centroids.float().numpy()[ids * 20 + rng.integers(0, 20, len(ids))]
    x += rng.normal(0, 0.5, x.shape).astype(np.float32)
    exact.save(tmp_path / "a")
    exact.save(tmp_path / "b", dtype="int8")
    small = SenseDictionary.load(tmp_path / "b")
    assert np.mean(small.assign(ids, x) == exact.assign(ids, x)) > 0.998
    expected = exact.replace(ids, x, 1.0)
    assert np.linalg.norm(small.replace(ids, x, 1.0) - expected) / np.linalg.norm(expected) < 0.01
    a, b = ((tmp_path / name / "dictionary.safetensors").stat().st_size for name in "ab")
    assert b < 0.65 * a  # the small arrays are a fifth of the larger file
