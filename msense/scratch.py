"""Temporary folders and names: told from all others, and removed even when the process that made them was killed.

Holds nothing but names.
"""

import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX = "msense-"


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Give a folder for temporary files, and remove it; those that killed processes left behind go with it.

    Each is locked by its process, so that one without a holder is known to be left behind.

    Args:
        parent: where to make it; None = the system's temporary folder.
    """
    parent = parent or Path(tempfile.gettempdir())
    for left in parent.glob(f"{_PREFIX}*.lock"):
        if re.fullmatch(rf"{_PREFIX}[0-9a-f]{{8}}", left.stem):  # ours by its name
            _remove_unheld(left)
    lock = parent / f"{_PREFIX}{_unique()}.lock"  # short: Ray puts sockets into one
    folder = lock.with_suffix("")
    with FileLock(lock):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _remove_unheld(lock: Path) -> None:
    """Remove a scratch folder whose process is gone."""
    try:
        with FileLock(lock, timeout=0):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
    except (Timeout, OSError):  # at work, or another user's
        return


def _unique() -> str:
    return uuid.uuid4().hex[:8]


def scratch_name(path: Path) -> Path:
    """Return a temporary name beside a path, told from all others by `is_scratch`."""
    return path.with_name(f".{path.name}.{_unique()}.part")


def is_scratch(path: Path) -> bool:
    """Tell whether a name is a temporary one of ours."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.part", path.name) is not None
