"""Progress of a training: written by the first worker to files of the run folder, displayed by the driver.

`metrics.jsonl` holds the metrics of each finished epoch, one JSON object per line; `training/progress.json` the current
step, rewritten every ten seconds.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from msense.io import storage
from msense.run.folder import RunFolder
from msense.runtime.progress import REPORT_SECONDS, progress_bar, set_gauges

logger = logging.getLogger(__name__)
POLL_SECONDS = 2.0


class Progress:
    """Writer of a training's progress."""

    def __init__(self, run: str) -> None:
        self.run = RunFolder(run)
        self._written = time.monotonic()

    def is_due(self) -> bool:
        """Return whether it is time to write the progress file."""
        return time.monotonic() - self._written >= REPORT_SECONDS

    def write_step(self, step: int, steps: int, epoch: int, metrics: dict[str, float], speed: dict[str, float]) -> None:
        """Write the progress file: finished and total steps, epoch from 1, losses and accuracy of the last step.

        The speed is `tokens_per_s`, and `seconds_left` of the whole training.
        """
        self._written = time.monotonic()
        storage.write_json(self.run.progress, {"step": step, "steps": steps, "epoch": epoch, "found": metrics, **speed})

    def write_epochs(self, history: list[dict[str, float]]) -> None:
        """Write the metrics of all epochs; rewriting the whole file avoids duplicate lines after a resume."""
        storage.write_text(self.run.metrics, "".join(json.dumps(metrics) + "\n" for metrics in history))


@contextmanager
def display_progress(run: RunFolder) -> Iterator[None]:
    """Display the training's progress within this context: a bar on a terminal, otherwise log lines."""
    storage.remove(run.progress)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(run, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch(run: RunFolder, ended: threading.Event) -> None:
    """Display new progress until the training has ended."""
    with progress_bar() as bar:
        step, task = 0, bar.add_task("training", total=None)
        while not ended.wait(POLL_SECONDS):
            progress = storage.read_json(run.progress)
            if progress is None or progress["step"] == step:
                continue
            step = progress["step"]
            set_gauges("training", step, progress["steps"])
            bar.update(task, total=progress["steps"], completed=step, description=_metrics(progress))
            if bar.disable:
                logger.info("training: %s", format_progress(progress))


def format_progress(progress: dict[str, Any]) -> str:
    """Return the content of a progress file as one line of text."""
    share = f"{progress['step']:,} of {progress['steps']:,} steps, epoch {progress['epoch']}"
    return f"{share}, {_metrics(progress)}, {progress['seconds_left']:,.0f} s left"


def _metrics(progress: dict[str, Any]) -> str:
    """Return losses, accuracy and speed as text."""
    losses = [f"{name} {value:.4f}" for name, value in progress["found"].items()]
    return ", ".join([*losses, f"{progress['tokens_per_s']:,.0f} tokens/s"])
