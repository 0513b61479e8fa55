"""Files of a run: URIs in, bytes out, and a done-marker that says a file is whole.

Every output of a stage is written to a temporary name (renamed on a local disk, uploaded from local scratch on an
object store) and counts only once its marker `<file>.done` exists: JSON with size, sha256 and the stage's facts. Every
JSON file carries its own hash, so that a byte that flipped is noticed. Holds nothing in memory beyond one copy buffer.
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

import numpy as np
from safetensors import SafetensorError

from msense.artefact import unique_keys
from msense.errors import BadInput, MsenseError
from msense.scratch import scratch_folder, scratch_name
from msense.stores import (
    call_errors,
    display_uri,
    filesystem,
    has_folders,
    is_local,
    open_file,
    reason_of,
    told_by_store,
)

MARKER = ".done"
SEAL = "seal"  # key of a JSON file's own hash
_BUFFER = 1 << 20
_LARGEST = 1 << 28  # bytes of a file that is read whole
_MARK: Mapping[str, type] = {"size": int, "sha256": str, "made_of": str, "facts": dict}


def absolute(uri: str) -> str:
    """Make a local path absolute (workers have other working directories); other URIs stay as they are."""
    return os.path.abspath(uri.removeprefix("file://")) if is_local(uri) else uri.rstrip("/")


def join(root: str, *names: str) -> str:
    """Append names to a URI."""
    return "/".join([root.rstrip("/"), *names])


def exists(uri: str) -> bool:
    """Tell whether a file or folder is there."""
    fs, path = filesystem(uri)
    with told_by_store(uri):
        return bool(fs.exists(path))


def remove(uri: str) -> None:
    """Delete a file or folder and all in it; nothing there is no error."""
    fs, path = filesystem(uri)
    with told_by_store(uri, "remove"):
        if fs.exists(path):
            fs.rm(path, recursive=True)


def make_folder(uri: str) -> None:
    """Create a folder and its parents, where there are such things."""
    fs, path = filesystem(uri)
    if has_folders(uri):
        fs.makedirs(path, exist_ok=True)


def read_range(uri: str, start: int, length: int) -> bytes:
    """Read `length` bytes from byte `start` on."""
    if not length:
        return b""  # S3 takes an empty range for the whole file
    fs, path = filesystem(uri)
    with told_by_store(uri):
        return bytes(fs.cat_file(path, start=start, end=start + length))


def read_bytes(uri: str, most: int, ask_store: bool = True) -> bytes:
    """Read a whole file, of a local disk only a plain one: opening a pipe would wait for ever.

    Args:
        uri: the file.
        most: bytes that it may have.
        ask_store: ask a store for the size first, one more request; else only local files are held to `most`.

    Raises:
        FileNotFoundError: there is none, or no plain one.
        BadInput: it is larger.
    """
    fs, path = filesystem(uri)
    with told_by_store(uri):
        if is_local(uri):
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                raise FileNotFoundError(errno.ENOENT, "no plain file", path)
            size = found.st_size
        else:
            size = fs.size(path) if ask_store else 0
        if size > most:
            raise BadInput(
                f"{display_uri(uri)} has {size} bytes, of such a file at most {most} are read: restore or remove it"
            )
        return bytes(fs.cat_file(path))


def read_text(uri: str, most: int = _LARGEST) -> str:
    """Read a UTF-8 text file of at most so many bytes."""
    return str(read_bytes(uri, most), encoding="utf-8")


def read_json(uri: str, shape: Mapping[str, type] | None = None) -> dict[str, Any] | None:
    """Read what `write_json` wrote; None when the file is missing, torn, edited or damaged, or no plain file.

    Args:
        uri: the file.
        shape: names that must be in it, and the types of their values; else it counts as damaged.
    """
    try:
        value = json.loads(read_bytes(uri, _LARGEST, ask_store=False), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        return None
    except OSError as error:
        if _is_no_file(error):
            return None
        raise
    if not isinstance(value, dict) or value.pop(SEAL, None) != seal(value):
        return None
    if any(not isinstance(value.get(name), kind) for name, kind in (shape or {}).items()):
        return None
    return value


def write_json(uri: str, value: dict[str, Any]) -> None:
    """Write a JSON object and its own hash in one atomic step."""
    plain = json.loads(json.dumps(value))
    write_text(uri, json.dumps({**plain, SEAL: seal(plain)}, indent=1, ensure_ascii=False) + "\n")


def seal(value: dict[str, Any]) -> str:
    """Return the hash by which a JSON object is known to be as it was written."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_text(uri: str, text: str) -> None:
    """Write a UTF-8 text file in one atomic step."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    _place(uri, write)


def publish(
    uri: str, write: Callable[[Path], Any], facts: dict[str, Any] | None = None, made_of: str = ""
) -> dict[str, Any]:
    """Write a file through `write(local path)`, then its done-marker.

    Args:
        uri: where the file goes.
        write: writes the whole file to the local path it is given; a dict it returns is added to the facts.
        facts: what the stage wants to remember about the file (JSON values).
        made_of: the hash of all that the file depends on.

    Returns:
        The facts as the marker holds them.
    """
    found: dict[str, Any] = dict(facts or {})
    digest: dict[str, Any] = {}

    def write_and_hash(path: Path) -> None:
        more = write(path)
        if isinstance(more, dict):
            found.update(more)
        digest["size"] = path.stat().st_size
        digest["sha256"] = sha256_of(path)

    _place(uri, write_and_hash)
    write_json(uri + MARKER, {**digest, "made_of": made_of, "facts": found})
    return found


def markers(folder: str) -> set[str]:
    """Return the names of the files in a folder that have a done-marker, the files themselves unseen."""
    return {name.removesuffix(MARKER) for name in names(folder) if name.endswith(MARKER)}


def names(folder: str) -> list[str]:
    """Return the names of all that is in a folder; none if it is not there."""
    fs, path = filesystem(folder)
    with told_by_store(folder):
        return [name.rpartition("/")[2] for name in fs.ls(path, detail=False, refresh=True)] if fs.exists(path) else []


def facts_of(uri: str, *, verify: bool = False, made_of: str = "") -> dict[str, Any] | None:
    """Return the facts of a finished file, or None when it does not count (no marker, wrong size, wrong bytes).

    Args:
        uri: the file.
        verify: also compare the sha256 (reads the whole file).
        made_of: what the file must have been made of; "" = anything.
    """
    marker = read_json(uri + MARKER, _MARK)
    if marker is None or made_of not in ("", marker["made_of"]) or not is_whole(uri, marker, verify=verify):
        return None
    facts: dict[str, Any] = marker["facts"]
    return facts


def is_whole(uri: str, written: dict[str, Any], *, verify: bool) -> bool:
    """Tell whether a file is what was written: `size` in bytes and, if `verify`, its `sha256`."""
    fs, path = filesystem(uri)
    try:
        with told_by_store(uri):  # a store that fails is no damage
            size = fs.size(path)
        return size == written["size"] and not (verify and sha256_of_uri(uri) != written["sha256"])
    except OSError as error:
        if _is_no_file(error) or error.errno == errno.EIO:  # the last: a bad disk
            return False
        raise


def _is_no_file(error: OSError) -> bool:
    """Tell whether there is nothing, a folder or a link that leads nowhere where a file should be."""
    return isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) or error.errno == errno.ELOOP


def sha256_of(path: Path) -> str:
    """Return the sha256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_uri(uri: str) -> str:
    """Return the sha256 of any file, in hexadecimal, reading it in pieces."""
    digest = hashlib.sha256()
    with open_file(uri) as file:
        while chunk := file.read(_BUFFER):
            digest.update(chunk)
    return digest.hexdigest()


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays as one safetensors file without free metadata."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def load_arrays(uri: str, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """Read arrays of a safetensors file: all, or those named."""
    from safetensors import safe_open

    if not is_local(uri):
        with scratch_folder() as scratch:
            fs, path = filesystem(uri)
            with told_by_store(uri):
                fs.get_file(path, f"{scratch}/file")
            return load_arrays(f"{scratch}/file", names)
    with safe_open(absolute(uri), framework="numpy") as file:
        return {name: file.get_tensor(name) for name in names or file.keys()}


def upload(file: Path, uri: str) -> None:
    """Copy a local file to a URI."""
    fs, path = filesystem(uri)
    with writing(uri):
        fs.put_file(str(file), path)


def upload_folder(folder: Path, uri: str) -> None:
    """Copy a local folder to a URI, every config.json after the other files, that of the folder itself last."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in sorted(
        paths, key=lambda path: (path.name == "config.json", -len(path.parts) * (path.name == "config.json"))
    ):
        target = join(uri, *path.relative_to(folder).parts)
        make_folder(target.rpartition("/")[0])
        upload(path, target)


def local_copy(uri: str) -> Path:
    """Return a local path to a file or folder; a remote one is copied once into the cache of this user.

    The cache key holds the URI and each file's size and etag, so a changed remote is copied anew.
    """
    if is_local(uri):
        return Path(absolute(uri))
    fs, path = filesystem(uri)
    if not exists(uri):
        raise BadInput(f"nothing at {display_uri(uri)}: check the name and the credentials of the store")
    with told_by_store(uri):
        infos = fs.find(path, detail=True)
    identity = json.dumps(
        [
            (name, i.get("size"), str(i.get("ETag") or i.get("etag") or i.get("mtime")))
            for name, i in sorted(infos.items())
        ]
    )
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "msense"
    target = base / hashlib.sha256((uri + identity).encode()).hexdigest()[:32]
    if not target.exists():
        base.mkdir(parents=True, exist_ok=True)
        with scratch_folder(base) as scratch, told_by_store(uri):
            copy = scratch / "copy"
            fs.get(path, str(copy), recursive=fs.isdir(path))
            copy.replace(target)
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_MODE = 0o666 & ~_umask()  # once: to look at it is to change it for all threads


def _place(uri: str, write: Callable[[Path], Any]) -> None:
    """Write a file so that it appears whole or not at all.

    Raises:
        MsenseError: it could not be written; says why, and what to do.
    """
    if is_local(uri):
        with writing(uri):
            _rename_into(Path(absolute(uri)), write)
        return
    with scratch_folder() as folder:
        with writing(uri, on_its_way=True):
            write(folder / "file")
        upload(folder / "file", uri)


@contextmanager
def writing(uri: str, on_its_way: bool = False) -> Iterator[None]:
    """Say what could not be written, why, and what to do, where the system only gives an error number.

    Args:
        uri: the file.
        on_its_way: it is still being written to the local disk, to be uploaded from there.

    Raises:
        MsenseError: in place of the system's error.
    """
    try:
        yield
    except call_errors(SafetensorError) as error:
        reason = _reason(error) if on_its_way or is_local(uri) else reason_of(error)
        raise MsenseError(f"cannot write {display_uri(uri)}: {reason}") from error


def _rename_into(target: Path, write: Callable[[Path], Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_name(target)
    try:
        write(scratch)
        scratch.chmod(_MODE)  # safetensors writes for its owner alone; workers may be other users
        scratch.replace(target)
    finally:
        with suppress(OSError):  # a folder that may not be written to any more; the next driver sweeps
            scratch.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """Say why a write failed and what to do; safetensors tells the system's error number in its text only."""
    told = str(error)
    found = re.search(r"os error (\d+)", told)
    number = int(found[1]) if found else getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left ({told}); free some or give an --output with more room"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission ({told}); allow this user to write there"
    return told or type(error).__name__
