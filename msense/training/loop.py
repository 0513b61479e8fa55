"""The loop of every training: workers, epochs, learning rates, random seeds, progress, checkpoints.

The random state of a step depends on (seed, epoch, step, rank) only. Never imports Ray.
"""

import math
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from msense.errors import InputError, MsenseError
from msense.io import storage
from msense.run.progress import Progress
from msense.training.engine import Engine, checkpoint_error

STATE_FILE = "state.json"  # of a checkpoint


class Session(Protocol):
    """The place of a worker in a training; executors provide it."""

    rank: int
    world: int  # number of workers

    def wrap(self, model: Any, **options: Any) -> Any:
        """Wrap a model so that gradients are averaged over all workers."""

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """Return a context with the folder of the last complete checkpoint; None at the start of a training."""

    def report(self, metrics: dict[str, float], folder: Path | None, name: str) -> None:
        """Store a checkpoint of this worker's files, if it has any, and wait until it is committed."""


@dataclass(frozen=True)
class ProcessGroup:
    """Rank and number of the workers; a single worker needs no process group."""

    rank: int = 0
    world: int = 1

    def sum(self, values: list[float], device: str) -> list[float]:
        """Return the values summed over all workers."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return [float(x) for x in total.tolist()]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings that all trainings have."""

    run: str  # run folder
    epochs: int
    lr: float  # peak learning rate
    schedule: str
    warmup: float  # see `lr_factor`
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
    counts: dict[str, int] = field(default_factory=dict)  # of these steps, those that have the loss
    history: list[dict[str, Any]] = field(default_factory=list)  # metrics of each finished epoch
    workers: int = 1


class TrainingLoop(ABC):
    """The training of one worker; subclasses define batches, losses and evaluation."""

    def __init__(
        self, settings: TrainingSettings, engine: Engine, group: ProcessGroup | None, losses: Sequence[str]
    ) -> None:
        """Prepare a training; `losses` are the names of the losses to average over each epoch."""
        self.settings, self.engine, self.losses = settings, engine, losses
        self.group = group or ProcessGroup()
        self.state = TrainState(workers=self.group.world)

    @abstractmethod
    def batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Yield the global batches of an epoch, int64 [B]; they are the same on all workers."""

    @abstractmethod
    def count_tokens(self, batch: np.ndarray) -> int:
        """Return the number of tokens of a global batch."""

    @abstractmethod
    def backward(self, batch: np.ndarray, report: bool) -> dict[str, float]:
        """Accumulate the gradients of this worker's share; return the global batch's mean losses (and more to `report`)."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Return the metrics on held-out data."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the trained model into the last checkpoint."""

    def run(self, progress: Progress | None = None) -> Iterator[TrainState]:
        """Train on; yield the state when a checkpoint is due, as at the end of an epoch. Raise MsenseError for NaN."""
        settings, state = self.settings, self.state
        steps = [sum(1 for _ in self.batches(epoch)) for epoch in range(settings.epochs)]
        for epoch in range(state.epoch, settings.epochs):
            self.engine.model.train()
            for batch in islice(self.batches(epoch), state.step, None):
                self._step(batch, sum(steps[:epoch]) + state.step, sum(steps), progress)
                if state.step % settings.checkpoint_steps == 0 and state.step < steps[epoch]:
                    yield state
            metrics: dict[str, float] = {"epoch": epoch + 1, "step": sum(steps[: epoch + 1])}
            metrics |= {f"train_{name}": total / state.counts[name] for name, total in state.sums.items()}
            metrics |= {"tokens_per_s": state.tokens / max(state.seconds, 1e-9), **self.evaluate()}
            self.state = state = TrainState(epoch + 1, history=[*state.history, metrics], workers=state.workers)
            if progress is not None:
                progress.write_epochs(state.history)
            yield state

    def _step(self, batch: np.ndarray, done: int, steps: int, progress: Progress | None) -> None:
        """Take step number `done` of `steps`, update the state and report progress if that is due."""
        settings, state = self.settings, self.state
        began = time.monotonic()
        numbers = (settings.seed, state.epoch, state.step, self.group.rank)
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
        report = progress is not None and progress.is_due()
        losses = self.backward(batch, report)
        if not all(map(math.isfinite, losses.values())):
            values = ", ".join(f"{name} {value}" for name, value in losses.items())
            raise MsenseError(f"the loss is not finite ({values}): use a smaller --lr, or train in float32")
        self.engine.step(settings.lr * lr_factor(done, steps, settings.warmup, settings.schedule))
        state.step += 1
        state.tokens += self.count_tokens(batch)
        state.seconds += time.monotonic() - began
        for name in losses.keys() & set(self.losses):
            state.sums[name] = state.sums.get(name, 0.0) + losses[name]
            state.counts[name] = state.counts.get(name, 0) + 1
        if progress is not None and report:
            left = (steps - done - 1) * state.seconds / state.step
            speed = {"tokens_per_s": state.tokens / state.seconds, "seconds_left": left}
            progress.write_step(done + 1, steps, state.epoch + 1, losses, speed)

    def save(self, folder: Path) -> None:
        """Write a checkpoint; its JSON file is written last."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.group.rank == 0 or self.engine.every_rank:
            self.engine.save(folder)
        if self.group.rank == 0:
            storage.write_json(str(folder / STATE_FILE), asdict(self.state))

    def restore(self, folder: Path) -> None:
        """Load a checkpoint; raise InputError if it is corrupted or sharded over another number of workers."""
        try:
            self.state = TypeAdapter(TrainState).validate_python(storage.read_json(str(folder / STATE_FILE)))
        except (OSError, ValueError) as error:
            raise checkpoint_error(folder, error) from error
        workers, self.state.workers = self.state.workers, self.group.world
        if self.engine.every_rank and workers != self.group.world:
            raise InputError(
                f"the checkpoint {folder} was written by {workers} workers, and DeepSpeed resumes only with as many: "
                f"use --workers {workers}, or delete the checkpoint"
            )
        self.engine.load(folder)


def lr_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Return the learning-rate factor of a step: linear warm-up, then cosine, linear or constant.

    `warmup` is a fraction of the steps if below 1, else a number of steps.

    `one-cycle` rises from 1/25 and falls to 1/250,000, both along a cosine (Smith and Topin 2019; defaults of PyTorch).
    """
    warm = warmup * steps if warmup < 1 else min(warmup, steps)
    if step < warm:
        return _cosine(1 / 25, 1.0, step / warm) if schedule == "one-cycle" else (step + 1) / (warm + 1)
    done = (step - warm) / max(1.0, steps - warm)
    lowest = 1 / 250_000 if schedule == "one-cycle" else 0.0
    return {"constant": 1.0, "linear": 1 - done}.get(schedule, _cosine(1.0, lowest, done))


def _cosine(first: float, last: float, share: float) -> float:
    """Interpolate between two numbers along half a cosine."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


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
