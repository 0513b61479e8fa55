"""Spawned processes, and training without Ray: in this process with one worker, as a gloo group with several.

Checkpoints go to `<folder>/<name>/<checkpoint>/`; `latest.json` beside them names the last complete one.
"""

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msense.errors import MsenseError
from msense.io import storage
from msense.io.scratch import scratch_folder
from msense.runtime.executor import TrainingResult, Work
from msense.runtime.resources import SINGLE_THREADED

CHECKPOINTS_KEPT = 2
_LATEST = "latest.json"


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables; restore them on exit. Others are left alone, as other threads read them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class SpawnedPool(ProcessPoolExecutor):
    """Processes that start when there is work, with one thread each for linear algebra, as Ray's workers have."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers, multiprocessing.get_context("spawn"))

    def submit(self, work: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        """Run a call in one of the processes."""
        with environment(SINGLE_THREADED):  # read by libraries when a new process loads them
            return super().submit(work, *arguments, **options)


class LocalSession:
    """The place of one worker in a training: its rank, its checkpoints, and how its model is wrapped."""

    def __init__(self, rank: int, world: int, folder: str) -> None:
        self.rank, self.world, self._folder = rank, world, folder
        self._kept = _checkpoints(folder)

    def wrap(self, model: Any, **options: Any) -> Any:
        """Wrap a model so that gradients are averaged over all workers."""
        if self.world == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, **options)

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """Yield the folder of the last complete checkpoint; None at the start of a training."""
        if not self._kept:
            yield None
            return
        with storage.local_folder(storage.join(self._folder, self._kept[-1])) as folder:
            yield folder

    def report(self, metrics: dict[str, float], folder: Path | None, name: str) -> None:
        """Store a checkpoint; it counts once all workers have stored their files."""
        import torch.distributed as dist

        if folder is not None:
            storage.upload_folder(folder, storage.join(self._folder, name))
        dist.barrier()
        kept = [*(old for old in self._kept if old != name), name]
        self._kept = kept[-CHECKPOINTS_KEPT:]
        if self.rank == 0:
            storage.write_json(storage.join(self._folder, _LATEST), {"checkpoints": self._kept, **metrics})
            for old in kept[:-CHECKPOINTS_KEPT]:
                storage.remove(storage.join(self._folder, old))


def train(name: str, worker: Work, settings: Any, folder: str, workers: int) -> TrainingResult:
    """Train without Ray, see `Executor.train`."""
    target = storage.join(folder, name)
    try:
        with scratch_folder() as scratch:
            arguments = (workers, scratch / "rendezvous", worker, settings, target)
            if workers == 1:
                histories = [_run_rank(0, *arguments)]
            else:
                with SpawnedPool(workers) as pool:
                    running = [pool.submit(_run_rank, rank, *arguments) for rank in range(workers)]
                    errors = [error for future in running if (error := future.exception())]
                    if errors:  # that of one worker makes others lose their connection
                        raise next((error for error in errors if isinstance(error, MsenseError | OSError)), errors[0])
                    histories = [future.result() for future in running]
    except Exception as error:  # reported in the words of a training on Ray
        message = str(error).strip() or type(error).__name__
        raise MsenseError(f"training failed: {message.splitlines()[-1]}") from error
    return TrainingResult(histories[0], storage.join(target, _checkpoints(target)[-1]))


def _run_rank(
    rank: int, world: int, rendezvous: Path, worker: Work, settings: Any, folder: str
) -> list[dict[str, float]]:
    """Run one worker as a member of the process group, which meets in a file: a free port may be taken meanwhile."""
    import torch.distributed as dist

    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    with environment({name: str(value) for name, value in group.items()}):  # also read by DeepSpeed
        dist.init_process_group("gloo", store=dist.FileStore(str(rendezvous), world), rank=rank, world_size=world)
        try:
            history: list[dict[str, float]] = worker(settings, LocalSession(rank, world, folder))
            return history
        finally:
            dist.destroy_process_group()


def _checkpoints(folder: str) -> list[str]:
    """Return the names of the complete checkpoints, oldest first."""
    latest = storage.read_json(storage.join(folder, _LATEST)) or {}
    return list(latest.get("checkpoints", []))
