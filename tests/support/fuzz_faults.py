"""Faulty readers, to test that the fuzzer detects each kind of failure."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from fuzzing import BYTES, Reader


def _faulty(fail: Callable[[], object]) -> Reader:
    return Reader(lambda folder: _read(folder) == b"whole" or fail(), ("a",))


def _read(folder: Path) -> bytes:
    return (folder / "a").read_bytes()


READERS = {
    "crash": _faulty(lambda: os._exit(3)),
    "hang": _faulty(lambda: time.sleep(60)),
    "memory": _faulty(lambda: bytearray(BYTES + (64 << 20))),
    "error": _faulty(lambda: {}["a"]),
    "read": Reader(_read, ("a",)),
    "hashed": Reader(_read, ("a",), exact=True),
}
