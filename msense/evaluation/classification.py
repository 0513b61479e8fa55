"""Text classification on frozen sentence vectors: logistic regression on a few texts a class, or on all.

The MTEB protocol (Muennighoff et al. 2023, section 3): of each class as many training texts as there are shots, drawn anew
ten times; the whole test part. Comes in: a model and labelled texts. Goes out: accuracy and macro F1 of every draw. Holds
the vectors of all texts.
"""

import warnings
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from msense.errors import BadInput
from msense.evaluation.models import Model
from msense.evaluation.result import METRICS, Result
from msense.labelled import Columns, read_labelled

PARTS = ("train", "test")
FEW_ROUNDS, ROUNDS = 100, 1000  # of the solver, on a few texts (as MTEB has it) and on all


class Protocol(NamedTuple):
    """How texts are drawn.

    Attributes:
        shots: texts a class; 0 = all of them, in one draw.
        draws: how often.
        seed: of the first draw; the others count on.
    """

    shots: int = 8
    draws: int = 10
    seed: int = 0


def measure(model: Model, source: str, columns: Columns, protocol: Protocol) -> Result:
    """Encode both parts and classify.

    Raises:
        BadInput: data are missing or damaged, or have one class only.
    """
    parts = {part: read_labelled(source, part, columns) for part in PARTS}
    vectors = {part: model.encode(found.first) for part, found in parts.items()}
    gold = parts["test"].labels
    draws = classify(vectors, {part: found.labels for part, found in parts.items()}, protocol)
    more = {"macro F1": float(np.mean([METRICS["macro F1"](gold, found) for found in draws]))}
    if not protocol.shots:
        return Result("accuracy", "texts", gold=gold.tolist(), found=draws[0].tolist(), more=more)
    return Result("accuracy", "draws", [METRICS["accuracy"](gold, found) for found in draws], more=more)


def classify(
    vectors: dict[str, np.ndarray], labels: dict[str, np.ndarray], protocol: Protocol | None = None
) -> list[np.ndarray]:
    """Train and test; return the predicted labels [P] of the test part, of every draw.

    Args:
        vectors: float32 [P, D] of the parts train and test.
        labels: [P] of them.
        protocol: how texts are drawn.

    Raises:
        BadInput: the training labels are of one class only, or the parts share none.
    """
    protocol = protocol or Protocol()
    classes = np.unique(labels["train"])
    if len(classes) < 2:
        raise BadInput(
            f"the training part has {len(classes)} class(es) of label: give data of two or more, or name the column of "
            "labels with --label-column"
        )
    if not np.isin(labels["test"], classes).any():
        raise BadInput("no label of the test part is among those of the training part: give parts of one data set")
    found = []
    for draw in range(protocol.draws if protocol.shots else 1):
        rng = np.random.default_rng(protocol.seed + draw)
        rows = [np.flatnonzero(labels["train"] == c) for c in classes]
        chosen = np.concatenate([rng.permutation(own)[: protocol.shots or len(own)] for own in rows])
        found.append(_predicted(vectors, labels["train"], chosen, FEW_ROUNDS if protocol.shots else ROUNDS))
    return found


def _predicted(vectors: dict[str, np.ndarray], labels: np.ndarray, chosen: np.ndarray, rounds: int) -> np.ndarray:
    """Fit on the chosen rows of the training part, and return labels of the test part."""
    with threadpool_limits(1), warnings.catch_warnings():  # more threads only wait for each other here
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol bounds the rounds
        model = LogisticRegression(max_iter=rounds).fit(vectors["train"][chosen], labels[chosen])
        return np.asarray(model.predict(vectors["test"]))
