"""What builds and distillations share: lock, executor, manifest, journal, summary."""

import json
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.corpus import SourceFile
from msense.errors import InputError
from msense.io import storage
from msense.run.folder import RunFolder, locked, remove_temp_files
from msense.run.journal import Journal
from msense.run.manifest import STAGES_VERSION, check_manifest, inputs_hash, keep_stages_version, without_defaults
from msense.runtime import Executor, open_executor
from msense.runtime.executor import peak_memory
from msense.stages.base import StageContext
from msense.teacher.batching import TOKEN_BUDGET
from msense.teacher.body import resolve_dtype

THREADS = 1  # of every teacher actor and clustering task
PINNED_PACKAGES = (
    "msense", "torch", "transformers", "tokenizers", "deepspeed", "numpy", "pyarrow", "safetensors", "xxhash", "ray",
)  # fmt: skip


def run_job(
    config: BuildConfig | DistillConfig,
    root: str,
    executor: Executor | None,
    inputs: dict[str, Any],
    teacher: str,
    run_stages: Callable[[StageContext, str], dict[str, Any]],
    flag: str = "--output",
) -> dict[str, Any]:
    """Run the stages of a job in the run folder that a flag sets, on `executor` or on what the settings select.

    `inputs` are those of `make_manifest`, `teacher` is a name or folder. `run_stages` returns the summary, from the stages'
    context and the teacher's dtype; this function adds `driver_peak`, the driver's peak memory in bytes.
    """
    with locked(RunFolder(root), flag):
        executor = executor or _open_executor(config)
        _check_executor(config, executor)
        manifest = make_manifest(config, executor, inputs)
        keep_stages_version(RunFolder(root), manifest)
        run = RunFolder(root, inputs_hash(manifest))
        check_manifest(run, manifest)
        run.remember_teacher(teacher)
        remove_temp_files(run)
        journal = Journal.begin(run, executor.resources.tasks)
        with journal.ending_with_errors():
            summary = run_stages(StageContext(run, executor, journal), manifest["pins"]["dtype"])
        summary["driver_peak"] = peak_memory()
        storage.write_json(run.summary, summary)
        journal.end("dry run" if config.dry_run else "finished")
        remove_temp_files(run)
    return summary


def _open_executor(config: BuildConfig | DistillConfig) -> Executor:
    """Return the executor that the settings select."""
    return open_executor(config.local, config.workers, config.gpus_per_actor, config.teacher_ranks, config.offload)


def _check_executor(config: BuildConfig | DistillConfig, executor: Executor) -> None:
    """Raise InputError for an executor that does not run the teacher as the settings say."""
    wanted = config.teacher_ranks, config.offload
    if (given := (executor.resources.ranks, executor.resources.offload)) != wanted:
        raise InputError(
            f"the executor runs teachers with (ranks, offload) = {given}, but the settings have {wanted}: make both alike"
        )


def make_manifest(config: BuildConfig | DistillConfig, executor: Executor, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest: its inputs, and as `pins` what results depend on besides; pins in the inputs take precedence."""
    device = executor.resources.device
    pins: dict[str, Any] = {"dtype": config.dtype, "device": device, "token_budget": TOKEN_BUDGET[device]}
    pins |= {"ranks": executor.resources.ranks} if executor.resources.ranks > 1 else {}  # sums round differently
    pins |= {"threads": THREADS, "tf32": False, "stages": STAGES_VERSION, "python": platform.python_version()}
    pins |= {name: metadata.version(name) for name in PINNED_PACKAGES} | inputs.get("pins", {})
    if pins["dtype"] == "auto":
        pins["dtype"] = native_dtype(executor)
    return without_defaults(json.loads(json.dumps({"format": 1, **inputs, "pins": pins})))  # tuples become lists


def fingerprints(files: list[SourceFile]) -> dict[str, str]:
    """Return the files of a text as a manifest records them: name to size and fingerprint."""
    return {file.name: f"{file.size} {file.fingerprint}" for file in files}


def native_dtype(executor: Executor) -> str:
    """Return the dtype that `auto` stands for where the work runs."""
    device = executor.resources.device
    return executor.run(resolve_dtype, "auto", device, device=device)


def training_dtype(dtype: str, executor: Executor) -> str:
    """Return the dtype that a training computes in: bfloat16 for `auto` if that is faster, else float32."""
    dtype = native_dtype(executor) if dtype == "auto" else dtype
    return "bfloat16" if dtype == "bfloat16" else "float32"
