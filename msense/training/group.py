"""The workers of a training: their ranks, sums over all of them, and what a worker needs from the executor."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist


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
