"""What builds and distillations share: lock, executor, manifest, journal, summary."""

from collections.abc import Callable
from typing import Any

from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.io import storage
from msense.run.folder import RunFolder, locked, remove_temp_files
from msense.run.journal import Journal
from msense.run.manifest import check_manifest, inputs_hash
from msense.runtime import Executor, open_executor
from msense.runtime.executor import peak_memory
from msense.stages.base import StageContext
from msense.teacher.body import resolve_dtype

THREADS = 1  # of every teacher actor and clustering task


def run_job(
    config: BuildConfig | DistillConfig,
    root: str,
    executor: Executor | None,
    describe: Callable[[str, str, int], dict[str, Any]],
    run_stages: Callable[[StageContext, str], dict[str, Any]],
) -> dict[str, Any]:
    """Run the stages of a job in its run folder.

    Args:
        config: all settings.
        root: URI of the run folder.
        executor: where the work runs; None: what the settings select.
        describe: returns the manifest from the teacher's resolved dtype, the device and the threads of a task.
        run_stages: returns the summary, from the stages' context and the dtype.

    Returns:
        The summary, with `driver_peak`, the driver's peak memory in bytes.
    """
    with locked(RunFolder(root)):
        executor = executor or open_executor(config.local, config.workers, config.gpus_per_actor)
        device = executor.resources.device
        dtype: str = config.dtype if config.dtype != "auto" else native_dtype(executor)
        manifest = describe(dtype, device, THREADS)
        run = RunFolder(root, inputs_hash(manifest))
        check_manifest(run, manifest)
        remove_temp_files(run)
        journal = Journal.begin(run, executor.resources.tasks)
        with journal.ending_with_errors():
            summary = run_stages(StageContext(run, executor, journal), dtype)
        summary["driver_peak"] = peak_memory()
        storage.write_json(run.summary, summary)
        journal.end("dry run" if config.dry_run else "finished")
        remove_temp_files(run)
    return summary


def native_dtype(executor: Executor) -> str:
    """Return the dtype that `auto` stands for where the work runs."""
    device = executor.resources.device
    dtype: str = executor.run(resolve_dtype, "auto", device, device=device)
    return dtype


def training_dtype(dtype: str, executor: Executor) -> str:
    """Return the dtype that a training computes in: bfloat16 for `auto` if supported natively, else float32."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if native_dtype(executor) == "bfloat16" else "float32"
