"""The interface between stages and whatever runs their work, and how errors travel back to the driver.

Work items and results are small rows of JSON values (paths and counts); embeddings never pass through an executor.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from msense.errors import MsenseError
from msense.io import filesystems
from msense.runtime.resources import Resources

MEMORY_HINT = "A common cause is a lack of memory: lower --workers, or use a machine with more memory"
Row = dict[str, Any]
Work = Callable[..., Any]  # a function of a module, as it may run in another process
Worker = Callable[..., Any]  # starts `method(*arguments)` of an object in a process, returns a handle to its result
Needs = Mapping[str, float] | None


class TrainingResult(NamedTuple):
    """The outcome of a finished training."""

    history: list[dict[str, float]]  # the metrics of every epoch
    checkpoint: str  # URI of the folder that was reported last


class Executor(Protocol):
    """Runs the work of a stage.

    Handles stand for results that may still be computed; `get` waits for them, and every method accepts them in place of
    arguments. InputError, MsenseError and OSError that the work raises are raised again on the driver, and a MsenseError
    where its process died repeatedly.
    """

    resources: Resources

    def map(
        self, name: str, work: Work, items: Sequence[Any], *common: Any, isolated: bool = False, needs: Needs = None
    ) -> Iterator[Row]:
        """Run `work(item, *common)` for every item; yield the rows it returns, in any order.

        Args:
            name: the stage, for progress and the dashboard.
            work: what to run.
            items: JSON values.
            common: more arguments.
            isolated: the work reads files that could crash its process, which must not be the driver's.
            needs: resources that Ray reserves for each call; half a CPU by default.
        """

    def map_actors(self, name: str, actor: Work, arguments: Row, items: Sequence[Any]) -> Iterator[Row]:
        """Run the items through actors made by `actor(**arguments)`; yield the rows they return, in any order."""

    def reduce(self, name: str, work: Work, items: Sequence[Any], *common: Any) -> Any:
        """Run `work(item, *common)` for every item (at least one) and merge the results with their `merge(other)`.

        They are merged in any order. Returns a handle to the total.
        """

    def run(self, work: Work, *arguments: Any, device: str = "cpu") -> Any:
        """Run one call, on a GPU if `device` is "cuda", and return its result."""

    def put(self, value: Any) -> Any:
        """Return a handle to a value that several calls need."""

    def get(self, handle: Any) -> Any:
        """Wait for the result of a handle, or of a list of handles."""

    def clustering_workers(self, actor: Work, *arguments: Any) -> AbstractContextManager[list[Worker]]:
        """Start as many objects made by `actor(*arguments)` as may cluster at a time; they end with the context.

        A worker is called with the name of a method and its arguments, which may be handles.
        """

    def train(self, name: str, worker: Work, settings: Any, folder: str) -> TrainingResult:
        """Run `worker(settings, session)` on every training worker, resumed from the last checkpoint of `name`.

        The name identifies everything that the result depends on. A worker reports checkpoints, which are stored below
        the URI `folder`, to its session and returns the metrics of all epochs.

        Raises:
            MsenseError: workers failed repeatedly; the message has the cause.
        """


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes; 0 where the system does not report it."""
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(peak[1]) * 1024 if peak else 0


def name_of(work: Work) -> str:
    """Return the name of a task on the dashboard."""
    return getattr(work, "__name__", type(work).__name__).strip("_").replace("_", " ")


def reported(work: Work, *arguments: Any, **options: Any) -> Any:
    """Call `work`; convert errors of stores and a lack of memory into MsenseError."""
    try:
        return work(*arguments, **options)
    except filesystems.storage_error_types(MsenseError, MemoryError, RuntimeError) as error:
        if (failure := reportable(error)) is None or failure is error:
            raise
        raise failure from error


class LazyActor:
    """Makes an object at the first call of a method, which then raises the errors of its construction."""

    def __init__(self, make: Work) -> None:
        self.make = make
        self.made: Any = None

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object."""
        if self.made is None:
            self.made = reported(self.make)
        return reported(getattr(self.made, method), *arguments)


def reportable(error: BaseException | None) -> Exception | None:
    """Return the error to report for one that msense or the system raised; None for a bug."""
    if isinstance(error, MsenseError | OSError):
        return error
    if isinstance(error, filesystems.s3_errors()):
        return MsenseError(filesystems.error_message(error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the second is torch's
        return MsenseError(f"out of memory ({type(error).__name__}: {error}). {MEMORY_HINT}")
    return None


def merged(first: Any, *others: Any) -> Any:
    """Return the sum of results with a `merge` method; none of them is changed."""
    total = copy.deepcopy(first)  # values of Ray's object store are read-only
    for other in others:
        total.merge(other)
    return total


def died(doing: str, cause: object) -> MsenseError:
    """Return the error for work whose process died repeatedly."""
    return MsenseError(f"a worker process died repeatedly {doing} ({cause}). {MEMORY_HINT}")


def shown_item(item: Any) -> str:
    """Return an item for an error message: the file it reads if it has one."""
    if isinstance(item, dict) and "uri" in item:
        return filesystems.display_uri(str(item["uri"]))
    return json.dumps(item, default=str)[:200]
