"""Run a job without Ray: in this process with one worker, in spawned processes with several.

For small corpora, tests and debugging. The results are those of Ray, byte for byte. Calls in this process run when they
are made, so that a handle is the result itself; calls in other processes return futures.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from typing import Any

from msense.runtime.executor import (
    Executor,
    Row,
    TrainingResult,
    Worker,
    died,
    expected_errors,
    merged,
    reportable,
    shown_item,
)
from msense.runtime.local_training import train
from msense.runtime.processes import process_pool
from msense.runtime.progress import track
from msense.runtime.resources import Resources

logger = logging.getLogger(__name__)

TRIES = 3  # of work whose process died
_actor: Any = None  # of a spawned process


class LocalExecutor(Executor):
    """Runs work in this process, or in `workers` spawned ones; work that must be isolated always in spawned ones.

    Example:
        >>> executor = LocalExecutor(workers=2)
        >>> executor.run(max, 3, 5)
        5
    """

    def __init__(self, workers: int = 1, device: str | None = None) -> None:
        self.workers = workers
        device = device or _device()
        self.resources = Resources(actors=1 if device == "cuda" else workers, tasks=workers, device=device)

    def map(
        self,
        name: str,
        work: Callable[..., Row],
        items: Sequence[Any],
        *common: Any,
        isolated: bool = False,
        needs: Mapping[str, float] | None = None,
    ) -> Iterator[Row]:
        """Run `work(item, *common)` for every item, see `Executor.map`."""
        if self.workers == 1 and not isolated:
            rows: Iterator[Row] = (_reported(work, item, *common) for item in items)
        else:
            rows = self._pooled(items, lambda pool, item: pool.submit(_reported, work, item, *common), {})
        yield from track(name, rows, len(items))

    def map_actors(self, name: str, actor: type, arguments: Row, items: Sequence[Any]) -> Iterator[Row]:
        """Run the items through actors, see `Executor.map_actors`."""
        if not items:
            return
        if self.resources.actors == 1:
            made = _reported(actor, **arguments)
            rows: Iterator[Row] = (_reported(made, item) for item in items)
        else:
            rows = self._pooled(
                items,
                lambda pool, item: pool.submit(_call_actor, None, item),
                {"initializer": _make_actor, "initargs": (actor, arguments)},
            )
        yield from track(name, rows, len(items))

    def reduce(self, name: str, work: Callable[..., Any], items: Sequence[Any], *common: Any) -> Any:
        """Run `work(item, *common)` for every item and merge the results, see `Executor.reduce`."""
        total = None
        for result in self.map(name, work, items, *map(self.get, common)):
            total = result if total is None else merged(total, result)
        return total

    def run(self, work: Callable[..., Any], *arguments: Any, device: str = "cpu") -> Any:
        """Run one call in this process."""
        return _reported(work, *map(self.get, arguments))

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run one call in this process; the handle is its result."""
        return self.run(work, *arguments)

    def put(self, value: Any) -> Any:
        """Return the value itself."""
        return value

    def get(self, handle: Any) -> Any:
        """Wait for a future; anything else is a result already."""
        if isinstance(handle, list):
            return [self.get(one) for one in handle]
        try:
            return handle.result() if isinstance(handle, Future) else handle
        except BrokenProcessPool as error:
            raise died("while clustering", error) from error

    @contextmanager
    def clustering_workers(self, actor: type, *arguments: Any) -> Iterator[list[Worker]]:
        """Start the workers of distributed k-means, each in a process of its own if there are several."""
        if self.workers == 1:
            yield [_InProcess(actor(*arguments))]
            return
        with ExitStack() as stack:
            pools = [stack.enter_context(process_pool(1, _make_actor, (actor, arguments))) for _ in range(self.workers)]
            yield [_Spawned(pool, self) for pool in pools]

    def train(self, name: str, worker: Callable[..., Any], settings: Any, folder: str) -> TrainingResult:
        """Train in this process, or in `workers` processes that talk through torch.distributed."""
        return train(name, worker, settings, folder, self.resources.trainers)

    def _pooled(
        self, items: Sequence[Any], submit: Callable[[ProcessPoolExecutor, Any], Future], options: Row
    ) -> Iterator[Row]:
        """Yield the results of items in spawned processes; items whose process died are tried again, one at a time."""
        left = dict(enumerate(items))
        try:
            with process_pool(min(self.workers, len(items)), **options) as pool:
                running = {submit(pool, item): number for number, item in left.items()}
                for future in as_completed(running):
                    row = future.result()
                    del left[running[future]]
                    yield row
            return
        except BrokenProcessPool:
            logger.warning("a worker process died; %d items are tried again, one at a time", len(left))
        for item in left.values():
            yield self._retried(item, submit, options)

    def _retried(self, item: Any, submit: Callable[[ProcessPoolExecutor, Any], Future], options: Row) -> Row:
        """Return the result of one item, each try in a new process."""
        cause: Exception | None = None
        for _ in range(TRIES):
            try:
                with process_pool(1, **options) as pool:
                    row: Row = submit(pool, item).result()
                    return row
            except BrokenProcessPool as error:
                cause = error
        raise died(f"at {shown_item(item)}", cause)


class _InProcess:
    """A worker in this process."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def call(self, method: str, *arguments: Any) -> Any:
        return _reported(getattr(self.actor, method), *arguments)


class _Spawned:
    """A worker in a process of its own."""

    def __init__(self, pool: ProcessPoolExecutor, executor: LocalExecutor) -> None:
        self.pool, self.executor = pool, executor

    def call(self, method: str, *arguments: Any) -> Any:
        return self.pool.submit(_call_actor, method, *map(self.executor.get, arguments))


def _make_actor(actor: type, arguments: Any) -> None:
    """Make the actor of this process; an error is raised by its first call, as an initializer's would be lost."""
    global _actor
    try:
        _actor = actor(**arguments) if isinstance(arguments, dict) else actor(*arguments)
    except expected_errors() as error:
        _actor = error


def _call_actor(method: str | None, *arguments: Any) -> Any:
    if isinstance(_actor, Exception):
        raise reportable(_actor) or _actor
    return _reported(_actor if method is None else getattr(_actor, method), *arguments)


def _reported(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call `work`; errors are those that a run on Ray would raise."""
    try:
        return work(*arguments, **options)
    except expected_errors() as error:
        if (failure := reportable(error)) is None or failure is error:
            raise
        raise failure from error


def _device() -> str:
    """Return "cuda" where torch can use a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
