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


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {  # of (gold [P], found [P])
    "accuracy": lambda gold, found: float((gold == found).mean()),
    "macro F1": lambda gold, found: float(metrics.f1_score(gold, found, average="macro", zero_division=0)),
    "F1": lambda gold, found: float(metrics.f1_score(gold == "1", found == "1", zero_division=0)),
    "Matthews": lambda gold, found: float(metrics.matthews_corrcoef(gold, found)),
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
        """Make a result of what `to_json` gave."""
        return cls(**{name: told[name] for name in cls.__dataclass_fields__})


class Difference(NamedTuple):
    """By how much one model exceeds another, and the ends of the 95 % interval."""

    gain: float
    low: float
    high: float


def difference(ours: Result, theirs: Result, seed: int = 0) -> Difference:
    """Compare two models on the same draws (texts, words, sets), which are resampled in pairs.

    A percentile bootstrap (Efron and Tibshirani 1993, chapter 13) of `RESAMPLES` samples.

    Args:
        ours: of one model.
        theirs: of the other, on the same task.
        seed: of the samples.

    Raises:
        ValueError: they are of different tasks.
    """
    if (ours.metric, ours.over, len(ours.values), ours.gold) != (
        theirs.metric,
        theirs.over,
        len(theirs.values),
        theirs.gold,
    ):
        raise ValueError("these two results are not of the same task")
    rng = np.random.default_rng(seed)
    if ours.gold is not None:
        gold, a, b = (np.array(values) for values in (ours.gold, ours.found, theirs.found))
        metric = METRICS[ours.metric]
        samples = (rng.integers(0, len(gold), len(gold)) for _ in range(RESAMPLES))
        found = np.array([metric(gold[own], a[own]) - metric(gold[own], b[own]) for own in samples])
    else:
        gaps = np.array(ours.values) - np.array(theirs.values)
        weights = np.ones(len(gaps)) if ours.weights is None else np.array(ours.weights)
        places = rng.integers(0, len(gaps), (RESAMPLES, len(gaps)))
        found = (gaps * weights)[places].sum(1) / weights[places].sum(1)
    low, high = np.quantile(found, [0.025, 0.975])
    return Difference(ours.score - theirs.score, float(low), float(high))
