"""Ray Train as the jobs use it: run training workers, resumed from the last checkpoint, until the last epoch."""

from collections.abc import Callable
from typing import Any

from msense.errors import MsenseError
from msense.io import filesystems
from msense.run.folder import RunFolder
from msense.run.progress import display_progress
from msense.runtime.resources import TASK_CPUS, Resources

WAIT_SECONDS = 1800  # timeout of collective operations
MAX_FAILURES = 3  # of workers, before the training is given up


def run_training(
    name: str, worker: Callable[[dict[str, Any]], Any], told: dict[str, Any], run: RunFolder, resources: Resources
) -> Any:  # noqa: ANN401 - Ray Train's
    """Start a training, or resume an interrupted one of this name; return Ray Train's result.

    Args:
        name: identifies the training by everything that its result depends on.
        worker: function of each worker; reports checkpoints.
        told: its argument.
        run: run folder, for checkpoints and progress.
        resources: number and device of the workers.

    Raises:
        MsenseError: workers failed repeatedly; names the cause.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        worker,
        train_loop_config=told,
        torch_config=TorchConfig(timeout_s=WAIT_SECONDS),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.trainers,
            use_gpu=resources.device == "cuda",
            resources_per_worker={"CPU": TASK_CPUS} | ({"GPU": 1} if resources.device == "cuda" else {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            **_storage(run.training),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        with display_progress(run):
            return trainer.fit()
    except Exception as error:  # Ray wraps a worker's exception in several of its own
        raise MsenseError(f"training failed: {_cause(error)}") from error


def _storage(uri: str) -> dict[str, Any]:
    """Return Ray Train's storage options; remote stores use msense's client, with its retries and credentials."""
    if filesystems.is_local(uri):
        return {"storage_path": uri}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = filesystems.filesystem(uri)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(filesystem))}


def _cause(error: BaseException) -> str:
    """Return the last line of a worker's error, or a summary of Ray's out-of-memory report."""
    while error.__cause__ is not None:
        error = error.__cause__
    message = str(error).strip() or type(error).__name__
    if "out of memory issue" in message:
        return "the machine ran out of memory and Ray killed a worker; stop other processes there, or lower --workers"
    return message.splitlines()[-1]
