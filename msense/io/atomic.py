"""Writing a file so that it appears complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msense.io.scratch import scratch_name

_UMASK = os.umask(0)  # at import only, as reading it changes it for all threads
os.umask(_UMASK)


@contextmanager
def atomic_path(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder that replaces `path` on exit, unless an exception is raised."""
    scratch = scratch_name(path)
    scratch.unlink(missing_ok=True)  # a symbolic link left there would redirect the bytes
    try:
        yield scratch
        scratch.chmod(0o666 & ~_UMASK)  # safetensors files are readable by their owner only; workers may be other users
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
