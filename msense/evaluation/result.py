"""Scores of a model on a task, and the paired bootstrap comparison of two models."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter
from scipy import stats

from msense.metrics import _OF_LABELS, METRICS

RESAMPLES = 2000  # bootstrap samples
_BATCH = 1 << 22  # indices held at once while resampling


@dataclass(frozen=True)
class Result:
    """A model's result on a task; its fields are checked against each other.

    Attributes:
        metric: name of the main metric.
        over: what one value belongs to: draws, texts, words or sets.
        values: float [n]; the score is their weighted mean. Empty if there are predictions.
        weights: float [n]; None: equal weights.
        names: names of the words or sets, if they have any.
        gold: true label of every text, for metrics over all texts together.
        found: predicted label of every text.
        more: secondary figures by name.

    Example:
        >>> Result("accuracy", "draws", [0.5, 0.75]).score
        0.625
        >>> Result("accuracy", "texts", gold=["a", "b"], found=["a", "a"]).score
        0.5
    """

    metric: str
    over: str
    values: list[float] = field(default_factory=list)
    weights: list[float] | None = None
    names: list[str] | None = None
    gold: list[Any] | None = None
    found: list[Any] | None = None
    more: dict[str, int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gold is None:
            n = len(self.values)
            if not n or any(len(own) != n for own in (self.weights, self.names) if own is not None):
                raise ValueError(f"a result has {n} values, but another number of weights or names, or none")
            if self.weights is not None and not (min(self.weights) >= 0 < sum(self.weights)):
                raise ValueError("weights of a result are negative or all 0")
        elif self.metric not in METRICS or self.found is None or not 0 < len(self.gold) == len(self.found):
            raise ValueError(f"predictions and labels of a result do not match, or {self.metric!r} takes none")

    @property
    def score(self) -> float:
        """The main figure."""
        if self.gold is not None:
            return METRICS[self.metric](np.array(self.gold), np.array(self.found))
        return float(np.average(self.values, weights=self.weights))

    @property
    def deviation(self) -> float | None:
        """Standard deviation (n - 1) over draws; None for results without several draws."""
        return float(np.std(self.values, ddof=1)) if self.over == "draws" and len(self.values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Return all fields, score and deviation as JSON values."""
        return asdict(self) | {"score": self.score, "deviation": self.deviation}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Result":
        """Load the output of `to_json`; ValueError if a field is invalid."""
        return TypeAdapter(cls).validate_json(json.dumps(told), strict=True)


class Difference(NamedTuple):
    """The gain of one model over another, with its 95 % confidence interval."""

    gain: float
    low: float
    high: float


def comparable(ours: Result, theirs: Result) -> bool:
    """Return whether two results have the same metric and the same draws, texts, words or sets with the same weights."""
    same = ("metric", "over", "weights", "names", "gold")
    return len(ours.values) == len(theirs.values) and all(getattr(ours, n) == getattr(theirs, n) for n in same)


def difference(ours: Result, theirs: Result, seed: int = 0) -> Difference:
    """Compare two models by a paired percentile bootstrap (Efron and Tibshirani 1993, chapter 13).

    Args:
        ours: result of one model.
        theirs: result of the other on the same task.
        seed: seed of the resampling, which does not depend on the models.

    Raises:
        ValueError: the results are of different tasks.
    """
    if not comparable(ours, theirs):
        raise ValueError("the two results are not of the same task")
    gain = ours.score - theirs.score
    data, statistic = _of_values(ours, theirs) if ours.gold is None else _of_texts(ours, theirs)
    if len(data[0]) < 2:  # every resample is the sample itself
        return Difference(gain, gain, gain)
    interval = stats.bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH // len(data[0])),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Difference(gain, float(interval.low), float(interval.high))


def _of_values(ours: Result, theirs: Result) -> tuple[tuple[np.ndarray, ...], Callable[..., Any]]:
    """Return gaps and weights to resample, and their weighted mean."""
    gaps = np.array(ours.values) - np.array(theirs.values)
    weights = np.ones(len(gaps)) if ours.weights is None else np.array(ours.weights)
    weighted = weights > 0  # a resample of zero weights would have no mean
    return (gaps[weighted], weights[weighted]), lambda g, w, axis: np.average(g, axis=axis, weights=w)


def _of_texts(ours: Result, theirs: Result) -> tuple[tuple[np.ndarray, ...], Callable[..., Any]]:
    """Return codes of the texts to resample, and the difference of the metric on a sample of them."""
    gold, a, b = (np.array(values) for values in (ours.gold, ours.found, theirs.found))
    of = METRICS[ours.metric]
    if ours.metric not in _OF_LABELS:
        return (np.arange(len(gold)),), lambda rows: of(gold[rows], a[rows]) - of(gold[rows], b[rows])
    # texts with the same three labels are interchangeable: count each triple instead of scoring every text
    codes = np.stack([np.unique(labels, return_inverse=True)[1] for labels in (gold, a, b)])
    _, first, kinds = np.unique(codes, axis=1, return_index=True, return_inverse=True)

    def statistic(sample: np.ndarray) -> float:
        counts = np.bincount(sample)
        present = np.flatnonzero(counts)
        rows, counts = first[present], counts[present]
        return of(gold[rows], a[rows], counts) - of(gold[rows], b[rows], counts)

    return (kinds.reshape(-1),), statistic
