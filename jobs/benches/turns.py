"""How things are timed: in turn, and with as many processes as one likes that are ready before the clock.

In: what to call. Out: seconds of every turn and the last results. A ratio is the median of the turns' ratios, so that
what disturbs the machine for a while disturbs both of its sides.
"""

import gc
import logging
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

logger = logging.getLogger("msense.bench")


@dataclass(frozen=True)
class Turns:
    """What was timed."""

    seconds: dict[str, np.ndarray]  # float64 [turns] of each way
    results: dict[str, Any]  # of the last turn

    def ratio(self, over: str, under: str) -> float:
        """Return how many times longer one way took than another: the median over turns."""
        return float(np.median(self.seconds[over] / self.seconds[under]))

    def best(self, kind: str) -> str | None:
        """Return the fastest of the ways whose names begin with `kind`; None if there is none."""
        ways = [name for name in self.seconds if name.startswith(kind)]
        return min(ways, key=lambda name: float(np.median(self.seconds[name]))) if ways else None


def in_turn(ways: Mapping[str, Callable[[], Any]], turns: int, budget: float = np.inf) -> Turns:
    """Time calls one after the other, again and again.

    Args:
        ways: what to call, by name.
        turns: how often each.
        budget: seconds after which no further turn begins.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    began = time.perf_counter()
    for _ in range(turns):
        for name, way in ways.items():
            results.pop(name, None)
            gc.collect()
            start = time.perf_counter()
            found = way()
            seconds[name].append(time.perf_counter() - start)
            results[name] = found
        if time.perf_counter() - began > budget:
            break
    for name, told in seconds.items():
        logger.debug("%s: %s s", name, " ".join(f"{s:.3f}" for s in told))
    return Turns({name: np.array(told) for name, told in seconds.items()}, results)


class Processes:
    """Processes that hold a share of some items each, and work on them when told to.

    Started afresh (spawn), so that none inherits threads; imports and items are there before any clock runs.
    """

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(count):
            own, other = context.Pipe()
            process = context.Process(target=_serve, args=(other,), daemon=True)
            process.start()
            other.close()
            self._pipes.append(own)
            self._processes.append(process)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()

    def give(self, items: Sequence[Any]) -> None:
        """Deal out items by turns; those of before are dropped."""
        for number, pipe in enumerate(self._pipes):
            pipe.send(("items", items[number :: len(self._pipes)]))

    def run(self, work: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
        """Have every process call `work` with its items; return the results in the order of all items."""
        for pipe in self._pipes:
            pipe.send(("work", work))
        told = [pipe.recv() for pipe in self._pipes]
        for found in told:
            if isinstance(found, BaseException):
                raise found
        results: list[Any] = [None] * sum(map(len, told))
        for number, found in enumerate(told):
            results[number :: len(told)] = found
        return results


def _serve(pipe: Connection) -> None:
    items: list[Any] = []
    while True:
        try:
            kind, value = pipe.recv()
        except EOFError:
            return
        if kind == "items":
            items = list(value)
            continue
        try:
            pipe.send(value(items))
        except Exception as error:  # noqa: BLE001 - raised again by who asked
            pipe.send(error)
