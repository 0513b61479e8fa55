"""Ray Train, seen from the jobs: workers that train until the last of them is done, from the last checkpoint on.

Comes in: a worker's function and what it is told. Goes out: what the first worker returned, and the last checkpoint. Holds
settings only.
"""

from collections.abc import Callable
from typing import Any

from msense import stores
from msense.errors import MsenseError
from msense.run_folder import RunFolder
from msense.runtime import TASK_CPUS, Resources
from msense.train_progress import shown

WAIT_SECONDS = 1800  # that workers wait for one another
MAX_FAILURES = 3  # of workers: more is no accident


def fit(
    name: str, worker: Callable[[dict[str, Any]], Any], told: dict[str, Any], run: RunFolder, resources: Resources
) -> Any:  # noqa: ANN401 - Ray Train's
    """Train, or go on with a training of this name that was cut off.

    Args:
        name: of the training, by all that its result depends on.
        worker: its function; reports checkpoints.
        told: what it is given.
        run: run folder, for checkpoints and progress.
        resources: workers.

    Returns:
        Ray Train's result.

    Raises:
        MsenseError: workers failed again and again; tells the cause.
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
        with shown(run):
            return trainer.fit()
    except Exception as error:  # Ray wraps whatever a worker raised in errors of its own
        raise MsenseError(f"training failed: {_cause(error)}") from error


def _storage(uri: str) -> dict[str, Any]:
    """Return where checkpoints go: on a store by the client of all other files, with its patience and credentials."""
    if stores.is_local(uri):
        return {"storage_path": uri}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = stores.filesystem(uri)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(filesystem))}


def _cause(error: BaseException) -> str:
    """Return the last line of what a worker said, or what a page of Ray's own words comes to."""
    while error.__cause__ is not None:
        error = error.__cause__
    told = str(error).strip() or type(error).__name__
    if "out of memory issue" in told:
        return (
            "the machine ran out of memory, and Ray killed a worker; end what else takes memory there, or give --workers a "
            "smaller number"
        )
    return told.splitlines()[-1]
