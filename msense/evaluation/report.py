"""Reports of an evaluation: tables on the terminal, `FILE.json` with everything, `FILE.md` with the tables, plots."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from msense.errors import InputError
from msense.evaluation.cost import Cost
from msense.evaluation.plots import Line, Point, draw_lines, draw_points
from msense.evaluation.result import Result, comparable, difference
from msense.io import storage
from msense.io.scratch import scratch_folder
from msense.io.untrusted import format_errors, reject_duplicate_keys
from msense.text import clean, first_line, size

VERSION = 1
_MAX_BYTES = 1 << 30  # of a results file
NONE = "–"
MORE_COLUMNS = 5  # columns of secondary figures in a table


@dataclass
class TaskReport:
    """Results of all models on a task: one table.

    Attributes:
        name: title of the table.
        kind: kind of the task.
        what: one-line description of the measurement.
        rows: result by model, or the reason why there is none.
    """

    name: str
    kind: str
    what: str
    rows: dict[str, Result | str]


@dataclass
class Evaluation:
    """All results of an evaluation.

    Attributes:
        models: names of the models; the first is the baseline.
        tasks: one table each.
        costs: costs by model.
        made: settings, seeds, device and versions.
        gains: cache of computed differences by table and model.

    Example:
        >>> rows = {"a": Result("accuracy", "draws", [0.5, 0.6]), "b": Result("accuracy", "draws", [0.6, 0.7])}
        >>> evaluation = Evaluation(["a", "b"], [TaskReport("t", "classification", "accuracy", rows)])
        >>> round(gain(evaluation, evaluation.tasks[0], "b").gain, 3)
        0.1
    """

    models: list[str]
    tasks: list[TaskReport]
    costs: dict[str, Cost] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    gains: dict[tuple[str, str], Any] = field(default_factory=dict, compare=False, repr=False)


class TextTable(NamedTuple):
    """A table of text cells."""

    title: str
    what: str
    head: list[str]
    rows: list[list[str]]


def tables(found: Evaluation) -> list[TextTable]:
    """Return all tables."""
    return [_task_sheet(found, task) for task in found.tasks] + ([_cost_sheet(found)] if found.costs else [])


def write_report(found: Evaluation, output: str, *, plots: bool) -> list[str]:
    """Write the JSON file `output` (name or URI) and, next to it, Markdown and optionally plots; return all file names."""
    stem = output.removesuffix(".json")
    storage.make_folder(output.rpartition("/")[0] or ".")
    storage.write_json(output, to_json(found))
    storage.write_text(f"{stem}.md", markdown(found))
    written = [output, f"{stem}.md"]
    if plots:
        with scratch_folder() as scratch:
            for name, draw in _drawings(found):
                file = scratch / f"{name}.png"
                draw(file)
                storage.upload(file, f"{stem}-{name}.png")
                written.append(f"{stem}-{name}.png")
    return written


def load_report(output: str) -> Evaluation | None:
    """Load the JSON file of `write_report`; None if it does not exist.

    Raises:
        InputError: the file is damaged or no report.
    """
    if not storage.exists(output):
        return None
    try:
        report = json.loads(storage.read_text(output, _MAX_BYTES), object_pairs_hook=reject_duplicate_keys)
        if storage.CHECKSUM in report and report.pop(storage.CHECKSUM) != storage.checksum(report):
            raise ValueError("its checksum does not match")
        if report["format_version"] != VERSION:
            raise ValueError(f"it has format version {report['format_version']!r}, but this msense reads {VERSION}")
        evaluation = TypeAdapter(Evaluation).validate_json(json.dumps(report), strict=True)
        if not isinstance(evaluation.made.get("settings", {}), dict):
            raise ValueError("settings are not a mapping")
        return evaluation
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        cause = format_errors(error) if isinstance(error, ValidationError) else first_line(error)
        raise InputError(
            f"{output} exists but is not a valid evaluation ({cause}): choose another --output, or remove it"
        ) from error


def to_json(found: Evaluation) -> dict[str, Any]:
    """Return everything, including differences to the first model, as JSON values."""
    tasks = [
        {
            **asdict(task),
            "rows": {name: row if isinstance(row, str) else row.to_json() for name, row in task.rows.items()},
            "differences": {
                name: gap._asdict()
                for name in task.rows
                if (gap := difference_to_baseline(found, task, name)) is not None
            },
        }
        for task in found.tasks
    ]
    costs = {name: asdict(cost) for name, cost in found.costs.items()}
    return {"format_version": VERSION, "models": found.models, "tasks": tasks, "costs": costs, "made": found.made}


def difference_to_baseline(found: Evaluation, task: TaskReport, model: str) -> Any:
    """Return the Difference of a model to the first model on a task; None if they cannot be compared."""
    first, own = task.rows.get(found.models[0]), task.rows.get(model)
    if model == found.models[0] or not isinstance(first, Result) or not isinstance(own, Result):
        return None
    if (own.gold is None and len(own.values) < 2) or not comparable(own, first):  # such as words that one model lacks
        return None
    place = (task.name, model)
    if place not in found.gains:
        found.gains[place] = difference(own, first, int(found.made.get("settings", {}).get("seed", 0)))
    return found.gains[place]


def markdown(found: Evaluation) -> str:
    """Return all tables as Markdown."""
    parts = []
    for sheet in tables(found):
        rows = [sheet.head, ["---", *["---:"] * (len(sheet.head) - 1)], *sheet.rows]
        lines = ["| " + " | ".join(clean(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append("\n".join([f"### {clean(sheet.title)}", "", clean(sheet.what), "", *lines]))
    return "\n\n".join(parts) + "\n"


def _task_sheet(found: Evaluation, task: TaskReport) -> TextTable:
    """Return a task's table: main metrics, difference to the first model, secondary figures."""
    results = [row for row in task.rows.values() if isinstance(row, Result)]
    metrics = list(dict.fromkeys(row.metric for row in results))
    more = list(dict.fromkeys(name for row in results for name in row.more if name not in metrics))[:MORE_COLUMNS]
    gains = {name: difference_to_baseline(found, task, name) for name in found.models}
    compared = any(gap is not None for gap in gains.values())
    head = ["model", *metrics, *([f"over {found.models[0]} [95 %]"] if compared else []), *more]
    rows = []
    for model in found.models:
        row = task.rows.get(model, NONE)
        if isinstance(row, str):
            rows.append([model, row, *[""] * (len(head) - 2)])
            continue
        cells = [_main(row, metric) for metric in metrics]
        if compared:
            gap = gains[model]
            cells.append(NONE if gap is None else f"{gap.gain:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]")
        rows.append([model, *cells, *(_number(row.more.get(name)) for name in more)])
    drawn = any(row.deviation is not None for row in results)
    return TextTable(task.name, task.what + ("; ± standard deviation over draws" if drawn else ""), head, rows)


def _main(row: Result, metric: str) -> str:
    """Return a result's cell in the column of a metric, its main or a secondary one."""
    if row.metric != metric:
        return _number(row.more.get(metric))
    return _number(row.score) + ("" if row.deviation is None else f" ± {row.deviation:.3f}")


def _number(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.3f}"


_COSTS: dict[str, Callable[[Cost], str]] = {  # heading: cell
    "weights": lambda cost: f"{cost.parameters / 1e6:,.1f} M",
    "disk": lambda cost: size(cost.disk_bytes),
    "senses": lambda cost: f"{cost.senses:,}" if cost.senses else NONE,
    "dictionary": lambda cost: size(cost.dictionary_bytes) if cost.senses else NONE,
    "compression": lambda cost: NONE if cost.compression is None else f"{cost.compression:,.1f}x",
    "texts/s": lambda cost: f"{cost.texts_per_s:,.0f}",
    "tokens/s": lambda cost: NONE if cost.tokens_per_s is None else f"{cost.tokens_per_s:,.0f}",
    "speed-up": lambda cost: f"{cost.speedup:,.1f}x",
    "memory": lambda cost: size(cost.peak_memory),
}


def _cost_sheet(found: Evaluation) -> TextTable:
    models = [name for name in found.models if name in found.costs]
    rows = [[name, *(cell(found.costs[name]) for cell in _COSTS.values())] for name in models]
    settings = found.made.get("settings", {})
    threads = f"; {settings['threads']} threads" if settings.get("threads") else ""
    what = (
        f"all models in turn on the same texts, medians{threads}; compression: bytes of the embeddings of the dictionary's "
        "corpus over the dictionary's; memory: peak of a process that loads the model and encodes"
    )
    return TextTable("costs", what, ["model", *_COSTS], rows)


def _drawings(found: Evaluation) -> list[tuple[str, Callable[[Path], None]]]:
    """Return the name of each plot and a function that draws it into a file."""
    drawings: list[tuple[str, Callable[[Path], None]]] = []
    for task in found.tasks:
        rows = {name: row for name, row in task.rows.items() if isinstance(row, Result) and name in found.costs}
        if task.kind not in ("classification", "classifier", "mteb") or len(rows) < 2:
            continue
        metric = next(iter(rows.values())).metric
        slug = "".join(c if c.isalnum() else "-" for c in task.name)
        points = [Point(n, found.costs[n].texts_per_s, r.score, r.deviation or 0.0) for n, r in rows.items()]
        title, axes = f"{task.name}: {metric} against speed", ("texts per second", metric)
        drawings.append((f"{slug}-speed", partial(draw_points, title=title, axes=axes, points=points)))
        sized = [
            p._replace(x=found.costs[p.name].dictionary_bytes / 1e6)
            for p in points
            if p.name in found.made.get("sizes", ())
        ]
        if len({found.costs[point.name].senses for point in sized}) > 1:
            first = task.rows[found.models[0]]
            level = Line(found.models[0], first.score) if isinstance(first, Result) else None
            title, axes = f"{task.name}: {metric} against dictionary size", ("dictionary in MB", metric)
            drawings.append((f"{slug}-size", partial(draw_lines, title=title, axes=axes, points=sized, level=level)))
    return drawings
