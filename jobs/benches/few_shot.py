"""Banking77 as the MTEB protocol has it: a few texts a class, logistic regression on sentence vectors, ten draws.

In: `banking77/{train,test}.csv`, columns text and label, and vectors of its texts. Out: accuracy of every draw; two models
are compared on the same draws. The protocol is that of `msense.evaluation.classification`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from msense.evaluation.classification import PARTS, classify
from msense.evaluation.result import METRICS, Result
from msense.labelled import read_labelled


@dataclass(frozen=True)
class Task:
    """Texts and their labels, by part."""

    texts: dict[str, list[str]]
    labels: dict[str, np.ndarray]  # str [P]


def read_task(folder: Path) -> Task:
    """Read both parts."""
    parts = {part: read_labelled(str(folder), part) for part in PARTS}
    return Task({part: found.first for part, found in parts.items()}, {p: found.labels for p, found in parts.items()})


def few_shot(vectors: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> Result:
    """Accuracy of logistic regression on a few vectors [P, D] a class, by draw."""
    found = classify(vectors, labels)
    return Result("accuracy", "draws", [METRICS["accuracy"](labels["test"], predicted) for predicted in found])
