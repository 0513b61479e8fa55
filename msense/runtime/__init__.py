"""Where the work of a job runs: on Ray, or in processes of this machine; the same interface for both."""

from msense.runtime.executor import Executor
from msense.runtime.local_executor import LocalExecutor

__all__ = ["Executor", "LocalExecutor", "open_executor"]


def open_executor(
    local: bool = False,
    workers: int | None = None,
    gpus_per_actor: float = 1.0,
    ranks: int = 1,
    offload: bool = False,
) -> Executor:
    """Return the executor of a job; the pipelines call this, stages only receive the result.

    With `local` it runs without Ray, and one worker is the default; on Ray, one per GPU or CPU; for the other
    arguments see `plan_workers`.

    Raises:
        InputError: no node of the cluster, or not this machine, could ever run the job.
    """
    if local:
        return LocalExecutor(workers or 1, ranks=ranks, offload=offload)
    from msense.runtime.ray_executor import RayExecutor

    return RayExecutor.connect(workers, gpus_per_actor, ranks, offload)
