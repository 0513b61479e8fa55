"""The manifest of a run: settings, inputs and pinned versions, written before any work and compared when it resumes.

Times, absolute paths and numbers of workers are not part of it.
"""

import hashlib
import json
from typing import Any

from msense.errors import InputError
from msense.io import storage
from msense.run.folder import RunFolder

_COMPARED = ("format", "config", "inputs", "teacher", "dictionary", "pins")  # a build has no dictionary
_SHOWN = 10
_ADDED: dict[str, dict[str, Any]] = {  # left out at these values, so that runs of versions without them resume
    "config": {"id_column": "id", "text.id_column": "id", "embeddings_dtype": "store", "attention": "auto"}
    | dict.fromkeys(("prompt_column", "text.prompt_column", "queries.prompt_column")),
    "teacher": {
        **{"skip": 0, "include_prompt": True, "projections": [], "truncate_dim": None, "truncation_side": "right"},
        "attention": "auto",
        "include_frame": True,
    },
    "training": {"student_pooling": "auto", "ship_dtype": "float32"},
}


STAGES_VERSION = 4  # of the files between stages: a run that an older version left unfinished cannot be resumed


def keep_stages_version(run: RunFolder, manifest: dict[str, Any]) -> None:
    """Pin the version of the stages that finished the run (or its labels), if any: its results are kept."""
    before = run.read_manifest()
    if before is not None and any(map(storage.exists, (run.finished, run.label_manifest, run.student))):
        manifest["pins"].pop("stages", None)
        manifest["pins"] |= {name: before["pins"][name] for name in ("stages",) if name in before["pins"]}


def without_defaults(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest (JSON values) without the entries that older versions do not have, where they change nothing."""
    kept = {}
    for part, entries in manifest.items():
        added = _ADDED.get(part, {})
        known = isinstance(entries, dict)
        kept[part] = {k: v for k, v in entries.items() if k not in added or v != added[k]} if known else entries
    return kept


def inputs_hash(manifest: dict[str, Any]) -> str:
    """Return the hash of everything in a manifest that the results (of a distillation: the labels) depend on."""
    compared = {part: manifest[part] for part in _COMPARED if part in manifest}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def check_manifest(run: RunFolder, manifest: dict[str, Any]) -> None:
    """Write the manifest of a new run, or compare it with that of the run to resume.

    Raises:
        InputError: the manifests differ (the message lists how), the folder's manifest is corrupted, or files of a run
            have no manifest.
    """
    remedy = f"restore them; to start a new run, give another --output or delete {run.root}"
    before = run.read_manifest()
    if before is None:
        if storage.exists(run.manifest):
            raise InputError(f"{run.manifest} is corrupted: {remedy}")
        if existing := [name for name in run.outputs() if storage.exists(name)]:
            raise InputError(f"{existing[0]} exists without manifest.json, which records its inputs: {remedy}")
        storage.write_json(run.manifest, manifest)
        return
    if kind_of(before) != kind_of(manifest):
        raise InputError(f"{run.root} is the run folder of {kind_of(before)}: give another --output")
    changes = [c for part in _COMPARED for c in differences(part, before.get(part), manifest.get(part))]
    training = differences("training", before.get("training"), manifest.get("training"))
    if (training or changes) and "training" in manifest and not storage.exists(run.student):
        same_version = before["pins"].get("stages") == manifest["pins"].get("stages")
        if not changes or (same_version and not storage.exists(run.label_manifest)):  # labels are elsewhere
            storage.write_json(run.manifest, manifest)
            return
    changes += training
    started = any(map(storage.markers, (run.passages, run.labels))) or any(map(storage.exists, run.outputs()[1:]))
    if changes and (not started or (_of_teacher(changes) and not _has_read(run))):
        storage.remove(run.passages)  # the earlier run was a dry run, or failed before it finished anything
        storage.write_json(run.manifest, manifest)
    elif changes:
        shown = "\n".join(f"  {change}" for change in changes[:_SHOWN])
        more = f"\n  ... and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        other = any(change.startswith("pins.stages:") for change in changes)
        message = f"the run in {run.root} has other settings or inputs:\n{shown}{more}\n"
        if other:
            own = f" ({before['pins']['msense']})" if "msense" in before["pins"] else ""
            again = f"To start a new run, give another --output or delete {run.root}"
            raise InputError(f"{message}Only the version of msense that began it{own} can resume it. {again}")
        raise InputError(f"{message}To resume it, {remedy}")


def _of_teacher(changes: list[str]) -> bool:
    """Return whether changes concern only how the teacher computes, which a dry run helps to choose."""
    return all(change.startswith(("pins.ranks:", "pins.dtype:")) for change in changes)


def _has_read(run: RunFolder) -> bool:
    """Return whether the teacher has read anything in a run."""
    read = any(map(storage.markers, (run.occurrences, run.embeddings, run.labels)))
    return read or any(map(storage.exists, (run.finished, run.student)))


def kind_of(manifest: dict[str, Any]) -> str:
    """Return what the run of a manifest makes, for messages."""
    return "a student" if "training" in manifest else "labels" if "dictionary" in manifest else "a dictionary"


def differences(name: str, before: Any, now: Any) -> list[str]:
    """Return the differences between two JSON values, one line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [line for key in keys for line in differences(f"{name}.{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{name}: {before!r} before, {now!r} now"]
