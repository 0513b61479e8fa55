"""Fingerprints of weights; those of large files are computed once for all processes of a machine.

Memory: a block of a file.
"""

import hashlib
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from msense.io import storage
from msense.io.scratch import atomic_path

logger = logging.getLogger(__name__)
HASHED_ALWAYS = 256 << 20  # bytes
_CLOCK_TICK = 2.0  # seconds within which a file system may give two writes the same time


def weights_fingerprint(folder: Path, config: str = "config.json") -> str:
    """Return the SHA-256 of the config and weight files, in hexadecimal.

    Weights of more than `HASHED_ALWAYS` bytes are hashed once for all processes of a machine: the result is kept in the
    user's cache for as long as paths, sizes, times and inodes of the files stay the same.
    """
    files = [folder / config, *sorted(folder.glob("*.safetensors"))]
    if sum(file.stat().st_size for file in files) <= HASHED_ALWAYS:
        return _hash(files)
    kept = storage.user_cache() / "fingerprints" / hashlib.sha256(_identity(files).encode()).hexdigest()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{kept}.lock"):
            return _kept_hash(kept, files)
    except OSError:  # such as a read-only home; an unreadable weights file raises again
        return _hash(files)


def _identity(files: Sequence[Path]) -> str:
    stats = [(file.resolve(), file.stat()) for file in files]
    return repr([(str(p), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev) for p, s in stats])


def _kept_hash(kept: Path, files: Sequence[Path]) -> str:
    """Return the hash in a file of the cache, which is made if it is missing or invalid."""
    known = kept.read_text(encoding="ascii", errors="replace") if kept.is_file() else ""
    if re.fullmatch("[0-9a-f]{64}", known):
        return known
    logger.info("hashing the weights in %s", files[-1].parent)
    before = _identity(files)
    made = _hash(files)
    settled = time.time() - max(file.stat().st_mtime for file in files) > _CLOCK_TICK
    if settled and _identity(files) == before:
        with atomic_path(kept) as scratch:
            scratch.write_text(made, encoding="ascii")
    return made


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
