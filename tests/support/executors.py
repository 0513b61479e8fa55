"""Executors that disturb the work of a build: count it, stop it, fail it, shuffle it or kill its process.

A place is the name of a stage as the executor sees it ("embed", "plan: select"), or the name of a function that the
driver runs alone ("assemble").
"""

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from msense.runtime import LocalExecutor
from msense.runtime.executor import Row, Work, Worker, merged, name_of

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
    from msense import runtime
    from msense.corpus import chunking
    from msense.stages import embedding_store

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "LocalExecutor", partial(LocalExecutor, isolate=False))  # of `open_executor`
        patch.setattr(chunking, "BLOCK_TOKENS", 1500)
        patch.setattr(embedding_store, "PARTITION_BYTES", (15_000, 15_000))
        patch.setattr(embedding_store, "SHARD_BYTES", (60_000, 60_000))
        yield


class WatchedExecutor(LocalExecutor):
    """Runs each piece of work, in this process, within the context `around(place)`."""

    def __init__(self, around: Callable[[str], AbstractContextManager[object]]) -> None:
        super().__init__(device="cpu", isolate=False)
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
        super().__init__(device="cpu", isolate=False)
        self.resources = replace(self.resources, actors=trainers, tasks=trainers)
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
        super().__init__(device="cpu", isolate=False)
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
