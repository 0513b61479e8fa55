"""Metrics of predictions against gold labels, by name."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics

_OF_LABELS: Mapping[str, Callable[..., float]] = {  # of (gold [P], predicted [P], weights [P] or None)
    "accuracy": lambda gold, found, counts=None: float(np.average(gold == found, weights=counts)),
    "macro F1": lambda gold, found, counts=None: float(
        metrics.f1_score(gold, found, average="macro", sample_weight=counts, zero_division=0)
    ),
    "F1": lambda gold, found, counts=None: float(
        metrics.f1_score(gold == "1", found == "1", sample_weight=counts, zero_division=0)
    ),
    "Matthews": lambda gold, found, counts=None: float(metrics.matthews_corrcoef(gold, found, sample_weight=counts)),
}
METRICS: Mapping[str, Callable[..., float]] = {  # of (gold [P], predicted [P])
    **_OF_LABELS,
    "Pearson": lambda gold, found: _correlation(stats.pearsonr, gold, found),
    "Spearman": lambda gold, found: _correlation(stats.spearmanr, gold, found),
}


def _correlation(of: Callable[..., Any], gold: np.ndarray, found: np.ndarray) -> float:
    """Return a correlation; 0 if one side is constant."""
    gold, found = gold.astype(np.float64), found.astype(np.float64)
    return float(of(gold, found)[0]) if np.ptp(gold) and np.ptp(found) else 0.0
