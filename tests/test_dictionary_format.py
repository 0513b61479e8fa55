"""The dictionary's folder: round trips, the streaming writer, and files that nobody should trust."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_same, make

from msense.dictionary import SenseDictionary, TeacherName, write_dictionary
from msense.dictionary import format as dictionary_format
from msense.dictionary.format import DTYPES
from msense.errors import DictionaryError

any_sizes = st.lists(st.integers(0, 5), min_size=1, max_size=9)


@settings(max_examples=25, deadline=None)
@given(
    sizes=any_sizes, dim=st.integers(1, 5), dtype=st.sampled_from(list(DTYPES)), shard=st.sampled_from([1, 64, 10**9])
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], dim: int, dtype: str, shard: int
) -> None:
    folder = tmp_path_factory.mktemp("round")
    saved = make(sizes, dim, dtype, quality={"inertia": 0.25})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dictionary_format, "SHARD_BYTES", shard)
        saved.save(folder)
    loaded = SenseDictionary.load(folder)
    assert_same(saved, loaded)
    assert len(loaded) == sum(sizes)
    ids, x = np.arange(len(sizes)), np.ones((len(sizes), dim), np.float32)
    np.testing.assert_array_equal(saved.assign(ids, x), loaded.assign(ids, x))
    np.testing.assert_array_equal(saved.replace(ids, x, 1.0), loaded.replace(ids, x, 1.0))
    for token, size in enumerate(sizes):
        start = sum(sizes[:token])
        own = loaded.senses(token)
        assert own.centroids.dtype == torch.float32
        assert torch.equal(own.centroids, saved.centroids[start : start + size].float())
        np.testing.assert_array_equal(own.counts, saved.counts[start : start + size])


def test_a_large_dictionary_is_cut_into_files_that_safetensors_reads(
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
    SenseDictionary.load(tmp_path).save(tmp_path)  # onto itself, into one file again
    assert [p.name for p in tmp_path.glob("dictionary*")] == ["dictionary.safetensors"]
    assert_same(saved, SenseDictionary.load(tmp_path))


def test_streaming_writer_takes_chunks_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    d = make([3, 4, 0, 2], dtype="bfloat16")
    monkeypatch.setattr(dictionary_format, "SHARD_BYTES", 4 * 3 * 2)
    rows = d.centroids.float()
    chunks = (rows[a:b] if a % 2 else rows[a:b].numpy() for a, b in ((0, 1), (1, 1), (1, 6), (6, 9)))
    write_dictionary(tmp_path, d.config, d.offsets, d.counts, d.spread, d.token_counts, chunks)
    assert_same(d, SenseDictionary.load(tmp_path))


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([np.zeros((4, 3))], "end 1 rows too early"),
        ([np.zeros((5, 3)), np.zeros((1, 3))], "more centroids came than the 5"),
        ([np.zeros((5, 2))], "width 3"),
        ([np.full((5, 3), 1e6)], "too large for float16"),
        ([np.full((5, 3), np.nan)], "NaN"),
    ],
)
def test_a_failed_write_leaves_no_dictionary(tmp_path: Path, chunks: list[np.ndarray], message: str) -> None:
    d = make([2, 3])
    d.save(tmp_path)
    with pytest.raises(DictionaryError, match=message):
        write_dictionary(tmp_path, d.config, d.offsets, d.counts, d.spread, d.token_counts, chunks)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(DictionaryError, match=r"no config.json"):
        SenseDictionary.load(tmp_path)


def test_centroids_are_mapped_not_read(tmp_path: Path) -> None:
    rows = 1 << 14
    d = make([rows], dim=512)
    d.save(tmp_path)
    code = (
        "import resource, sys; from msense import SenseDictionary; import torch, numpy as np;"
        "rss = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize();"
        "before = rss(); d = SenseDictionary.load(sys.argv[1]); print(rss() - before, d.centroids.shape[0])"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, found = map(int, out.stdout.split())
    assert found == rows
    assert grown < rows * 512 * 2 / 2


def test_a_run_folder_and_a_file_uri_are_followed(tmp_path: Path) -> None:
    d = make([1, 2])
    d.save(tmp_path / "run" / "dictionary")
    assert_same(d, SenseDictionary.load(str(tmp_path / "run")))
    assert_same(d, SenseDictionary.load(f"file://{tmp_path}/run"))


def test_the_card_says_what_it_is_and_cannot_be_broken_out_of(tmp_path: Path) -> None:
    d = make([1, 2], teacher=TeacherName(name="a|b\n# evil", fingerprint="f"), quality={"explained_variance": 0.75})
    d.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| teacher | a/b # evil |" in card
    assert "| explained_variance | 0.75 |" in card
    assert "| senses | 3 of 2 tokens" in card
    assert "SenseDictionary.load" in card
    assert "licence" in card


# --- folders that nobody should trust ---------------------------------------------------------------------------------


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def edit_array(folder: Path, name: str, values: list) -> None:
    path = folder / "dictionary.safetensors"
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8:start])[name]
    data = np.array(values, {"I64": np.int64, "F32": np.float32, "F16": np.float16}[entry["dtype"]]).tobytes()
    raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][0] + len(data)] = data
    path.write_bytes(raw)


def one_tensor_missing(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / "dictionary.safetensors")
    del arrays["spread"]
    save_file(arrays, folder / "dictionary.safetensors")


def move_out(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)


CONFIG, DATA = "config.json", "dictionary.safetensors"
BIG = 1 << 61
HOSTILE = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no config.json"),
    "config is a folder": (lambda f: ((f / CONFIG).unlink(), (f / CONFIG).mkdir()), "no config.json"),
    "config is no JSON": (lambda f: (f / CONFIG).write_text("{"), "is not JSON"),
    "config is binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "is not JSON"),
    "config is deep": (lambda f: (f / CONFIG).write_text("[" * 200_000), "is not JSON"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[1]"), "states no format_version"),
    "foreign config": (lambda f: (f / CONFIG).write_text('{"model_type": "bert"}'), "states no format_version"),
    "future version": (lambda f: edit_json(f / CONFIG, lambda c: c.update(format_version=2)), "format version 2"),
    "extra field": (lambda f: edit_json(f / CONFIG, lambda c: c.update(surprise=1)), "surprise"),
    "unknown metric": (lambda f: edit_json(f / CONFIG, lambda c: c.update(metric="l1")), "metric"),
    "negative dim": (lambda f: edit_json(f / CONFIG, lambda c: c.update(dim=-3)), "dim"),
    "NaN unit": (
        lambda f: edit_json(f / CONFIG, lambda c: c.update(temperature_unit=float("nan"))),
        "temperature_unit",
    ),
    "other vocabulary": (lambda f: edit_json(f / CONFIG, lambda c: c.update(vocab_size=4)), r"offsets is .*should be"),
    "other width": (lambda f: edit_json(f / CONFIG, lambda c: c.update(dim=4)), r"centroids is .*should be"),
    "other dtype": (lambda f: edit_json(f / CONFIG, lambda c: c.update(dtype="bfloat16")), r"centroids is .*should be"),
    "no data": (lambda f: (f / DATA).unlink(), r"dictionary.safetensors is missing"),
    "empty data": (lambda f: (f / DATA).write_bytes(b""), "cut off"),
    "truncated": (lambda f: (f / DATA).write_bytes((f / DATA).read_bytes()[:-1]), "cut off"),
    "truncated header": (lambda f: (f / DATA).write_bytes((f / DATA).read_bytes()[:60]), "cut off"),
    "appended": (lambda f: (f / DATA).write_bytes((f / DATA).read_bytes() + b"x"), "cut off"),
    "vast header": (lambda f: (f / DATA).write_bytes(b"\xff" * 99), "cut off"),
    "header is no JSON": (lambda f: (f / DATA).write_bytes((4).to_bytes(8, "little") + b"abcd"), "foreign header"),
    "metadata": (lambda f: edit_header(f / DATA, lambda h: h.update(__metadata__={"a": "b"})), "foreign header"),
    "vast shape": (
        lambda f: edit_header(f / DATA, lambda h: h["centroids"].update(shape=[BIG, BIG])),
        "not where they should be",
    ),
    "negative shape": (lambda f: edit_header(f / DATA, lambda h: h["counts"].update(shape=[-6])), "foreign header"),
    "vast range": (
        lambda f: edit_header(f / DATA, lambda h: h["centroids"].update(shape=[BIG, 1], data_offsets=[0, BIG * 2])),
        "foreign header",
    ),
    "overlapping": (
        lambda f: edit_header(f / DATA, lambda h: h["token_counts"].update(data_offsets=h["offsets"]["data_offsets"])),
        "not where they should be",
    ),
    "object dtype": (lambda f: edit_header(f / DATA, lambda h: h["counts"].update(dtype="O")), "not where they should"),
    "float counts": (
        lambda f: edit_header(f / DATA, lambda h: h["spread"].update(dtype="I64")),
        "not where they should",
    ),
    "missing tensor": (one_tensor_missing, "holds the tensors"),
    "renamed tensor": (lambda f: edit_header(f / DATA, lambda h: h.update(x=h.pop("spread"))), "holds the tensors"),
    "reshaped": (
        lambda f: edit_header(f / DATA, lambda h: h["centroids"].update(shape=[3, 6])),
        r"centroids is .*should",
    ),
    "offsets from 1": (lambda f: edit_array(f, "offsets", [1, 2, 2, 6]), "offsets must rise"),
    "offsets fall": (lambda f: edit_array(f, "offsets", [0, 4, 2, 6]), "offsets must rise"),
    "offsets end early": (lambda f: edit_array(f, "offsets", [0, 2, 2, 5]), "offsets must rise"),
    "offsets wrap around": (lambda f: edit_array(f, "offsets", [0, 2**63 - 1, -(2**63), 6]), "offsets must rise"),
    "negative counts": (lambda f: edit_array(f, "counts", [-1]), "counts holds the negative number -1"),
    "negative token counts": (
        lambda f: edit_array(f, "token_counts", [-7]),
        "token_counts holds the negative number -7",
    ),
    "NaN spread": (lambda f: edit_array(f, "spread", [float("nan")]), "spread holds"),
    "infinite spread": (lambda f: edit_array(f, "spread", [float("inf")]), "spread holds"),
    "link out: config": (lambda f: move_out(f, CONFIG), "outside the dictionary"),
    "link out: data": (lambda f: move_out(f, DATA), "outside the dictionary"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders_are_refused(tmp_path: Path, case: str) -> None:
    spoil, message = HOSTILE[case]
    folder = tmp_path / "dictionary"
    make([2, 0, 4]).save(folder)
    spoil(folder)
    with pytest.raises(DictionaryError, match=message):
        SenseDictionary.load(folder)


INDEX = "dictionary.safetensors.index.json"
SECOND = "dictionary-00002-of-00002.safetensors"


def rename_in_index(folder: Path, name: str) -> None:
    edit_json(folder / INDEX, lambda i: i["weight_map"].update({"centroids.00002": name}))


HOSTILE_INDEX = {
    "path up": (lambda f: rename_in_index(f, "../outside.safetensors"), "only dictionary-"),
    "absolute path": (lambda f: rename_in_index(f, "/etc/passwd"), "only dictionary-"),
    "hidden in a name": (lambda f: rename_in_index(f, f"{SECOND}/../../x"), "only dictionary-"),
    "another number": (lambda f: rename_in_index(f, "dictionary-00003-of-00002.safetensors"), "does not list slices"),
    "gap": (
        lambda f: edit_json(f / INDEX, lambda i: i["row_ranges"].update({"centroids.00002": [5, 6]})),
        "does not list",
    ),
    "negative": (
        lambda f: edit_json(f / INDEX, lambda i: i["row_ranges"].update({"centroids.00002": [3, -6]})),
        "wrong",
    ),
    "falling": (
        lambda f: edit_json(f / INDEX, lambda i: i["row_ranges"].update({"centroids.00002": [3, 1]})),
        "does not",
    ),
    "too many rows": (
        lambda f: edit_json(f / INDEX, lambda i: i["row_ranges"].update({"centroids.00002": [3, 7]})),
        "should be",
    ),
    "one range": (lambda f: edit_json(f / INDEX, lambda i: i["row_ranges"].pop("centroids.00002")), "does not list"),
    "no ranges": (lambda f: edit_json(f / INDEX, lambda i: i.update(row_ranges={})), "does not list"),
    "no JSON": (lambda f: (f / INDEX).write_text("x"), "is wrong"),
    "no shard": (lambda f: (f / SECOND).unlink(), "is missing"),
    "truncated shard": (lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-2]), "cut off"),
    "no index": (lambda f: (f / INDEX).unlink(), r"dictionary.safetensors is missing"),
    "link out": (lambda f: move_out(f, SECOND), "outside the dictionary"),
}


@pytest.mark.parametrize("case", HOSTILE_INDEX)
def test_hostile_indexes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    spoil, message = HOSTILE_INDEX[case]
    folder = tmp_path / "dictionary"
    monkeypatch.setattr(dictionary_format, "SHARD_BYTES", 3 * 3 * 2)
    make([2, 0, 4]).save(folder)
    assert len(SenseDictionary.load(folder)) == 6
    spoil(folder)
    with pytest.raises(DictionaryError, match=message):
        SenseDictionary.load(folder)


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
