"""What a run folder holds: `python -m msense status RUN`.

Comes in: a run folder, finished, cut off or at work. Goes out: a table of its stages. Reads the done-markers only.
"""

from msense import storage
from msense.cli import show_table
from msense.errors import BadInput
from msense.storage import RunFolder


def show_status(run: str) -> None:
    """Print how far every stage of a run is.

    Raises:
        BadInput: there is no run.
    """
    folder = RunFolder(storage.absolute(run))
    manifest = storage.read_json(folder.manifest)
    if manifest is None:
        raise BadInput(f"{run} is no run folder: it has no manifest.json; give the --output of a build")
    teacher = manifest["teacher"]
    rows = [("teacher", f"{teacher['name']} ({teacher['dim']} wide, {manifest['pins']['dtype']})")]
    rows.append(("corpus", " ".join(manifest["corpus"])))
    finished = storage.read_json(folder.finished)
    stages = finished["stages"] if finished else {}
    for name, count in _counts(folder).items():
        rows.append((name, f"done, {stages[name]['seconds']:,.1f} s" if name in stages else count))
    rows.append(
        ("dictionary", finished["dictionary"] if finished else "not yet; the build's command goes on from here")
    )
    if finished:
        facts = stages["dictionary"]
        rows.append(("", f"{facts['tokens']:,} tokens, {facts['senses']:,} senses, {facts['points']:,} points"))
    show_table(f"Run {run}", rows)


def _counts(run: RunFolder) -> dict[str, str]:
    """Say how many files of every stage are finished."""
    plan = storage.facts_of(run.thresholds)
    units = storage.read_json(run.units)
    of_units = f" of {units['units']}" if units else ""
    shards = f" of {units['shards']}" if units else ""
    return {
        "passages": f"{_finished(run.passages)} files",
        "plan": "done" if plan else "not yet",
        "occurrences": f"{_finished(run.occurrences, '.records')}{of_units} units",
        "clustering": f"{_finished(run.centroids, prefix='0')}{shards} shards",
    }


def _finished(folder: str, suffix: str = "", prefix: str = "") -> int:
    """Count the files of a folder whose marker is there; files of single tokens have other names than shards."""
    fs, path = storage.filesystem(folder)
    names = {name.rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)} if fs.exists(path) else set()
    names = {name for name in names if name.startswith(prefix)}
    return sum(name.endswith(suffix + storage.MARKER) and name.removesuffix(storage.MARKER) in names for name in names)
