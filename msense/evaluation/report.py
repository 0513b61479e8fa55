"""What an evaluation found, as tables for people and as JSON for programs.

Comes in: results by task and model, and costs. Goes out: tables on the terminal, `FILE.json` with everything, `FILE.md` with the
same tables, plots beside them. Holds results only.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from msense import storage
from msense.artefact import unique_keys
from msense.cli import console
from msense.errors import BadInput
from msense.evaluation.plots import Line, Point, draw_lines, draw_points
from msense.evaluation.result import Result, comparable, difference
from msense.scratch import scratch_folder
from msense.text import clean, size

VERSION = 1
_LARGEST = 1 << 30  # bytes of a file of results
NONE = "–"
MORE_COLUMNS = 5  # of other figures in a table


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: weights, those of a dictionary left out.
        disk_bytes: of its files, a dictionary left out.
        dictionary_bytes: of its senses; 0 without.
        senses: of its dictionary.
        compression: of the dictionary's corpus: bytes of its embeddings at 2 a number, over those of the senses.
        texts_per_s: median over turns.
        tokens_per_s: likewise; None where the model does not count tokens.
        peak_memory: of a process that loads it and encodes, in bytes.
        speedup: over the first model, median over turns.
    """

    parameters: int
    disk_bytes: int
    dictionary_bytes: int
    senses: int
    compression: float | None
    texts_per_s: float
    tokens_per_s: float | None
    peak_memory: int
    speedup: float


@dataclass
class TaskReport:
    """A table: what each model has on a task.

    Attributes:
        name: of the table.
        kind: of the task.
        what: is measured, in a line.
        rows: a result, or the reason why there is none, by model.
    """

    name: str
    kind: str
    what: str
    rows: dict[str, Result | str]


@dataclass
class Evaluation:
    """Everything that was found.

    Attributes:
        models: their names; the others are held against the first.
        tasks: a table each.
        costs: by model.
        made: settings, seeds, device, versions.
        gains: differences that have been computed, by table and model.
    """

    models: list[str]
    tasks: list[TaskReport]
    costs: dict[str, Cost] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    gains: dict[tuple[str, str], Any] = field(default_factory=dict, compare=False, repr=False)


class Sheet(NamedTuple):
    """A table as text."""

    title: str
    what: str
    head: list[str]
    rows: list[list[str]]


def sheets(found: Evaluation) -> list[Sheet]:
    """Return all tables as text."""
    own = [_task_sheet(found, task) for task in found.tasks]
    return own + ([_cost_sheet(found)] if found.costs else [])


def show(found: Evaluation) -> None:
    """Print all tables on stdout."""
    out = console()
    for sheet in sheets(found):
        table = Table(
            title=Text(clean(sheet.title)),
            title_justify="left",
            caption=Text(clean(sheet.what)),
            caption_justify="left",
            box=None,
            collapse_padding=True,  # ten costs and the names in a hundred columns
            pad_edge=False,
        )
        for number, name in enumerate(sheet.head):
            table.add_column(Text(clean(name)), justify="right" if number else "left", overflow="fold")
        for row in sheet.rows:
            table.add_row(*(Text(clean(cell)) for cell in row))
        out.print(table)
        out.print()


def write_report(found: Evaluation, output: str, *, plots: bool) -> list[str]:
    """Write the JSON file, and beside it the Markdown and, if asked for, the plots.

    Args:
        found: what there is so far.
        output: name or URI of the JSON file.
        plots: whether to draw.

    Returns:
        Names of all files written.
    """
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
    """Read what `write_report` wrote; None if there is no such file.

    Raises:
        BadInput: it is no such file, or damaged.
    """
    if not storage.exists(output):
        return None
    try:
        told = json.loads(storage.read_text(output, _LARGEST), object_pairs_hook=unique_keys)
        if storage.SEAL in told and told.pop(storage.SEAL) != storage.seal(told):
            raise ValueError("a byte of it has changed since it was written")
        if told["format_version"] != VERSION:
            raise BadInput(f"{output} has format version {told['format_version']!r}, this msense reads {VERSION}")
        tasks = [
            TaskReport(
                task["name"],
                task["kind"],
                task["what"],
                {name: row if isinstance(row, str) else Result.from_json(row) for name, row in task["rows"].items()},
            )
            for task in told["tasks"]
        ]
        costs = {name: Cost(**{f.name: cost[f.name] for f in fields(Cost)}) for name, cost in told["costs"].items()}
        found = Evaluation(list(told["models"]), tasks, costs, dict(told["made"]))
        _check(found)
        return found
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise BadInput(
            f"{output} is there, but holds no evaluation ({type(error).__name__}: {error}): give another --output, or remove it"
        ) from error


def _check(found: Evaluation) -> None:
    """Refuse what no evaluation has written; results have been checked.

    Raises:
        ValueError: saying what is wrong.
    """
    names = [*found.models, *(word for task in found.tasks for word in (task.name, task.kind, task.what))]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a name is no text")
    figures = [figure for cost in found.costs.values() for figure in asdict(cost).values() if figure is not None]
    if any(isinstance(figure, bool) or not isinstance(figure, int | float) for figure in figures):
        raise ValueError("a cost is no number")
    if not isinstance(found.made.get("settings", {}), dict):
        raise ValueError("settings have no names")


def to_json(found: Evaluation) -> dict[str, Any]:
    """Return everything as JSON values, with the differences to the first model."""
    tasks = [
        {
            **asdict(task),
            "rows": {name: row if isinstance(row, str) else row.to_json() for name, row in task.rows.items()},
            "differences": {
                name: told._asdict() for name in task.rows if (told := gain(found, task, name)) is not None
            },
        }
        for task in found.tasks
    ]
    costs = {name: asdict(cost) for name, cost in found.costs.items()}
    return {"format_version": VERSION, "models": found.models, "tasks": tasks, "costs": costs, "made": found.made}


def gain(found: Evaluation, task: TaskReport, model: str) -> Any:  # noqa: ANN401 - a Difference, or None
    """Return by how much a model exceeds the first on a task; None where the two cannot be compared."""
    first, own = task.rows.get(found.models[0]), task.rows.get(model)
    if model == found.models[0] or not isinstance(first, Result) or not isinstance(own, Result):
        return None
    if own.gold is None and len(own.values) < 2:  # nothing to resample
        return None
    if not comparable(own, first):  # such as words that one of the two lacks
        return None
    place = (task.name, model)
    if place not in found.gains:
        found.gains[place] = difference(own, first, int(found.made.get("settings", {}).get("seed", 0)))
    return found.gains[place]


def markdown(found: Evaluation) -> str:
    """Return all tables as Markdown."""
    parts = []
    for sheet in sheets(found):
        rule = ["---", *["---:"] * (len(sheet.head) - 1)]
        rows = [sheet.head, rule, *sheet.rows]
        lines = ["| " + " | ".join(clean(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append("\n".join([f"### {clean(sheet.title)}", "", clean(sheet.what), "", *lines]))
    return "\n\n".join(parts) + "\n"


def _task_sheet(found: Evaluation, task: TaskReport) -> Sheet:
    """Return a task's table: the main figure, its difference to the first model, others."""
    results = [row for row in task.rows.values() if isinstance(row, Result)]
    metrics = list(dict.fromkeys(row.metric for row in results))
    more = list(dict.fromkeys(name for row in results for name in row.more if name not in metrics))[:MORE_COLUMNS]
    drawn = any(row.deviation is not None for row in results)
    others = [name for name in found.models[1:] if gain(found, task, name) is not None]
    head = ["model", *metrics, *([f"over {found.models[0]} [95 %]"] if others else []), *more]
    rows = []
    for model in found.models:
        row = task.rows.get(model, NONE)
        if isinstance(row, str):
            rows.append([model, row, *[""] * (len(head) - 2)])
            continue
        cells = [_main(row, metric) for metric in metrics]
        if others:
            cells.append(_gained(gain(found, task, model)))
        rows.append([model, *cells, *(_number(row.more.get(name)) for name in more)])
    deviation = "; ± standard deviation over draws" if drawn else ""
    return Sheet(task.name, task.what + deviation, head, rows)


def _main(row: Result, metric: str) -> str:
    """Return a result under the heading of a metric: its own, or one that it has beside."""
    if row.metric != metric:
        return _number(row.more.get(metric))
    return _number(row.score) + ("" if row.deviation is None else f" ± {row.deviation:.3f}")


def _gained(told: Any) -> str:  # noqa: ANN401 - a Difference, or None
    return NONE if told is None else f"{told.gain:+.3f} [{told.low:+.3f}, {told.high:+.3f}]"


def _number(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.3f}"


def _cost_sheet(found: Evaluation) -> Sheet:
    """Return the table of costs."""
    head = [
        "model",
        "weights",
        "disk",
        "senses",
        "dictionary",
        "compression",
        "texts/s",
        "tokens/s",
        "speed-up",
        "memory",
    ]
    rows = []
    for model in (name for name in found.models if name in found.costs):
        cost = found.costs[model]
        rows.append(
            [
                model,
                f"{cost.parameters / 1e6:,.1f} M",
                size(cost.disk_bytes),
                f"{cost.senses:,}" if cost.senses else NONE,
                size(cost.dictionary_bytes) if cost.senses else NONE,
                NONE if cost.compression is None else f"{cost.compression:,.1f}x",
                f"{cost.texts_per_s:,.0f}",
                NONE if cost.tokens_per_s is None else f"{cost.tokens_per_s:,.0f}",
                f"{cost.speedup:,.1f}x",
                size(cost.peak_memory),
            ]
        )
    made = found.made.get("settings", {})
    threads = f"; {made['threads']} threads" if made.get("threads") else ""
    what = (
        f"all models in turn on the same texts, medians{threads}; compression: bytes of the embeddings of the dictionary's "
        "corpus over the dictionary's; memory: peak of a process that loads the model and encodes"
    )
    return Sheet("costs", what, head, rows)


def _drawings(found: Evaluation) -> list[tuple[str, Any]]:
    """Return what is to be drawn: a name, and a function that draws it into a file."""
    drawings: list[tuple[str, Any]] = []
    for task in found.tasks:
        if task.kind not in ("classification", "classifier", "mteb"):
            continue
        rows = {name: row for name, row in task.rows.items() if isinstance(row, Result) and name in found.costs}
        slug = "".join(c if c.isalnum() else "-" for c in task.name)
        if len(rows) > 1:
            points = [Point(n, found.costs[n].texts_per_s, r.score, r.deviation or 0.0) for n, r in rows.items()]
            drawings.append((f"{slug}-speed", _speed(task, next(iter(rows.values())).metric, points)))
        sized = {name: row for name, row in rows.items() if name in found.made.get("sizes", ())}
        if len({found.costs[name].senses for name in sized}) > 1:
            points = [
                Point(n, found.costs[n].dictionary_bytes / 1e6, r.score, r.deviation or 0.0) for n, r in sized.items()
            ]
            first = task.rows[found.models[0]]
            level = Line(found.models[0], first.score) if isinstance(first, Result) else None
            drawings.append((f"{slug}-size", _sizes(task, next(iter(rows.values())).metric, points, level)))
    return drawings


def _speed(task: TaskReport, metric: str, points: Sequence[Point]) -> Any:  # noqa: ANN401 - a function
    title = f"{task.name}: {metric} against speed"
    return lambda file: draw_points(file, title, ("texts a second", metric), points)


def _sizes(task: TaskReport, metric: str, points: Sequence[Point], level: Line | None) -> Any:  # noqa: ANN401 - a function
    title = f"{task.name}: {metric} against the dictionary's size"
    return lambda file: draw_lines(file, title, ("dictionary in MB", metric), points, level)
