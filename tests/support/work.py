"""Work for the contract tests of executors, importable by every process."""

import os
import signal
from pathlib import Path
from typing import Any

from msense.errors import DictionaryError, InputError, MsenseError


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


ERRORS: dict[str, tuple[Exception, type[Exception], str]] = {  # name: raised, the kind and message that are reported
    "InputError": (InputError("no such item"), InputError, "^no such item$"),
    "DictionaryError": (DictionaryError("no such dictionary"), DictionaryError, "^no such dictionary$"),
    "MsenseError": (MsenseError("failed"), MsenseError, "^failed$"),
    "OSError": (FileNotFoundError(2, "gone", "file"), OSError, "gone"),
    "MemoryError": (MemoryError("no room"), MsenseError, r"out of memory \(MemoryError: no room\)\. .*--workers"),
    "OutOfMemoryError": (OutOfMemoryError("CUDA"), MsenseError, r"out of memory \(OutOfMemoryError: CUDA\)\. "),
    "bug": (ZeroDivisionError("a bug"), ZeroDivisionError, "a bug"),
}


def add(item: int, offset: int = 0) -> dict:
    return {"item": item + offset, "pid": os.getpid()}


def fail(item: str, *_: object) -> dict:
    raise ERRORS[item][0]


def die(item: dict, tried: str) -> dict:
    """Kill this process at its first `item["deaths"]` tries."""
    file = Path(tried, str(item["number"]))
    tries = int(file.read_text()) if file.exists() else 0
    file.write_text(str(tries + 1))
    if tries < item["deaths"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"number": item["number"]}


class Total:
    """Mergeable numbers."""

    def __init__(self, item: int, offset: int) -> None:
        self.numbers = [item + offset]

    def merge(self, other: "Total") -> None:
        self.numbers = self.numbers + other.numbers


class Adder:
    """An actor, and a clustering worker, that adds."""

    def __init__(self, offset: int) -> None:
        if offset < 0:
            raise InputError("a negative offset")
        self.offset, self.calls = offset, 0

    def __call__(self, item: int) -> dict:
        return fail(item) if isinstance(item, str) else add(item, self.offset)

    def held(self, more: list[int]) -> tuple[int, int]:
        """Return the number of calls so far, and a sum."""
        self.calls += 1
        return self.calls, self.offset + sum(more)


class Dying:
    """An actor that dies as `die` does, or when it is made."""

    def __init__(self, tried: str, at_once: bool = False) -> None:
        self.tried = tried
        if at_once:
            die({"number": 0, "deaths": 99}, tried)

    def __call__(self, item: dict) -> dict:
        return die(item, self.tried)


def train(settings: dict[str, Any], session: Any) -> list[dict[str, float]]:
    """A training of a few steps, each with a checkpoint, that fails once at `settings["fail_at"]`."""
    import tempfile

    with session.latest_checkpoint() as folder:
        step = int(Path(folder, "step").read_text()) if folder else 0
    history: list[dict[str, float]] = [{"step": n + 1.0, "resumed": float(n < step)} for n in range(step)]
    while step < settings["steps"]:
        step += 1
        if step == settings["fail_at"] and not Path(settings["flag"]).exists():
            if session.rank == 0:
                Path(settings["flag"]).touch()
            raise MsenseError("interrupted")
        history.append({"step": float(step), "resumed": 0.0})
        with tempfile.TemporaryDirectory() as own:
            Path(own, "step").write_text(str(step))
            session.report({"step": step}, Path(own) if session.rank == 0 else None, f"step_{step}")
    return history
