"""The loop of every training: epochs, learning rates, random seeds, progress, checkpoints.

The random state of a step depends on (seed, epoch, step, rank) only. Never imports Ray.
"""

import math
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from msense.errors import InputError, MsenseError
from msense.io import storage
from msense.run.progress import Progress
from msense.training.engine import Engine, checkpoint_error
from msense.training.group import ProcessGroup, Session
from msense.training.schedule import lr_factor

STATE_FILE = "state.json"  # of a checkpoint


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings that all trainings have."""

    run: str  # run folder
    epochs: int
    lr: float  # peak learning rate
    schedule: str
    warmup: float  # share of the steps
    weight_decay: float
    clip: float  # maximum gradient norm, 0 = no clipping
    dtype: str  # float32, or bfloat16 for autocast
    seed: int
    checkpoint_steps: int  # between checkpoints within an epoch
    device: str
    threads: int  # torch threads per worker


@dataclass
class TrainState:
    """Progress of a training; a checkpoint stores it as JSON."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    tokens: int = 0  # read by these steps
    seconds: float = 0.0  # taken by these steps
    sums: dict[str, float] = field(default_factory=dict)  # losses of these steps, by name
    history: list[dict[str, float]] = field(default_factory=list)  # metrics of each finished epoch


class TrainingLoop(ABC):
    """The training of one worker; subclasses define batches, losses and evaluation."""

    def __init__(
        self, settings: TrainingSettings, engine: Engine, group: ProcessGroup | None, losses: Sequence[str]
    ) -> None:
        """Prepare a training; `losses` are the names of the losses to average over each epoch."""
        self.settings, self.engine, self.losses = settings, engine, losses
        self.group, self.state = group or ProcessGroup(), TrainState()

    @abstractmethod
    def batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Yield the global batches of an epoch, int64 [B]; they are the same on all workers."""

    @abstractmethod
    def count_tokens(self, batch: np.ndarray) -> int:
        """Return the number of tokens of a global batch."""

    @abstractmethod
    def backward(self, batch: np.ndarray, report: bool) -> dict[str, float]:
        """Accumulate the gradients of this worker's share of a global batch.

        Returns the mean losses of the global batch, and with `report` further metrics to display.
        """

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Return the metrics on held-out data."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the trained model into the last checkpoint."""

    def run(self, progress: Progress | None = None) -> Iterator[TrainState]:
        """Train from the current state on; yield it whenever a checkpoint is due, which includes the end of each epoch.

        Raises:
            MsenseError: a loss or gradient is NaN or infinite.
        """
        settings, state = self.settings, self.state
        steps = [sum(1 for _ in self.batches(epoch)) for epoch in range(settings.epochs)]
        for epoch in range(state.epoch, settings.epochs):
            self.engine.model.train()
            for batch in islice(self.batches(epoch), state.step, None):
                self._next_step(batch, sum(steps[:epoch]) + state.step, sum(steps), progress)
                if state.step % settings.checkpoint_steps == 0 and state.step < steps[epoch]:
                    yield state
            metrics: dict[str, float] = {"epoch": epoch + 1, "step": sum(steps[: epoch + 1])}
            metrics |= {f"train_{name}": total / max(1, steps[epoch]) for name, total in state.sums.items()}
            metrics |= {"tokens_per_s": state.tokens / max(state.seconds, 1e-9), **self.evaluate()}
            state.history.append(metrics)
            state.epoch, state.step, state.tokens, state.seconds, state.sums = epoch + 1, 0, 0, 0.0, {}
            if progress is not None:
                progress.write_epochs(state.history)
            yield state

    def _next_step(self, batch: np.ndarray, done: int, steps: int, progress: Progress | None) -> None:
        """Take step number `done` of `steps`, update the state and report progress if that is due."""
        settings, state = self.settings, self.state
        began = time.monotonic()
        numbers = (settings.seed, state.epoch, state.step, self.group.rank)
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
        report = progress is not None and progress.is_due()
        losses = self._step(batch, settings.lr * lr_factor(done, steps, settings.warmup, settings.schedule), report)
        state.step += 1
        state.tokens += self.count_tokens(batch)
        state.seconds += time.monotonic() - began
        for name in self.losses:
            state.sums[name] = state.sums.get(name, 0.0) + losses[name]
        if progress is not None and report:
            left = (steps - done - 1) * state.seconds / state.step
            speed = {"tokens_per_s": state.tokens / state.seconds, "seconds_left": left}
            progress.write_step(done + 1, steps, state.epoch + 1, losses, speed)

    def _step(self, batch: np.ndarray, lr: float, report: bool = False) -> dict[str, float]:
        """Take one step on a global batch; return its mean losses."""
        losses = self.backward(batch, report)
        if not all(map(math.isfinite, losses.values())):
            values = ", ".join(f"{name} {value}" for name, value in losses.items())
            raise MsenseError(f"the loss is not finite ({values}): use a smaller --lr, or train in float32")
        self.engine.step(lr)
        return losses

    def save(self, folder: Path) -> None:
        """Write a checkpoint; its JSON file is written last."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.group.rank == 0 or self.engine.every_rank:
            self.engine.save(folder)
        if self.group.rank == 0:
            storage.write_json(str(folder / STATE_FILE), asdict(self.state) | {"workers": self.group.world})

    def restore(self, folder: Path) -> None:
        """Load a checkpoint; raise InputError if it is corrupted or sharded over another number of workers."""
        try:
            stored = storage.read_json(str(folder / STATE_FILE))
            if stored is None:
                raise ValueError(f"{STATE_FILE} is missing or fails its checksum")
            epoch, step, tokens, workers = (int(stored[name]) for name in ("epoch", "step", "tokens", "workers"))
            seconds, sums, history = float(stored["seconds"]), dict(stored["sums"]), list(stored["history"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise checkpoint_error(folder, error) from error
        if self.engine.every_rank and workers != self.group.world:
            raise InputError(
                f"the checkpoint {folder} was written by {workers} workers, and DeepSpeed resumes only with as many: "
                f"use --workers {workers}, or delete the checkpoint"
            )
        self.state = TrainState(epoch, step, tokens, seconds, sums, history)
        self.engine.load(folder)


def run_worker(loop: TrainingLoop, session: Session) -> list[dict[str, float]]:
    """Resume a training from its last checkpoint, run the rest, and report checkpoints; return all epochs' metrics."""
    with session.latest_checkpoint() as folder:
        if folder is not None:
            loop.restore(folder)
    first = session.rank == 0
    for state in loop.run(Progress(loop.settings.run) if first else None):
        with tempfile.TemporaryDirectory() as scratch:
            loop.save(Path(scratch))
            if state.epoch == loop.settings.epochs:
                with loop.engine.whole():
                    if first:
                        loop.export(Path(scratch))
            files = Path(scratch) if first or loop.engine.every_rank else None
            name = f"epoch_{state.epoch:05d}_step_{state.step:08d}"
            session.report(dict(state.history[-1]) if state.history else {}, files, name)
    return loop.state.history
