"""Run a job without Ray: in this process with one worker, in spawned processes with several.

For small corpora, tests and debugging. The results are those of Ray, byte for byte. A handle is the result itself, or a
future of another process.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from msense.errors import InputError
from msense.runtime.executor import (
    Executor,
    LazyActor,
    Needs,
    Row,
    TrainingResult,
    Work,
    Worker,
    died,
    reported,
    shown_item,
)
from msense.runtime.local_training import SpawnedPool, train
from msense.runtime.progress import track
from msense.runtime.resources import Resources

logger = logging.getLogger(__name__)
TRIES = 3  # of work whose process died
_actor: tuple[int, LazyActor] | None = None  # of a spawned process, with its number
_numbers = itertools.count()


class LocalExecutor(Executor):
    """Runs work in this process, or in `workers` spawned ones.

    Args:
        workers: actors and tasks at a time.
        device: "cuda" or "cpu"; None = a GPU if there is one.
        isolate: run isolated work in a spawned process even with one worker; tests of other things are faster without.
        ranks: processes of a teacher actor, each with one GPU (cuda:0 and so on), or one CPU without GPUs.
        offload: whether actors keep the teacher's weights in host memory.

    Raises:
        InputError: this machine has fewer GPUs than `ranks`.

    Example:
        >>> executor = LocalExecutor(workers=2)
        >>> executor.run(max, 3, 5)
        5
    """

    def __init__(
        self,
        workers: int = 1,
        device: str | None = None,
        isolate: bool = True,
        ranks: int = 1,
        offload: bool = False,
    ) -> None:
        import torch

        self.workers, self.isolate = workers, isolate
        self._pool: SpawnedPool | None = None
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        gpus = torch.cuda.device_count() if device == "cuda" else ranks
        if ranks > max(1, gpus):
            raise InputError(f"{ranks} ranks need a GPU each, but this machine has {gpus}: give --ranks {gpus} or less")
        actors = 1 if device == "cuda" else max(1, workers // ranks)
        self.resources = Resources(actors, workers, device, ranks=ranks, offload=offload)

    def map(
        self, name: str, work: Work, items: Sequence[Any], *common: Any, isolated: bool = False, needs: Needs = None
    ) -> Iterator[Row]:
        common = tuple(map(self.get, common))
        if self.workers == 1 and not (isolated and self.isolate):
            rows: Iterator[Row] = (reported(work, item, *common) for item in items)
        else:
            rows = self._spawned(items, partial(_call, work, common))
        yield from track(name, rows, len(items))

    def map_actors(self, name: str, actor: Work, arguments: Row, items: Sequence[Any]) -> Iterator[Row]:
        if not items:
            return
        if self.resources.grouped:
            yield from track(name, self._grouped(partial(actor, **arguments), items), len(items))
            return
        if self.resources.actors == 1:
            own = LazyActor(partial(actor, **arguments))
            rows: Iterator[Row] = (own.call("__call__", item) for item in items)
        else:
            rows = self._spawned(items, partial(_call_actor, next(_numbers), partial(actor, **arguments), "__call__"))
        yield from track(name, rows, len(items))

    def _grouped(self, make: Work, items: Sequence[Any]) -> Iterator[Row]:
        """Yield the results of actors whose processes, and with them their process groups, end after the last item."""
        others, self._pool = self._pool, SpawnedPool(self.resources.actors)
        try:
            yield from self._spawned(items, partial(_call_actor, next(_numbers), make, "__call__"))
        finally:
            if self._pool is not None:
                self._pool.shutdown()
            self._pool = others

    def reduce(self, name: str, work: Work, items: Sequence[Any], *common: Any) -> Any:
        total: Any = None
        for result in self.map(name, work, items, *common):
            if total is None:
                total = result
            else:
                total.merge(result)
        return total

    def run(self, work: Work, *arguments: Any, device: str = "cpu") -> Any:
        return reported(work, *map(self.get, arguments))

    def put(self, value: Any) -> Any:
        return value

    def get(self, handle: Any) -> Any:
        if isinstance(handle, list):
            return [self.get(one) for one in handle]
        try:
            return handle.result() if isinstance(handle, Future) else handle
        except BrokenProcessPool as error:
            raise died("while clustering", error) from error

    @contextmanager
    def clustering_workers(self, actor: Work, *arguments: Any) -> Iterator[list[Worker]]:
        if self.workers == 1:
            yield [LazyActor(partial(actor, *arguments)).call]
            return
        call = partial(_call_actor, next(_numbers), partial(actor, *arguments))
        with ExitStack() as stack:
            pools = [stack.enter_context(SpawnedPool(1)) for _ in range(self.workers)]
            yield [partial(self._start, pool, call) for pool in pools]

    def train(self, name: str, worker: Work, settings: Any, folder: str) -> TrainingResult:
        return train(name, worker, settings, folder, self.resources.trainers)

    def _start(self, pool: SpawnedPool, call: Work, method: str, *arguments: Any) -> Future[Any]:
        return pool.submit(call, method, *map(self.get, arguments))

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
    cause: Exception | None = None
    for _ in range(TRIES):
        try:
            with SpawnedPool(1) as pool:
                row: Row = pool.submit(work, item).result()
                return row
        except BrokenProcessPool as error:
            cause = error
    raise died(f"at {shown_item(item)}", cause) from cause


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
