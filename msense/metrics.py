"""Metrics of predictions against gold labels, by name. SciPy and scikit-learn, of an extra, are imported when one is computed."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np


def _accuracy(gold: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None) -> float:
    return float(np.average(gold == predicted, weights=weights))


def _macro_f1(gold: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None) -> float:
    return _of_sklearn("f1_score", gold, predicted, average="macro", sample_weight=weights, zero_division=0)


def _f1(gold: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None) -> float:
    return _of_sklearn("f1_score", gold == "1", predicted == "1", sample_weight=weights, zero_division=0)


def _matthews(gold: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None) -> float:
    return _of_sklearn("matthews_corrcoef", gold, predicted, sample_weight=weights)


def _average_precision(gold: np.ndarray, predicted: np.ndarray) -> float:
    return _of_sklearn("average_precision_score", gold, predicted) if gold.any() else 0.0


def _pearson(gold: np.ndarray, predicted: np.ndarray) -> float:
    return _correlation("pearsonr", gold, predicted)


def _spearman(gold: np.ndarray, predicted: np.ndarray) -> float:
    return _correlation("spearmanr", gold, predicted)


LABEL_METRICS: Mapping[str, Callable[..., float]] = {  # of (gold [P], predicted [P], weights [P] or None)
    "accuracy": _accuracy,
    "macro F1": _macro_f1,
    "F1": _f1,
    "Matthews": _matthews,
}
METRICS: Mapping[str, Callable[..., float]] = {  # of (gold [P], predicted [P])
    **LABEL_METRICS,
    "Pearson": _pearson,
    "average precision": _average_precision,
    "Spearman": _spearman,
}


def _of_sklearn(name: str, *arguments: Any, **options: Any) -> float:
    return float(getattr(import_module("sklearn.metrics"), name)(*arguments, **options))


def _correlation(name: str, gold: np.ndarray, predicted: np.ndarray) -> float:
    """Return a correlation of SciPy; 0 if one side is constant or empty."""
    gold, predicted = gold.astype(np.float64), predicted.astype(np.float64)
    if not len(gold) or not np.ptp(gold) or not np.ptp(predicted):
        return 0.0
    return float(getattr(import_module("scipy.stats"), name)(gold, predicted)[0])
