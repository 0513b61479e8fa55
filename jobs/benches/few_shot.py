"""Banking77 as the MTEB protocol has it: a few texts a class, logistic regression on sentence vectors, ten draws.

In: `banking77/{train,test}.csv`, columns text and label, and vectors of its texts. Out: accuracy of every draw; two models
are compared on the same draws.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from sklearn.linear_model import LogisticRegression

from benches.peers import at_most

SHOTS, DRAWS = 8, 10
PARTS = ("train", "test")


@dataclass(frozen=True)
class Task:
    """Texts and their labels, by part."""

    texts: dict[str, list[str]]
    labels: dict[str, np.ndarray]  # str [P]


def read_task(folder: Path) -> Task:
    """Read both parts."""
    texts, labels = {}, {}
    for part in PARTS:
        with (folder / f"{part}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        texts[part], labels[part] = [row["text"] for row in rows], np.array([row["label"] for row in rows])
    return Task(texts, labels)


def few_shot(vectors: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> np.ndarray:
    """Accuracy of logistic regression on a few vectors [P, D] a class, float64 [DRAWS]."""
    found = []
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        by_class = [rng.permutation(np.flatnonzero(labels["train"] == c))[:SHOTS] for c in np.unique(labels["train"])]
        chosen = np.concatenate(by_class)
        with at_most(1):  # more threads only wait for each other here
            model = LogisticRegression(max_iter=100).fit(vectors["train"][chosen], labels["train"][chosen])
            found.append(model.score(vectors["test"], labels["test"]))
    return np.array(found)


def difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Mean of the paired differences of draws, and its 95 % interval."""
    gain = ours - theirs
    low, high = stats.t.interval(0.95, len(gain) - 1, gain.mean(), stats.sem(gain))
    return float(gain.mean()), float(low), float(high)
