"""Training on Ray Train: run workers, resumed from the last checkpoint, until the training is complete."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import CheckpointConsistencyMode
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model

from msense.errors import MsenseError
from msense.io import filesystems
from msense.io.storage import join
from msense.runtime.executor import TrainingResult, Work
from msense.runtime.resources import TASK_CPUS, Resources

TIMEOUT_SECONDS = 1800  # of collective operations
MAX_FAILURES = 3  # of workers, before the training is given up


class RaySession:
    """The place of one worker in a training: its rank, its checkpoints, and how its model is wrapped."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()

    def wrap(self, model: Any, **options: Any) -> Any:
        """Wrap a model so that gradients are averaged over all workers."""
        return prepare_model(model, parallel_strategy_kwargs=options)

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """Yield the folder of the last complete checkpoint; None at the start of a training."""
        if (latest := ray.train.get_checkpoint()) is None:
            yield None
            return
        with latest.as_directory() as folder:
            yield Path(folder)

    def report(self, metrics: dict[str, float], folder: Path | None, name: str) -> None:
        """Report a checkpoint and wait until it is committed."""
        checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)
        # `report` may return before the checkpoint can be resumed from
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)


def train(name: str, worker: Work, settings: Any, folder: str, resources: Resources) -> TrainingResult:
    """Train on Ray, see `Executor.train`."""
    on_gpu = resources.device == "cuda"
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"worker": worker, "settings": settings},
        torch_config=TorchConfig(timeout_s=TIMEOUT_SECONDS),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.trainers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": TASK_CPUS} | ({"GPU": 1} if on_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            **_storage(folder),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:  # Ray wraps a worker's exception in several of its own
        raise MsenseError(f"training failed: {_cause(error)}") from error
    return TrainingResult(result.return_value, join(folder, name, Path(result.checkpoint.path).name))


def _run_worker(given: dict[str, Any]) -> Any:
    """Run a worker in a process of Ray Train."""
    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    return given["worker"](given["settings"], RaySession())


def _storage(uri: str) -> dict[str, Any]:
    """Return Ray Train's storage options; remote stores use msense's client, with its retries and credentials."""
    if filesystems.is_local(uri):
        return {"storage_path": uri}
    filesystem, path = filesystems.filesystem(uri)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(filesystem))}


def _cause(error: BaseException) -> str:
    """Return the last line of a worker's error, or a summary of Ray's out-of-memory report."""
    while error.__cause__ is not None:
        error = error.__cause__
    message = str(error).strip() or type(error).__name__
    if "out of memory issue" in message:
        return "the machine ran out of memory and Ray killed a worker; stop other processes that use memory, or lower --workers"
    return message.splitlines()[-1]
