"""Pairs of texts: how well the cosine of their vectors agrees with scores, or separates labels 0 and 1.

As in MTEB: Spearman correlation with scores (semantic similarity), average precision for labels (pair classification).
Memory: the texts and their vectors.
"""

from typing import NamedTuple

import numpy as np
from sklearn import metrics

from msense.corpus.labelled import Columns, find_pair_columns, read_labelled
from msense.errors import InputError
from msense.evaluation.models import Model
from msense.evaluation.result import Result
from msense.evaluation.search import unit
from msense.io.filesystems import display_uri
from msense.io.untrusted import printable

_TRUTH = {"true": "1", "false": "0"}
LABELS = {"similarity": ("score", "label"), "pairs": ("label", "labels", "score")}  # usual columns, by task kind


class Pairs(NamedTuple):
    """P pairs of texts."""

    first: list[str]
    second: list[str]
    gold: np.ndarray  # float64 [P], a score, or int64 [P], 0 or 1


def measure_similarity(model: Model, source: str, split: str, columns: Columns | None = None) -> Result:
    """Correlate the cosines of pairs with their scores; InputError if the data are missing or invalid."""
    pairs = read_pairs(source, split, "similarity", columns)
    return Result("Spearman", "pairs", gold=pairs.gold.tolist(), found=_cosines(model, pairs).tolist())


def measure_pairs(model: Model, source: str, split: str, columns: Columns | None = None) -> Result:
    """Rank pairs by cosine and score the ranking by their labels; InputError if the data are missing or invalid."""
    pairs = read_pairs(source, split, "pairs", columns)
    return classification_result(pairs.gold, _cosines(model, pairs))


def classification_result(gold: np.ndarray, cosines: np.ndarray) -> Result:
    """Return the average precision of cosines [P] for labels [P], and accuracy and F1 at the best threshold for each."""
    precision, recall, _ = metrics.precision_recall_curve(gold, cosines)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    false, true, _ = metrics.roc_curve(gold, cosines, drop_intermediate=False)
    share = float(np.mean(gold))
    accuracy = true * share + (1 - false) * (1 - share)
    more: dict[str, int | float] = {"best accuracy": float(accuracy.max()), "best F1": float(f1.max())}
    return Result("average precision", "pairs", gold=gold.tolist(), found=cosines.tolist(), more=more)


def read_pairs(source: str, split: str, kind: str, columns: Columns | None = None) -> Pairs:
    """Read the pairs of a split for task kind `similarity` or `pairs`; without `columns`, those with usual names.

    Raises:
        InputError: the split is missing or corrupted, lacks a column, or its scores or labels are invalid.
    """
    columns = columns or find_pair_columns(source, split, LABELS[kind])
    data = read_labelled(source, split, columns)
    where = f"{display_uri(source)}, split {split!r}, column {columns.label!r}"
    labels = [_TRUTH.get(label.strip().lower(), label) if kind == "pairs" else label for label in data.labels.tolist()]
    if (wrong := next((label for label in labels if not _is_number(label)), None)) is not None:
        raise InputError(
            f"{where}: {printable(wrong)!r} is no number: correct or remove it, or choose with --pair-columns"
        )
    gold = np.array(labels, dtype=np.float64)
    if not np.isfinite(gold).all():
        raise InputError(f"{where}: row {int((~np.isfinite(gold)).argmax())} is NaN or infinite: correct or remove it")
    if kind == "pairs":
        if set(gold) != {0.0, 1.0}:
            raise InputError(
                f"{where}: pair classification needs labels 0 and 1, both present: use kind similarity for scores"
            )
        gold = gold.astype(np.int64)
    elif not np.ptp(gold):
        raise InputError(f"{where}: all scores are equal, so nothing correlates with them: provide other scores")
    first, second = (list(texts) for texts in zip(*data.texts, strict=True))
    return Pairs(first, second, gold)


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _cosines(model: Model, pairs: Pairs) -> np.ndarray:
    """Return the cosine of each pair, float64 [P]."""
    vectors = unit(np.asarray(model.encode(pairs.first + pairs.second))).astype(np.float64)
    first, second = np.split(vectors, 2)
    return np.asarray(np.einsum("pd,pd->p", first, second))
