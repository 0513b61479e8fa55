"""How often the teacher reads a text on the way from a corpus to two students, with and without spans, and how long all takes.

The runs are kept in a folder beside the shared run's, and reused.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.shared import STUDENTS, Bench, Figures
from msense.config.base import validate_config
from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.errors import InputError
from msense.io import storage
from msense.pipelines.build import build_dictionary
from msense.pipelines.distill import distill_student
from msense.run.folder import RunFolder

RECORD = "seconds.json"  # of a run that was timed
SPANS = {"": "none", "_spans": DistillConfig.model_fields["spans"].default}  # by the end of a figure's name


def once(bench: Bench) -> Figures:
    """Build a dictionary, distill two students from it without spans and two with them, and count the teacher's tokens."""
    folder = Path(f"{bench.run.root}-once")
    dictionary, common = folder / "dictionary", {"workers": bench.workers}
    given = {name: getattr(bench, name) for name in ("corpus", "senses", "max_occurrences")}
    built = timed(dictionary, {**given, **common}, _build)
    seconds = {f"once.seconds{end}": built for end in SPANS}
    for end, spans in SPANS.items():
        for name, kind in STUDENTS.items():
            given = {"dictionary": str(dictionary), "student": kind, "spans": spans, **common}
            given |= {"epochs": bench.epochs} if bench.epochs else {}
            seconds[f"once.seconds{end}"] += timed(folder / f"{name}{end}", given, _distill)
    return seconds | reads(folder)


def _build(settings: dict[str, Any]) -> None:
    build_dictionary(validate_config(BuildConfig, settings))


def _distill(settings: dict[str, Any]) -> None:
    distill_student(validate_config(DistillConfig, settings))


def timed(output: Path, settings: dict[str, Any], job: Callable[[dict[str, Any]], None]) -> float:
    """Return the wall time in seconds of a job with these settings and this output; of its record if it was done before.

    The record is in the run folder. An interrupted job begins anew, but finds the labels that it had finished.
    """
    record, given = output / RECORD, json.loads(json.dumps(settings))
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if known.get("settings") != given:
        shutil.rmtree(output, ignore_errors=True)
        began = time.perf_counter()
        job({**settings, "output": str(output)})
        known = {"settings": given, "seconds": time.perf_counter() - began}
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(known), encoding="utf-8")
    return float(known["seconds"])


def reads(folder: Path) -> Figures:
    """Return tokens that the teacher read over those of the text, from the summaries of the runs in a folder."""
    built = _read(RunFolder(str(folder / "dictionary")).finished, stages=dict)["stages"]
    text = built["passages"]["tokens"]
    figures, labelled = {"once.tokens": float(text)}, {}
    for end in SPANS:
        runs = [RunFolder(str(folder / f"{name}{end}")) for name in STUDENTS]
        labels = {_read(run.labels_place, folder=str)["folder"] for run in runs}
        stages = [_read(RunFolder(place).summary, stages=dict)["stages"]["labels"] for place in labels]
        labelled[end] = stages[0]["tokens"]
        read = built["embed"]["forwarded"] + sum(stage["forwarded"] for stage in stages)
        figures[f"once.reads{end}"] = read / (text + labelled[end] - labelled[""])
    return figures


def _read(file: str, **shape: type) -> dict[str, Any]:
    """Return the content of a file of a run; InputError if it is missing."""
    found = storage.read_json(file, shape)
    if found is None:
        raise InputError(f"{file} is missing or corrupted: remove {Path(file).parent}")
    return found
