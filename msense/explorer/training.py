"""Curves: the metrics of every epoch, of one or more distillations together; and a dictionary's distortion by budget."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from msense.errors import InputError
from msense.explorer.charts import Chart, Series
from msense.explorer.origin import Origin
from msense.io import storage
from msense.run.folder import RunFolder

_MAX_BYTES = 1 << 24  # of metrics.jsonl
_MOST_METRICS = 40
_INSIDE = ("", "student")  # a run, and the output of `msense make`


@dataclass(frozen=True)
class Training:
    """The metrics of each finished epoch of a training."""

    name: str  # as it was named to `read_training`
    epochs: tuple[dict[str, float], ...]


def read_training(source: str) -> Training | None:
    """Return the metrics of a run, or of the output of `msense make`; None if it trained nothing yet.

    Raises:
        InputError: the file of metrics is too large or not one.
    """
    for inner in _INSIDE:
        file = RunFolder(storage.join(source, inner) if inner else source).metrics
        if not storage.exists(file):
            continue
        try:
            epochs = [_numbers(json.loads(line)) for line in storage.read_text(file, _MAX_BYTES).splitlines()]
        except (ValueError, RecursionError, AttributeError, OverflowError) as error:
            raise InputError(f"{file} has no metrics of epochs: {error}; remove it, or resume its run") from error
        return Training(source, tuple(epochs))
    return None


def charts(trainings: Sequence[Training]) -> list[Chart]:
    """Return a chart of each metric over the steps, in the order in which the metrics stand in the files."""
    metrics = dict.fromkeys(name for training in trainings for epoch in training.epochs for name in epoch)
    metrics = {name: None for name in metrics if name not in ("epoch", "step")}
    every = [_chart(metric, trainings) for metric in list(metrics)[:_MOST_METRICS]]
    return [chart for chart in every if chart.series]


def budget_chart(origin: Origin) -> Chart | None:
    """Return the estimated distortion over the number of senses; None if the run did not choose by a budget."""
    if not origin.curve:
        return None
    points = tuple((float(senses), value) for senses, value in origin.curve)
    return Chart("lines", "Distortion by budget", "senses", "mean squared distance", (Series("this corpus", points),))


def _chart(metric: str, trainings: Sequence[Training]) -> Chart:
    values = {
        training.name: tuple(
            (epoch["step"], epoch[metric]) for epoch in training.epochs if {"step", metric} <= epoch.keys()
        )
        for training in trainings
    }
    return Chart("lines", metric, "steps", metric, tuple(Series(name, own) for name, own in values.items() if own))


def _numbers(record: dict[str, object]) -> dict[str, float]:
    """Return the finite numbers of a line."""
    numbers = ((name, value) for name, value in record.items() if isinstance(value, int | float))
    return {name: float(value) for name, value in numbers if not isinstance(value, bool) and math.isfinite(value)}
