"""Hostile inputs for every reader, and a process of its own that reads them: a crash, a hang or a full memory is seen as such.

A `Case` says which file of a reader's folder is spoilt and how; `Child.run` gives what became of it: "refused" (a documented
error), "same" (what the whole folder gives), "other" (well formed, and what the file now says), or what is wrong.
"""

import gzip
import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

SECONDS, BYTES = 60, 768 << 20  # of one input
MOST = 6 << 30  # bytes of the process that reads
Edit = tuple[str, float, float, bytes]
VALUES: list[Any] = [
    *(-1, 0, 1, 2**31, 2**63, 10**4000, -(2**63) - 1, 1e308, 0.5, float("nan"), float("inf"), True, None),
    *("", "..", "../../outside", "/etc/passwd", "\x1b[31m", "\ud800", "x" * 70_000, "org/kernel", "file:///dev/zero"),
    *([], [[]], {}, {"a": {"b": [1]}}, [1] * 10_000, "NEST"),
]
KINDS = ("flip", "overwrite", "cut", "insert", "append", "value", "drop", "twice", "array", "number", "place")
PLACES = ("pipe", "link out", "device", "folder", "nothing", "circle", "empty", "hole")


@dataclass(frozen=True)
class Reader:
    """A reader of bytes.

    Attributes:
        read: folder in, what it means out (its repr counts); fails an assertion if that is not well formed.
        files: that may be spoilt.
        exact: any change must be refused or mean the same: the files are hashed.
    """

    read: Callable[[Path], object]
    files: tuple[str, ...]
    exact: bool = False


def spoil(path: Path, edits: list[Edit], reseal: bool) -> None:
    """Damage a file in place."""
    for kind, where, also, data in edits:
        if kind == "place":
            replace(path, PLACES[int(where * len(PLACES))])
            return
        raw = path.read_bytes()
        packed = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        plain = _unpacked(raw, packed) if packed and also < 0.7 else None
        if plain is not None:
            plain = damage(plain, kind, where, also, data, path)
            if where > 0.97:
                plain = (data * 1000)[: 1 << 10] * (96 << 10)  # a bomb of 96 MB, with or without ends of lines
            raw = gzip.compress(plain, 1) if packed == "gzip" else pa.Codec("zstd").compress(plain, asbytes=True)
        else:
            raw = damage(raw, kind, where, also, data, path)
        path.write_bytes(raw)
    if reseal:
        seal(path)


def _unpacked(raw: bytes, packed: str) -> bytes | None:
    """Return what packed bytes hold; None if an edit before this one broke them."""
    try:
        return pa.CompressedInputStream(pa.BufferReader(raw), packed).read()
    except OSError:
        return None


def seal(path: Path) -> None:
    """Give a spoilt JSON file the hash of what it says now, as a person would who means harm."""
    from msense import storage

    try:
        told = json.loads(path.read_bytes())
        told.pop(storage.SEAL, None)
        path.write_text(json.dumps({**told, storage.SEAL: storage.seal(told)}))
    except (ValueError, AttributeError, TypeError, RecursionError):
        return


def replace(path: Path, what: str) -> None:
    """Put something else in a file's place."""
    outside = path.parent.parent / f"outside-{path.name}"
    outside.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, outside)
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "link out": lambda: path.symlink_to(outside),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "nothing": lambda: None,
        "circle": lambda: path.symlink_to(path),
        "empty": path.touch,
        "hole": lambda: (shutil.copyfile(outside, path), os.truncate(path, 1 << 40)),
    }[what]()


def damage(raw: bytes, kind: str, where: float, also: float, data: bytes, path: Path) -> bytes:
    """Return damaged bytes; what asks for more structure than there is flips a bit."""
    place = int(where * len(raw))
    if kind in ("value", "drop", "twice"):
        try:
            return _json(raw, kind, where, also, path)
        except (ValueError, TypeError, RecursionError, IndexError):
            kind = "flip"
    if kind == "array" and path.suffix == ".safetensors":
        start = 8 + int.from_bytes(raw[:8], "little")
        place = start + int(where * (len(raw) - start)) // 8 * 8
        filling = [b"\xff" * 8, b"\x7f" * 8, bytes(8), np.float32([np.nan, np.inf]).tobytes(), data][int(also * 5)]
        return raw[:place] + filling + raw[place + len(filling) :]
    if kind == "number":  # a number in a text becomes another
        digits = [i for i, byte in enumerate(raw[: 1 << 16]) if 48 <= byte < 58]
        if digits:
            at = digits[int(where * len(digits))]
            new = [b"-1", b"9" * 12, b"9" * 5000, b"nan", b"1e999", b"0"][int(also * 6)]
            return raw[:at] + new + raw[at + 1 :]
    if kind == "overwrite":
        return raw[:place] + data + raw[place + len(data) :]
    if kind == "cut":
        return raw[:place]
    if kind == "insert":
        return raw[:place] + data * (1 + int(also * 50) ** 3) + raw[place:]
    if kind == "append":
        return raw + data
    return raw[:place] + bytes(b ^ (1 << data[0] % 8) for b in raw[place : place + 1]) + raw[place + 1 :]


def _json(raw: bytes, kind: str, where: float, also: float, path: Path) -> bytes:
    """Edit one value of a JSON file, of a line of one, or of a safetensors header."""
    head, tail = b"", b""
    if path.suffix == ".safetensors":
        length = int.from_bytes(raw[:8], "little")
        raw, tail = raw[8 : 8 + length], raw[8 + length :]
    elif ".jsonl" in path.name:
        lines = raw.split(b"\n")
        number = int(where * len(lines))
        head, raw, tail = (
            b"".join(li + b"\n" for li in lines[:number]),
            lines[number],
            b"\n" + b"\n".join(lines[number + 1 :]),
        )
    value = json.loads(raw)
    nodes: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        inner = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        nodes += [(node, key) for key, _ in inner]
        waiting += [child for _, child in inner if isinstance(child, dict | list)]
    node, key = nodes[int(where * 7919 % 1 * len(nodes))]
    if kind == "drop":
        del node[key]
    elif kind == "value":
        node[key] = VALUES[int(also * len(VALUES))]
    sys.set_int_max_str_digits(0)
    text = json.dumps(value).replace('"NEST"', "[" * 3000 + "]" * 3000).encode()
    sys.set_int_max_str_digits(4300)
    if kind == "twice" and isinstance(node, dict):
        text = json.dumps(value).encode().replace(b"{", b"{" + json.dumps(str(key)).encode() + b": 1, ", 1)
    if path.suffix == ".safetensors":
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little")
    return head + text + tail


def serve(end: Connection, module: str, wholes: dict[str, str]) -> None:
    """Read what is asked for, in a process of its own, until nothing more is."""
    readers: dict[str, Reader] = importlib.import_module(module).READERS
    resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))  # who reads without end fails, and the machine stands
    said = os.open(os.devnull, os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    meanings = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(1 << 62):
            try:
                name, file, edits, reseal = end.recv()
            except EOFError:
                return
            if name not in meanings:  # at another place than its makers': no path may count
                shutil.copytree(wholes[name], Path(scratch, "whole", name))
                meanings[name] = _meaning(readers[name], Path(scratch, "whole", name))
            folder = Path(scratch, str(number), "in")
            shutil.copytree(wholes[name], folder)
            spoil(folder / file, edits, reseal)
            end.send(_outcome(readers[name], folder, meanings[name], reseal))
            shutil.rmtree(folder.parent)


def _meaning(reader: Reader, folder: Path) -> str:
    return hashlib.sha256(repr(reader.read(folder)).replace(str(folder), "").encode("utf-8", "replace")).hexdigest()


def _outcome(reader: Reader, folder: Path, whole: str, reseal: bool) -> str:
    from msense.errors import BadInput

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory("VmRSS")
    try:
        found = "same" if _meaning(reader, folder) == whole else "other"
    except BadInput as error:
        found = "refused"
        if len(str(error)) > 6000 or "\x1b" in str(error).replace("\\x1b", ""):
            found = f"silent: an error that is long or of control characters: {str(error)[:500]!r}"
    except AssertionError:
        found = f"silent: {traceback.format_exc()[-1500:]}"
    except BaseException:  # noqa: BLE001 - whatever else comes out is the finding
        found = f"crash: {traceback.format_exc()[-2500:]}"
    if found == "other" and reader.exact and not reseal:
        found = "silent: a change of hashed files went by"
    if (taken := memory("VmHWM") - before) > BYTES:
        found = f"memory: {taken >> 20} MB ({found[:300]})"
    return found


def memory(name: str) -> int:
    """Return a figure of this process's memory, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


class Child:
    """The process that reads; a new one when it is gone."""

    def __init__(self, module: str, wholes: dict[str, str]) -> None:
        self._given = module, wholes
        self._process: Any = None

    def run(self, name: str, file: str, edits: list[Edit], reseal: bool) -> str:
        """Have one spoilt folder read."""
        if self._process is None:
            spawn = multiprocessing.get_context("spawn")
            self._end, theirs = spawn.Pipe()
            self._process = spawn.Process(target=serve, args=(theirs, *self._given), daemon=True)
            self._process.start()
            theirs.close()
            self.run(name, file, [], False)  # imports, and reads the whole folder
        self._end.send((name, file, edits, reseal))
        try:
            if self._end.poll(SECONDS if edits else 5 * SECONDS):
                return str(self._end.recv())
            self.close()
            return f"hang: over {SECONDS} s"
        except (EOFError, ConnectionError):
            self._process.join()
            code, self._process = self._process.exitcode, None
            return f"crash: the process ended with {code}"

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
