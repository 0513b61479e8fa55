"""Metrics of predictions against gold labels, by name."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics

LABEL_METRICS: Mapping[str, Callable[..., float]] = {  # of (gold [P], predicted [P], weights [P] or None)
    "accuracy": lambda gold, predicted, weights=None: float(np.average(gold == predicted, weights=weights)),
    "macro F1": lambda gold, predicted, weights=None: float(
        metrics.f1_score(gold, predicted, average="macro", sample_weight=weights, zero_division=0)
    ),
    "F1": lambda gold, predicted, weights=None: float(
        metrics.f1_score(gold == "1", predicted == "1", sample_weight=weights, zero_division=0)
    ),
    "Matthews": lambda gold, predicted, weights=None: float(
        metrics.matthews_corrcoef(gold, predicted, sample_weight=weights)
    ),
}
METRICS: Mapping[str, Callable[..., float]] = {  # of (gold [P], predicted [P])
    **LABEL_METRICS,
    "Pearson": lambda gold, predicted: _correlation(stats.pearsonr, gold, predicted),
    "average precision": lambda gold, predicted: (
        float(metrics.average_precision_score(gold, predicted)) if gold.any() else 0.0
    ),
    "Spearman": lambda gold, predicted: _correlation(stats.spearmanr, gold, predicted),
}


def _correlation(function: Callable[..., Any], gold: np.ndarray, predicted: np.ndarray) -> float:
    """Return a correlation; 0 if one side is constant or empty."""
    gold, predicted = gold.astype(np.float64), predicted.astype(np.float64)
    return float(function(gold, predicted)[0]) if len(gold) and np.ptp(gold) and np.ptp(predicted) else 0.0
