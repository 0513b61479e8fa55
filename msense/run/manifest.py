"""What a run was made of: its settings, inputs and pins, written down before any work and compared ever after.

Comes in: what this driver would make the run of. Goes out: nothing, or the error that names each difference. Times,
absolute paths and numbers of workers are not in it.
"""

import hashlib
import json
import platform
from dataclasses import asdict
from importlib import metadata
from typing import Any

from msense import storage
from msense.config import BuildConfig
from msense.corpus import SourceFile, display_uri
from msense.distill_config import DistillConfig
from msense.errors import BadInput
from msense.label_source import Source
from msense.run_folder import RunFolder
from msense.teacher import TOKEN_BUDGET, TeacherInfo

FORMAT = 1
PINNED_PACKAGES = (
    "msense", "torch", "transformers", "tokenizers", "deepspeed", "numpy", "pyarrow", "safetensors", "xxhash", "ray",
)  # fmt: skip
_COMPARED = ("format", "config", "inputs", "teacher", "dictionary", "pins")  # a build has no dictionary
_SHOWN = 10


def describe_run(
    config: BuildConfig, files: list[SourceFile], info: TeacherInfo, dtype: str, device: str, threads: int
) -> dict[str, Any]:
    """Return the manifest of a run: JSON values only.

    Args:
        config: all settings; those that cannot change the results are left out.
        files: the corpus, fingerprinted.
        info: the teacher, its weights and tokenizer fingerprinted.
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
    config: DistillConfig, source: Source, dtype: str, device: str, threads: int
) -> dict[str, Any]:
    """Return the manifest of a distillation: as that of a build, and `training`, on which no label depends.

    Args:
        config: all settings.
        source: dictionary, teacher and text.
        dtype: the teacher's resolved dtype.
        device: "cpu" or "cuda".
        threads: of an actor or task.
    """
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
    """Return what else numbers depend on: dtype, device, sizes of batches, versions."""
    return {
        "dtype": dtype,
        "device": device,
        "token_budget": TOKEN_BUDGET[device],
        "threads": threads,
        "tf32": False,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PINNED_PACKAGES},
    }


def made_of(manifest: dict[str, Any]) -> str:
    """Return the hash of all in a manifest on which the results depend; of a distillation, the labels."""
    compared = {part: manifest[part] for part in _COMPARED if part in manifest}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def check_manifest(run: RunFolder, manifest: dict[str, Any]) -> None:
    """Write the manifest of a new run; refuse to go on with a run made of other things.

    Raises:
        BadInput: naming what differs; or the folder's manifest is damaged, or it holds a run's files without one.
    """
    before = run.read_manifest()
    if before is None:
        if storage.exists(run.manifest):
            raise BadInput(f"{run.manifest} is damaged: {_remedy(run)}")
        if there := [name for name in run.outputs() if storage.exists(name)]:
            raise BadInput(f"{there[0]} is there, but no manifest.json that tells what it was made of: {_remedy(run)}")
        storage.write_json(run.manifest, manifest)
        return
    if ("dictionary" in before) != ("dictionary" in manifest):
        other = "a distillation" if "dictionary" in before else "a dictionary"
        raise BadInput(f"{run.root} is the run folder of {other}: give another --output")
    changes = [c for part in _COMPARED for c in differences(part, before.get(part), manifest.get(part))]
    training = differences("training", before.get("training"), manifest.get("training"))
    later = run.outputs()[1:]
    if training and not changes and not storage.exists(run.student):
        storage.write_json(run.manifest, manifest)  # the labels serve this training as well
        return
    changes += training
    if changes and not storage.markers(run.passages) and not any(storage.exists(name) for name in later):
        storage.remove(run.passages)  # the former run failed before anything was finished
        storage.write_json(run.manifest, manifest)
    elif changes:
        shown = "\n".join(f"  {change}" for change in changes[:_SHOWN])
        more = f"\n  ... and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        raise BadInput(f"the run in {run.root} was made with other things:\n{shown}{more}\nTo go on, {_remedy(run)}")


def _remedy(run: RunFolder) -> str:
    return f"bring the former things back; to start afresh, give another --output or delete {run.root}"


def differences(name: str, before: Any, now: Any) -> list[str]:  # noqa: ANN401 - any JSON value
    """List what differs between two JSON values, a line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [line for key in keys for line in differences(f"{name}.{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{name}: {before!r} then, {now!r} now"]
