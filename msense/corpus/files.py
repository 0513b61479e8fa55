"""Listing of corpus files: URIs (fsspec files, folders and globs, `hf://` datasets, `pydocs`) to `SourceFile`s.

The order depends on names only. Memory: about 300 bytes per file.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from msense.corpus.pydocs import choose_packages, package_version, source_files
from msense.errors import InputError, MsenseError
from msense.io import filesystems
from msense.io.filesystems import display_uri, is_credentials_error, s3_error_message, s3_errors
from msense.text import first_line, is_utf8

FORMATS = ("txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "csv")
ACCEPTED = (
    "*.txt and *.jsonl (also .gz and .zst), *.parquet, *.csv, a folder or glob of those, "
    "hf://dataset[:config][:split], pydocs[:package,...]"
)
_CONTENT_KEYS = ("ETag", "etag", "md5Hash", "md5", "blob_id")
_TIME_KEYS = ("mtime", "LastModified", "updated", "created")
_LISTING = "a corpus"  # `form` passed to `reading` while files are only listed


@dataclass(frozen=True)
class SourceFile:
    """A corpus file.

    Attributes:
        uri: location, possibly with credentials: print it through `display_uri` only.
        name: path below the corpus root, prefixed with the root's base name if there are several corpora.
        format: one of `FORMATS`, or "pydocs" for a package.
        size: in bytes.
        fingerprint: changes with the content; contains no path.

    Example:
        >>> (file,) = list_files(["data/a.jsonl"])
        >>> file.name, file.format
        ('a.jsonl', 'jsonl')
    """

    uri: str
    name: str
    format: str
    size: int
    fingerprint: str


def list_files(uris: Sequence[str]) -> list[SourceFile]:
    """Return the files of a corpus, sorted by name, whatever the order of the URIs.

    Folders and globs are read recursively. Names that start with a dot, links to folders and files of unknown suffix
    are skipped.

    Raises:
        InputError: a URI is unsupported, missing, unreadable or without readable files; a package is not installed; two
            files have the same name.
    """
    files: list[SourceFile] = []
    for uri in uris:
        pydocs = uri == "pydocs" or uri.startswith("pydocs:")
        root, listed = (_list_pydocs if pydocs else _list_hub if uri.startswith("hf://") else _list_storage)(uri)
        prefix = f"{root}/" if len(uris) > 1 and root else ""
        files += [replace(file, name=prefix + file.name) for file in listed]
    by_name: dict[str, SourceFile] = {}
    for file in files:
        if not is_utf8(file.name):
            raise InputError(f"{display_uri(file.uri)}: the name, part of document ids, is not UTF-8; rename it")
        other = by_name.setdefault(file.name, file)
        if other is not file and other.uri == file.uri:
            raise InputError(f"{display_uri(file.uri)}: the corpus contains this file twice; list it once")
        if other is not file:
            raise InputError(
                f"two files of the corpus have the name {file.name!r}, from which document ids are made: "
                f"{display_uri(other.uri)} and {display_uri(file.uri)}; rename a folder, or use one common folder"
            )
    return sorted(files, key=lambda file: file.name)


def current_fingerprint(uri: str) -> str | None:
    """Return the current size and fingerprint of a corpus file; None for `pydocs` and the Hub, which pin versions."""
    if uri.startswith(("pydocs", "hf://")):
        return None
    with read_errors(uri, _LISTING):
        filesystem, path = corpus_filesystem(uri)
        filesystem.invalidate_cache()
        info = filesystem.info(path)
    return f"{info['size'] or 0} {_fingerprint(info)}"


def corpus_filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """Return the fsspec filesystem of a URI and the path on it; like `stores.filesystem`, plus the Hub."""
    if uri.startswith("hf://"):
        return hub_filesystem(), uri.removeprefix("hf://")
    return filesystems.filesystem(uri)


def hub_filesystem() -> AbstractFileSystem:
    """Return the filesystem of the Hugging Face Hub."""
    from huggingface_hub import HfFileSystem  # slow to import, and few corpora need it

    return HfFileSystem()


@contextmanager
def read_errors(uri: str, form: str) -> Iterator[None]:
    """Convert errors raised while reading the file `uri` as `form` into errors that name the file.

    Raises:
        InputError: the file is missing, not readable, or corrupted.
        MsenseError: the connection was lost.
    """
    shown = display_uri(uri)
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{shown}: no such file or folder; check the path, and the scheme of a remote one") from error
    except PermissionError as error:
        raise InputError(
            f"{shown}: no permission to read it ({first_line(error)}); grant access, or use other credentials"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise MsenseError(
            f"{shown}: the connection was lost ({first_line(error)}); run the same command again"
        ) from error
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        remedy = "check the path" if form == _LISTING else "it is corrupted or of another format: restore or exclude it"
        raise InputError(f"{shown}: cannot be read as {form} ({first_line(error)}); {remedy}") from error
    except s3_errors() as error:
        raise (InputError if is_credentials_error(error) else MsenseError)(
            f"{shown}: {s3_error_message(error)}"
        ) from error


def _list_storage(uri: str) -> tuple[str, list[SourceFile]]:
    """Return the base name of the root, and the files, of a file, folder or glob."""
    with read_errors(uri, _LISTING):
        filesystem, path = corpus_filesystem(uri)
    local = isinstance(filesystem, LocalFileSystem)
    if local:
        uri = path = os.path.abspath(path)  # workers have other working directories
    with read_errors(uri, _LISTING):
        try:
            info = filesystem.info(path)
        except FileNotFoundError:
            # In an HTTP URL "?" starts the query.
            if not re.search(r"[*[]" if uri.startswith(("http://", "https://")) else r"[*?[]", path):
                raise
            info = {"type": "glob"}
        if info["type"] == "file":
            return _one_file(uri, info)
        if info["type"] == "other":
            raise _special_file(uri)
        if info["type"] == "glob":
            root = _parent(re.split(r"[*?[]", uri)[0])
            found = filesystem.glob(path, detail=True)
            folders = [name for name, info in found.items() if info["type"] == "directory"]
        else:
            root = uri.rstrip("/")
            found, folders = {}, [path]
        for folder in folders:
            found |= filesystem.find(folder, detail=True)
        for folder in ([root, *folders] if "**" in path else folders) if local else []:
            _check_listable(folder)
        files = _readable(filesystem, root, found)
    if not files:
        raise InputError(f"{display_uri(uri)}: no readable file there; accepted are {ACCEPTED}")
    return _base_name(display_uri(root)), files


def _readable(filesystem: AbstractFileSystem, root: str, found: dict[str, dict[str, Any]]) -> list[SourceFile]:
    """Return the files of a listing with a known suffix; raise if one of them is a pipe or similar."""
    files = []
    root_length = len(root) if isinstance(filesystem, LocalFileSystem) else len(corpus_filesystem(root)[1])
    for name, info in found.items():
        relative = name[root_length:].lstrip("/")
        form = _format_of(relative)
        if not form or info["type"] == "directory" or re.search(r"(^|/)\.", relative):
            continue
        if info.get("islink"):  # the target's size and time count
            with read_errors(name, _LISTING):
                info = filesystem.info(name)
        if info["type"] == "other":
            raise _special_file(name)
        if info["type"] != "directory":
            files.append(SourceFile(f"{root}/{relative}", relative, form, info["size"] or 0, _fingerprint(info)))
    return files


def _special_file(uri: str) -> InputError:
    return InputError(f"{display_uri(uri)}: a pipe, socket or device, not a file or folder; exclude it")


def _check_listable(folder: str) -> None:
    """Raise if a local folder, or one below it, cannot be listed: fsspec skips it silently."""

    def fail(error: OSError) -> None:
        raise error

    for _ in os.walk(folder or "/", onerror=fail):
        pass


def _one_file(uri: str, info: dict[str, Any]) -> tuple[str, list[SourceFile]]:
    """Return the base name of the folder, and the file itself, of a file named directly."""
    name = _base_name(display_uri(uri) if uri.startswith(("http://", "https://")) else uri)
    form = _format_of(name)
    if not form:
        raise InputError(f"{display_uri(uri)}: unsupported file format; accepted are {ACCEPTED}")
    return _base_name(display_uri(_parent(uri))), [SourceFile(uri, name, form, info["size"] or 0, _fingerprint(info))]


def _list_pydocs(uri: str) -> tuple[str, list[SourceFile]]:
    """Return "pydocs" and a SourceFile for each package."""
    files = []
    for package in choose_packages([name for name in uri.removeprefix("pydocs").strip(":").split(",") if name]):
        sources = source_files(package)
        size = sum(path.stat().st_size for _, path in sources)
        files.append(SourceFile(f"pydocs:{package}", package, "pydocs", size, package_version(package, sources)))
    return "pydocs", files


def _list_hub(uri: str) -> tuple[str, list[SourceFile]]:
    """Return the name of a Hub dataset and the parquet files to which the Hub converted one of its splits."""
    from huggingface_hub import errors

    shown = display_uri(uri)
    parts = uri.removeprefix("hf://").split(":")
    if len(parts) > 3 or not parts[0] or "@" in uri:
        raise InputError(f"{shown}: not a dataset name; write hf://dataset[:config][:split]")
    dataset, config, split = parts + [""] * (3 - len(parts))
    filesystem = hub_filesystem()
    root = f"datasets/{dataset}@refs%2Fconvert%2Fparquet"
    try:
        configs = _folders(filesystem, root)
        config = config or (configs[0] if len(configs) == 1 else "default")
        if config not in configs:
            raise InputError(
                f"{shown}: no config {config!r}; choose one of {', '.join(configs)}: hf://{dataset}:CONFIG"
            )
        splits = _folders(filesystem, f"{root}/{config}")
        split = split or "train"
        if split not in splits:
            raise InputError(
                f"{shown}: no split {split!r}; choose one of {', '.join(splits)}: hf://{dataset}:{config}:SPLIT"
            )
        infos = filesystem.ls(f"{root}/{config}/{split}", detail=True, expand_info=True)
    except (OSError, ValueError, errors.HTTPError) as error:
        raise InputError(
            f"{shown}: the Hub provides no parquet files for it ({first_line(error)}); check owner/name and the network; "
            "log in to reach a private or gated dataset: hf auth login"
        ) from error
    files = []
    for info in infos:
        name = f"{config}/{split}/{_base_name(info['name'])}"
        if name.endswith(".parquet"):
            files.append(SourceFile(f"hf://{root}/{name}", name, "parquet", info["size"], _fingerprint(info)))
    if not files:
        raise InputError(f"{shown}: the Hub has no parquet files for it (yet); use its original files: {ACCEPTED}")
    return _base_name(dataset), files


def _folders(filesystem: AbstractFileSystem, path: str) -> list[str]:
    infos = filesystem.ls(path, detail=True)
    return sorted(_base_name(info["name"]) for info in infos if info["type"] == "directory")


def _fingerprint(info: dict[str, Any]) -> str:
    """Return the content hash (and commit) in an fsspec listing if the store has one, else the modification time."""
    commit = getattr(info.get("last_commit"), "oid", None)
    content = next((str(info[key]).strip('"') for key in _CONTENT_KEYS if info.get(key)), None)
    changed = next((str(info[key]) for key in _TIME_KEYS if info.get(key)), None)
    return " ".join(part for part in (commit, content or changed) if part) or "unknown"


def _format_of(name: str) -> str:
    return next((form for form in FORMATS if name.lower().endswith(f".{form}")), "")


def _parent(uri: str) -> str:
    scheme, mark, path = uri.rpartition("://")
    return scheme + mark + path.rpartition("/")[0]


def _base_name(uri: str) -> str:
    return uri.rpartition("://")[2].rstrip("/").rpartition("/")[2]
