"""Progress of a job: a bar or log lines, Ray's metrics, and warnings about tasks that take far longer than others."""

import logging
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
REPORT_SECONDS = 10.0
SKEW_TASKS = 8  # the median of fewer says little
SKEW_FACTOR = 4.0
SKEW_SECONDS = 30.0
T = TypeVar("T")


def track(name: str, rows: Iterator[T], total: int) -> Iterator[T]:
    """Yield the rows, with a progress bar on a terminal and a log line every ten seconds elsewhere.

    On a cluster with a dashboard, the gauges `msense_pieces_done` and `msense_pieces` report the same, by stage.
    """
    set_gauges(name, 0, total)
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as rich_track

        bar = rich_track(rows, description=name, total=total, console=Console(stderr=True), transient=True)
        for done, row in enumerate(bar, 1):
            set_gauges(name, done, total)
            yield row
        return
    began = last = time.monotonic()
    for done, row in enumerate(rows, 1):
        set_gauges(name, done, total)
        now = time.monotonic()
        if now - last >= REPORT_SECONDS and done < total:
            pace = (now - began) / done
            logger.info("%s: %d of %d, %s, %.0f s left", name, done, total, _rate(pace), pace * (total - done))
            last = now
        yield row


def _rate(pace: float) -> str:
    """Return a rate in readable units."""
    return f"{1 / pace:.1f}/s" if pace < 1 else f"{60 / pace:.1f}/min"


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


def warn_of_skew(name: str, seconds: Sequence[float]) -> None:
    """Warn if a stage waited for one task that was far slower than the others."""
    if len(seconds) < SKEW_TASKS:
        return
    slowest, median = max(seconds), statistics.median(seconds)
    if slowest > SKEW_SECONDS and slowest > SKEW_FACTOR * median:
        logger.warning(
            "%s: the slowest of %d tasks took %.0f s, %.1f times the median: check for a slow node, a worker that died, or "
            "a very uneven corpus",
            name,
            len(seconds),
            slowest,
            slowest / max(median, 1e-9),
        )


def spilled_bytes() -> int:
    """Return the bytes that Ray's object stores have spilled to disk since they started; 0 if Ray is not running."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return 0
    import grpc
    from ray._private import internal_api  # as `ray memory` does; public interfaces need a dashboard
    from ray._private.state import state

    try:
        reply = internal_api.get_memory_info_reply(state)
    except grpc.RpcError as error:  # a node that is shutting down
        logger.debug("Ray did not report what it has spilled: %s", error)
        return 0
    return int(reply.store_stats.spilled_bytes_total)
