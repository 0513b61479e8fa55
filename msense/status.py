"""What a run folder holds: `python -m msense status RUN`.

Comes in: a run folder, finished, cut off or at work. Goes out: a table of its stages, and what each driver did. Reads
the done-markers and the journal only.
"""

from typing import Any

from msense import storage
from msense.artefact import shown
from msense.cli import show_table
from msense.errors import BadInput
from msense.label_set import LabelUnit
from msense.run_folder import RunFolder
from msense.text import size
from msense.train_progress import line

DRIVERS_SHOWN = 10


def show_status(run: str) -> None:
    """Print how far every stage of a run is, and what its latest drivers kept of earlier ones and made.

    Raises:
        BadInput: there is no run.
    """
    folder = RunFolder(storage.absolute(run))
    manifest = folder.read_manifest()
    if manifest is None:
        raise BadInput(f"{run} is no run folder: it has no sound manifest.json; give the --output of a build")
    try:
        _show(run, folder, manifest)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{run} has records that this msense did not write ({type(error).__name__}: {shown(error)}): give a run of "
            "this version"
        ) from error


def _show(run: str, folder: RunFolder, manifest: dict[str, Any]) -> None:
    teacher = manifest["teacher"]
    rows = [("teacher", f"{teacher['name']} ({teacher['dim']} wide, {manifest['pins']['dtype']})")]
    rows.append(("corpus", " ".join(manifest["corpus"])))
    if "dictionary" in manifest:
        show_table(f"Run {run}", [*rows, *_distillation(folder, manifest), *_drivers(folder)])
        return
    finished = storage.read_json(folder.finished)
    stages = finished["stages"] if finished else {}
    for name, count in _counts(folder, not isinstance(manifest.get("config", {}).get("senses", 0), int)).items():
        rows.append((name, f"done, {stages[name]['seconds']:,.1f} s" if name in stages else count))
    rows.append(("dictionary", folder.dictionary if finished else "not yet; the build's command goes on from here"))
    if finished:
        facts = stages["dictionary"]
        told = f"{facts['tokens']:,} tokens, {facts['senses']:,} senses, {facts['points']:,} points"
        rows.append(
            (
                "",
                told + (f", {stages['senses']['largest']:,} senses of one token at most" if "senses" in stages else ""),
            )
        )
    show_table(f"Run {run}", [*rows, *_drivers(folder)])


def _distillation(run: RunFolder, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Say how far labels and student of a distillation are."""
    units = storage.read_json(run.units)
    of_units = f" of {units['labels']}" if units else ""
    rows = [("dictionary", f"fingerprint {manifest['dictionary'][:12]}")]
    if pieces := _finished(run.passages, ".parquet"):  # else the dictionary's run has them
        rows += [("passages", f"{pieces} files"), ("plan", "done" if storage.facts_of(run.thresholds) else "not yet")]
    rows.append(("labels", f"{_finished(run.labels, '.safetensors', '0')}{of_units} units"))
    labels = storage.read_json(run.label_manifest)
    if labels:
        total = {
            name: sum(unit[name] for unit in labels["units"]) for name in LabelUnit.model_fields if name != "sha256"
        }
        told = f"{total['passages']:,} passages ({total['held_out_passages']:,} held out), {total['tokens']:,} tokens"
        rows.append(("", f"{told}, {total['labelled']:,} with a sense, {size(total['size'])}"))
    there = storage.exists(run.student)
    if (progress := storage.read_json(run.progress)) and not there:
        rows.append(("training", line(progress)))
    rows.append(("student", run.student if there else "not yet; the distillation's command goes on from here"))
    return rows


def _drivers(run: RunFolder) -> list[tuple[str, str]]:
    """Say what the latest drivers did."""
    drivers = (storage.read_json(run.journal) or {}).get("drivers", [])
    return [_driver(number, record) for number, record in list(enumerate(drivers, 1))[-DRIVERS_SHOWN:]]


def _counts(run: RunFolder, by_token: bool) -> dict[str, str]:
    """Say how many files of every stage are finished; `by_token`: whether each token gets a number of senses."""
    plan = storage.facts_of(run.thresholds)
    units = storage.read_json(run.units)
    of_units = f" of {units['units']}" if units else ""
    shards = f" of {units['shards']}" if units else ""
    numbers = {"senses": "done" if storage.facts_of(run.senses) else "not yet"} if by_token else {}
    return {
        "passages": f"{_finished(run.passages, '.parquet')} files",
        "plan": "done" if plan else "not yet",
        "occurrences": f"{_finished(run.occurrences, '.records')}{of_units} units",
        **numbers,
        "clustering": f"{_finished(run.centroids, prefix='0')}{shards} shards",
    }


def _finished(folder: str, suffix: str = "", prefix: str = "") -> int:
    """Count the files of a folder whose marker is there; files of single tokens have other names than shards."""
    names = {name for name in storage.names(folder) if name.startswith(prefix)}
    return sum(name.endswith(suffix + storage.MARKER) and name.removesuffix(storage.MARKER) in names for name in names)


def _driver(number: int, record: dict[str, Any]) -> tuple[str, str]:
    """Say what a driver kept of earlier ones, found damaged, and made, in files of each stage."""
    told = []
    for stage, found in record["stages"].items():
        counts = [f"{found[name]:,} {name}" for name in ("kept", "damaged", "made") if found.get(name)]
        if "made" not in found and not found.get("kept"):
            counts.append("begun")
        told.append(f"{stage} {' + '.join(counts) or 'nothing to do'}")
    outcome = record["outcome"].split("\n")[0] or f"no word of its end: at work or killed (process {record['pid']})"
    return f"driver {number}", f"{record['began']}, {record['host']}: {'; '.join(told)}. {outcome}"
