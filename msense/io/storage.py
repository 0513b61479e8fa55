"""Files of a run: atomic writes to any storage, and markers that record when a file is complete.

Files are written under a temporary name and renamed (local disk), or written locally and uploaded (object store). A
file is valid only with its marker `<file>.done`, JSON with size, sha256 and statistics. JSON files include a checksum,
so that corruption is detected. Memory: one copy buffer.
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from msense.errors import InputError, MsenseError
from msense.io.filesystems import (
    display_uri,
    error_message,
    filesystem,
    has_folders,
    is_local,
    open_file,
    storage_error_types,
    store_errors,
)
from msense.io.scratch import scratch_folder, scratch_name
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
    with store_errors(uri):
        return bool(fs.exists(path))


def remove(uri: str) -> None:
    """Delete a file, or a folder and its contents, if it exists."""
    fs, path = filesystem(uri)
    with store_errors(uri, "remove"):
        if fs.exists(path):
            fs.rm(path, recursive=True)


def make_folder(uri: str) -> None:
    """Create a folder and its parents, on storage that has folders."""
    fs, path = filesystem(uri)
    if has_folders(uri):
        fs.makedirs(path, exist_ok=True)


def read_range(uri: str, start: int, length: int) -> bytes:
    """Read `length` bytes from byte `start`."""
    if not length:
        return b""  # S3 returns the whole file for an empty range
    fs, path = filesystem(uri)
    with store_errors(uri):
        return bytes(fs.cat_file(path, start=start, end=start + length))


def read_bytes(uri: str, most: int, ask_store: bool = True) -> bytes:
    """Read a whole file; a local one must be a regular file, as opening a pipe would block.

    Args:
        uri: the file.
        most: maximum size in bytes.
        ask_store: request the size from an object store first; else the limit applies to local files only.

    Raises:
        FileNotFoundError: the file does not exist or is not a regular file.
        InputError: the file is too large.
    """
    fs, path = filesystem(uri)
    with store_errors(uri):
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

    Args:
        uri: the file.
        shape: required keys and the types of their values; a mismatch counts as corruption.
    """
    try:
        value = json.loads(read_bytes(uri, _MAX_BYTES, ask_store=False), object_pairs_hook=reject_duplicate_keys)
    except (ValueError, RecursionError):
        return None
    except OSError as error:
        if _is_no_file(error):
            return None
        raise
    if not isinstance(value, dict) or value.pop(CHECKSUM, None) != checksum(value):
        return None
    if any(not isinstance(value.get(name), kind) for name, kind in (shape or {}).items()):
        return None
    return value


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
    """Write a file, then its marker.

    Args:
        uri: destination.
        write: writes the file to a local path; if it returns a dict, that is added to the stats.
        stats: stats to record with the file (JSON values).
        inputs_hash: inputs hash, of everything that the file depends on.

    Returns:
        The stats as recorded in the marker.
    """
    stats: dict[str, Any] = dict(stats or {})
    digest: dict[str, Any] = {}

    def write_and_hash(path: Path) -> None:
        more = write(path)
        if isinstance(more, dict):
            stats.update(more)
        digest["size"] = path.stat().st_size
        digest["sha256"] = sha256_of(path)

    _place(uri, write_and_hash)
    write_json(uri + MARKER, {**digest, "made_of": inputs_hash, "facts": stats})
    return stats


def markers(folder: str) -> set[str]:
    """Return the names of the files in a folder that have a marker, without looking at the files themselves."""
    return {name.removesuffix(MARKER) for name in names(folder) if name.endswith(MARKER)}


def names(folder: str) -> list[str]:
    """Return the names in a folder; none if it does not exist."""
    fs, path = filesystem(folder)
    with store_errors(folder):
        return [name.rpartition("/")[2] for name in fs.ls(path, detail=False, refresh=True)] if fs.exists(path) else []


def stats_of(uri: str, *, verify: bool = False, inputs_hash: str = "") -> dict[str, Any] | None:
    """Return the stats of a finished file, or None if it is invalid (no marker, wrong size or content).

    Args:
        uri: the file.
        verify: also compare the sha256, which reads the whole file.
        inputs_hash: required inputs hash; "" accepts any.
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
        with store_errors(uri):  # an unavailable store is not corruption
            size = fs.size(path)
        return size == written["size"] and not (verify and sha256_of_uri(uri) != written["sha256"])
    except OSError as error:
        if _is_no_file(error) or error.errno == errno.EIO:  # EIO: a bad disk
            return False
        raise


def _is_no_file(error: OSError) -> bool:
    """Return whether there is nothing, a folder or a broken link in place of a file."""
    return isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) or error.errno == errno.ELOOP


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_uri(uri: str) -> str:
    """Return the hexadecimal sha256 of a file on any storage."""
    with open_file(uri) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def upload(file: Path, uri: str) -> None:
    """Copy a local file to a URI."""
    fs, path = filesystem(uri)
    with write_errors(uri):
        fs.put_file(str(file), path)


def upload_folder(folder: Path, uri: str) -> None:
    """Copy a local folder to a URI, the config.json files last and that of the folder itself at the very end."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    configs = sorted((path for path in paths if path.name == "config.json"), key=lambda path: -len(path.parts))
    for path in [path for path in paths if path.name != "config.json"] + configs:
        target = join(uri, *path.relative_to(folder).parts)
        make_folder(target.rpartition("/")[0])
        upload(path, target)


def local_copy(uri: str) -> Path:
    """Return a local path to a file or folder; a remote one is copied once into the user's cache.

    The cache key contains the URI and each file's size and etag, so a changed remote is copied again.
    """
    if is_local(uri):
        return Path(absolute(uri))
    fs, path = filesystem(uri)
    if not exists(uri):
        raise InputError(f"nothing at {display_uri(uri)}: check the name and the credentials of the store")
    with store_errors(uri):
        infos = fs.find(path, detail=True)
    tags = {name: str(i.get("ETag") or i.get("etag") or i.get("mtime")) for name, i in infos.items()}
    identity = json.dumps([(name, i.get("size"), tags[name]) for name, i in sorted(infos.items())])
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "msense"
    target = base / hashlib.sha256((uri + identity).encode()).hexdigest()[:32]
    if not target.exists():
        base.mkdir(parents=True, exist_ok=True)
        with scratch_folder(base) as scratch, store_errors(uri):
            copy = scratch / "copy"
            fs.get(path, str(copy), recursive=fs.isdir(path))
            copy.replace(target)
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_MODE = 0o666 & ~_umask()  # at import only: reading the umask changes it for all threads


def _place(uri: str, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: it appears complete or not at all."""
    if is_local(uri):
        with write_errors(uri):
            _rename_into(Path(absolute(uri)), write)
        return
    with scratch_folder() as folder:
        with write_errors(uri, on_its_way=True):
            write(folder / "file")
        upload(folder / "file", uri)


@contextmanager
def write_errors(uri: str, on_its_way: bool = False) -> Iterator[None]:
    """Convert write errors into a MsenseError that names the file, the cause and the remedy.

    `on_its_way` marks errors of the local disk, to which the file is written before its upload.
    """
    try:
        yield
    except storage_error_types(SafetensorError) as error:
        reason = _reason(error) if on_its_way or is_local(uri) else error_message(error)
        raise MsenseError(f"cannot write {display_uri(uri)}: {reason}") from error


def _rename_into(target: Path, write: Callable[[Path], Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_name(target)
    try:
        write(scratch)
        scratch.chmod(_MODE)  # safetensors files are readable by their owner only; workers may be other users
        scratch.replace(target)
    finally:
        with suppress(OSError):  # if the folder became read-only, the next driver removes temporary files
            scratch.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """Return the cause and remedy of a failed local write; safetensors has the error number in its message only."""
    message = str(error)
    match = re.search(r"os error (\d+)", message)
    number = int(match[1]) if match else getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left ({message}); free some space, or choose an --output with more"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission ({message}); allow this user to write there"
    return message or type(error).__name__
