"""Timing of several ways in turn, and worker processes that are ready before the clock starts.

A ratio is the median of the ratios per turn, so that a disturbance of the machine affects both sides.
"""

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

Run = Callable[[Callable[[list[Any]], Sequence[Any]]], list[Any]]
_items: list[Any] = []  # of a worker process


class Turns(dict[str, np.ndarray]):
    """Seconds of several ways by name, float64 [turns] each."""

    def ratio(self, over: str, under: str) -> float:
        """Return the median over turns of one way's time over another's."""
        return float(np.median(self[over] / self[under]))

    def median(self, name: str) -> float:
        """Return the median seconds of a way."""
        return float(np.median(self[name]))

    def best(self, prefix: str) -> str:
        """Return the fastest way whose name starts with `prefix`."""
        return min((name for name in self if name.startswith(prefix)), key=self.median)


def in_turn(ways: Mapping[str, Callable[[], Any]], turns: int) -> Turns:
    """Time several calls in alternation."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            gc.collect()
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return Turns({name: np.array(times) for name, times in seconds.items()})


@contextmanager
def processes(items: Sequence[Any], count: int) -> Iterator[Run]:
    """Spawn processes that each keep a share of some items, dealt round-robin.

    Yields:
        A function that calls its argument in every process with the share and returns the results in the items' order.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        given = [(items[number::count],) for number in range(count)]
        pools = [stack.enter_context(ProcessPoolExecutor(1, context, _keep, share)) for share in given]

        def run(work: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
            shares = [future.result() for future in [pool.submit(_call, work) for pool in pools]]
            results: list[Any] = [None] * sum(map(len, shares))
            for number, share in enumerate(shares):
                results[number::count] = share
            return results

        yield run


def _keep(items: Sequence[Any]) -> None:
    _items.extend(items)


def _call(work: Callable[[list[Any]], Sequence[Any]]) -> Sequence[Any]:
    return work(_items)
