"""What builds and distillations share: lock, executor, manifest, journal, summary."""

import json
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.corpus import SourceFile
from msense.io import storage
from msense.run.folder import RunFolder, locked, remove_temp_files
from msense.run.journal import Journal
from msense.run.manifest import add_stages_version, check_manifest, inputs_hash, without_defaults
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
) -> dict[str, Any]:
    """Run the stages of a job in its run folder, on `executor` or on what the settings select.

    `inputs` is the manifest without what depends on the executor, `teacher` a name or folder. `run_stages` returns the
    summary, from the stages' context and the teacher's dtype; this function adds `driver_peak`, the driver's peak memory in
    bytes.
    """
    with locked(RunFolder(root)):
        executor = executor or open_executor(config.local, config.workers, config.gpus_per_actor)
        dtype: str = config.dtype if config.dtype != "auto" else native_dtype(executor)
        pins = _pins(dtype, executor.resources.device)
        values = json.loads(json.dumps({"format": 1, **inputs, "pins": pins}))  # tuples become lists
        manifest = without_defaults(values)
        add_stages_version(RunFolder(root), manifest)
        run = RunFolder(root, inputs_hash(manifest))
        check_manifest(run, manifest)
        run.remember_teacher(teacher)
        remove_temp_files(run)
        journal = Journal.begin(run, executor.resources.tasks)
        with journal.ending_with_errors():
            summary = run_stages(StageContext(run, executor, journal), dtype)
        summary["driver_peak"] = peak_memory()
        storage.write_json(run.summary, summary)
        journal.end("dry run" if config.dry_run else "finished")
        remove_temp_files(run)
    return summary


def _pins(dtype: str, device: str) -> dict[str, Any]:
    """Return what results depend on besides settings and inputs."""
    return {
        "dtype": dtype,
        "device": device,
        "token_budget": TOKEN_BUDGET[device],
        "threads": THREADS,
        "tf32": False,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PINNED_PACKAGES},
    }


def fingerprints(files: list[SourceFile]) -> dict[str, str]:
    """Return the files of a text as a manifest records them: name to size and fingerprint."""
    return {file.name: f"{file.size} {file.fingerprint}" for file in files}


def native_dtype(executor: Executor) -> str:
    """Return the dtype that `auto` stands for where the work runs."""
    device = executor.resources.device
    return executor.run(resolve_dtype, "auto", device, device=device)


def training_dtype(dtype: str, executor: Executor) -> str:
    """Return the dtype that a training computes in: bfloat16 for `auto` if supported natively, else float32."""
    dtype = native_dtype(executor) if dtype == "auto" else dtype
    return "bfloat16" if dtype == "bfloat16" else "float32"
