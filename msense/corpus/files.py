"""Which files a corpus has.

In: corpus URIs (files, folders and globs on any fsspec storage, `hf://` datasets, `pydocs`). Out: `SourceFile`s with
fingerprints, in an order that depends on names only; `pieces` cuts them, `readers` reads them.
In memory: this list, about 300 bytes a file; no text.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from msense import stores
from msense.corpus.pydocs import choose_packages, package_version, source_files
from msense.errors import BadInput, MsenseError
from msense.stores import display_uri, s3_errors, s3_trouble, wants_credentials
from msense.text import is_utf8, redact

FORMATS = ("txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "csv")
ACCEPTED = (
    "*.txt and *.jsonl (also .gz and .zst), *.parquet, *.csv, a folder or glob of those, "
    "hf://dataset[:config][:split], pydocs[:package,...]"
)
_CONTENT_KEYS = ("ETag", "etag", "md5Hash", "md5", "blob_id")
_LISTING = "a corpus"  # what `reading` is told while files are only listed
_TIME_KEYS = ("mtime", "LastModified", "updated", "created")


@dataclass(frozen=True)
class SourceFile:
    """An input file.

    Attributes:
        uri: where it is, credentials included: show it through `display_uri` only.
        name: its path below the corpus root; the root's base name stands before it when there are several corpora.
        format: one of `FORMATS`, or "pydocs" for a package.
        size: in bytes.
        fingerprint: changes when the content does; holds no path.
    """

    uri: str
    name: str
    format: str
    size: int
    fingerprint: str


def list_files(uris: Sequence[str]) -> list[SourceFile]:
    """The files of a corpus, sorted by name, whatever the order of the URIs.

    Folders and globs are read recursively; names that start with a dot, links to folders and files of unknown suffix
    are passed over.

    Raises:
        BadInput: a URI that is not accepted, does not exist or may not be read; no readable file under it; a package
            that is not installed; two files of one name.
    """
    files: list[SourceFile] = []
    for uri in uris:
        if uri == "pydocs" or uri.startswith("pydocs:"):
            root, found = _list_pydocs(uri)
        elif uri.startswith("hf://"):
            root, found = _list_hub(uri)
        else:
            root, found = _list_storage(uri)
        prefix = f"{root}/" if len(uris) > 1 and root else ""
        files += [replace(file, name=prefix + file.name) for file in sorted(found, key=lambda file: file.name)]
    by_name: dict[str, SourceFile] = {}
    for file in files:
        if not is_utf8(file.name):
            raise BadInput(f"{display_uri(file.uri)}: the name is not UTF-8, and document ids start with it; rename it")
        other = by_name.setdefault(file.name, file)
        if other is not file and other.uri == file.uri:
            raise BadInput(f"{display_uri(file.uri)}: the corpus has it twice; name it, or a folder it is in, once")
        if other is not file:
            raise BadInput(
                f"two files of the corpus have the name {file.name!r}: {display_uri(other.uri)} and "
                f"{display_uri(file.uri)}; document ids start with it: rename a folder, or give one common folder"
            )
    return sorted(files, key=lambda file: file.name)


def fingerprint_of(uri: str) -> str | None:
    """Return size and fingerprint of a file of the corpus as it is now; None where `pydocs` or the Hub pins it."""
    if uri.startswith(("pydocs", "hf://")):
        return None
    with reading(uri, _LISTING):
        filesystem, path = filesystem_of(uri)
        filesystem.invalidate_cache()
        info = filesystem.info(path)
    return f"{info['size'] or 0} {_fingerprint(info)}"


def filesystem_of(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URI and the path on it; as `stores.filesystem`, and the hub's as well."""
    if uri.startswith("hf://"):
        return hub_filesystem(), uri.removeprefix("hf://")
    return stores.filesystem(uri)


def hub_filesystem() -> Any:  # noqa: ANN401 - fsspec has no types
    """The filesystem of the Hugging Face Hub."""
    from huggingface_hub import HfFileSystem  # slow to import, and few corpora need it

    return HfFileSystem()


@contextmanager
def reading(uri: str, form: str) -> Iterator[None]:
    """Turn what goes wrong while the file `uri` is read as `form` into errors that name it.

    Raises:
        BadInput: the file is missing, may not be read, or is damaged.
        MsenseError: the connection was lost.
    """
    shown = display_uri(uri)
    try:
        yield
    except FileNotFoundError as error:
        raise BadInput(f"{shown}: no such file or folder; check the path, and the scheme of a remote one") from error
    except PermissionError as error:
        raise BadInput(
            f"{shown}: no permission to read it ({_cause(error)}); allow it, or give other credentials"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise MsenseError(f"{shown}: the connection was lost ({_cause(error)}); run the same command again") from error
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        remedy = "it is damaged or of another kind: restore it or leave it out"
        remedy = "check the path" if form == _LISTING else remedy
        raise BadInput(f"{shown}: cannot be read as {form} ({_cause(error)}); {remedy}") from error
    except s3_errors() as error:
        raise (BadInput if wants_credentials(error) else MsenseError)(f"{shown}: {s3_trouble(error)}") from error


def _cause(error: Exception) -> str:
    """First line of what a library says, without the credentials that it may quote."""
    return redact(str(error).partition("\n")[0])


def _list_storage(uri: str) -> tuple[str, list[SourceFile]]:
    """Base name of the root, and files, of a file, folder or glob."""
    with reading(uri, _LISTING):
        filesystem, path = filesystem_of(uri)
    local = isinstance(filesystem, LocalFileSystem)
    if local:
        uri = path = os.path.abspath(path)  # workers run in other folders
    with reading(uri, _LISTING):
        try:
            info = filesystem.info(path)
        except FileNotFoundError:
            # In a web address "?" opens the query.
            if not re.search(r"[*[]" if uri.startswith(("http://", "https://")) else r"[*?[]", path):
                raise
            info = {"type": "glob"}
        if info["type"] == "file":
            return _one_file(uri, info)
        if info["type"] == "other":
            raise _neither(uri)
        if info["type"] == "glob":
            root = _parent(re.split(r"[*?[]", uri)[0])
            found = filesystem.glob(path, detail=True)
            folders = [name for name, info in found.items() if info["type"] == "directory"]
        else:
            root = uri.rstrip("/")
            found, folders = {}, [path]
        for folder in folders:
            found |= filesystem.find(folder, detail=True)
        if local:
            _check_folders([root, *folders] if "**" in path else folders)
        files = _readable(filesystem, root, found)
    if not files:
        raise BadInput(f"{display_uri(uri)}: no file there that can be read; accepted are {ACCEPTED}")
    return _base_name(display_uri(root)), files


def _readable(filesystem: Any, root: str, found: dict[str, dict[str, Any]]) -> list[SourceFile]:  # noqa: ANN401
    """The files of a listing that have a known suffix; raises if one of them is a pipe or the like."""
    files = []
    cut = len(root) if isinstance(filesystem, LocalFileSystem) else len(filesystem_of(root)[1])
    for name, info in found.items():
        relative = name[cut:].lstrip("/")
        form = _format_of(relative)
        if not form or info["type"] == "directory" or re.search(r"(^|/)\.", relative):
            continue
        if info.get("islink"):  # what counts is the file that the link leads to
            with reading(name, _LISTING):
                info = filesystem.info(name)
        if info["type"] == "other":
            raise _neither(name)
        if info["type"] != "directory":
            files.append(SourceFile(f"{root}/{relative}", relative, form, info["size"] or 0, _fingerprint(info)))
    return files


def _neither(uri: str) -> BadInput:
    return BadInput(f"{display_uri(uri)}: neither a file nor a folder but a pipe, a socket or a device; leave it out")


def _check_folders(paths: Sequence[str]) -> None:
    """Raise if a local folder in or below `paths` may not be listed: fsspec passes over it in silence."""

    def refuse(error: OSError) -> None:
        raise error

    for path in paths:
        for _ in os.walk(path or "/", onerror=refuse):
            pass


def _one_file(uri: str, info: dict[str, Any]) -> tuple[str, list[SourceFile]]:
    """Base name of the folder, and the file itself, of a file named outright."""
    name = _base_name(display_uri(uri) if uri.startswith(("http://", "https://")) else uri)
    form = _format_of(name)
    if not form:
        raise BadInput(f"{display_uri(uri)}: not a kind of file that can be read; accepted are {ACCEPTED}")
    return _base_name(display_uri(_parent(uri))), [SourceFile(uri, name, form, info["size"] or 0, _fingerprint(info))]


def _list_pydocs(uri: str) -> tuple[str, list[SourceFile]]:
    """The word "pydocs", and a SourceFile for each package."""
    found = []
    for package in choose_packages([name for name in uri.removeprefix("pydocs").strip(":").split(",") if name]):
        sources = source_files(package)
        size = sum(path.stat().st_size for _, path in sources)
        found.append(SourceFile(f"pydocs:{package}", package, "pydocs", size, package_version(package, sources)))
    return "pydocs", found


def _list_hub(uri: str) -> tuple[str, list[SourceFile]]:
    """Name of a dataset of the Hub, and the parquet files that the Hub made of one of its splits."""
    from huggingface_hub import errors

    shown = display_uri(uri)
    parts = uri.removeprefix("hf://").split(":")
    if len(parts) > 3 or not parts[0] or "@" in uri:
        raise BadInput(f"{shown}: write hf://dataset[:config][:split]")
    dataset, config, split = parts + [""] * (3 - len(parts))
    filesystem = hub_filesystem()
    root = f"datasets/{dataset}@refs%2Fconvert%2Fparquet"
    try:
        configs = _folders(filesystem, root)
        config = config or (configs[0] if len(configs) == 1 else "default")
        if config not in configs:
            raise BadInput(f"{shown}: no config {config!r}; name one of {', '.join(configs)}: hf://{dataset}:CONFIG")
        splits = _folders(filesystem, f"{root}/{config}")
        split = split or "train"
        if split not in splits:
            raise BadInput(
                f"{shown}: no split {split!r}; name one of {', '.join(splits)}: hf://{dataset}:{config}:SPLIT"
            )
        found = filesystem.ls(f"{root}/{config}/{split}", detail=True, expand_info=True)
    except (OSError, ValueError, errors.HTTPError) as error:
        raise BadInput(
            f"{shown}: the Hub gives no parquet files of it ({_cause(error)}); check owner/name and the network; "
            "log in to reach a private or gated dataset: hf auth login"
        ) from error
    files = []
    for info in found:
        name = f"{config}/{split}/{_base_name(info['name'])}"
        if name.endswith(".parquet"):
            files.append(SourceFile(f"hf://{root}/{name}", name, "parquet", info["size"], _fingerprint(info)))
    if not files:
        raise BadInput(f"{shown}: the Hub holds no parquet file of it (yet); give its files instead: {ACCEPTED}")
    return _base_name(dataset), files


def _folders(filesystem: Any, path: str) -> list[str]:  # noqa: ANN401 - fsspec has no types
    infos = filesystem.ls(path, detail=True)
    return sorted(_base_name(info["name"]) for info in infos if info["type"] == "directory")


def _fingerprint(info: dict[str, Any]) -> str:
    """What an fsspec listing says of a file's content: a hash (and a commit) where the store has one, else its time."""
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
