"""What a run was made of: its settings, inputs and pins, written down before any work and compared ever after.

Comes in: what this driver would make the run of. Goes out: nothing, or the error that names each difference. Times,
absolute paths and numbers of workers are not in it.
"""

import hashlib
import json
from typing import Any

from msense.errors import InputError
from msense.io import storage
from msense.run.folder import RunFolder

_COMPARED = ("format", "config", "inputs", "teacher", "dictionary", "pins")  # a build has no dictionary
_SHOWN = 10


def inputs_hash(manifest: dict[str, Any]) -> str:
    """Return the hash of all in a manifest on which the results depend; of a distillation, the labels."""
    compared = {part: manifest[part] for part in _COMPARED if part in manifest}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def check_manifest(run: RunFolder, manifest: dict[str, Any]) -> None:
    """Write the manifest of a new run; refuse to go on with a run made of other things.

    Raises:
        InputError: naming what differs; or the folder's manifest is damaged, or it holds a run's files without one.
    """
    before = run.read_manifest()
    if before is None:
        if storage.exists(run.manifest):
            raise InputError(f"{run.manifest} is damaged: {_remedy(run)}")
        if there := [name for name in run.outputs() if storage.exists(name)]:
            raise InputError(
                f"{there[0]} is there, but no manifest.json that tells what it was made of: {_remedy(run)}"
            )
        storage.write_json(run.manifest, manifest)
        return
    if ("dictionary" in before) != ("dictionary" in manifest):
        other = "a distillation" if "dictionary" in before else "a dictionary"
        raise InputError(f"{run.root} is the run folder of {other}: give another --output")
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
        raise InputError(f"the run in {run.root} was made with other things:\n{shown}{more}\nTo go on, {_remedy(run)}")


def _remedy(run: RunFolder) -> str:
    return f"bring the former things back; to start afresh, give another --output or delete {run.root}"


def differences(name: str, before: Any, now: Any) -> list[str]:
    """List what differs between two JSON values, a line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [line for key in keys for line in differences(f"{name}.{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{name}: {before!r} then, {now!r} now"]
