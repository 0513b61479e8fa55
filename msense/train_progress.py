"""How a training goes: told by its first worker through files of the run folder, shown by the driver.

`metrics.jsonl` has the metrics of every finished epoch, a JSON object a line. `training/progress.json` has how far it is,
anew every ten seconds; whoever waits reads it. With TensorBoard installed and a run folder on a local disk, both are also
drawn there (`tensorboard --logdir RUN/training/tensorboard`).
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

from msense import storage, stores
from msense.run_folder import RunFolder
from msense.watch import REPORT_SECONDS, tell_ray

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0


class Progress:
    """Writes how a training goes."""

    def __init__(self, run: str, history: list[dict[str, float]]) -> None:
        """Begin, or go on after the epochs of a history."""
        self.run = RunFolder(run)
        self.told = time.monotonic()
        self._board = _board(self.run, int(history[-1]["step"]) if history else 0)
        self._epochs = len(history)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()

    def is_due(self) -> bool:
        """Tell whether it is time to tell."""
        return time.monotonic() - self.told >= REPORT_SECONDS

    def tell(self, step: int, steps: int, epoch: int, found: dict[str, float], speed: dict[str, float]) -> None:
        """Write how far it is.

        Args:
            step: steps that are done.
            steps: in all.
            epoch: that is under way, from 1.
            found: losses and accuracy of the last step.
            speed: tokens_per_s, and seconds_left of the whole training.
        """
        self.told = time.monotonic()
        storage.write_json(self.run.progress, {"step": step, "steps": steps, "epoch": epoch, "found": found, **speed})
        self._draw(step, {f"step/{name}": value for name, value in (found | speed).items()})

    def epoch(self, history: list[dict[str, float]]) -> None:
        """Write the metrics of all epochs: a line that a driver before this one wrote is not there twice."""
        storage.write_text(self.run.metrics, "".join(json.dumps(metrics) + "\n" for metrics in history))
        for metrics in history[self._epochs :]:
            self._draw(int(metrics["step"]), {f"epoch/{name}": value for name, value in metrics.items()})
        self._epochs = len(history)

    def _draw(self, step: int, values: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()


def _board(run: RunFolder, step: int) -> Any:  # noqa: ANN401 - a SummaryWriter, or None
    """Open TensorBoard's file; what an earlier training wrote after a step is hidden by it."""
    if not stores.is_local(run.root):
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(storage.join(run.training, "tensorboard"), purge_step=step + 1)


@contextmanager
def shown(run: RunFolder) -> Iterator[None]:
    """Show how a training goes while this waits for it: a bar on a terminal, a line every ten seconds elsewhere."""
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
    """Show what is new until the training has ended."""
    step, bar = 0, _bar() if sys.stderr.isatty() else None
    task = None if bar is None else bar.add_task("training", total=None)
    while not ended.wait(LOOK_SECONDS):
        told = storage.read_json(run.progress)
        if told is None or told["step"] == step:
            continue
        step = told["step"]
        tell_ray("training", step, told["steps"])
        if bar is None or task is None:
            logger.info("training: %s", line(told))
        else:
            bar.update(task, total=told["steps"], completed=step, description=_now(told))
    if bar is not None:
        bar.stop()


def line(told: dict[str, Any]) -> str:
    """Return what a progress file tells, for people."""
    share = f"{told['step']:,} of {told['steps']:,} steps, epoch {told['epoch']}"
    return f"{share}, {_now(told)}, {told['seconds_left']:,.0f} s left"


def _now(told: dict[str, Any]) -> str:
    """Return losses, accuracy and speed."""
    return ", ".join(
        [*(f"{name} {value:.4f}" for name, value in told["found"].items()), f"{told['tokens_per_s']:,.0f} tokens/s"]
    )


def _bar() -> Bar:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total}"))
    bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    bar.start()
    return bar
