"""Run storage: atomic writes, and markers and checksums that detect every incomplete or corrupted file."""

import errno
import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from msense.errors import InputError, MsenseError
from msense.io import filesystems, scratch, storage
from msense.io.arrays import load_arrays, save_arrays

Patch = pytest.MonkeyPatch


def write_bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data) and None


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket/run"


def test_a_file_is_valid_only_complete_and_with_its_marker(root: str) -> None:
    file = storage.join(root, "a", "b.bin")
    assert storage.stats_of(file) is None
    assert storage.publish(file, write_bytes(b"12345"), {"n": 5}) == {"n": 5}
    assert storage.stats_of(file, verify=True) == {"n": 5}
    assert storage.read_range(file, 1, 3) == b"234"
    assert storage.read_bytes(file, 5) == b"12345"
    with pytest.raises(InputError, match=r"b\.bin has 5 bytes, more than the limit of 4"):
        storage.read_bytes(file, 4)
    fs, path = filesystems.filesystem(file)
    fs.pipe_file(path, b"1234")  # truncated
    assert storage.stats_of(file) is None
    fs.pipe_file(path, b"12354")  # same size, other bytes
    assert storage.stats_of(file) == {"n": 5}
    assert storage.stats_of(file, verify=True) is None
    fs.pipe_file(path + ".done", b'{"size": 5')  # incomplete marker
    assert storage.stats_of(file) is None
    storage.remove(file)
    assert not storage.exists(file)
    storage.remove(file)


def test_a_marker_has_size_hash_and_stats_and_detects_a_flipped_bit(tmp_path: Path) -> None:
    file, marker = str(tmp_path / "x"), tmp_path / "x.done"
    storage.publish(file, lambda path: path.write_bytes(b"ab") and {"more": 2}, {"n": 1})
    recorded = json.loads(marker.read_text())
    assert recorded["facts"] == {"n": 1, "more": 2}
    assert recorded["size"] == 2
    assert recorded["sha256"] == "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"
    data = marker.read_bytes()
    for place in (b'"n"', b'"size"', b'"sha256"', b'"seal"', b"{"):
        for offset in (0, len(place) + 3):
            broken = bytearray(data)
            broken[min(data.index(place) + offset, len(data) - 1)] ^= 1
            marker.write_bytes(broken)
            assert storage.stats_of(file) is None
    marker.write_bytes(data)
    assert storage.stats_of(file) == {"n": 1, "more": 2}


def test_a_failed_write_leaves_no_file_and_keeps_the_old_one(root: str) -> None:
    file = storage.join(root, "x.json")
    storage.write_json(file, {"a": 1})

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(MsenseError, match=r"cannot write .*x\.json: disk full"):
        storage.publish(file, fail)
    assert storage.read_json(file) == {"a": 1}
    fs, path = filesystems.filesystem(root)
    assert [name.rsplit("/", 1)[-1] for name in fs.find(path)] == ["x.json"]


def test_read_json_accepts_only_what_was_written(root: str) -> None:
    file = storage.join(root, "x.json")
    assert storage.read_json(file) is None
    storage.write_json(file, {"a": 1, "b": 2})
    assert storage.read_json(file, {"a": int}) == {"a": 1, "b": 2}
    assert storage.read_json(file, {"a": str}) is None
    duplicate = storage.read_text(file).replace("{", '{"a": 3,', 1)  # readers could resolve it differently
    for text in ("[1]", "{", "3", duplicate):
        storage.write_text(file, text)
        assert storage.read_json(file) is None


def test_arrays_round_trip_and_can_be_read_by_name(root: str) -> None:
    arrays = {"a": np.arange(6, dtype=np.uint64).reshape(2, 3), "b": np.zeros(0, np.float32)}
    file = storage.join(root, "x.safetensors")
    storage.publish(file, lambda path: save_arrays(path, arrays))
    for name, array in load_arrays(file).items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype
    assert set(load_arrays(file, ("b",))) == {"b"}


@pytest.mark.parametrize(
    ("root", "number", "corrupted"),
    [("", errno.EIO, True), ("", errno.EACCES, False), ("memory://eio", errno.EIO, False)],
    ids=["bad disk", "no permission", "failing store"],
)
def test_only_a_bad_disk_counts_as_corruption(
    tmp_path: Path, monkeypatch: Patch, root: str, number: int, corrupted: bool
) -> None:
    """Corrupted files are deleted: a store that answers 502 must not cost a finished file."""
    file = f"{root or tmp_path}/x"
    storage.publish(file, write_bytes(b"whole"))

    def fail(*_: object) -> None:
        raise OSError(number, "Bad Gateway")

    monkeypatch.setattr(type(filesystems.filesystem(file)[0]), "size", fail)
    if corrupted:
        assert storage.stats_of(file) is None
    else:
        with pytest.raises(MsenseError if root else PermissionError, match="Bad Gateway"):
            storage.stats_of(file)


def test_temporary_folders_of_killed_processes_are_removed_and_others_kept(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path; from msense.io import scratch\n"
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
        assert len(list(tmp_path.glob("msense-data*"))) == 2  # not a name of scratch_folder


def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.umask(0o022)\n"
        "import numpy as np; from msense.io import arrays, storage\n"
        "storage.publish(sys.argv[1], lambda path: arrays.save_arrays(path, {'a': np.zeros(1)}))\n"
        "print(oct(os.umask(0)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "0o22\n"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MsenseError, match=r"cannot write .*file/run: "):
        storage.make_folder(f"{tmp_path}/file/run")


def test_local_copy_follows_the_remote(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pipe({"/d/config.json": b"{}", "/d/sub/x": b"abc"})
    copy = storage.local_copy("memory://d")
    assert (copy / "sub" / "x").read_bytes() == b"abc"
    assert storage.local_copy("memory://d") == copy
    fs.pipe({"/d/sub/x": b"abcd"})
    assert (storage.local_copy("memory://d") / "sub" / "x").read_bytes() == b"abcd"
    with pytest.raises(InputError, match="nothing at memory://none"):
        storage.local_copy("memory://none")
    assert storage.local_copy(str(tmp_path)) == tmp_path


def test_uris_are_resolved_and_shown_without_secrets_and_invalid_ones_rejected(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    for uri, shown in {
        "s3://key:secret@bucket/a?b": "s3://bucket/a",
        "https://u:p#?@host/a.txt?token=1#x": "https://host/a.txt",
        "hf://datasets/a/b@refs%2Fconvert/x": "hf://datasets/a/b@refs%2Fconvert/x",
        "/data/C# notes?.txt": "/data/C# notes?.txt",
    }.items():
        assert filesystems.display_uri(uri) == shown
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x") == str(tmp_path / "runs" / "x")
    assert storage.absolute("s3://b/x/") == "s3://b/x"
    for uri in ("s3://key:hunter2@bucket/x", "gs://key:hunter2@bucket/x"):
        with pytest.raises(InputError, match=r"://bucket/x: .* takes no credentials in the URI") as error:
            storage.read_json(uri)
        assert "hunter2" not in str(error.value)
    with pytest.raises(InputError, match="nosuch://"):
        filesystems.filesystem("nosuch://x")


def test_a_folder_is_uploaded_with_its_own_config_last(root: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """Readers take a folder with a config.json for complete."""
    source = tmp_path / "source"
    for name in ("config.json", "z.bin", "dictionary/config.json", "dictionary/a.bin"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    order: list[str] = []
    upload = storage.upload
    monkeypatch.setattr(
        storage, "upload", lambda path, uri: (order.append(uri.split("target/")[1]), upload(path, uri))[1]
    )
    storage.upload_folder(source, storage.join(root, "target"))
    assert order == ["dictionary/a.bin", "z.bin", "dictionary/config.json", "config.json"]
    assert storage.read_text(storage.join(root, "target", "dictionary", "config.json")) == "dictionary/config.json"
    assert storage.read_text(storage.join(root, "target", "config.json")) == "config.json"


def test_an_unreachable_hub_is_reported_with_its_remedy() -> None:
    import huggingface_hub.errors  # noqa: F401 - imports the client whose errors are meant

    (error_type,) = filesystems.hub_errors()
    with (
        pytest.raises(
            MsenseError, match=r"cannot read hf://owner/name: the Hugging Face Hub is unavailable \(no route\)"
        ),
        filesystems.storage_errors("hf://owner/name"),
    ):
        raise error_type("no route")
