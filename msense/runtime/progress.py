"""Progress of a job: a bar or log lines, and Ray's metrics."""

import logging
import sys
import time
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)
REPORT_SECONDS = 10.0
T = TypeVar("T")


def track(name: str, rows: Iterator[T], total: int) -> Iterator[T]:
    """Yield the rows, with a progress bar on a terminal and a log line every ten seconds elsewhere.

    On a cluster with a dashboard, the gauges `msense_pieces_done` and `msense_pieces` report the same, by stage.
    """
    set_gauges(name, 0, total)
    began = last = time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task(name, total=total)
        for done, row in enumerate(rows, 1):
            set_gauges(name, done, total)
            bar.advance(task)
            now = time.monotonic()
            if bar.disable and now - last >= REPORT_SECONDS and done < total:
                logger.info("%s: %d of %d, %.0f s left", name, done, total, (now - began) / done * (total - done))
                last = now
            yield row


def progress_bar() -> Progress:
    """Return a progress bar on standard error, disabled if that is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total}"))
    console = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not sys.stderr.isatty())


def set_gauges(stage: str, done: int, total: int) -> None:
    """Set the gauges of a stage among Ray's metrics, if Ray is running."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        _gauge("msense_pieces", "tasks of a stage").set(total, {"stage": stage})
        _gauge("msense_pieces_done", "finished tasks of a stage").set(done, {"stage": stage})


@cache
def _gauge(name: str, text: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, text, ("stage",))
