"""Damage files in place and read them in a subprocess, so that crashes, hangs and excessive memory are detected.

`Child.run` returns the outcome of one damaged folder: "refused" (a documented error), "same" (reads as the undamaged
folder), "other" (well formed, with other content), or a failure: "silent: ...", "crash: ...", "hang: ..." or
"memory: ...".
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

from msense.errors import InputError
from msense.io import storage

SECONDS, BYTES = 60, 768 << 20  # limits of one input
PROCESS_BYTES = 6 << 30
Edit = tuple[str, float, float, bytes]
VALUES: list[Any] = [
    *(-1, 0, 1, 2**31, 2**63, 10**4000, -(2**63) - 1, 1e308, 0.5, float("nan"), float("inf"), True, None),
    *("", "..", "../../outside", "/etc/passwd", "\x1b[31m", "\ud800", "x" * 70_000, "org/kernel", "file:///dev/zero"),
    *([], [[]], {}, {"a": {"b": [1]}}, [1] * 10_000, "NEST"),
]
KINDS = ("flip", "overwrite", "cut", "insert", "value", "drop", "twice", "array", "number", "place")
PLACES = ("pipe", "link out", "device", "folder", "nothing", "circle", "empty", "hole")


@dataclass(frozen=True)
class Reader:
    """A reader under test."""

    read: Callable[[Path], object]  # returns the meaning of a folder, by its repr; asserts that it is well formed
    files: tuple[str, ...]  # that may be damaged
    exact: bool = False  # they are hashed: any change must be refused or keep the meaning
    write: Callable[[Path], object] | None = None  # writes an undamaged folder; None if it takes fixtures


def spoil(path: Path, edits: list[Edit], reseal: bool) -> None:
    """Damage a file in place; `reseal` then updates its checksum, as an attacker would."""
    for kind, where, also, data in edits:
        if kind == "place":
            replace(path, PLACES[int(where * len(PLACES))])
            return
        content = path.read_bytes()
        codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix) if also < 0.7 else None
        if codec is not None:
            try:
                content = pa.CompressedInputStream(pa.BufferReader(content), codec).read()
            except OSError:  # damaged by an earlier edit
                codec = None
        content = damage(content, kind, where, also, data, path)
        if codec is not None:
            if where > 0.97:
                content = (data * 1000)[: 1 << 10] * (96 << 10)  # a decompression bomb of 96 MB
            content = gzip.compress(content, 1) if codec == "gzip" else pa.Codec("zstd").compress(content, asbytes=True)
        path.write_bytes(content)
    if reseal:
        seal(path)


def seal(path: Path) -> None:
    """Recompute the checksum in a JSON file."""
    try:
        content = json.loads(path.read_bytes())
        content.pop(storage.CHECKSUM, None)
        path.write_text(json.dumps({**content, storage.CHECKSUM: storage.checksum(content)}))
    except (ValueError, AttributeError, TypeError, RecursionError):
        return


def replace(path: Path, kind: str) -> None:
    """Replace a file by another kind of directory entry."""
    outside = path.parent.parent / f"outside-{path.name}"
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
    }[kind]()


def damage(raw: bytes, kind: str, where: float, also: float, data: bytes, path: Path) -> bytes:
    """Return damaged bytes; an edit that does not apply flips a bit."""
    place = int(where * len(raw))
    if kind in ("value", "drop", "twice"):
        try:
            return _edit_json(raw, kind, where, also, path)
        except (ValueError, TypeError, RecursionError, IndexError):
            kind = "flip"
    if kind == "array" and path.suffix == ".safetensors":
        start = 8 + int.from_bytes(raw[:8], "little")
        place = start + int(where * (len(raw) - start)) // 8 * 8
        data = [b"\xff" * 8, b"\x7f" * 8, bytes(8), np.float32([np.nan, np.inf]).tobytes(), data][int(also * 5)]
        kind = "overwrite"
    if kind == "number" and (digits := [i for i, byte in enumerate(raw[: 1 << 16]) if 48 <= byte < 58]):
        place = digits[int(where * len(digits))]
        return raw[:place] + [b"-1", b"9" * 12, b"9" * 5000, b"nan", b"1e999", b"0"][int(also * 6)] + raw[place + 1 :]
    if kind == "overwrite":
        return raw[:place] + data + raw[place + len(data) :]
    if kind == "cut":
        return raw[:place]
    if kind == "insert":
        return raw[:place] + data * (1 + int(also * 50) ** 3) + raw[place:]
    return raw[:place] + bytes(b ^ (1 << data[0] % 8) for b in raw[place : place + 1]) + raw[place + 1 :]


def _edit_json(raw: bytes, kind: str, where: float, also: float, path: Path) -> bytes:
    """Edit one value of a JSON file, of one line of a JSONL file, or of a safetensors header."""
    head, tail = b"", b""
    if path.suffix == ".safetensors":
        length = int.from_bytes(raw[:8], "little")
        raw, tail = raw[8 : 8 + length], raw[8 + length :]
    elif ".jsonl" in path.name:
        lines = raw.splitlines(keepends=True)
        number = int(where * len(lines))
        head, raw, tail = b"".join(lines[:number]), lines[number], b"\n" + b"".join(lines[number + 1 :])
    value = json.loads(raw)
    nodes: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        node = stack.pop()
        items = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        nodes += [(node, key) for key, _ in items]
        stack += [child for _, child in items if isinstance(child, dict | list)]
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
    """In the subprocess: read damaged copies of folders on request."""
    readers: dict[str, Reader] = importlib.import_module(module).READERS
    resource.setrlimit(resource.RLIMIT_DATA, (PROCESS_BYTES, PROCESS_BYTES))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    meanings = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(1 << 62):
            try:
                name, file, edits, reseal = end.recv()
            except EOFError:
                return
            if name not in meanings:  # read from a copy: a meaning must not depend on the path
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
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak memory
    before = memory("VmRSS")
    try:
        outcome = "same" if _meaning(reader, folder) == whole else "other"
    except InputError as error:
        outcome = "refused"
        if len(str(error)) > 6000 or "\x1b" in str(error).replace("\\x1b", ""):
            outcome = f"silent: the error is too long or has control characters: {str(error)[:500]!r}"
    except AssertionError:
        outcome = f"silent: {traceback.format_exc()[-1500:]}"
    except BaseException:  # noqa: BLE001 - any other error is a bug to report
        outcome = f"crash: {traceback.format_exc()[-2500:]}"
    if outcome == "other" and reader.exact and not reseal:
        outcome = "silent: a change of hashed files was not detected"
    if (peak := memory("VmHWM") - before) > BYTES:
        outcome = f"memory: {peak >> 20} MB ({outcome[:300]})"
    return outcome


def memory(name: str) -> int:
    """Return a memory figure of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


class Child:
    """The reading subprocess, restarted after a crash or a hang."""

    def __init__(self, module: str, wholes: dict[str, str]) -> None:
        self._arguments = module, wholes
        self._process: Any = None

    def run(self, name: str, file: str, edits: list[Edit], reseal: bool) -> str:
        """Return the outcome of reading one damaged folder."""
        if self._process is None:
            spawn = multiprocessing.get_context("spawn")
            self._end, theirs = spawn.Pipe()
            self._process = spawn.Process(target=serve, args=(theirs, *self._arguments), daemon=True)
            self._process.start()
            theirs.close()
            self.run(name, file, [], False)  # imports, and reads the undamaged folder
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
        """End the subprocess."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
