"""Storage clients: fsspec filesystems by URI, with retries, and errors that name the file, the cause and the remedy."""

import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from safetensors import SafetensorError

from msense.errors import InputError, MsenseError
from msense.io.extras import install_command
from msense.text import first_line

S3_CREDENTIALS = "AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or an IAM role"
S3_ATTEMPTS = 6
_S3 = ("s3", "s3a")
_BUCKET = re.compile(r"(?:^|::)(s3|s3a|gs|gcs)://([^/]*)")
OBJECT_STORES = {  # scheme: what installs its client
    **dict.fromkeys(("s3", "s3a"), install_command("s3")),
    **dict.fromkeys(("gs", "gcs"), install_command("gcs")),
    **dict.fromkeys(("az", "abfs"), "pip install adlfs"),
}


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """Return the fsspec filesystem of a URI and the path on it; a plain path is local.

    Raises:
        InputError: unknown scheme, missing package, or invalid bucket.
    """
    _check_buckets(uri)
    scheme = uri.partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(uri, **_options(scheme))
    except ImportError as error:
        remedy = OBJECT_STORES.get(scheme, str(error))
        raise InputError(f"{display_uri(uri)}: {scheme}:// needs a package that is not installed: {remedy}") from error
    except ValueError as error:
        raise InputError(f"{display_uri(uri)}: {error}; use a local path, or s3://, gs:// or hf://") from error
    return fs, path


def _check_buckets(uri: str) -> None:
    """Raise for an invalid bucket, before a storage client quotes the password in it or fails without a reason."""
    for scheme, bucket in _BUCKET.findall(uri):
        if "@" in bucket:
            variables = S3_CREDENTIALS if scheme in _S3 else "GOOGLE_APPLICATION_CREDENTIALS"
            raise InputError(
                f"{display_uri(uri)}: {scheme}:// takes no credentials in the URI; remove them and use {variables}"
            )
        if not bucket:
            raise InputError(f"{display_uri(uri)}: names no bucket; write {scheme}://bucket/path")


def _options(scheme: str) -> dict[str, Any]:
    """Return client options: no listings cache, as other processes write too, and S3 retries with exponential backoff.

    botocore waits up to 20 seconds before each attempt; AWS_MAX_ATTEMPTS and AWS_RETRY_MODE override the retries.
    """
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in _S3:
        options["max_concurrency"] = 1  # s3fs resumes an interrupted download only when it is sequential
    if scheme in _S3 and not os.environ.keys() & {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"}:
        options["config_kwargs"] = {"retries": {"mode": "standard", "max_attempts": S3_ATTEMPTS}}
    return options


def display_uri(uri: str) -> str:
    """Return a URI for manifests, logs and cards: without user, password, query and fragment."""
    if "://" not in uri:
        return uri  # a local path may contain any character
    return re.split(r"[?#]", re.sub(r"://[^/]*@", "://", uri))[0]


def is_local(uri: str) -> bool:
    """Return whether a URI is on the local disk."""
    return "://" not in uri or uri.startswith("file://")


def is_s3(uri: str) -> bool:
    """Return whether a URI is on storage with the S3 API."""
    return uri.partition("://")[0] in _S3


def s3_errors() -> tuple[type[Exception], ...]:
    """Return the S3 client's errors that are not OSErrors, such as missing credentials; empty if it is not imported."""
    types = {"botocore.exceptions": "BotoCoreError", "aiohttp.client_exceptions": "ClientError"}
    return tuple(getattr(sys.modules[module], name) for module, name in types.items() if module in sys.modules)


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the errors of the hub's client that are not OSErrors, such as of the network; empty if it is not imported."""
    modules = (sys.modules[module] for module in ("httpx", "httpx2") if module in sys.modules)
    return tuple(module.HTTPError for module in modules)


def storage_error_types(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the errors that a disk or storage client may raise, and `more`."""
    return (OSError, *s3_errors(), *hub_errors(), *more)


@contextmanager
def storage_errors(uri: str, doing: str = "read", *, staged: bool = False) -> Iterator[None]:
    """Convert errors of a disk or storage client into a MsenseError that names the file, the cause and the remedy.

    Passed through, unless `doing` is "write", are FileNotFoundError, IsADirectoryError and errors of the local disk.
    `staged`: the file is still on the local disk, before its upload.
    """
    try:
        yield
    except storage_error_types(SafetensorError) as error:
        local = staged or is_local(uri)
        if doing != "write" and (local or isinstance(error, FileNotFoundError | IsADirectoryError)):
            raise
        raise MsenseError(f"cannot {doing} {display_uri(uri)}: {error_message(error, local=local)}") from error


def is_credentials_error(error: Exception) -> bool:
    """Return whether an error of the S3 client is about credentials, not about the store or the network."""
    return "Credentials" in type(error).__name__ or "Profile" in type(error).__name__


def error_message(error: Exception, *, local: bool = False) -> str:
    """Return the cause and remedy of a failed storage request, which the client has already retried where that helps."""
    message = first_line(error)
    code = re.search(r"os error (\d+)", message)  # safetensors has it in the message only
    number = int(code[1]) if code else getattr(error, "errno", None)
    if isinstance(error, hub_errors()):
        return f"the Hugging Face Hub is unavailable ({message}): check the connection, or try again later"
    if isinstance(error, s3_errors()):
        if is_credentials_error(error):
            return f"S3 denied access ({message}): set credentials: {S3_CREDENTIALS}"
        return f"the store is unavailable after all retries ({message}): run the same command again later"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left ({message}); free some space, or choose an --output with more"
    if isinstance(error, PermissionError) or number in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "allow this user to write there" if local else f"grant access, or use others: {S3_CREDENTIALS}"
        return f"no permission ({message}); {remedy}"
    if local:
        return message
    if isinstance(error, FileNotFoundError):
        return f"{message}; check the bucket's name, or create it"
    if number == errno.EBUSY:
        return f"the store is busy ({message}); run the same command again later"
    return f"the store failed ({message}); run the same command again when it works"


def open_file(uri: str) -> io.BufferedIOBase:
    """Open a file on any storage for reading."""
    if is_local(uri):
        return Path(uri.removeprefix("file://")).open("rb")
    fs, path = filesystem(uri)
    with storage_errors(uri):
        return fs.open(path, "rb")
