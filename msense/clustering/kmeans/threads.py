"""Python threads for numerical work: torch and NumPy release the interpreter lock while they compute."""

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
    """`count` threads; without a pool, only the calling thread."""

    count: int = 1
    pool: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Apply a function to every item in inference mode; results are in the order of the items."""
        function = torch.inference_mode()(function)
        if self.pool is None:
            return [function(item) for item in items]
        return [future.result() for future in [self.pool.submit(function, item) for item in items]]


ALONE = Threads()


@contextmanager
def open_threads(count: int) -> Iterator[Threads]:
    """Start threads with one torch and BLAS thread each, and enter inference mode; both end on exit.

    With more, thousands of small operations contend for the cores (25 times slower on two cores).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # torch keeps this number per thread, so each worker of the pool sets its own
    pool = ThreadPoolExecutor(count, "kmeans", torch.set_num_threads, (1,)) if count > 1 else None
    try:
        with threadpool_limits(1, "blas"), torch.inference_mode():
            yield Threads(count, pool)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
