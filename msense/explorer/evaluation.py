"""The page of evaluations: accuracy against speed, with intervals."""

from dataclasses import dataclass

from msense.errors import InputError
from msense.evaluation.report import Evaluation, TaskReport, difference_to_baseline, load_report
from msense.evaluation.result import Result
from msense.explorer.charts import Chart, Series


@dataclass(frozen=True)
class Point:
    """A model on a task."""

    name: str
    speed: float  # texts per second
    score: float
    low: float  # of the interval
    high: float


@dataclass(frozen=True)
class SpeedChart:
    """The models of a task, best first."""

    task: str
    metric: str
    interval: str  # what the intervals are
    points: tuple[Point, ...]

    @property
    def chart(self) -> Chart:
        """The models as points with intervals."""
        every = (Series(p.name, ((p.speed, p.score),), (p.low, p.high)) for p in self.points)
        return Chart("points", self.task, "texts per second", self.metric, tuple(every))


def speed_charts(file: str) -> list[SpeedChart]:
    """Return a chart of each task of an evaluation whose models have costs; errors are those of `read_evaluation`."""
    evaluation = read_evaluation(file)
    return [chart for task in evaluation.tasks if (chart := _chart(evaluation, task))]


def read_evaluation(file: str) -> Evaluation:
    """Return an evaluation with the speeds of its models.

    Raises:
        InputError: the file is missing, is no evaluation, or measured no speeds.
    """
    evaluation = load_report(file)
    if evaluation is None:
        raise InputError(f"there is no {file}: name the JSON file that msense evaluate wrote")
    if not any(_measured(evaluation, task) for task in evaluation.tasks):
        raise InputError(f"{file} has no task with the speeds of its models: evaluate without --no-cost")
    return evaluation


def _measured(evaluation: Evaluation, task: TaskReport) -> dict[str, Result]:
    """Return the results of a task by model, of those whose speed is known."""
    return {name: row for name, row in task.rows.items() if isinstance(row, Result) and name in evaluation.costs}


def _chart(evaluation: Evaluation, task: TaskReport) -> SpeedChart | None:
    if not (rows := _measured(evaluation, task)):
        return None
    drawn = any(row.deviation is not None for row in rows.values())
    points = [
        Point(name, evaluation.costs[name].texts_per_s, row.score, *_interval(evaluation, task, name, row, drawn))
        for name, row in rows.items()
    ]
    kind = "± standard deviation over draws" if drawn else f"95 % of the difference to {evaluation.models[0]}"
    metric = next(iter(rows.values())).metric
    return SpeedChart(task.name, metric, kind, tuple(sorted(points, key=lambda p: -p.score)))


def _interval(evaluation: Evaluation, task: TaskReport, name: str, row: Result, drawn: bool) -> tuple[float, float]:
    """Return the interval of a score; the score itself if there is none."""
    if drawn:
        deviation = row.deviation or 0.0
        return row.score - deviation, row.score + deviation
    gap = difference_to_baseline(evaluation, task, name)
    return (row.score, row.score) if gap is None else (row.score - gap.gain + gap.low, row.score - gap.gain + gap.high)
