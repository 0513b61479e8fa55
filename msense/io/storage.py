"""Files of a run: atomic writes to any storage, and markers that record when a file is complete.

Files are written under a temporary name and renamed (local disk), or written locally and uploaded (object store). A
file is valid only with its marker `<file>.done`, JSON with size, sha256 and statistics. JSON files include a checksum,
so that corruption is detected. Memory: one copy buffer.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msense.errors import InputError
from msense.io.filesystems import OBJECT_STORES, display_uri, filesystem, is_local, open_file, storage_errors
from msense.io.scratch import atomic_path, scratch_folder
from msense.io.untrusted import reject_duplicate_keys

MARKER = ".done"
CHECKSUM = "seal"  # key of a JSON file's own checksum
_MAX_BYTES = 1 << 28  # of a file that is read whole
_MARKER_TYPES: Mapping[str, type] = {"size": int, "sha256": str, "made_of": str, "facts": dict}


def absolute(uri: str) -> str:
    """Return a local path as an absolute one, as workers have other working directories; other URIs are unchanged."""
    return os.path.abspath(uri.removeprefix("file://")) if is_local(uri) else uri.rstrip("/")


def join(root: str, *names: str) -> str:
    """Append names to a URI."""
    return "/".join([root.rstrip("/"), *names])


def exists(uri: str) -> bool:
    """Return whether a file or folder exists."""
    fs, path = filesystem(uri)
    with storage_errors(uri):
        return bool(fs.exists(path))


def remove(uri: str) -> None:
    """Delete a file, or a folder and its contents, if it exists."""
    fs, path = filesystem(uri)
    with storage_errors(uri, "remove"):
        if fs.exists(path):
            fs.rm(path, recursive=True)


def make_folder(uri: str) -> None:
    """Create a folder and its parents; object stores have no folders, and their client would create a bucket."""
    fs, path = filesystem(uri)
    if uri.partition("://")[0] not in OBJECT_STORES:
        with storage_errors(uri, "write"):
            fs.makedirs(path, exist_ok=True)


def read_range(uri: str, start: int, length: int) -> bytes:
    """Read `length` bytes from byte `start`."""
    if not length:
        return b""  # S3 returns the whole file for an empty range
    fs, path = filesystem(uri)
    with storage_errors(uri):
        return bytes(fs.cat_file(path, start=start, end=start + length))


def read_bytes(uri: str, most: int, ask_store: bool = True) -> bytes:
    """Read a whole file of at most `most` bytes; a local one must be a regular file, as opening a pipe would block.

    Without `ask_store`, which costs a request, the limit applies to local files only.

    Raises:
        FileNotFoundError: the file does not exist or is not a regular file.
        InputError: the file is too large.
    """
    fs, path = filesystem(uri)
    with storage_errors(uri):
        if is_local(uri):
            info = os.stat(path)
            if not stat.S_ISREG(info.st_mode):
                raise FileNotFoundError(errno.ENOENT, "not a regular file", path)
            size = info.st_size
        else:
            size = fs.size(path) if ask_store else 0
        if size > most:
            raise InputError(
                f"{display_uri(uri)} has {size} bytes, more than the limit of {most} for such a file: restore or remove it"
            )
        return bytes(fs.cat_file(path))


def read_text(uri: str, most: int = _MAX_BYTES) -> str:
    """Read a UTF-8 text file of at most `most` bytes."""
    return str(read_bytes(uri, most), encoding="utf-8")


def read_json(uri: str, shape: Mapping[str, type] | None = None) -> dict[str, Any] | None:
    """Read a file written by `write_json`; None if it is missing, incomplete, edited, corrupted or not a regular file.

    Also None if a key of `shape` is missing or its value has another type.
    """
    try:
        raw = read_bytes(uri, _MAX_BYTES, ask_store=False)
    except OSError as error:
        if _is_no_file(error):
            return None
        raise
    try:
        value = json.loads(raw, object_pairs_hook=reject_duplicate_keys)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(value, dict) and value.pop(CHECKSUM, None) == checksum(value)
    return value if valid and all(isinstance(value.get(name), kind) for name, kind in (shape or {}).items()) else None


def write_json(uri: str, value: dict[str, Any]) -> None:
    """Write a JSON object and its checksum atomically."""
    plain = json.loads(json.dumps(value))
    write_text(uri, json.dumps({**plain, CHECKSUM: checksum(plain)}, indent=1, ensure_ascii=False) + "\n")


def checksum(value: dict[str, Any]) -> str:
    """Return the checksum of a JSON object."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_text(uri: str, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    _place(uri, lambda path: path.write_text(text, encoding="utf-8"))


def publish(
    uri: str, write: Callable[[Path], Any], stats: dict[str, Any] | None = None, inputs_hash: str = ""
) -> dict[str, Any]:
    """Write a file, then its marker; return the stats in the marker.

    Args:
        uri: destination.
        write: writes the file to a local path; if it returns a dict, that is added to the stats.
        stats: JSON values.
        inputs_hash: hash of everything that the file depends on.
    """
    marker: dict[str, Any] = {}
    stats = dict(stats or {})

    def write_and_hash(path: Path) -> None:
        more = write(path)
        stats.update(more if isinstance(more, dict) else {})
        marker.update(size=path.stat().st_size, sha256=sha256_of(path))

    _place(uri, write_and_hash)
    write_json(uri + MARKER, {**marker, "made_of": inputs_hash, "facts": stats})
    return stats


def markers(folder: str) -> set[str]:
    """Return the names of the files in a folder that have a marker, without looking at the files themselves."""
    return {name.removesuffix(MARKER) for name in names(folder) if name.endswith(MARKER)}


def names(folder: str) -> list[str]:
    """Return the names in a folder; none if it does not exist."""
    fs, path = filesystem(folder)
    with storage_errors(folder):
        return [name.rpartition("/")[2] for name in fs.ls(path, detail=False, refresh=True)] if fs.exists(path) else []


def stats_of(uri: str, *, verify: bool = False, inputs_hash: str = "") -> dict[str, Any] | None:
    """Return the stats of a finished file, or None if it is invalid (no marker, wrong size or content).

    `verify` also compares the sha256, which reads the whole file; an `inputs_hash` of "" accepts any.
    """
    marker = read_json(uri + MARKER, _MARKER_TYPES)
    if marker is None or inputs_hash not in ("", marker["made_of"]) or not is_intact(uri, marker, verify=verify):
        return None
    stats: dict[str, Any] = marker["facts"]
    return stats


def is_intact(uri: str, written: dict[str, Any], *, verify: bool) -> bool:
    """Return whether a file has the `size` in bytes and, if `verify`, the `sha256` that were recorded."""
    fs, path = filesystem(uri)
    try:
        with storage_errors(uri):  # an unavailable store is not corruption
            return fs.size(path) == written["size"] and not (verify and sha256_of(uri) != written["sha256"])
    except OSError as error:
        if _is_no_file(error) or error.errno == errno.EIO:  # EIO: a bad disk
            return False
        raise


def _is_no_file(error: OSError) -> bool:
    """Return whether there is nothing, a folder or a broken link in place of a file."""
    return isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) or error.errno == errno.ELOOP


def sha256_of(file: Path | str) -> str:
    """Return the hexadecimal sha256 of a file on any storage."""
    with storage_errors(str(file)), open_file(str(file)) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def upload(file: Path, uri: str) -> None:
    """Copy a local file to a URI."""
    fs, path = filesystem(uri)
    with storage_errors(uri, "write"):
        fs.put_file(str(file), path)


def upload_folder(folder: Path, uri: str) -> None:
    """Copy a local folder to a URI, the config.json files last and that of the folder itself at the very end."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    configs = sorted((path for path in paths if path.name == "config.json"), key=lambda path: -len(path.parts))
    for path in [path for path in paths if path.name != "config.json"] + configs:
        target = join(uri, *path.relative_to(folder).parts)
        make_folder(target.rpartition("/")[0])
        upload(path, target)


def user_cache() -> Path:
    """Return the folder of what msense keeps for this user between runs, which may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msense"


def local_copy(uri: str) -> Path:
    """Return a local path to a file or folder; a remote one is copied once into the user's cache.

    The cache key contains the URI and each file's size and etag, so a changed remote is copied again.
    """
    if is_local(uri):
        return Path(absolute(uri))
    fs, path = filesystem(uri)
    if not exists(uri):
        raise InputError(f"nothing at {display_uri(uri)}: check the name and the credentials of the store")
    with storage_errors(uri):
        infos = fs.find(path, detail=True)
    tags = {name: str(info.get("ETag") or info.get("etag") or info.get("mtime")) for name, info in infos.items()}
    identity = json.dumps([(name, info.get("size"), tags[name]) for name, info in sorted(infos.items())])
    base = user_cache()
    target = base / hashlib.sha256((uri + identity).encode()).hexdigest()[:32]
    if not target.exists():
        base.mkdir(parents=True, exist_ok=True)
        with scratch_folder(base) as scratch, storage_errors(uri):
            copy = scratch / "copy"
            fs.get(path, str(copy), recursive=fs.isdir(path))
            copy.replace(target)
    return target


@contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """Yield a local path to a folder; a remote one is copied for the duration of the context."""
    if is_local(uri):
        yield Path(absolute(uri))
        return
    fs, path = filesystem(uri)
    with scratch_folder() as scratch:
        with storage_errors(uri):
            fs.get(path, str(scratch / "copy"), recursive=True)
        yield scratch / "copy"


def _place(uri: str, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: it appears complete or not at all."""
    if is_local(uri):
        target = Path(absolute(uri))
        with storage_errors(uri, "write"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(target, sync=False) as scratch:
                write(scratch)
        return
    with scratch_folder() as folder:
        with storage_errors(uri, "write", staged=True):
            write(folder / "file")
        upload(folder / "file", uri)
