"""Timing in turns, and worker processes that are ready before the clock starts.

A ratio is the median of the ratios per turn, so that a disturbance of the machine affects both sides.
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
    """Timings of several ways.

    Attributes:
        seconds: float64 [turns] per way.
        results: return value of the last turn per way.
    """

    seconds: dict[str, np.ndarray]
    results: dict[str, Any]

    def ratio(self, over: str, under: str) -> float:
        """Return the median over turns of one way's time over another's."""
        return float(np.median(self.seconds[over] / self.seconds[under]))

    def median(self, name: str) -> float:
        """Return the median seconds of a way."""
        return float(np.median(self.seconds[name]))

    def best(self, prefix: str) -> str | None:
        """Return the fastest way whose name starts with `prefix`, or None."""
        return min((name for name in self.seconds if name.startswith(prefix)), key=self.median, default=None)


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
            result = way()
            seconds[name].append(time.perf_counter() - start)
            results[name] = result
        if time.perf_counter() - began > budget:
            break
    for name, times in seconds.items():
        logger.debug("%s: %s s", name, " ".join(f"{s:.3f}" for s in times))
    return Turns({name: np.array(times) for name, times in seconds.items()}, results)


class Processes:
    """Spawned processes that each hold a share of some items and run functions on it."""

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
        """Distribute items round-robin, replacing those of the previous call."""
        for number, pipe in enumerate(self._pipes):
            pipe.send(("items", items[number :: len(self._pipes)]))

    def run(self, work: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
        """Call `work` in every process with its items and return the results in the order of all items."""
        for pipe in self._pipes:
            pipe.send(("work", work))
        answers = [pipe.recv() for pipe in self._pipes]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        results: list[Any] = [None] * sum(map(len, answers))
        for number, answer in enumerate(answers):
            results[number :: len(answers)] = answer
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
        except Exception as error:  # noqa: BLE001 - raised again by `run`
            pipe.send(error)
