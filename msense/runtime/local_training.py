"""Training without Ray: in this process with one worker, in spawned processes that form a gloo group with several.

Checkpoints go to `<folder>/<name>/<checkpoint>/`; `latest.json` beside them names the last complete one.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msense.errors import MsenseError
from msense.io import filesystems, storage
from msense.io.scratch import scratch_folder
from msense.runtime.executor import TrainingResult
from msense.runtime.processes import process_pool

CHECKPOINTS_KEPT = 2
_LATEST = "latest.json"


@dataclass(frozen=True)
class LocalCheckpoint:
    """The files of a checkpoint in a local folder or on a store."""

    uri: str

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        """Yield the local folder of the files, downloaded to scratch if they are on a store."""
        if filesystems.is_local(self.uri):
            yield self.uri
            return
        filesystem, path = filesystems.filesystem(self.uri)
        with scratch_folder() as scratch:
            filesystem.get(path, str(scratch / "checkpoint"), recursive=True)
            yield str(scratch / "checkpoint")


class LocalSession:
    """The place of one worker in a training: its rank, its checkpoints, and how its model is wrapped."""

    def __init__(self, rank: int, world: int, folder: str) -> None:
        self.rank, self.world, self._folder = rank, world, folder
        self._kept: list[str] = (storage.read_json(storage.join(folder, _LATEST)) or {}).get("checkpoints", [])

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
        with LocalCheckpoint(storage.join(self._folder, self._kept[-1])).as_directory() as folder:
            yield Path(folder)

    def report(self, metrics: dict[str, float], folder: Path | None, name: str) -> None:
        """Store a checkpoint; it counts once all workers have stored their files."""
        import torch.distributed as dist

        target = storage.join(self._folder, name)
        if folder is not None:
            storage.upload_folder(folder, target)
        dist.barrier()
        if name not in self._kept:
            self._kept = [*self._kept, name]
        if self.rank == 0:
            storage.write_json(
                storage.join(self._folder, _LATEST), {"checkpoints": self._kept[-CHECKPOINTS_KEPT:], **metrics}
            )
            for old in self._kept[:-CHECKPOINTS_KEPT]:
                storage.remove(storage.join(self._folder, old))
        self._kept = self._kept[-CHECKPOINTS_KEPT:]


def train(name: str, worker: Callable[..., Any], settings: Any, folder: str, workers: int) -> TrainingResult:
    """Train without Ray, see `Executor.train`."""
    target = storage.join(folder, name)
    try:
        with scratch_folder() as scratch:
            group = (workers, f"file://{scratch}/group", _free_port())
            if workers == 1:
                histories = [_run_rank(0, group, worker, settings, target)]
            else:
                with process_pool(workers) as pool:
                    running = [pool.submit(_run_rank, rank, group, worker, settings, target) for rank in range(workers)]
                    histories = [future.result() for future in running]
    except Exception as error:  # reported in the words of a training on Ray
        message = str(error).strip() or type(error).__name__
        raise MsenseError(f"training failed: {message.splitlines()[-1]}") from error
    latest = storage.read_json(storage.join(target, _LATEST)) or {}
    return TrainingResult(histories[0], LocalCheckpoint(storage.join(target, latest["checkpoints"][-1])))


def _run_rank(
    rank: int, group: tuple[int, str, int], worker: Callable[..., Any], settings: Any, folder: str
) -> list[dict[str, float]]:
    """Run one worker as a member of the process group."""
    import torch.distributed as dist

    world, init_method, port = group
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in variables.items()})  # DeepSpeed reads them
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world)
    try:
        history: list[dict[str, float]] = worker(settings, LocalSession(rank, world, folder))
        return history
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def _free_port() -> int:
    """Return a free TCP port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
