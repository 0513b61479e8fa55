"""Progress of a training: written by the first worker to files of the run folder, displayed by the driver.

`metrics.jsonl` holds the metrics of every finished epoch, one JSON object per line; `training/progress.json` the current
step, rewritten every ten seconds. With TensorBoard installed and a local run folder, both are also logged there
(`tensorboard --logdir RUN/training/tensorboard`).
"""

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from msense.io import filesystems, storage
from msense.run.folder import RunFolder
from msense.runtime.progress import REPORT_SECONDS, set_gauges

logger = logging.getLogger(__name__)
POLL_SECONDS = 2.0


class Progress:
    """Writes the progress of a training.

    Example:
        with Progress("runs/student", history=[]) as progress:
            progress.epoch([{"epoch": 1, "step": 28, "train_sense": 0.7}])
    """

    def __init__(self, run: str, history: list[dict[str, float]]) -> None:
        """Open the run folder, resuming after the epochs in `history`."""
        self.run = RunFolder(run)
        self.told = time.monotonic()
        self._board = _open_board(self.run, int(history[-1]["step"]) if history else 0)
        self._epochs = len(history)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()

    def is_due(self) -> bool:
        """Return whether it is time to report."""
        return time.monotonic() - self.told >= REPORT_SECONDS

    def tell(self, step: int, steps: int, epoch: int, found: dict[str, float], speed: dict[str, float]) -> None:
        """Write the progress file.

        Args:
            step: finished steps.
            steps: total steps.
            epoch: current epoch, from 1.
            found: losses and accuracy of the last step.
            speed: `tokens_per_s`, and `seconds_left` of the whole training.
        """
        self.told = time.monotonic()
        storage.write_json(self.run.progress, {"step": step, "steps": steps, "epoch": epoch, "found": found, **speed})
        self._log(step, {f"step/{name}": value for name, value in (found | speed).items()})

    def epoch(self, history: list[dict[str, float]]) -> None:
        """Write the metrics of all epochs; rewriting the whole file avoids duplicate lines after a resume."""
        storage.write_text(self.run.metrics, "".join(json.dumps(metrics) + "\n" for metrics in history))
        for metrics in history[self._epochs :]:
            self._log(int(metrics["step"]), {f"epoch/{name}": value for name, value in metrics.items()})
        self._epochs = len(history)

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()


def _open_board(run: RunFolder, step: int) -> Any:
    """Return a TensorBoard writer that hides events after `step` of an earlier training, or None."""
    if not filesystems.is_local(run.root):
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(storage.join(run.training, "tensorboard"), purge_step=step + 1)


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
    step, bar = 0, _start_bar() if sys.stderr.isatty() else None
    task = None if bar is None else bar.add_task("training", total=None)
    while not ended.wait(POLL_SECONDS):
        progress = storage.read_json(run.progress)
        if progress is None or progress["step"] == step:
            continue
        step = progress["step"]
        set_gauges("training", step, progress["steps"])
        if bar is None or task is None:
            logger.info("training: %s", format_progress(progress))
        else:
            bar.update(task, total=progress["steps"], completed=step, description=_metrics(progress))
    if bar is not None:
        bar.stop()


def format_progress(told: dict[str, Any]) -> str:
    """Return the content of a progress file as one line of text."""
    share = f"{told['step']:,} of {told['steps']:,} steps, epoch {told['epoch']}"
    return f"{share}, {_metrics(told)}, {told['seconds_left']:,.0f} s left"


def _metrics(progress: dict[str, Any]) -> str:
    """Return losses, accuracy and speed as text."""
    losses = [f"{name} {value:.4f}" for name, value in progress["found"].items()]
    return ", ".join([*losses, f"{progress['tokens_per_s']:,.0f} tokens/s"])


def _start_bar() -> Bar:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total}"))
    bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    bar.start()
    return bar
