"""Reports of an evaluation: tables on the terminal, `FILE.json` with everything, `FILE.md` with the tables, plots."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from msense.errors import InputError
from msense.evaluation.cost import Cost
from msense.evaluation.plots import draw
from msense.evaluation.result import Difference, Result, comparable, difference
from msense.io import storage
from msense.io.scratch import scratch_folder
from msense.io.untrusted import format_errors, reject_duplicate_keys
from msense.text import clean, first_line, size

VERSION = 1
_MAX_BYTES = 1 << 30  # of a results file
NONE = "–"


@dataclass
class TaskReport:
    """Results of all models on a task: one table."""

    name: str  # title of the table
    kind: str  # of the task
    what: str  # one-line description of the measurement
    rows: dict[str, Result | str]  # result by model (and its fusion with BM25), or the reason why there is none
    bm25: str = ""  # name of the row of BM25 alone, a second baseline


@dataclass
class Evaluation:
    """All results of an evaluation.

    Example:
        >>> rows = {"a": Result("accuracy", "draws", [0.5, 0.6]), "b": Result("accuracy", "draws", [0.6, 0.7])}
        >>> evaluation = Evaluation(["a", "b"], [TaskReport("t", "classification", "accuracy", rows)])
        >>> round(difference_to_baseline(evaluation, evaluation.tasks[0], "b").gain, 3)
        0.1
    """

    models: list[str]  # their names; the first is the baseline
    tasks: list[TaskReport]  # one table each
    costs: dict[str, Cost] = field(default_factory=dict)  # by model
    made: dict[str, Any] = field(default_factory=dict)  # settings, seeds, device and versions
    gains: dict[tuple[str, str, str], Any] = field(
        default_factory=dict, compare=False, repr=False
    )  # computed differences

    def rows(self, title: str) -> dict[str, Result | str]:
        """Return the rows of a table."""
        return next(task.rows for task in self.tasks if task.name == title)


class TextTable(NamedTuple):
    """A table of text cells."""

    title: str
    what: str
    head: list[str]
    rows: list[list[str]]


def write_report(evaluation: Evaluation, output: str, *, plots: bool) -> None:
    """Write the JSON file `output` (name or URI) and, next to it, Markdown and optionally plots."""
    stem = output.removesuffix(".json")
    storage.make_folder(output.rpartition("/")[0] or ".")
    storage.write_json(output, to_json(evaluation))
    storage.write_text(f"{stem}.md", markdown(evaluation))
    with scratch_folder() as scratch:
        for name, settings in _plots(evaluation) if plots else ():
            draw(scratch / f"{name}.png", **settings)
            storage.upload(scratch / f"{name}.png", f"{stem}-{name}.png")


def load_report(output: str) -> Evaluation | None:
    """Load the JSON file of `write_report`; None if it does not exist.

    Raises:
        InputError: the file is corrupted or not a report.
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


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return everything, including differences to the first model, as JSON values."""
    report = {"format_version": VERSION, **asdict(evaluation)}
    del report["gains"]
    for task, values in zip(evaluation.tasks, report["tasks"], strict=True):
        for baseline in _baselines(evaluation, task):
            gaps = {name: difference_to_baseline(evaluation, task, name, baseline) for name in task.rows}
            key = "differences" if baseline == evaluation.models[0] else "differences_to_bm25"
            values[key] = {name: gap._asdict() for name, gap in gaps.items() if gap is not None}
        values["rows"] = {n: row if isinstance(row, str) else row.to_json() for n, row in task.rows.items()}
    return report


def _baselines(evaluation: Evaluation, task: TaskReport) -> list[str]:
    """Return the first model and, if it is another row of the table, BM25."""
    return list(dict.fromkeys([evaluation.models[0], *([task.bm25] if task.bm25 in task.rows else [])]))


def difference_to_baseline(
    evaluation: Evaluation, task: TaskReport, model: str, baseline: str | None = None
) -> Difference | None:
    """Return the difference of a row of a task to another, by default the first model's; None if they cannot be compared."""
    baseline = baseline or evaluation.models[0]
    first, own = task.rows.get(baseline), task.rows.get(model)
    if model == baseline or not isinstance(first, Result) or not isinstance(own, Result):
        return None
    if (own.gold is None and len(own.values) < 2) or not comparable(own, first):  # such as words that one model lacks
        return None
    if (key := (task.name, model, baseline)) not in evaluation.gains:
        evaluation.gains[key] = difference(own, first, int(evaluation.made.get("settings", {}).get("seed", 0)))
    gap: Difference = evaluation.gains[key]
    return gap


def markdown(evaluation: Evaluation) -> str:
    """Return all tables as Markdown."""
    parts = []
    for table in tables(evaluation):
        rows = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
        lines = ["| " + " | ".join(clean(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append("\n".join([f"### {clean(table.title)}", "", clean(table.what), "", *lines]))
    return "\n\n".join(parts) + "\n"


def tables(evaluation: Evaluation) -> list[TextTable]:
    """Return a table per task, and one of costs."""
    result = [_task_table(evaluation, task) for task in evaluation.tasks]
    if evaluation.costs:
        threads = evaluation.made.get("settings", {}).get("threads")
        what = (
            f"all models in turn on the same texts, medians{f'; {threads} threads' if threads else ''}; compression: bytes "
            "of the embeddings of the dictionary's corpus over the dictionary's; memory: peak of a process that loads the "
            "model and encodes"
        )
        costs = {name: evaluation.costs[name] for name in evaluation.models if name in evaluation.costs}
        rows = [[name, *(cell(cost) for cell in _COSTS.values())] for name, cost in costs.items()]
        result.append(TextTable("costs", what, ["model", *_COSTS], rows))
    return result


def _task_table(evaluation: Evaluation, task: TaskReport) -> TextTable:
    """Return a task's table: main metrics, difference to the first model, secondary figures."""
    results = {name: row for name, row in task.rows.items() if isinstance(row, Result)}
    metrics = list(dict.fromkeys(row.metric for row in results.values()))
    more = dict.fromkeys(name for row in results.values() for name in row.more if name not in metrics)
    gaps = {
        f"over {baseline} [95 %]": {name: difference_to_baseline(evaluation, task, name, baseline) for name in results}
        for baseline in _baselines(evaluation, task)
    }
    over = [column for column, own in gaps.items() if any(own.values())]
    head = ["model", *(metrics or ["result"]), *over, *more]
    rows = []
    for name, row in task.rows.items():
        if name in results:
            cells = {column: _figure(results[name], column) for column in head[1:]}
            rows.append([name, *(cells | {column: _gap(gaps[column][name]) for column in over}).values()])
        else:
            rows.append([name, str(row), *[""] * (len(head) - 2)])
    drawn = any(row.deviation is not None for row in results.values())
    return TextTable(task.name, task.what + ("; ± standard deviation over draws" if drawn else ""), head, rows)


def _figure(row: Result, name: str) -> str:
    """Return a result's cell in the column of its main metric or a secondary figure."""
    if row.metric == name:
        return f"{row.score:.3f}" + ("" if row.deviation is None else f" ± {row.deviation:.3f}")
    value = row.more.get(name)
    if value is None:
        return NONE
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) > 1 else f"{value:.3f}"


def _gap(gap: Difference | None) -> str:
    return NONE if gap is None else f"{gap.gain:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


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


_PLOTTED = ("classification", "classifier", "mteb", "retrieval", "similarity", "pairs")  # task kinds


def _plots(evaluation: Evaluation) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each plot and the arguments of `draw`."""
    costs, first = evaluation.costs, evaluation.models[0]
    for task in evaluation.tasks:
        rows = {name: row for name, row in task.rows.items() if isinstance(row, Result) and name in costs}
        if task.kind not in _PLOTTED or len(rows) < 2:
            continue
        metric = next(iter(rows.values())).metric
        slug = "".join(c if c.isalnum() else "-" for c in task.name)
        points = {name: (costs[name].texts_per_s, row.score, row.deviation or 0.0) for name, row in rows.items()}
        axes = ("texts per second", metric)
        own = task.rows.get(task.bm25)
        level = (task.bm25, own.score) if isinstance(own, Result) else None
        title = f"{task.name}: {metric} against speed"
        yield f"{slug}-speed", {"title": title, "axes": axes, "points": points, "baseline": level}
        megabytes = {name: costs[name].dictionary_bytes / 1e6 for name in rows if costs[name].senses}
        if len(set(megabytes.values())) > 1:
            sized = {name: (x, *points[name][1:]) for name, x in megabytes.items()}
            level = (first, rows[first].score) if first in rows and first not in sized else None
            title, axes = f"{task.name}: {metric} against dictionary size", ("dictionary in MB", metric)
            yield f"{slug}-size", {"title": title, "axes": axes, "points": sized, "baseline": level}
