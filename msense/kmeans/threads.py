"""Python threads that compute side by side: torch lets go of the interpreter while it works.

Comes in: a function and items. Goes out: its results, in the order of the items. Holds nothing of its own.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Threads:
    """`count` threads; without a pool, the calling thread alone."""

    count: int = 1
    pool: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Apply a function, without gradients, to each item."""
        function = torch.inference_mode()(function)
        if self.pool is None:
            return [function(item) for item in items]
        return [done.result() for done in [self.pool.submit(function, item) for item in items]]


ALONE = Threads()


@contextmanager
def open_threads(count: int) -> Iterator[Threads]:
    """Start threads, each with one thread of torch and of NumPy; the caller has one, too, until they end.

    With more, thousands of small operations wait for each other's threads (25 times as slow on two cores).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # torch holds the number of its threads per thread, and a default for new ones, which is now 1 as well
    pool = ThreadPoolExecutor(count, "kmeans", torch.set_num_threads, (1,)) if count > 1 else None
    try:
        with threadpool_limits(1, "blas"):
            yield Threads(count, pool)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
