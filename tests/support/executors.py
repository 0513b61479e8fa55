"""Executors that disturb the work of a build: count it, stop it, fail it, shuffle it or kill its process.

A place is the name of a stage as the executor sees it ("embed", "plan: select"), or the name of a function that the
driver runs alone ("assemble").
"""

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from msense.runtime import LocalExecutor
from msense.runtime.executor import LazyActor, Row, Work, Worker, merged, name_of
from msense.runtime.ray_executor import RayExecutor

Fault = Callable[[], AbstractContextManager[object]]
# stage: place, and the number of the call there that is disturbed
INSIDE = {"passages": ("passages", 2), "plan": ("write", 1), "embed": ("embed", 2), "senses": ("senses", 2)}
INSIDE |= {"clustering": ("clustering", 2), "large tokens": ("large tokens", 1), "exemplars": ("exemplars", 2)}
INSIDE |= {"dictionary": ("assemble", 1), "labels": ("labels", 2), "training": ("training", 1)}


class StoppedError(BaseException):
    """Simulates the end of the driver's process."""


@contextmanager
def small_partitions() -> Iterator[None]:
    """Cut a small corpus into many blocks, partitions and shards, and run isolated work in this process."""
    from msense.corpus import chunking
    from msense.runtime import local_executor
    from msense.stages import embedding_store, label

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_executor, "SPAWN_ISOLATED", False)
        patch.setattr(chunking, "BLOCK_TOKENS", 1500)
        patch.setattr(embedding_store, "PARTITION_BYTES", (60_000, 60_000))
        patch.setattr(embedding_store, "SHARD_BYTES", (60_000, 60_000))
        patch.setattr(label, "PARTITION_BYTES", (4_000, 4_000))
        yield


class WatchedExecutor(LocalExecutor):
    """Runs each piece of work, in this process, within the context `around(place)`."""

    def __init__(self, around: Callable[[str], AbstractContextManager[object]]) -> None:
        super().__init__(device="cpu")
        self.around = around

    def _within(self, place: str, work: Work) -> Work:
        def call(*arguments: Any) -> Any:
            with self.around(place):
                return work(*arguments)

        return call

    def map(self, name: str, work: Work, items: Sequence[Any], *common: Any, **options: Any) -> Iterator[Row]:
        return super().map(name, self._within(name, work), items, *common, **options)

    def map_actors(self, name: str, actor: Work, arguments: Row, items: Sequence[Any]) -> Iterator[Row]:
        return super().map_actors(name, lambda **given: self._within(name, actor(**given)), arguments, items)

    def run(self, work: Work, *arguments: Any, device: str = "cpu") -> Any:
        return super().run(self._within(name_of(work), work), *arguments, device=device)

    @contextmanager
    def clustering_workers(self, actor: Work, *arguments: Any) -> Iterator[list[Worker]]:
        with super().clustering_workers(actor, *arguments) as workers, self.around("large tokens"):
            yield workers

    def train(self, name: str, worker: Work, settings: Any, folder: str) -> Any:
        with self.around("training"):
            return super().train(name, worker, settings, folder)


def disturbed(place: str, fault: Fault, call: int = 1) -> WatchedExecutor:
    """Return an executor that runs the given call of a place within a fault."""
    counted = itertools.count(1)
    return WatchedExecutor(lambda at: fault() if at == place and next(counted) == call else nullcontext())


def before(place: str, action: Callable[[], object], call: int = 1) -> WatchedExecutor:
    """Return an executor that calls `action` ahead of the given call of a place."""

    @contextmanager
    def act() -> Iterator[None]:
        action()
        yield

    return disturbed(place, act, call)


def stopping(place: str, call: int = 1) -> WatchedExecutor:
    """Return an executor that raises StoppedError in place of the given call."""

    return disturbed(place, stopped, call)


def stop(*_: object) -> None:
    """Raise StoppedError."""
    raise StoppedError


@contextmanager
def stopped() -> Iterator[None]:
    """Raise StoppedError."""
    stop()
    yield


class DisturbedTraining(LocalExecutor):
    """Runs the given report of every training worker within a fault; `reports` has the names of those in this process."""

    def __init__(self, fault: Fault = nullcontext, report: int = 1, trainers: int = 1) -> None:
        super().__init__(device="cpu")
        self.resources = replace(self.resources, actors=trainers)
        self.fault, self.report, self.reports = fault, report, []

    def train(self, name: str, worker: Work, settings: Any, folder: str) -> Any:
        names = self.reports if self.resources.actors == 1 else []
        return super().train(name, partial(_with_fault, worker, self.fault, self.report, names), settings, folder)


def _with_fault(worker: Work, fault: Fault, at: int, names: list[str], settings: Any, session: Any) -> Any:
    report, counted = session.report, itertools.count(1)

    def disturbed_report(metrics: dict[str, float], folder: Path | None, name: str) -> None:
        names.append(name)
        with fault() if next(counted) == at else nullcontext():
            report(metrics, folder, name)

    session.report = disturbed_report
    return worker(settings, session)


@contextmanager
def killed() -> Iterator[None]:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)
    yield


class ShuffledExecutor(LocalExecutor):
    """Finishes and merges work in random order, in this process, with several clustering workers."""

    def __init__(self, rng: random.Random, workers: int = 3) -> None:
        super().__init__(device="cpu")
        self.rng, self.clusterers = rng, workers

    def map(self, name: str, work: Work, items: Sequence[Any], *common: Any, **options: Any) -> Iterator[Row]:
        rows = list(super().map(name, work, self.rng.sample(items, len(items)), *common, **options))
        yield from self.rng.sample(rows, len(rows))

    def map_actors(self, name: str, actor: Work, arguments: Row, items: Sequence[Any]) -> Iterator[Row]:
        rows = list(super().map_actors(name, actor, arguments, self.rng.sample(items, len(items))))
        yield from self.rng.sample(rows, len(rows))

    def reduce(self, name: str, work: Work, items: Sequence[Any], *common: Any) -> Any:
        return merged_randomly([work(item, *common) for item in items], merged, self.rng)

    @contextmanager
    def clustering_workers(self, actor: Work, *arguments: Any) -> Iterator[list[Worker]]:
        with ExitStack() as stack:
            own = super().clustering_workers
            yield [stack.enter_context(own(actor, *arguments))[0] for _ in range(self.clusterers)]


def merged_randomly(things: list, combine: Callable, rng: random.Random, side_by_side: bool = False) -> Any:
    """Combine two or three at a time in random order; only neighbours if their order matters."""
    while len(things) > 1:
        things = things if side_by_side else rng.sample(things, len(things))
        at = rng.randrange(len(things) - 1)
        things = [*things[:at], combine(*things[at : at + 3]), *things[at + 3 :]]
    return things[0]


# --- processes that die: these classes are sent to Ray's workers


class LoggedWork:
    """Work that appends "place item" to a log when it starts, and kills or holds its process once.

    Args:
        work: what to call.
        place: its name in the log.
        log: the log.
        flag: file that records that the fault has happened; None = no fault.
        at: name of a function of `storage` at whose call the process dies, rather than at once: in the middle of a write.
        hold: wait to be killed, with the id of the node in the flag.
    """

    def __init__(
        self, work: Work, place: str, log: Path, flag: Path | None = None, at: str = "", hold: bool = False
    ) -> None:
        self.work, self.place, self.log, self.flag, self.at, self.hold = work, place, log, flag, at, hold

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        item = arguments[0] if arguments else {}
        if isinstance(item, dict) and "number" in item:
            with self.log.open("a") as file:
                file.write(f"{self.place} {item['number']}\n")
        if self.flag is None or self.flag.exists():
            return self.work(*arguments, **options)
        if not self.at:
            die_once(self.flag, self.hold)
            return self.work(*arguments, **options)
        from msense.io import storage

        with pytest.MonkeyPatch.context() as patch:
            original = getattr(storage, self.at)
            patch.setattr(storage, self.at, lambda *given: (die_once(self.flag, self.hold), original(*given))[1])
            return self.work(*arguments, **options)


def die_once(flag: Path, hold: bool = False) -> None:
    """Kill this process unless the flag exists; with `hold`, wait until its node is killed."""
    try:
        file = flag.open("x")
    except FileExistsError:
        return
    if not hold:
        os.kill(os.getpid(), signal.SIGKILL)
    import ray

    with file:
        file.write(ray.get_runtime_context().get_node_id())
    time.sleep(600)


class MadeWork:
    """Makes an actor whose calls are wrapped."""

    def __init__(self, actor: Work, wrap: Callable[[Work], Work]) -> None:
        self.actor, self.wrap = actor, wrap

    def __call__(self, **arguments: Any) -> Work:
        return self.wrap(self.actor(**arguments))


class RayWithFaults(RayExecutor):
    """Runs work on Ray through `LoggedWork`.

    Args:
        executor: the executor to run it on.
        log: file of lines "place number".
        faults: options of `LoggedWork` by place.
        kill_driver_at: place, and number of finished items there, at which this process dies.
        delay: wrapper of all work, such as one that waits.
    """

    def __init__(
        self, executor: RayExecutor, log: Path, faults: dict[str, Row] | None = None,
        kill_driver_at: tuple[str, int] | None = None, delay: Callable[[Work], Work] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(executor.resources)
        self.log, self.faults, self.kill_driver_at, self.delay = log, faults or {}, kill_driver_at, delay

    def _logged(self, place: str, work: Work) -> Work:
        return LoggedWork(self.delay(work) if self.delay else work, place, self.log, **self.faults.get(place, {}))

    def _counted(self, place: str, rows: Iterator[Row]) -> Iterator[Row]:
        for number, row in enumerate(rows, 1):
            self._die_at(place, number)
            yield row

    def _die_at(self, place: str, number: int) -> None:
        if (place, number) == self.kill_driver_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def map(self, name: str, work: Work, items: Sequence[Any], *common: Any, **options: Any) -> Iterator[Row]:
        return self._counted(name, super().map(name, self._logged(name, work), items, *common, **options))

    def map_actors(self, name: str, actor: Work, arguments: Row, items: Sequence[Any]) -> Iterator[Row]:
        made = MadeWork(actor, partial(self._logged, name))
        return self._counted(name, super().map_actors(name, made, arguments, items))

    def reduce(self, name: str, work: Work, items: Sequence[Any], *common: Any) -> Any:
        self._die_at(name, 1)
        return super().reduce(name, self._logged(name, work), items, *common)

    def run(self, work: Work, *arguments: Any, device: str = "cpu") -> Any:
        self._die_at(name_of(work), 1)
        return super().run(self._logged(name_of(work), work), *arguments, device=device)

    @contextmanager
    def clustering_workers(self, actor: Work, *arguments: Any) -> Iterator[list[Worker]]:
        made = partial(FaultyChunkWorker, actor, self.faults.get("large tokens"))
        with super().clustering_workers(made, *arguments) as workers:
            yield workers


class FaultyChunkWorker(LazyActor):
    """A clustering worker that dies once in the second round of a token."""

    def __init__(self, actor: Work, fault: Row | None, *arguments: Any) -> None:
        super().__init__(partial(actor, *arguments))
        self.fault = fault

    def __getattr__(self, method: str) -> Work:
        return partial(self.call, method)

    def partial(self, chunks: object, state: Any) -> object:
        if self.fault and state.rounds:
            die_once(self.fault["flag"], self.fault.get("hold", False))
        return self.call("partial", chunks, state)
