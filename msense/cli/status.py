"""`msense status RUN`: progress of a run, from its done-markers, manifest and journal."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from msense.cli.console import show_table
from msense.errors import InputError
from msense.io import storage
from msense.io.untrusted import printable
from msense.run.folder import RunFolder
from msense.run.manifest import kind_of
from msense.run.progress import format_progress
from msense.text import size

DRIVERS_SHOWN = 10
_OF_MAKE = ("dictionary", "student")  # the runs in a folder of `msense make`
_RENAMED = {"occurrences": "embed"}  # stages in the summaries of older versions


class Progress(NamedTuple):
    """How much of a stage is done."""

    done: int
    total: int | None  # None: not known yet
    unit: str = ""  # empty: a single step

    @property
    def text(self) -> str:
        """The progress in words."""
        if not self.unit:
            return "done" if self.done else "pending"
        return f"{self.done}{'' if self.total is None else f' of {self.total}'} {self.unit}"


def show_status(run: str, *, as_json: bool = False) -> None:
    """Print the progress of every stage of a run, and what its latest drivers did; of `msense make`, of both its runs.

    As JSON, those of `msense make` are one object with the keys "dictionary" and "student".

    Raises:
        InputError: it is no run, or one of another version.
    """
    own = RunFolder(storage.absolute(run))
    parts = {name: RunFolder(storage.join(run, name)) for name in _OF_MAKE}
    parts = {} if own.read_manifest() else {name: part for name, part in parts.items() if part.read_manifest()}
    if not as_json:
        for part in parts.values() or [own]:
            _show_table(part)
        return
    found = {name: _as_json(part) for name, part in parts.items()} or _as_json(own)
    sys.stdout.write(json.dumps(found) + "\n")


@contextmanager
def _records(run: RunFolder) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Yield a run's manifest and the records of its drivers; InputError if it is no run, or one of another version."""
    if (manifest := run.read_manifest()) is None:
        raise InputError(
            f"{run.root} is not a run folder: it has no valid manifest.json; give the --output of a build, a "
            "distillation or msense make"
        )
    try:
        yield manifest, (storage.read_json(run.journal) or {}).get("drivers", [])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        cause = f"{type(error).__name__}: {printable(error)}"
        raise InputError(f"{run.root} has records of another version of msense ({cause}): use that version") from error


def _show_table(run: RunFolder) -> None:
    with _records(run) as (manifest, drivers):
        teacher = manifest["teacher"]
        rows = [
            ("teacher", f"{teacher['name']} ({teacher['dim']} dimensions, {manifest['pins']['dtype']})"),
            ("corpus", " ".join(manifest["corpus"])),
            *(_distillation_rows if "dictionary" in manifest else _build_rows)(run, manifest),
        ]
        rows += [_driver_row(number, record) for number, record in list(enumerate(drivers, 1))[-DRIVERS_SHOWN:]]
    show_table(f"Run {run.root}", rows)


def _as_json(run: RunFolder) -> dict[str, Any]:
    """Return the status as JSON values: `stages` has items done and in total (null: not known yet) by stage."""
    with _records(run) as (manifest, drivers):
        kind = kind_of(manifest)
        result = {"a dictionary": run.finished, "labels": run.label_manifest, "a student": run.student}[kind]
        counts = (
            _build_progress(run, manifest) if kind == "a dictionary" else _label_progress(_labels_of(run, manifest))
        )
        return {
            "run": run.root,
            "makes": kind.removeprefix("a "),
            "teacher": manifest["teacher"]["name"],
            "corpus": manifest["corpus"],
            "finished": storage.exists(result),
            "stages": {name: {"done": own.done, "total": own.total} for name, own in counts.items()},
            "summary": (storage.read_json(run.summary) or {}).get("stages"),
            "training": None if storage.exists(result) else storage.read_json(run.progress),
            "drivers": drivers,
        }


def _build_progress(run: RunFolder, manifest: dict[str, Any]) -> dict[str, Progress]:
    totals = storage.read_json(run.partitions) or {}
    partitions, shards = totals.get("units"), totals.get("shards")
    fixed = isinstance(manifest.get("config", {}).get("senses", 0), int)
    counts = {
        "passages": Progress(_finished(run.passages, ".parquet"), None, "files"),
        "plan": _done(run.thresholds),
        "embed": Progress(_finished(run.occurrences, ".records"), partitions, "partitions"),
        "embeddings": Progress(_finished(run.embeddings, ".embeddings"), partitions, "partitions"),
        **({} if fixed else {"senses": _done(run.senses)}),
        "clustering": Progress(_finished(run.centroids, prefix="0"), shards, "shards"),
    }
    if storage.exists(run.finished):  # the files between stages are deleted
        for name, own in counts.items():
            counts[name] = own._replace(done=own.done if own.total is None else own.total)
    return counts


def _build_rows(run: RunFolder, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    finished = storage.read_json(run.finished)
    stages = {_RENAMED.get(name, name): stats for name, stats in (finished or {"stages": {}})["stages"].items()}
    done = {name: f"done, {stats['seconds']:,.1f} s" for name, stats in stages.items()}
    rows = [(name, done.get(name, own.text)) for name, own in _build_progress(run, manifest).items()]
    if not finished:
        return [*rows, ("dictionary", "pending; rerun the build command to resume")]
    stats = stages["dictionary"]
    text = f"{stats['tokens']:,} tokens, {stats['senses']:,} senses, {stats['points']:,} points"
    text += f", at most {stages['senses']['largest']:,} senses per token" if "senses" in stages else ""
    return [*rows, ("dictionary", run.dictionary), ("", text)]


def _distillation_rows(run: RunFolder, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("dictionary", f"fingerprint {manifest['dictionary'][:12]}"), *_label_rows(_labels_of(run, manifest))]
    if "training" not in manifest:
        return rows
    finished = storage.exists(run.student)
    if (progress := storage.read_json(run.progress)) and not finished:
        rows.append(("training", format_progress(progress)))
    return [*rows, ("student", run.student if finished else "pending; rerun the distillation command to resume")]


def _labels_of(run: RunFolder, manifest: dict[str, Any]) -> RunFolder:
    """Return the run folder of the labels; those of older versions are in the student's run itself."""
    place = storage.read_json(run.labels_place) if "training" in manifest else None
    return RunFolder(place["folder"]) if place else RunFolder(run.root)


def _label_progress(run: RunFolder) -> dict[str, Progress]:
    totals = storage.read_json(run.partitions) or {}
    counts = {}
    if files := _finished(run.passages, ".parquet"):  # otherwise those of the dictionary's run are used
        counts = {"passages": Progress(files, None, "files"), "plan": _done(run.thresholds)}
    done = _finished(run.labels, ".safetensors", "0")
    return counts | {"labels": Progress(done, totals.get("labels"), "partitions")}


def _label_rows(run: RunFolder) -> list[tuple[str, str]]:
    rows = [(name, own.text) for name, own in _label_progress(run).items()]
    rows[-1] = ("labels", f"{rows[-1][1]} in {run.root}")
    if labels := storage.read_json(run.label_manifest):
        names = ("passages", "spans", "held_out_passages", "tokens", "labelled", "size")
        total = {name: sum(partition.get(name, 0) for partition in labels["units"]) for name in names}
        text = f"{total['passages'] - total['spans']:,} passages and {total['spans']:,} spans and queries"
        text += f" ({total['held_out_passages']:,} held out), {total['tokens']:,} tokens"
        rows.append(("", f"{text}, {total['labelled']:,} with a sense, {size(total['size'])}"))
    return rows


def _done(file: str) -> Progress:
    return Progress(int(storage.stats_of(file) is not None), 1)


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
    stages = stages or ["no stage begun"]
    outcome = record["outcome"].split("\n")[0] or f"no outcome recorded: running or killed (process {record['pid']})"
    return f"driver {number}", f"{record['began']}, {record['host']}: {'; '.join(stages)}. {outcome}"
