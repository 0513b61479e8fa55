"""Stores of files: a URI in, its client out, and errors that name the file.

The local disk, and all that fsspec has a client for. Every client is made here: what it remembers, how often it asks
again. Holds nothing beyond what a client reads ahead.
"""

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

from msense.errors import BadInput, MsenseError
from msense.text import first_line, redact

S3_CREDENTIALS = "AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or an IAM role"
S3_ATTEMPTS = 6
S3 = ("s3", "s3a")
_BUCKET = re.compile(r"(?:^|::)(s3|s3a|gs|gcs)://([^/]*)")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """Return the fsspec filesystem of a URI and the path on it; a plain path is local.

    Raises:
        BadInput: an unknown scheme, one whose package is not installed, or a bucket that no store could take.
    """
    check_buckets(uri)
    scheme = uri.partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(uri, **_options(scheme))
    except ImportError as error:
        remedy = f"pip install {_PACKAGES[scheme]}" if scheme in _PACKAGES else str(error)
        raise BadInput(f"{display_uri(uri)}: {scheme}:// needs a package that is not installed: {remedy}") from error
    except ValueError as error:
        raise BadInput(f"{display_uri(uri)}: {error}; give a local path, or s3://, gs:// or hf://") from error
    return fs, path


def check_buckets(uri: str) -> None:
    """Raise for a bucket that no store could take: the store's client would quote the password, or find no words."""
    for scheme, bucket in _BUCKET.findall(uri):
        if "@" in bucket:
            raise BadInput(
                f"{display_uri(uri)}: {scheme}:// takes no credentials in the URI; leave them out and give them as "
                + (S3_CREDENTIALS if scheme in S3 else "GOOGLE_APPLICATION_CREDENTIALS")
            )
        if not bucket:
            raise BadInput(f"{display_uri(uri)}: names no bucket; write {scheme}://bucket/path")


def _options(scheme: str) -> dict[str, Any]:
    """Return how a store is asked: what others have written since is seen, and a busy S3 is asked again, ever later.

    botocore waits up to 20 seconds before each of its attempts; AWS_MAX_ATTEMPTS and AWS_RETRY_MODE set others.
    """
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in S3:
        options["max_concurrency"] = 1  # one part at a time: only so s3fs goes on with a download that breaks off
    if scheme in S3 and not os.environ.keys() & {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"}:
        options["config_kwargs"] = {"retries": {"mode": "standard", "max_attempts": S3_ATTEMPTS}}
    return options


def display_uri(uri: str) -> str:
    """Return a URI fit for manifests, logs and cards: without user, password, query and fragment."""
    if "://" not in uri:
        return uri  # a local path may hold any character
    return re.split(r"[?#]", re.sub(r"://[^/]*@", "://", uri))[0]


def is_local(uri: str) -> bool:
    """Tell whether a URI names the local disk."""
    return "://" not in uri or uri.startswith("file://")


def has_folders(uri: str) -> bool:
    """Tell whether folders are made; an object store has none, and its client would make a bucket of a misspelt name."""
    return uri.partition("://")[0] not in _PACKAGES


def is_s3(uri: str) -> bool:
    """Tell whether a URI names a store with S3's API."""
    return uri.partition("://")[0] in S3


def s3_errors() -> tuple[type[Exception], ...]:
    """Return the errors of the S3 client that are no OSErrors, such as missing credentials; none while it is not loaded."""
    found = {"botocore.exceptions": "BotoCoreError", "aiohttp.client_exceptions": "ClientError"}
    return tuple(getattr(sys.modules[module], name) for module, name in found.items() if module in sys.modules)


def wants_credentials(error: Exception) -> bool:
    """Tell whether an error of the S3 client is about who asks, and not about the store or the way there."""
    return "Credentials" in type(error).__name__ or "Profile" in type(error).__name__


def s3_trouble(error: Exception) -> str:
    """Say what is wrong with S3, and what to do."""
    if wants_credentials(error):
        return f"S3 refused ({redact(str(error))}): give credentials: {S3_CREDENTIALS}"
    return (
        f"S3 does not answer, however often it is asked ({redact(str(error))}): run the same command again when it does"
    )


def call_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the errors that a disk or store may answer with, and more."""
    return (OSError, *s3_errors(), *more)


@contextmanager
def told_by_store(uri: str, doing: str = "read") -> Iterator[None]:
    """Say what could not be read (or else), why, and what to do, where a store's client names no file.

    A file that is not there, and what goes wrong on the local disk, passes.

    Raises:
        MsenseError: in place of the client's error.
    """
    try:
        yield
    except call_errors() as error:
        if is_local(uri) or isinstance(error, FileNotFoundError | IsADirectoryError):
            raise
        raise MsenseError(f"cannot {doing} {display_uri(uri)}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Say why a store did not do what it was asked, and what to do; its client has tried again where that may help."""
    told = first_line(error)
    if isinstance(error, s3_errors()):
        return s3_trouble(error)
    if isinstance(error, PermissionError):
        return f"no permission ({told}); allow it, or give other credentials: {S3_CREDENTIALS}"
    if isinstance(error, FileNotFoundError):
        return f"{told}; check the bucket's name, or make it"
    if isinstance(error, OSError) and error.errno == errno.EBUSY:
        return f"the store is busy ({told}); run the same command again later"
    return f"the store failed ({told}); run the same command again when it works"


def open_file(uri: str) -> io.BufferedIOBase:
    """Open a file of any storage to read it; errors of a remote one name it."""
    return Path(uri.removeprefix("file://")).open("rb") if is_local(uri) else io.BufferedReader(_Remote(uri), 1 << 20)


class _Remote(io.RawIOBase):
    """A remote file, read in blocks."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        fs, path = filesystem(uri)
        with told_by_store(uri):
            self._file = fs.open(path, "rb")

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """Return the place."""
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - any writable buffer
        """Read into a buffer."""
        with told_by_store(self._uri):
            return int(self._file.readinto(buffer))
