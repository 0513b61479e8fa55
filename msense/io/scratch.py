"""Temporary folders and names that are recognisable, and removed even if their process was killed."""

import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX = "msense-"


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Create a temporary folder in `parent` (default: the system's) and remove it on exit.

    Also removes the folders that killed processes left: those whose lock nobody holds.
    """
    parent = parent or Path(tempfile.gettempdir())
    for lock in parent.glob(f"{_PREFIX}*.lock"):
        if re.fullmatch(rf"{_PREFIX}[0-9a-f]{{8}}", lock.stem):
            with suppress(Timeout, OSError), FileLock(lock, timeout=0):  # else in use, or another user's
                _remove(lock)
    lock = parent / f"{_PREFIX}{_unique()}.lock"  # short, because Ray creates sockets in such folders
    with FileLock(lock):
        lock.with_suffix("").mkdir(mode=0o700)
        try:
            yield lock.with_suffix("")
        finally:
            _remove(lock)


def _remove(lock: Path) -> None:
    """Remove a temporary folder and its lock."""
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    lock.unlink(missing_ok=True)


def _unique() -> str:
    return uuid.uuid4().hex[:8]


def scratch_name(path: Path) -> Path:
    """Return a temporary name beside a path, recognised by `is_scratch`."""
    return path.with_name(f".{path.name}.{_unique()}.part")


def is_scratch(path: Path) -> bool:
    """Return whether a path has a name from `scratch_name`."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.part", path.name) is not None
