"""Temporary files and folders, removed even if their process was killed, and files that appear complete or not at all."""

import os
import re
import shutil
import stat
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


def is_scratch(path: Path) -> bool:
    """Return whether a path is a temporary one of `atomic_path`."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.part", path.name) is not None


@contextmanager
def atomic_path(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder that replaces `path` on exit, unless an exception is raised."""
    scratch = path.with_name(f".{path.name}.{_unique()}.part")
    scratch.unlink(missing_ok=True)  # a symbolic link left there would redirect the bytes
    try:
        scratch.touch(exist_ok=False)
        mode = stat.S_IMODE(scratch.stat().st_mode)  # as the umask says
        yield scratch
        scratch.chmod(mode)  # safetensors files are readable by their owner only; workers may be other users
        if sync:
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        with suppress(OSError):  # the folder may have become read-only; a later run removes temporary files
            scratch.unlink(missing_ok=True)


def copy_file(source: Path | None, target: Path) -> None:
    """Copy a file atomically; without a source, remove the target."""
    if source is None:
        target.unlink(missing_ok=True)
    elif source.resolve() != target.resolve():
        target.parent.mkdir(exist_ok=True)
        with atomic_path(target) as scratch:
            shutil.copyfile(source, scratch)
