"""TODO"""

import copy
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msense.errors import InputError, MsenseError
from msense.io import filesystems

_MEMORY = "Often it ran out of memory: give --workers a smaller number, or a machine with more memory"
Row = dict[str, Any]


def peak_memory() -> int:
    """Return the most memory this process has held, in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def _tellable() -> tuple[type[Exception], ...]:
    """Return the errors of work among which `_failure` looks; those of a store's client once it is loaded."""
    return (MsenseError, OSError, MemoryError, RuntimeError, *filesystems.s3_errors())


def _failure(error: BaseException | None) -> Exception | None:
    """Return what to tell of an error that msense or the system raised on purpose; None for a bug."""
    if isinstance(error, MsenseError | OSError):
        return error
    if isinstance(error, filesystems.s3_errors()):
        return MsenseError(filesystems.s3_error_message(error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the second is torch's
        return MsenseError(f"out of memory ({type(error).__name__}: {error}). {_MEMORY}")
    return None


def _merge(first: Any, *others: Any) -> Any:  # noqa: ANN401 - anything with merge()
    total = copy.deepcopy(first)  # what comes from the object store is read-only
    for other in others:
        total.merge(other)
    return total


def unwrap(row: Row) -> Row:
    """Return what the work returned, or raise what it raised."""
    if row["error"]:
        raise (InputError if row["usage"] else MsenseError)(row["error"])
    value: Row = json.loads(row["result"])
    return value


def guard(work: Callable[[Any], Row], item: Any) -> Row:  # noqa: ANN401 - any JSON value
    """Run work so that an error of msense or of the system travels as a row, not as a traceback through Ray."""
    began = time.monotonic()
    try:
        result = json.dumps(work(item))
        return {"result": result, "error": "", "usage": False, "seconds": time.monotonic() - began}
    except _tellable() as error:
        failure = _failure(error)
        if failure is None:
            raise
        return {"result": "", "error": str(failure), "usage": isinstance(failure, InputError), "seconds": 0.0}
