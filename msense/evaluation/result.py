"""Scores of a model on a task, and the paired bootstrap comparison of two models."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from msense.metrics import LABEL_METRICS, METRICS

RESAMPLES = 2000  # bootstrap samples
_BATCH = 1 << 22  # indices held at once while resampling


@dataclass(frozen=True)
class Result:
    """A model's result on a task; its fields are checked against each other.

    Example:
        >>> Result("accuracy", "draws", [0.5, 0.75]).score
        0.625
        >>> Result("accuracy", "texts", gold=["a", "b"], found=["a", "a"]).score
        0.5
    """

    metric: str  # name of the main metric
    over: str  # what one value belongs to: draws, texts, pairs, queries, words or sets
    values: list[float] = field(default_factory=list)  # [n], whose weighted mean is the score; empty with predictions
    weights: list[float] | None = None  # [n]; None: equal weights
    names: list[str] | None = None  # of the queries, words or sets, if they have any
    gold: list[Any] | None = (
        None  # true label of every text, or score of every pair, for metrics over all of them together
    )
    found: list[Any] | None = None  # predicted label of every text, or cosine of every pair
    more: dict[str, int | float] = field(default_factory=dict)  # secondary figures

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
    def from_json(cls, values: Mapping[str, Any]) -> "Result":
        """Load the output of `to_json`; ValueError if a field is invalid."""
        return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)


class Difference(NamedTuple):
    """The gain of one model over another, with its 95 % confidence interval."""

    gain: float
    low: float
    high: float


def comparable(a: Result, b: Result) -> bool:
    """Return whether two results have the same metric, and the same draws, texts, pairs, ... with the same weights."""
    same = ("metric", "over", "weights", "names", "gold")
    return len(a.values) == len(b.values) and all(getattr(a, name) == getattr(b, name) for name in same)


def difference(a: Result, b: Result, seed: int = 0) -> Difference:
    """Return a - b by a paired percentile bootstrap (Efron and Tibshirani 1993, chapter 13), resampled by seed only.

    Raises:
        ValueError: the results are of different tasks.
    """
    if not comparable(a, b):
        raise ValueError("the two results are not of the same task")
    gain = a.score - b.score
    data, statistic = _of_values(a, b) if a.gold is None else _of_texts(a, b)
    if len(data[0]) < 2:  # every resample is the sample itself
        return Difference(gain, gain, gain)
    from scipy import stats  # of an extra, and slow to import

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


def _of_values(a: Result, b: Result) -> tuple[tuple[np.ndarray, ...], Callable[..., Any]]:
    """Return gaps and weights to resample, and their weighted mean."""
    gaps = np.array(a.values) - np.array(b.values)
    weights = np.ones(len(gaps)) if a.weights is None else np.array(a.weights)
    weighted = weights > 0  # a resample of zero weights would have no mean
    return (gaps[weighted], weights[weighted]), lambda g, w, axis: np.average(g, axis=axis, weights=w)


def _of_texts(a: Result, b: Result) -> tuple[tuple[np.ndarray, ...], Callable[..., Any]]:
    """Return codes of the texts to resample, and the difference of the metric on a sample of them."""
    gold, left, right = (np.array(values) for values in (a.gold, a.found, b.found))
    metric = METRICS[a.metric]
    if a.metric not in LABEL_METRICS:
        return (np.arange(len(gold)),), lambda rows: metric(gold[rows], left[rows]) - metric(gold[rows], right[rows])
    # texts with the same three labels are interchangeable: count each triple instead of scoring every text
    codes = np.stack([np.unique(labels, return_inverse=True)[1] for labels in (gold, left, right)])
    _, first, kinds = np.unique(codes, axis=1, return_index=True, return_inverse=True)

    def statistic(sample: np.ndarray) -> float:
        counts = np.bincount(sample)
        present = np.flatnonzero(counts)
        rows, counts = first[present], counts[present]
        return metric(gold[rows], left[rows], counts) - metric(gold[rows], right[rows], counts)

    return (kinds.reshape(-1),), statistic
