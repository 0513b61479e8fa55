"""Spawned processes, for runs without Ray."""

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

SINGLE_THREADED = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LOCAL_SIZE"), "1")
SINGLE_THREADED["TOKENIZERS_PARALLELISM"] = "false"


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables; restore all of them on exit."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class SpawnedPool(ProcessPoolExecutor):
    """Processes that start when there is work, with one thread each for linear algebra, as Ray's workers have."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers, multiprocessing.get_context("spawn"))

    def submit(self, work: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        """Run a call in one of the processes."""
        with environment(SINGLE_THREADED):  # read by libraries when a new process loads them
            return super().submit(work, *arguments, **options)
