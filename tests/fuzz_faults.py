"""Readers that do what none may, for the test of the fuzzer itself."""

import os
import time
from pathlib import Path

from fuzzing import BYTES, Reader


def _whole(folder: Path) -> bool:
    return (folder / "a").read_bytes() == b"whole"


def crash(folder: Path) -> None:
    if not _whole(folder):
        os._exit(3)


def hang(folder: Path) -> None:
    if not _whole(folder):
        time.sleep(60)


def take(folder: Path) -> None:
    if not _whole(folder):
        bytearray(BYTES + (64 << 20))


def fail(folder: Path) -> None:
    if not _whole(folder):
        raise KeyError("a")


def read(folder: Path) -> bytes:
    return (folder / "a").read_bytes()


READERS = {
    **{own.__name__: Reader(own, ("a",)) for own in (crash, hang, take, fail, read)},
    "hashed": Reader(read, ("a",), exact=True),
}
