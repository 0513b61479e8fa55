"""What a task finds of a model, and how two models are compared on it.

Comes in: scores by draw (or by text, word, set). Goes out: their mean and deviation, and the paired difference of two models
with a bootstrap interval. Holds scores and predictions, nothing larger.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn import metrics

RESAMPLES = 2000  # of a bootstrap


def _correlation(of: Callable[..., Any], gold: np.ndarray, found: np.ndarray) -> float:
    """Correlate numbers; 0 where one side is constant."""
    gold, found = gold.astype(np.float64), found.astype(np.float64)
    return float(of(gold, found)[0]) if np.ptp(gold) and np.ptp(found) else 0.0


_OF_LABELS: Mapping[str, Callable[..., float]] = {  # of (gold [P], found [P], how often each pair counts [P] or None)
    "accuracy": lambda gold, found, counts=None: float(np.average(gold == found, weights=counts)),
    "macro F1": lambda gold, found, counts=None: float(
        metrics.f1_score(gold, found, average="macro", sample_weight=counts, zero_division=0)
    ),
    "F1": lambda gold, found, counts=None: float(
        metrics.f1_score(gold == "1", found == "1", sample_weight=counts, zero_division=0)
    ),
    "Matthews": lambda gold, found, counts=None: float(metrics.matthews_corrcoef(gold, found, sample_weight=counts)),
}
METRICS: Mapping[str, Callable[..., float]] = {  # of (gold [P], found [P])
    **_OF_LABELS,
    "Pearson": lambda gold, found: _correlation(stats.pearsonr, gold, found),
    "Spearman": lambda gold, found: _correlation(stats.spearmanr, gold, found),
}


@dataclass(frozen=True)
class Result:
    """A model's result on a task.

    Attributes:
        metric: name of the main one.
        over: what its values are of: draws, texts, words, sets.
        values: float [n], one each; the score is their mean by weight. Empty where there are predictions.
        weights: float [n]; None: all equal.
        names: of what the values are of, such as words; None: they have none.
        gold: of every text, where the metric is one of all texts together.
        found: what the model says of every text.
        more: other figures, by name.
    """

    metric: str
    over: str
    values: list[float] = field(default_factory=list)
    weights: list[float] | None = None
    names: list[str] | None = None
    gold: list[Any] | None = None
    found: list[Any] | None = None
    more: dict[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The main figure."""
        if self.gold is not None:
            return METRICS[self.metric](np.array(self.gold), np.array(self.found))
        return float(np.average(self.values, weights=self.weights))

    @property
    def deviation(self) -> float | None:
        """Standard deviation (n - 1) over draws; None of what was not drawn."""
        return float(np.std(self.values, ddof=1)) if self.over == "draws" and len(self.values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self) | {"score": self.score, "deviation": self.deviation}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Result":
        """Make a result of what `to_json` gave.

        Raises:
            KeyError: something is missing.
            ValueError: it is no result.
        """
        found = cls(**{name: told[name] for name in cls.__dataclass_fields__})
        _check(found)
        return found


class Difference(NamedTuple):
    """By how much one model exceeds another, and the ends of the 95 % interval."""

    gain: float
    low: float
    high: float


def comparable(ours: Result, theirs: Result) -> bool:
    """Tell whether two results are of the same draws (texts, words, sets), of the same weights, by the same metric."""
    same = ("metric", "over", "weights", "names", "gold")
    return len(ours.values) == len(theirs.values) and all(getattr(ours, n) == getattr(theirs, n) for n in same)


def difference(ours: Result, theirs: Result, seed: int = 0) -> Difference:
    """Compare two models on the same draws (texts, words, sets), which are resampled in pairs.

    A percentile bootstrap (Efron and Tibshirani 1993, chapter 13) of `RESAMPLES` samples.

    Args:
        ours: of one model.
        theirs: of the other, on the same task.
        seed: of the samples, which do not depend on the models.

    Raises:
        ValueError: they are of different tasks.
    """
    if not comparable(ours, theirs):
        raise ValueError("these two results are not of the same task")
    rng = np.random.default_rng(seed)
    if ours.gold is not None:
        gold, a, b = (np.array(values) for values in (ours.gold, ours.found, theirs.found))
        found = _of_texts(ours.metric, gold, a, b, rng)
    else:
        gaps = np.array(ours.values) - np.array(theirs.values)
        weights = np.ones(len(gaps)) if ours.weights is None else np.array(ours.weights)
        gaps, weights = gaps[weights > 0], weights[weights > 0]  # a sample of what does not count would have no mean
        places = rng.integers(0, len(gaps), (RESAMPLES, len(gaps)))
        found = (gaps * weights)[places].sum(1) / weights[places].sum(1)
    low, high = np.quantile(found, [0.025, 0.975])
    return Difference(ours.score - theirs.score, float(low), float(high))


def _of_texts(metric: str, gold: np.ndarray, a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return by how much a exceeds b in each sample of the texts, float64 [RESAMPLES], of [P] each."""
    n = len(gold)
    samples = (rng.integers(0, n, n) for _ in range(RESAMPLES))
    if metric not in _OF_LABELS:
        of = METRICS[metric]
        return np.array([of(gold[own], a[own]) - of(gold[own], b[own]) for own in samples])
    # texts of the same three labels are alike: a sample is how often each such triple is in it
    codes = np.stack([np.unique(labels, return_inverse=True)[1] for labels in (gold, a, b)])
    _, first, kinds = np.unique(codes, axis=1, return_index=True, return_inverse=True)
    gold, a, b, kinds = gold[first], a[first], b[first], kinds.reshape(-1)
    of, found = _OF_LABELS[metric], []
    for own in samples:
        counts = np.bincount(kinds[own], minlength=len(first))
        there = counts > 0
        counts = counts[there]
        found.append(of(gold[there], a[there], counts) - of(gold[there], b[there], counts))
    return np.array(found)


def _check(found: Result) -> None:
    """Refuse what no model has found.

    Raises:
        ValueError: naming the field.
    """
    if not isinstance(found.more, dict):
        raise ValueError("more of a result has no names")
    numbers = {"values": found.values, "weights": found.weights or [], "more": [*found.more.values()]}
    for name, own in numbers.items():
        if not isinstance(own, list) or any(isinstance(n, bool) or not isinstance(n, int | float) for n in own):
            raise ValueError(f"{name} of a result are not numbers")
    if not isinstance(found.metric, str) or not isinstance(found.over, str):
        raise ValueError("metric or over of a result is no text")
    if found.gold is None:
        n = len(found.values)
        if not n or any(len(own) != n for own in (found.weights, found.names) if own is not None):
            raise ValueError(f"a result has {n} values, and weights or names of another number")
        if found.weights is not None and not (min(found.weights) >= 0 < sum(found.weights)):
            raise ValueError("weights of a result are below 0, or all 0")
    elif found.metric not in METRICS or found.found is None or not 0 < len(found.gold) == len(found.found):
        raise ValueError(f"a result by {found.metric!r} has predictions that do not fit")
