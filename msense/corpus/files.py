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
from msense.io.filesystems import display_uri, error_message, is_credentials_error, storage_error_types
from msense.text import first_line, is_utf8

FORMATS = ("txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "csv", "csv.gz", "csv.zst")
ACCEPTED = (
    "*.txt, *.jsonl and *.csv (also .gz and .zst), *.parquet, a folder or glob of those, "
    "hf://dataset[:config][:split], pydocs[:package,...]"
)
_CONTENT_KEYS = ("ETag", "etag", "md5Hash", "md5", "blob_id")
_TIME_KEYS = ("mtime", "LastModified", "updated", "created")
_HIDDEN = re.compile(r"(^|/)(\.|_(?![^/]*=[^/]*/))")  # as in Spark, pyarrow and datasets; `_key=value/` is a partition
_LISTING = "a corpus"  # `form` of `read_errors` while files are only listed


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

    Folders and globs are read recursively. Skipped are names that begin with a dot or an underscore (but not `_key=value`),
    as other readers of data sets do, links to folders, and files of unknown suffix.

    Raises:
        InputError: a URI is unsupported, missing, unreadable or without readable files; a package is not installed; two
            files have the same name.
    """
    by_name: dict[str, SourceFile] = {}
    for uri in uris:
        pydocs = uri == "pydocs" or uri.startswith("pydocs:")
        root, listed = (_list_pydocs if pydocs else _list_hub if uri.startswith("hf://") else _list_storage)(uri)
        prefix = f"{root}/" if len(uris) > 1 and root else ""
        for file in listed:
            _add_file(by_name, replace(file, name=prefix + file.name))
    return sorted(by_name.values(), key=lambda file: file.name)


def _add_file(by_name: dict[str, SourceFile], file: SourceFile) -> None:
    """Add a file, whose name must be unique and UTF-8, as document ids start with it."""
    shown = display_uri(file.uri)
    if not is_utf8(file.name):
        raise InputError(f"{shown}: the name, part of document ids, is not UTF-8; rename it")
    if (other := by_name.setdefault(file.name, file)) is file:
        return
    if other.uri == file.uri:
        raise InputError(f"{shown}: the corpus contains this file twice; list it once")
    raise InputError(
        f"two files of the corpus have the name {file.name!r}, from which document ids are made: {display_uri(other.uri)} "
        f"and {shown}; rename a folder, or use one common folder"
    )


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
    """Return the fsspec filesystem of a URI and the path on it; like `filesystems.filesystem`, plus the Hub."""
    return (hub_filesystem(), uri.removeprefix("hf://")) if uri.startswith("hf://") else filesystems.filesystem(uri)


def hub_filesystem() -> AbstractFileSystem:
    """Return the filesystem of the Hugging Face Hub."""
    from huggingface_hub import HfFileSystem  # slow to import, and few corpora need it

    return HfFileSystem()


@contextmanager
def read_errors(uri: str, form: str) -> Iterator[None]:
    """Convert errors raised while reading the file `uri` as `form` into errors that name the file.

    Raises:
        InputError: the file is missing, not readable, or corrupted.
        MsenseError: the connection was lost, or the store is unavailable.
    """
    try:
        yield
    except storage_error_types(pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise _read_error(error, display_uri(uri), form) from error


def _read_error(error: Exception, shown: str, form: str) -> MsenseError:
    reason = first_line(error)
    match error:
        case FileNotFoundError():
            return InputError(f"{shown}: no such file or folder; check the path, and the scheme of a remote one")
        case PermissionError():
            return InputError(f"{shown}: no permission to read it ({reason}); grant access, or use other credentials")
        case ConnectionError() | TimeoutError():
            return MsenseError(f"{shown}: the connection was lost ({reason}); run the same command again")
        case OSError() | pa.ArrowInvalid() | pa.ArrowNotImplementedError():
            corrupted = "it is corrupted or of another format: restore, convert or exclude it"
            remedy = "check the path" if form == _LISTING else corrupted
            return InputError(f"{shown}: cannot be read as {form} ({reason}); {remedy}")
    return (InputError if is_credentials_error(error) else MsenseError)(f"{shown}: {error_message(error)}")


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
        root, infos, folders = uri.rstrip("/"), {}, [path]
        if info["type"] == "glob":
            root = _parent(re.split(r"[*?[]", uri)[0])
            infos = filesystem.glob(path, detail=True)
            folders = [name for name, info in infos.items() if info["type"] == "directory"]
        for folder in folders:
            infos |= filesystem.find(folder, detail=True)
        for folder in ([root, *folders] if "**" in path else folders) if local else []:
            _check_listable(folder)
        files = _readable(filesystem, root, infos)
    if not files:
        raise InputError(
            f"{display_uri(uri)}: no readable file there; accepted are {ACCEPTED}; names that begin with . or _ are skipped"
        )
    return _base_name(display_uri(root)), files


def _readable(filesystem: AbstractFileSystem, root: str, infos: dict[str, dict[str, Any]]) -> list[SourceFile]:
    """Return the files of a listing with a known suffix; raise if one of them is a pipe or similar."""
    files = []
    root_length = len(root) if isinstance(filesystem, LocalFileSystem) else len(corpus_filesystem(root)[1])
    for name, info in infos.items():
        relative = name[root_length:].lstrip("/")
        form = _format_of(relative)
        if not form or info["type"] == "directory" or _HIDDEN.search(relative):
            continue
        if info.get("islink"):  # the target's size and time count
            with read_errors(name, _LISTING):
                info = filesystem.info(name)
        if info["type"] == "other":
            raise _special_file(name)
        if info["type"] != "directory":
            files.append(_source_file(f"{root}/{relative}", relative, form, info))
    return files


def _source_file(uri: str, name: str, form: str, info: dict[str, Any]) -> SourceFile:
    return SourceFile(uri, name, form, info["size"] or 0, _fingerprint(info))


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
    if not (form := _format_of(name)):
        raise InputError(f"{display_uri(uri)}: unsupported file format; accepted are {ACCEPTED}")
    return _base_name(display_uri(_parent(uri))), [_source_file(uri, name, form, info)]


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
            names = ", ".join(configs)
            raise InputError(f"{shown}: no config {config!r}; choose one of {names}: hf://{dataset}:CONFIG")
        splits = _folders(filesystem, f"{root}/{config}")
        split = split or "train"
        if split not in splits:
            names = ", ".join(splits)
            raise InputError(f"{shown}: no split {split!r}; choose one of {names}: hf://{dataset}:{config}:SPLIT")
        infos = filesystem.ls(f"{root}/{config}/{split}", detail=True, expand_info=True)
    except InputError:
        raise
    except storage_error_types(ValueError) as error:
        raise InputError(
            f"{shown}: the Hub provides no parquet files for it ({first_line(error)}); check owner/name and the network; "
            "log in to reach a private or gated dataset: hf auth login"
        ) from error
    named = [(f"{config}/{split}/{_base_name(info['name'])}", info) for info in infos]
    files = [
        _source_file(f"hf://{root}/{name}", name, "parquet", info) for name, info in named if name.endswith(".parquet")
    ]
    if not files:
        raise InputError(f"{shown}: the Hub has no parquet files for it (yet); use its original files: {ACCEPTED}")
    return _base_name(dataset), files


def _folders(filesystem: AbstractFileSystem, path: str) -> list[str]:
    infos = filesystem.ls(path, detail=True)
    return sorted(_base_name(info["name"]) for info in infos if info["type"] == "directory")


def _fingerprint(info: dict[str, Any]) -> str:
    """Return the content hash (and commit) in an fsspec listing if the store has one, else the modification time."""
    commit = getattr(info.get("last_commit"), "oid", None)
    version = next((str(info[key]).strip('"') for key in _CONTENT_KEYS if info.get(key)), None)
    version = version or next((str(info[key]) for key in _TIME_KEYS if info.get(key)), None)
    return " ".join(part for part in (commit, version) if part) or "unknown"


def _format_of(name: str) -> str:
    return next((form for form in FORMATS if name.lower().endswith(f".{form}")), "")


def _parent(uri: str) -> str:
    scheme, mark, path = uri.rpartition("://")
    return scheme + mark + path.rpartition("/")[0]


def _base_name(uri: str) -> str:
    return uri.rpartition("://")[2].rstrip("/").rpartition("/")[2]
