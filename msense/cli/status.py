"""`python -m msense status RUN`: progress of a run, from its done-markers, manifest and journal."""

from typing import Any

from msense.cli.console import show_table
from msense.errors import InputError
from msense.io import storage
from msense.io.untrusted import printable
from msense.run.folder import RunFolder
from msense.run.progress import format_progress
from msense.text import size

DRIVERS_SHOWN = 10
_RENAMED = {"occurrences": "embed"}  # stages in the summaries of older versions


def show_status(run: str) -> None:
    """Print the progress of every stage of a run, and what its latest drivers did; raise InputError if it is not a run."""
    folder = RunFolder(storage.absolute(run))
    manifest = folder.read_manifest()
    if manifest is None:
        raise InputError(f"{run} is not a run folder: it has no valid manifest.json; give the --output of a build")
    try:
        teacher = manifest["teacher"]
        rows = [
            ("teacher", f"{teacher['name']} ({teacher['dim']} dimensions, {manifest['pins']['dtype']})"),
            ("corpus", " ".join(manifest["corpus"])),
            *(_distillation_rows if "dictionary" in manifest else _build_rows)(folder, manifest),
        ]
        drivers = (storage.read_json(folder.journal) or {}).get("drivers", [])
        rows += [_driver_row(number, record) for number, record in list(enumerate(drivers, 1))[-DRIVERS_SHOWN:]]
        show_table(f"Run {run}", rows)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        cause = f"{type(error).__name__}: {printable(error)}"
        raise InputError(f"{run} has records of another version of msense ({cause}): use that version") from error


def _build_rows(run: RunFolder, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    finished = storage.read_json(run.finished)
    stages = {_RENAMED.get(name, name): stats for name, stats in (finished or {"stages": {}})["stages"].items()}
    totals = storage.read_json(run.partitions)
    of_partitions, of_shards = (f" of {totals['units']}", f" of {totals['shards']}") if totals else ("", "")
    fixed = isinstance(manifest.get("config", {}).get("senses", 0), int)
    counts = {
        "passages": f"{_finished(run.passages, '.parquet')} files",
        "plan": _done(run.thresholds),
        "embed": f"{_finished(run.occurrences, '.records')}{of_partitions} partitions",
        "embeddings": f"{_finished(run.embeddings, '.embeddings')}{of_partitions} partitions",
        **({} if fixed else {"senses": _done(run.senses)}),
        "clustering": f"{_finished(run.centroids, prefix='0')}{of_shards} shards",
    }
    done = {name: f"done, {stats['seconds']:,.1f} s" for name, stats in stages.items()}
    rows = [(name, done.get(name, text)) for name, text in counts.items()]
    if not finished:
        return [*rows, ("dictionary", "pending; rerun the build command to resume")]
    stats = stages["dictionary"]
    text = f"{stats['tokens']:,} tokens, {stats['senses']:,} senses, {stats['points']:,} points"
    text += f", at most {stages['senses']['largest']:,} senses per token" if "senses" in stages else ""
    return [*rows, ("dictionary", run.dictionary), ("", text)]


def _distillation_rows(run: RunFolder, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("dictionary", f"fingerprint {manifest['dictionary'][:12]}")]
    if "training" not in manifest:
        return rows + _label_rows(run)
    place = storage.read_json(run.labels_place)  # the labels of older versions are in the run itself
    rows += _label_rows(RunFolder(place["folder"] if place else run.root))
    finished = storage.exists(run.student)
    if (progress := storage.read_json(run.progress)) and not finished:
        rows.append(("training", format_progress(progress)))
    return [*rows, ("student", run.student if finished else "pending; rerun the distillation command to resume")]


def _label_rows(run: RunFolder) -> list[tuple[str, str]]:
    totals = storage.read_json(run.partitions)
    of_partitions = f" of {totals['labels']}" if totals else ""
    rows = []
    if files := _finished(run.passages, ".parquet"):  # otherwise those of the dictionary's run are used
        rows += [("passages", f"{files} files"), ("plan", _done(run.thresholds))]
    rows.append(("labels", f"{_finished(run.labels, '.safetensors', '0')}{of_partitions} partitions in {run.root}"))
    if labels := storage.read_json(run.label_manifest):
        names = ("passages", "spans", "held_out_passages", "tokens", "labelled", "size")
        total = {name: sum(partition.get(name, 0) for partition in labels["units"]) for name in names}
        text = f"{total['passages'] - total['spans']:,} passages and {total['spans']:,} spans and queries"
        text += f" ({total['held_out_passages']:,} held out), {total['tokens']:,} tokens"
        rows.append(("", f"{text}, {total['labelled']:,} with a sense, {size(total['size'])}"))
    return rows


def _done(file: str) -> str:
    return "done" if storage.stats_of(file) else "pending"


def _finished(folder: str, suffix: str = "", prefix: str = "") -> int:
    """Return the number of files with a done-marker; the prefix excludes files of single tokens."""
    names = {name for name in storage.names(folder) if name.startswith(prefix)}
    return sum(name.endswith(suffix + storage.MARKER) and name.removesuffix(storage.MARKER) in names for name in names)


def _driver_row(number: int, record: dict[str, Any]) -> tuple[str, str]:
    stages = []
    for stage, counts in record["stages"].items():
        texts = [f"{counts[name]:,} {name}" for name in ("kept", "damaged", "made") if counts.get(name)]
        if "made" not in counts and not counts.get("kept"):
            texts.append("started")
        stages.append(f"{stage} {' + '.join(texts) or 'nothing to do'}")
    outcome = record["outcome"].split("\n")[0] or f"no outcome recorded: running or killed (process {record['pid']})"
    return f"driver {number}", f"{record['began']}, {record['host']}: {'; '.join(stages)}. {outcome}"
