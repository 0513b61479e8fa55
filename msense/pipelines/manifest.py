"""The manifests of builds and distillations: settings, fingerprints of inputs, and what else results depend on."""

import json
import platform
from dataclasses import asdict
from importlib import metadata
from typing import Any

from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.corpus import SourceFile, display_uri
from msense.pipelines.distill_inputs import DistillInputs
from msense.teacher.batching import TOKEN_BUDGET
from msense.teacher.spec import TeacherInfo

FORMAT = 1
PINNED_PACKAGES = (
    "msense", "torch", "transformers", "tokenizers", "deepspeed", "numpy", "pyarrow", "safetensors", "xxhash", "ray",
)  # fmt: skip


def describe_run(
    config: BuildConfig, files: list[SourceFile], info: TeacherInfo, dtype: str, device: str, threads: int
) -> dict[str, Any]:
    """Return the manifest of a build: JSON values only.

    Args:
        config: all settings; those that cannot change the results are left out.
        files: the corpus.
        info: the teacher.
        dtype: the teacher's resolved dtype.
        device: "cpu" or "cuda".
        threads: of an actor or task.
    """
    return {
        "format": FORMAT,
        "config": {**config.of_results(), "teacher": info.name},
        "corpus": [display_uri(uri) for uri in config.corpus],
        "inputs": {f.name: f"{f.size} {f.fingerprint}" for f in files},
        "teacher": json.loads(json.dumps(asdict(info))),
        "pins": pins(dtype, device, threads),
    }


def describe_distillation(
    config: DistillConfig, source: DistillInputs, dtype: str, device: str, threads: int
) -> dict[str, Any]:
    """Return the manifest of a distillation: like that of a build, plus `training`, on which no label depends."""
    return {
        "format": FORMAT,
        "config": {**config.of_labels(), **{f"text.{name}": value for name, value in source.of_text().items()}},
        "corpus": list(source.corpus),
        "inputs": source.inputs,
        "teacher": json.loads(json.dumps(asdict(source.info))),
        "dictionary": source.fingerprint,
        "pins": pins(dtype, device, threads),
        "training": config.of_training(),
    }


def pins(dtype: str, device: str, threads: int) -> dict[str, Any]:
    """Return what else results depend on: dtype, device, batch sizes and versions."""
    return {
        "dtype": dtype,
        "device": device,
        "token_budget": TOKEN_BUDGET[device],
        "threads": threads,
        "tf32": False,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PINNED_PACKAGES},
    }
