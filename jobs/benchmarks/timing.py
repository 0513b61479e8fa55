"""Timing of several ways in turn, and worker processes that are ready before the clock starts.

A ratio is the median of the ratios per turn, so that a disturbance of the machine affects both sides.
"""

import gc
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

_items: list[Any] = []  # of a worker process


@dataclass(frozen=True)
class Turns:
    """Timings of several ways: float64 [turns] seconds per way, and the return value of the last turn per way."""

    seconds: dict[str, np.ndarray]
    results: dict[str, Any]

    def ratio(self, over: str, under: str) -> float:
        """Return the median over turns of one way's time over another's."""
        return float(np.median(self.seconds[over] / self.seconds[under]))

    def median(self, name: str) -> float:
        """Return the median seconds of a way."""
        return float(np.median(self.seconds[name]))

    def best(self, prefix: str) -> str:
        """Return the fastest way whose name starts with `prefix`."""
        return min((name for name in self.seconds if name.startswith(prefix)), key=self.median)


def in_turn(ways: Mapping[str, Callable[[], Any]], turns: int, budget: float = np.inf) -> Turns:
    """Time several calls in alternation; no turn starts after `budget` seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    began = time.perf_counter()
    for _ in range(turns):
        for name, way in ways.items():
            results.pop(name, None)
            gc.collect()
            start = time.perf_counter()
            results[name] = way()
            seconds[name].append(time.perf_counter() - start)
        if time.perf_counter() - began > budget:
            break
    return Turns({name: np.array(times) for name, times in seconds.items()}, results)


class Processes:
    """Spawned processes that each keep a share of some items and run functions on it."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pools = [ProcessPoolExecutor(1, context) for _ in range(count)]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown()

    def give(self, items: Sequence[Any]) -> None:
        """Distribute items round-robin, replacing those of the previous call."""
        count = len(self._pools)
        for future in [pool.submit(_keep, items[number::count]) for number, pool in enumerate(self._pools)]:
            future.result()

    def run(self, work: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
        """Call `work` in every process with its items and return the results in the order of all items."""
        shares = [future.result() for future in [pool.submit(_call, work) for pool in self._pools]]
        results: list[Any] = [None] * sum(map(len, shares))
        for number, share in enumerate(shares):
            results[number :: len(shares)] = share
        return results


def _keep(items: Sequence[Any]) -> None:
    _items[:] = items


def _call(work: Callable[[list[Any]], Sequence[Any]]) -> Sequence[Any]:
    return work(_items)
