"""Senses allocated by budget against the same number for every token, at equal dictionary size.

Reads Banking77 (`banking77/{train,test}.csv`) and CoarseWSD (`coarsewsd/WORD/{train,test}.{data,gold}.txt`) with the demo
teacher and holds all token embeddings of one of them.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.artifacts import MAX_OCCURRENCES
from benchmarks.shared import Bench, Figures
from msense import SenseDictionary
from msense.clustering.budget import DEFAULT_BUDGET, SenseBudget, sense_bytes
from msense.constants import DEMO_TEACHER
from msense.corpus.labelled import read_labelled
from msense.dictionary.layout import Arrays, corpus_distortion
from msense.evaluation.models import TeacherModel, TokenEmbeddings
from msense.evaluation.result import Result, difference
from msense.evaluation.spec import Spec
from msense.evaluation.tasks import coarsewsd
from msense.evaluation.tasks.classification import PARTS, classify
from msense.metrics import METRICS
from msense.teacher.pooling import pool_rows

logger = logging.getLogger("msense.benchmark")
FIXED, MORE = 20, 50
TRIES = 5  # to reach equal sizes


@dataclass(frozen=True)
class Task:
    """Texts and labels (str [P]) of a classification task, by part."""

    texts: dict[str, list[str]]
    labels: dict[str, np.ndarray]


def load_task(folder: Path) -> Task:
    """Return both parts of a classification task."""
    parts = {part: read_labelled(str(folder), part) for part in PARTS}
    return Task({part: own.first for part, own in parts.items()}, {part: own.labels for part, own in parts.items()})


def few_shot(vectors: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> Result:
    """Return the accuracy of ten 8-shot logistic regressions on vectors [P, D], as in MTEB."""
    draws = classify(vectors, labels)
    return Result("accuracy", "draws", [METRICS["accuracy"](labels["test"], predicted) for predicted in draws])


def load_teacher(workers: int) -> TeacherModel:
    """Load the demo teacher."""
    return TeacherModel(Spec("teacher", "teacher", teacher=DEMO_TEACHER), "cpu", workers)


def senses(bench: Bench) -> Figures:
    """Measure Banking77, then CoarseWSD."""
    task, contexts = load_task(bench.data("banking77")), bench.data("coarsewsd")
    teacher = load_teacher(bench.workers)
    parts = {part: teacher.read(texts) for part, texts in task.texts.items()}
    return banking(parts, task.labels, teacher.info.vocab_size) | _coarse(teacher, str(contexts))


def _dictionaries(train: TokenEmbeddings, vocab_size: int) -> dict[str, SenseDictionary]:
    """Return the dictionaries to compare; `auto` has as many senses as `k20`, or as near as possible."""

    def fit(k: int | SenseBudget) -> SenseDictionary:
        given: dict[str, Any] = {"vocab_size": vocab_size, "max_occurrences": MAX_OCCURRENCES}
        return SenseDictionary.from_embeddings(train.ids, train.hidden, k=k, **given)

    fixed = fit(FIXED)
    budget = len(fixed)
    for _ in range(1 + TRIES):  # a token of few distinct points may have fewer senses than its share
        auto = fit(SenseBudget(size=budget * sense_bytes(fixed.dim)))
        if len(auto) == len(fixed):
            break
        budget += len(fixed) - len(auto)
    return {"k20": fixed, "auto": auto, "k50": fit(MORE), "default": fit(DEFAULT_BUDGET)}


def banking(parts: dict[str, TokenEmbeddings], labels: dict[str, np.ndarray], vocab_size: int) -> Figures:
    """Compare distortion and few-shot accuracy."""

    def accuracy_of(values: dict[str, np.ndarray]) -> Result:
        lengths = {part: torch.from_numpy(np.diff(own.offsets)) for part, own in parts.items()}
        rows = {part: torch.from_numpy(values[part]) for part in parts}
        return few_shot({p: pool_rows(rows[p], lengths[p], "mean", normalize=True).numpy() for p in parts}, labels)

    accuracy = {"teacher": accuracy_of({part: own.hidden for part, own in parts.items()})}
    figures: Figures = {}
    for name, dictionary in _dictionaries(parts["train"], vocab_size).items():
        replaced = {part: np.asarray(dictionary.replace(own.ids, own.hidden)) for part, own in parts.items()}
        arrays = Arrays(dictionary.offsets, dictionary.counts, dictionary.rms_distance, dictionary.token_counts)
        figures[f"senses.size_{name}"] = float(len(dictionary))
        for part, kind in (("train", "distortion"), ("test", "test_distortion")):
            figures[f"senses.{kind}_{name}"] = _distortion(dictionary, parts[part], replaced[part])
        figures[f"senses.in_sample_distortion_{name}"] = corpus_distortion(arrays)
        accuracy[name] = accuracy_of(replaced)
        logger.info("banking77 %s: %d senses, accuracy %.4f", name, len(dictionary), accuracy[name].score)
    for kind in ("distortion", "test_distortion", "in_sample_distortion"):
        figures[f"senses.{kind}_ratio"] = figures[f"senses.{kind}_auto"] / figures[f"senses.{kind}_k20"]
    figures |= {f"senses.banking77_{name}": result.score for name, result in accuracy.items()}
    gains = zip(("", "_low", "_high"), difference(accuracy["auto"], accuracy["k20"]), strict=True)
    return figures | {f"senses.banking77_gain{end}": value for end, value in gains}


def _distortion(dictionary: SenseDictionary, own: TokenEmbeddings, replaced: np.ndarray) -> float:
    """Return the mean squared distance of embeddings to their senses, over tokens that have senses."""
    known = np.diff(dictionary.offsets)[own.ids] > 0
    return float(np.square(own.hidden[known] - replaced[known]).sum(1).mean(dtype=np.float64))


def _coarse(teacher: TeacherModel, folder: str) -> Figures:
    """Compare how well senses, named by the majority of their training contexts, predict the test contexts."""
    words = coarsewsd.words(folder)
    texts = [text for word in words for text in coarsewsd.read_contexts(folder, word, "train").texts]
    figures: Figures = {"senses.coarsewsd_words": float(len(words))}
    for name, dictionary in _dictionaries(teacher.read(texts), teacher.info.vocab_size).items():
        teacher.dictionary = dictionary
        figures[f"senses.coarsewsd_{name}"] = coarsewsd.measure(teacher, folder).score
        figures[f"senses.coarsewsd_size_{name}"] = float(len(dictionary))
    return figures | {"senses.coarsewsd_gain": figures["senses.coarsewsd_auto"] - figures["senses.coarsewsd_k20"]}
