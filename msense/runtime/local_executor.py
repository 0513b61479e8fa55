"""Run a job without Ray: in this process with one worker, in spawned processes with several.

For small corpora, tests and debugging. The results are those of Ray, byte for byte. Calls in this process run when they
are made, so that a handle is the result itself; calls in other processes return futures.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from msense.runtime.executor import (
    Executor,
    LazyActor,
    Needs,
    Row,
    TrainingResult,
    Work,
    Worker,
    died,
    merged,
    reported,
    shown_item,
)
from msense.runtime.local_training import train
from msense.runtime.processes import SpawnedPool
from msense.runtime.progress import track
from msense.runtime.resources import Resources

logger = logging.getLogger(__name__)

TRIES = 3  # of work whose process died
SPAWN_ISOLATED = True  # tests of other things run isolated work in this process, which is faster
_actor: tuple[int, LazyActor] | None = None  # of a spawned process, with its number
_numbers = itertools.count()


class LocalExecutor(Executor):
    """Runs work in this process, or in `workers` spawned ones; work that must be isolated always in spawned ones.

    Example:
        >>> executor = LocalExecutor(workers=2)
        >>> executor.run(max, 3, 5)
        5
    """

    def __init__(self, workers: int = 1, device: str | None = None) -> None:
        import torch

        self.workers = workers
        self._pool: SpawnedPool | None = None
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.resources = Resources(actors=1 if device == "cuda" else workers, tasks=workers, device=device)

    def map(
        self, name: str, work: Work, items: Sequence[Any], *common: Any, isolated: bool = False, needs: Needs = None
    ) -> Iterator[Row]:
        """Run `work(item, *common)` for every item, see `Executor.map`."""
        if self.workers == 1 and not (isolated and SPAWN_ISOLATED):
            rows: Iterator[Row] = (reported(work, item, *common) for item in items)
        else:
            rows = self._spawned(items, partial(_call, work, common))
        yield from track(name, rows, len(items))

    def map_actors(self, name: str, actor: Work, arguments: Row, items: Sequence[Any]) -> Iterator[Row]:
        """Run the items through actors, see `Executor.map_actors`."""
        if not items:
            return
        if self.resources.actors == 1:
            own = LazyActor(partial(actor, **arguments))
            rows: Iterator[Row] = (own.call("__call__", item) for item in items)
        else:
            rows = self._spawned(items, partial(_call_actor, next(_numbers), partial(actor, **arguments), "__call__"))
        yield from track(name, rows, len(items))

    def reduce(self, name: str, work: Work, items: Sequence[Any], *common: Any) -> Any:
        """Run `work(item, *common)` for every item and merge the results, see `Executor.reduce`."""
        total = None
        for result in self.map(name, work, items, *map(self.get, common)):
            total = result if total is None else merged(total, result)
        return total

    def run(self, work: Work, *arguments: Any, device: str = "cpu") -> Any:
        """Run one call in this process."""
        return reported(work, *map(self.get, arguments))

    def submit(self, work: Work, *arguments: Any) -> Any:
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
    def clustering_workers(self, actor: Work, *arguments: Any) -> Iterator[list[Worker]]:
        """Start the workers of distributed k-means, each in a process of its own if there are several."""
        if self.workers == 1:
            yield [LazyActor(partial(actor, *arguments))]
            return
        call = partial(_call_actor, next(_numbers), partial(actor, *arguments))
        with ExitStack() as stack:
            yield [_Spawned(stack.enter_context(SpawnedPool(1)), call, self) for _ in range(self.workers)]

    def train(self, name: str, worker: Work, settings: Any, folder: str) -> TrainingResult:
        """Train in this process, or in `workers` processes that talk through torch.distributed."""
        return train(name, worker, settings, folder, self.resources.trainers)

    def _spawned(self, items: Sequence[Any], work: Work) -> Iterator[Row]:
        """Yield the results of items in spawned processes; those whose process died are retried one at a time."""
        left = dict(enumerate(items))
        pool = self._pool = self._pool or SpawnedPool(self.workers)
        running: dict[Future[Row], int] = {}
        try:
            running |= {pool.submit(work, item): number for number, item in left.items()}
            for future in as_completed(running):
                row = future.result()
                del left[running[future]]
                yield row
            return
        except BrokenProcessPool:
            self._pool = None
            logger.warning("a worker process died; %d items are retried, one at a time", len(left))
        finally:
            for future in running:
                future.cancel()
        yield from (_retried(work, item) for item in left.values())


def _retried(work: Work, item: Any) -> Row:
    """Return the result of one item, each try in a new process."""
    for attempt in range(TRIES):
        try:
            with SpawnedPool(1) as pool:
                row: Row = pool.submit(work, item).result()
                return row
        except BrokenProcessPool as error:
            if attempt == TRIES - 1:
                raise died(f"at {shown_item(item)}", error) from error
    raise AssertionError


class _Spawned:
    """A worker in a process of its own."""

    def __init__(self, pool: SpawnedPool, made: Work, executor: LocalExecutor) -> None:
        self.pool, self.made, self.executor = pool, made, executor

    def call(self, method: str, *arguments: Any) -> Any:
        return self.pool.submit(self.made, method, *map(self.executor.get, arguments))


def _call(work: Work, common: tuple[Any, ...], item: Any) -> Any:
    """Run work in a spawned process; frees the actor of an earlier stage."""
    global _actor
    _actor = None
    return reported(work, item, *common)


def _call_actor(number: int, make: Work, method: str, *arguments: Any) -> Any:
    """Call a method of an actor of this process, which replaces that of an earlier stage."""
    global _actor
    if _actor is None or _actor[0] != number:
        _actor = number, LazyActor(make)
    return _actor[1].call(method, *arguments)
