"""Files of a run: URIs in, bytes out, and a done-marker that says a file is whole.

Every output of a stage is written to a temporary name (renamed on a local disk, uploaded from local scratch on an
object store) and counts only once its marker `<file>.done` exists: JSON with size, sha256 and the stage's facts.
Holds nothing in memory beyond one copy buffer.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec import AbstractFileSystem

from msense.errors import BadInput

MARKER = ".done"
_BUFFER = 1 << 20
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """Return the fsspec filesystem of a URI and the path on it; a plain path is local.

    Raises:
        BadInput: an unknown scheme, or one whose package is not installed.
    """
    scheme = uri.partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        remedy = f"pip install {_PACKAGES[scheme]}" if scheme in _PACKAGES else str(error)
        raise BadInput(f"{display_uri(uri)}: {scheme}:// needs a package that is not installed: {remedy}") from error
    except ValueError as error:
        raise BadInput(f"{display_uri(uri)}: {error}; give a local path, or s3://, gs:// or hf://") from error
    return fs, path


def display_uri(uri: str) -> str:
    """Return a URI fit for manifests, logs and cards: without user, password, query and fragment."""
    if "://" not in uri:
        return uri  # a local path may hold any character
    return re.split(r"[?#]", re.sub(r"://[^/]*@", "://", uri))[0]


def is_local(uri: str) -> bool:
    """Tell whether a URI names the local disk."""
    return "://" not in uri or uri.startswith("file://")


def absolute(uri: str) -> str:
    """Make a local path absolute (workers have other working directories); other URIs stay as they are."""
    return os.path.abspath(uri.removeprefix("file://")) if is_local(uri) else uri.rstrip("/")


def join(root: str, *names: str) -> str:
    """Append names to a URI."""
    return "/".join([root.rstrip("/"), *names])


def exists(uri: str) -> bool:
    """Tell whether a file or folder is there."""
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def remove(uri: str) -> None:
    """Delete a file or folder and all in it; nothing there is no error."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def make_folder(uri: str) -> None:
    """Create a folder and its parents."""
    fs, path = filesystem(uri)
    fs.makedirs(path, exist_ok=True)


def read_range(uri: str, start: int, length: int) -> bytes:
    """Read `length` bytes from byte `start` on."""
    fs, path = filesystem(uri)
    return bytes(fs.cat_file(path, start=start, end=start + length))


def read_text(uri: str) -> str:
    """Read a UTF-8 text file."""
    fs, path = filesystem(uri)
    return str(fs.cat_file(path), encoding="utf-8")


def read_json(uri: str) -> dict[str, Any] | None:
    """Read a JSON object; None when the file is missing or is not one (a torn write)."""
    fs, path = filesystem(uri)
    try:
        value = json.loads(fs.cat_file(path))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(uri: str, value: dict[str, Any]) -> None:
    """Write a JSON object in one atomic step."""
    write_text(uri, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(uri: str, text: str) -> None:
    """Write a UTF-8 text file in one atomic step."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    _place(uri, write)


def publish(uri: str, write: Callable[[Path], Any], facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write a file through `write(local path)`, then its done-marker.

    Args:
        uri: where the file goes.
        write: writes the whole file to the local path it is given; a dict it returns is added to the facts.
        facts: what the stage wants to remember about the file (JSON values).

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
    write_json(uri + MARKER, {**digest, "facts": found})
    return found


def facts_of(uri: str, *, verify: bool = False) -> dict[str, Any] | None:
    """Return the facts of a finished file, or None when it does not count (no marker, wrong size, wrong bytes).

    Args:
        uri: the file.
        verify: also compare the sha256 (reads the whole file).
    """
    marker = read_json(uri + MARKER)
    if marker is None or "facts" not in marker:
        return None
    fs, path = filesystem(uri)
    try:
        if fs.size(path) != marker.get("size"):
            return None
        if verify and sha256_of_uri(uri) != marker.get("sha256"):
            return None
    except FileNotFoundError:
        return None
    facts: dict[str, Any] = marker["facts"]
    return facts


def sha256_of(path: Path) -> str:
    """Return the sha256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_uri(uri: str) -> str:
    """Return the sha256 of any file, in hexadecimal, reading it in pieces."""
    fs, path = filesystem(uri)
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
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
        with tempfile.TemporaryDirectory(prefix="msense-") as scratch:
            fs, path = filesystem(uri)
            fs.get_file(path, f"{scratch}/file")
            return load_arrays(f"{scratch}/file", names)
    with safe_open(absolute(uri), framework="numpy") as file:
        return {name: file.get_tensor(name) for name in names or file.keys()}


def upload(file: Path, uri: str) -> None:
    """Copy a local file to a URI."""
    fs, path = filesystem(uri)
    fs.put_file(str(file), path)


def local_copy(uri: str) -> Path:
    """Return a local path to a file or folder; a remote one is copied once into the cache of this user.

    The cache key holds the URI and each file's size and etag, so a changed remote is copied anew.
    """
    if is_local(uri):
        return Path(absolute(uri))
    fs, path = filesystem(uri)
    if not fs.exists(path):
        raise BadInput(f"nothing at {display_uri(uri)}: check the name and the credentials of the store")
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
        with tempfile.TemporaryDirectory(dir=base) as scratch:
            copy = Path(scratch) / "copy"
            fs.get(path, str(copy), recursive=fs.isdir(path))
            copy.replace(target)
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _place(uri: str, write: Callable[[Path], Any]) -> None:
    """Write a file so that it appears whole or not at all."""
    if is_local(uri):
        target = Path(absolute(uri))
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            write(scratch)
            scratch.chmod(0o666 & ~_umask())  # safetensors writes for its owner alone; workers may be other users
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="msense-") as folder:
        local = Path(folder) / "file"
        write(local)
        upload(local, uri)


@dataclass(frozen=True)
class RunFolder:
    """Names of all files in a run folder; nobody else joins strings."""

    root: str

    @property
    def manifest(self) -> str:
        """The config and the fingerprints of everything that the results depend on."""
        return join(self.root, "manifest.json")

    @property
    def lock(self) -> str:
        """Held by the driver while it works (local disks)."""
        return join(self.root, ".lock")

    @property
    def summary(self) -> str:
        """What the last driver did: seconds and counts a stage, its peak memory."""
        return join(self.root, "summary.json")

    @property
    def bad_documents(self) -> str:
        """The first hundred bad documents of each reason, one JSON object a line."""
        return join(self.root, "bad_documents.jsonl")

    @property
    def tokenizer(self) -> str:
        """The teacher's tokenizer, as one tokenizer.json."""
        return join(self.root, "tokenizer.json")

    @property
    def passages(self) -> str:
        """Folder of stage 1."""
        return join(self.root, "passages")

    @property
    def plan(self) -> str:
        """Folder of stage 2."""
        return join(self.root, "plan")

    @property
    def thresholds(self) -> str:
        """Per token: threshold key, count in the corpus, stored occurrences."""
        return join(self.plan, "plan.safetensors")

    @property
    def blocks(self) -> str:
        """Per row group of the passages files: what the teacher must read of it."""
        return join(self.plan, "blocks.parquet")

    @property
    def duplicates(self) -> str:
        """Passages that `--dedup` drops: piece, block, row."""
        return join(self.plan, "duplicates.safetensors")

    @property
    def units(self) -> str:
        """How many units and shards the plan was cut into."""
        return join(self.plan, "units.json")

    @property
    def occurrences(self) -> str:
        """Folder of stage 3."""
        return join(self.root, "occurrences")

    @property
    def offsets(self) -> str:
        """Where each shard's rows lie in each unit: int64 [units, shards + 1]."""
        return join(self.occurrences, "index.safetensors")

    @property
    def centroids(self) -> str:
        """Folder of stage 4."""
        return join(self.root, "centroids")

    @property
    def contexts(self) -> str:
        """Folder of the exemplars' contexts, a file a unit, before they are brought together."""
        return join(self.root, "contexts")

    @property
    def dictionary(self) -> str:
        """Folder of stage 5."""
        return join(self.root, "dictionary")

    @property
    def contexts_index(self) -> str:
        """Places of all exemplars, a row group a unit."""
        return join(self.contexts, "index.parquet")

    @property
    def finished(self) -> str:
        """There once the dictionary is whole; the facts of the whole run."""
        return join(self.root, "finished.json")

    def passages_file(self, piece: int) -> str:
        """Passages of one piece of the corpus."""
        return join(self.passages, f"{piece:06d}.parquet")

    def bad_file(self, piece: int) -> str:
        """The first bad documents of one piece."""
        return join(self.passages, f"{piece:06d}.bad.json")

    def unit_file(self, unit: int) -> str:
        """Occurrences of one unit."""
        return join(self.occurrences, f"{unit:06d}.records")

    def shard_file(self, shard: int) -> str:
        """Centroids of one shard of token ids."""
        return join(self.centroids, f"{shard:06d}.safetensors")

    def token_file(self, token: int) -> str:
        """Centroids of one token that was cut into parts."""
        return join(self.centroids, f"token-{token:08d}.safetensors")

    def round_file(self, token: int) -> str:
        """Centroids of such a token after its latest round: the resume point."""
        return join(self.centroids, f"token-{token:08d}-round.safetensors")

    def contexts_file(self, unit: int) -> str:
        """Contexts of the exemplars that lie in one unit."""
        return join(self.contexts, f"{unit:06d}.parquet")
