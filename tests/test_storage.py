"""Files of a run: whole or not there, counted only with a marker that fits them."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from msense import scratch, storage, stores
from msense.errors import BadInput, MsenseError


def write_bytes(data: bytes):  # noqa: ANN201 - a closure for publish
    return lambda path: path.write_bytes(data) and None


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    return "memory://bucket/run"


def test_a_file_counts_only_whole_and_with_its_marker(root: str) -> None:
    file = storage.join(root, "a", "b.bin")
    assert storage.facts_of(file) is None
    assert storage.publish(file, write_bytes(b"12345"), {"n": 5}) == {"n": 5}
    assert storage.facts_of(file, verify=True) == {"n": 5}
    assert storage.read_range(file, 1, 3) == b"234"
    fs, path = stores.filesystem(file)
    fs.pipe_file(path, b"1234")  # cut off
    assert storage.facts_of(file) is None
    fs.pipe_file(path, b"12354")  # same size, other bytes
    assert storage.facts_of(file) == {"n": 5}
    assert storage.facts_of(file, verify=True) is None
    fs.pipe_file(path + ".done", b'{"size": 5')  # a torn marker
    assert storage.facts_of(file) is None
    storage.remove(file)
    assert not storage.exists(file)
    storage.remove(file)


def test_a_disk_that_cannot_be_read_is_damage_and_a_lost_right_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "x")
    storage.publish(file, write_bytes(b"12345"))

    def refuse(number: int) -> None:
        def read(uri: str) -> str:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(storage, "sha256_of_uri", read)

    refuse(errno.EIO)
    assert storage.facts_of(file, verify=True) is None
    refuse(errno.EACCES)
    with pytest.raises(PermissionError):
        storage.facts_of(file, verify=True)


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(root: str) -> None:
    file = storage.join(root, "x.json")
    storage.write_json(file, {"a": 1})

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(MsenseError, match=r"cannot write .*x\.json: disk full"):
        storage.publish(file, fail)
    assert storage.read_json(file) == {"a": 1}
    fs, path = stores.filesystem(root)
    assert [name.rsplit("/", 1)[-1] for name in fs.find(path)] == ["x.json"]


def test_read_json_takes_only_objects(root: str) -> None:
    file = storage.join(root, "x.json")
    assert storage.read_json(file) is None
    for text in ("[1]", "{", "3"):
        storage.write_text(file, text)
        assert storage.read_json(file) is None


def test_arrays_round_trip_and_may_be_read_by_name(root: str) -> None:
    arrays = {"a": np.arange(6, dtype=np.uint64).reshape(2, 3), "b": np.zeros(0, np.float32)}
    file = storage.join(root, "x.safetensors")
    storage.publish(file, lambda path: storage.save_arrays(path, arrays))
    for name, array in storage.load_arrays(file).items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype
    assert set(storage.load_arrays(file, ("b",))) == {"b"}


@pytest.mark.parametrize("place", [b'"n"', b'"size"', b'"sha256"', b'"seal"', b"{"])
def test_a_byte_that_flipped_in_a_marker_is_noticed(tmp_path: Path, place: bytes) -> None:
    file = str(tmp_path / "x")
    storage.publish(file, write_bytes(b"12345"), {"n": 5})
    marker = Path(file + ".done")
    data = bytearray(marker.read_bytes())
    for offset in (0, len(place) + 3):
        broken = bytearray(data)
        broken[min(data.index(place) + offset, len(data) - 1)] ^= 1
        marker.write_bytes(broken)
        assert storage.facts_of(file) is None
    marker.write_bytes(data)
    assert storage.facts_of(file) == {"n": 5}


def test_scratch_of_killed_processes_is_removed_and_that_of_others_is_not(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path; from msense import scratch\n"
        "with scratch.scratch_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'x').write_text('left')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (left,) = (path for path in tmp_path.iterdir() if path.is_dir())
    with scratch.scratch_folder(tmp_path) as other:
        assert not left.exists()
        with scratch.scratch_folder(tmp_path) as folder:
            assert other.exists()
            assert folder != other
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(tmp_path.iterdir())
    (tmp_path / "msense-data").mkdir()
    (tmp_path / "msense-data.lock").touch()
    with scratch.scratch_folder(tmp_path):
        assert len(list(tmp_path.glob("msense-data*"))) == 2  # not ours


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.umask(0o022)\n"
        "import numpy as np; from msense import storage\n"
        "storage.publish(sys.argv[1], lambda path: storage.save_arrays(path, {'a': np.zeros(1)}))\n"
        "print(oct(os.umask(0)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")], check=True, capture_output=True, text=True
    ).stdout
    assert told == "0o22\n"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


def test_local_copy_follows_the_remote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pipe({"/d/config.json": b"{}", "/d/sub/x": b"abc"})
    copy = storage.local_copy("memory://d")
    assert (copy / "sub" / "x").read_bytes() == b"abc"
    assert storage.local_copy("memory://d") == copy
    fs.pipe({"/d/sub/x": b"abcd"})
    assert (storage.local_copy("memory://d") / "sub" / "x").read_bytes() == b"abcd"
    with pytest.raises(BadInput, match="nothing at memory://none"):
        storage.local_copy("memory://none")
    assert storage.local_copy(str(tmp_path)) == tmp_path


def test_uris_are_told_apart_and_shown_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x") == str(tmp_path / "runs" / "x")
    assert storage.absolute("s3://b/x/") == "s3://b/x"
    assert stores.display_uri("s3://key:secret@bucket/x?token=1#f") == "s3://bucket/x"
    for named in ("s3://key:hunter2@bucket/x", "gs://key:hunter2@bucket/x"):
        with pytest.raises(BadInput, match=r"://bucket/x: .* takes no credentials in the URI") as refusal:
            storage.read_json(named)
        assert "hunter2" not in str(refusal.value)
    with pytest.raises(BadInput, match="nosuch://"):
        stores.filesystem("nosuch://x")


def test_markers_hold_what_was_told(tmp_path: Path) -> None:
    storage.publish(str(tmp_path / "x"), lambda path: path.write_bytes(b"ab") and {"more": 2}, {"n": 1})
    marker = json.loads((tmp_path / "x.done").read_text())
    assert marker["facts"] == {"n": 1, "more": 2}
    assert marker["size"] == 2
    assert marker["sha256"] == "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"


@pytest.mark.parametrize(("where", "damaged"), [("local", True), ("memory", False)])
def test_a_bad_disk_is_damage_and_a_bad_answer_of_a_store_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, damaged: bool
) -> None:
    """What counts as damaged is removed: a store that answers 502 must not cost a finished file."""
    root = str(tmp_path) if where == "local" else "memory://eio"
    storage.publish(f"{root}/x", write_bytes(b"whole"))
    kind = type(stores.filesystem(root)[0])

    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.EIO, "Bad Gateway")

    monkeypatch.setattr(kind, "size", fail)
    if damaged:
        assert storage.facts_of(f"{root}/x") is None
    else:
        with pytest.raises(MsenseError, match="Bad Gateway"):
            storage.facts_of(f"{root}/x")


def test_files_beyond_a_limit_are_not_read_from_any_disk_or_store(root: str) -> None:
    storage.publish(f"{root}/x", write_bytes(b"12345"))
    assert storage.read_bytes(f"{root}/x", 5) == b"12345"
    with pytest.raises(BadInput, match="x has 5 bytes, of such a file at most 4 are read"):
        storage.read_bytes(f"{root}/x", 4)


def test_json_in_which_a_key_comes_twice_is_damaged(tmp_path: Path) -> None:
    """Two readers may see two different files in it, though one sees what was written."""
    file = tmp_path / "x.json"
    storage.write_json(str(file), {"a": 1, "b": 2})
    assert storage.read_json(str(file)) == {"a": 1, "b": 2}
    file.write_text(file.read_text().replace("{", '{"a": 3,', 1))
    assert storage.read_json(str(file)) is None
