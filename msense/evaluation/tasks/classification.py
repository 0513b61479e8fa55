"""Text classification on frozen sentence vectors: logistic regression on a few training texts per class, or on all.

Follows the MTEB protocol (Muennighoff et al. 2023, section 3): draw `shots` training texts per class, fit, score the whole
test set, and repeat with ten draws. Memory: the vectors of all texts.
"""

import warnings
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from msense.corpus.labelled import Columns, read_labelled
from msense.errors import InputError
from msense.evaluation.models import Model
from msense.evaluation.result import Result
from msense.metrics import METRICS

PARTS = ("train", "test")
FEW_SHOT_MAX_ITER, FULL_MAX_ITER = 100, 1000  # solver iterations for few-shot training (MTEB's value) and for all texts


class Protocol(NamedTuple):
    """How training texts are sampled."""

    shots: int = 8  # training texts per class; 0: all of them, in a single draw
    draws: int = 10
    seed: int = 0  # draw i uses `seed + i`


def measure(model: Model, source: str, columns: Columns, protocol: Protocol) -> Result:
    """Encode the training and test texts and score the classifier trained on them."""
    parts = {part: read_labelled(source, part, columns) for part in PARTS}
    vectors = {part: model.encode(data.first) for part, data in parts.items()}
    gold = parts["test"].labels
    draws = classify(vectors, {part: data.labels for part, data in parts.items()}, protocol)
    more = {"macro F1": float(np.mean([METRICS["macro F1"](gold, predicted) for predicted in draws]))}
    if not protocol.shots:
        return Result("accuracy", "texts", gold=gold.tolist(), found=draws[0].tolist(), more=more)
    return Result("accuracy", "draws", [METRICS["accuracy"](gold, predicted) for predicted in draws], more=more)


def classify(
    vectors: dict[str, np.ndarray], labels: dict[str, np.ndarray], protocol: Protocol | None = None
) -> list[np.ndarray]:
    """Return the predicted test labels [P] of every draw.

    Takes vectors, float32 [P, D], and labels [P] of "train" and "test".

    Raises:
        InputError: the training set has only one class, or shares no label with the test set.
    """
    protocol = protocol or Protocol()
    classes = check_labels(labels)
    predictions = []
    for draw in range(protocol.draws if protocol.shots else 1):
        rng = np.random.default_rng(protocol.seed + draw)
        rows = [rng.permutation(np.flatnonzero(labels["train"] == c))[: protocol.shots or None] for c in classes]
        chosen = np.concatenate(rows)
        with threadpool_limits(1), warnings.catch_warnings():  # such small fits are slower with more threads
            warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol limits the iterations
            model = LogisticRegression(max_iter=FEW_SHOT_MAX_ITER if protocol.shots else FULL_MAX_ITER)
            model.fit(vectors["train"][chosen], labels["train"][chosen])
            predictions.append(np.asarray(model.predict(vectors["test"])))
    return predictions


def check_labels(labels: dict[str, np.ndarray]) -> np.ndarray:
    """Return the classes of the training set; InputError if there is only one, or none is in the test set."""
    classes = np.unique(labels["train"])
    if len(classes) < 2:
        raise InputError(
            f"the training set has {len(classes)} class(es), but classification needs two or more: check --label-column"
        )
    if not np.isin(labels["test"], classes).any():
        raise InputError("training and test set share no label: use splits of the same data set")
    return classes
