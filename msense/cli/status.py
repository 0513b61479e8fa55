"""`python -m msense status RUN`: progress of a run; reads only done-markers, the manifest and the journal."""

from typing import Any

from msense.cli.console import show_table
from msense.errors import InputError
from msense.io import storage
from msense.io.untrusted import printable
from msense.run.folder import RunFolder
from msense.run.progress import format_progress
from msense.text import size
from msense.training.label_dataset import LabelPartition

DRIVERS_SHOWN = 10


def show_status(run: str) -> None:
    """Print the progress of every stage of a run, and what its latest drivers kept and wrote.

    Raises:
        InputError: the folder is not a run, or has records of another version.
    """
    folder = RunFolder(storage.absolute(run))
    manifest = folder.read_manifest()
    if manifest is None:
        raise InputError(f"{run} is not a run folder: it has no valid manifest.json; give the --output of a build")
    try:
        show_table(f"Run {run}", _rows(folder, manifest))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{run} has records that this version of msense did not write ({type(error).__name__}: {printable(error)}): "
            "give a run of this version"
        ) from error


def _rows(run: RunFolder, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    teacher = manifest["teacher"]
    rows = [
        ("teacher", f"{teacher['name']} ({teacher['dim']} wide, {manifest['pins']['dtype']})"),
        ("corpus", " ".join(manifest["corpus"])),
        *(_distillation(run, manifest) if "dictionary" in manifest else _build(run, manifest)),
    ]
    drivers = (storage.read_json(run.journal) or {}).get("drivers", [])
    return rows + [_driver(number, record) for number, record in list(enumerate(drivers, 1))[-DRIVERS_SHOWN:]]


def _build(run: RunFolder, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the progress of a dictionary build."""
    finished = storage.read_json(run.finished)
    stages = finished["stages"] if finished else {}
    partitions = storage.read_json(run.partitions)
    of_units, of_shards = (f" of {partitions['units']}", f" of {partitions['shards']}") if partitions else ("", "")
    chosen = {} if isinstance(manifest.get("config", {}).get("senses", 0), int) else {"senses": _done(run.senses)}
    counts = {
        "passages": f"{_finished(run.passages, '.parquet')} files",
        "plan": _done(run.thresholds),
        "occurrences": f"{_finished(run.occurrences, '.records')}{of_units} partitions",
        **chosen,
        "clustering": f"{_finished(run.centroids, prefix='0')}{of_shards} shards",
    }
    rows = [
        (name, f"done, {stages[name]['seconds']:,.1f} s" if name in stages else count) for name, count in counts.items()
    ]
    if not finished:
        return [*rows, ("dictionary", "pending; rerun the build command to resume")]
    stats = stages["dictionary"]
    text = f"{stats['tokens']:,} tokens, {stats['senses']:,} senses, {stats['points']:,} points"
    if "senses" in stages:
        text += f", at most {stages['senses']['largest']:,} senses per token"
    return [*rows, ("dictionary", run.dictionary), ("", text)]


def _distillation(run: RunFolder, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the progress of the labels and the student of a distillation."""
    partitions = storage.read_json(run.partitions)
    of_units = f" of {partitions['labels']}" if partitions else ""
    rows = [("dictionary", f"fingerprint {manifest['dictionary'][:12]}")]
    if files := _finished(run.passages, ".parquet"):  # otherwise those of the dictionary's run are used
        rows += [("passages", f"{files} files"), ("plan", _done(run.thresholds))]
    rows.append(("labels", f"{_finished(run.labels, '.safetensors', '0')}{of_units} partitions"))
    if labels := storage.read_json(run.label_manifest):
        names = (name for name in LabelPartition.model_fields if name != "sha256")
        total = {name: sum(partition[name] for partition in labels["units"]) for name in names}
        text = f"{total['passages']:,} passages ({total['held_out_passages']:,} held out), {total['tokens']:,} tokens"
        rows.append(("", f"{text}, {total['labelled']:,} with a sense, {size(total['size'])}"))
    finished = storage.exists(run.student)
    if (progress := storage.read_json(run.progress)) and not finished:
        rows.append(("training", format_progress(progress)))
    return [*rows, ("student", run.student if finished else "pending; rerun the distillation command to resume")]


def _done(file: str) -> str:
    return "done" if storage.stats_of(file) else "pending"


def _finished(folder: str, suffix: str = "", prefix: str = "") -> int:
    """Return the number of files with a done-marker; the prefix excludes files of single tokens."""
    names = {name for name in storage.names(folder) if name.startswith(prefix)}
    return sum(name.endswith(suffix + storage.MARKER) and name.removesuffix(storage.MARKER) in names for name in names)


def _driver(number: int, record: dict[str, Any]) -> tuple[str, str]:
    """Return what a driver did, in files per stage."""
    stages = []
    for stage, counts in record["stages"].items():
        texts = [f"{counts[name]:,} {name}" for name in ("kept", "damaged", "made") if counts.get(name)]
        if "made" not in counts and not counts.get("kept"):
            texts.append("started")
        stages.append(f"{stage} {' + '.join(texts) or 'nothing to do'}")
    outcome = record["outcome"].split("\n")[0] or f"no outcome recorded: running or killed (process {record['pid']})"
    return f"driver {number}", f"{record['began']}, {record['host']}: {'; '.join(stages)}. {outcome}"
