"""Senses allocated by budget against the same number for every token, at equal dictionary size.

Reads Banking77 (`banking77/{train,test}.csv`) and CoarseWSD (`coarsewsd/WORD/{train,test}.{data,gold}.txt`) with the demo
teacher and holds all token embeddings of one of them.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared import Bench, Figures
from benchmarks.workshop import CAP
from msense import SenseDictionary
from msense.clustering.budget import DEFAULT_BUDGET, SenseBudget, sense_bytes
from msense.constants import DEMO_TEACHER
from msense.corpus.labelled import read_labelled
from msense.dictionary.layout import Arrays, corpus_distortion
from msense.evaluation.models import TeacherModel, iter_slabs
from msense.evaluation.result import Result, difference
from msense.evaluation.spec import Spec
from msense.evaluation.tasks import coarsewsd
from msense.evaluation.tasks.classification import PARTS, classify
from msense.metrics import METRICS
from msense.teacher.pooling import pool_rows

logger = logging.getLogger("msense.bench")
FIXED, MORE = 20, 50
TRIES = 5  # to reach equal sizes
Dictionaries = dict[str, SenseDictionary]


@dataclass(frozen=True)
class Task:
    """Texts and labels (str [P]) of a classification task, by part."""

    texts: dict[str, list[str]]
    labels: dict[str, np.ndarray]


@dataclass(frozen=True)
class Read:
    """Token embeddings of P texts: ids int64 [N], offsets int64 [P + 1], embeddings float16 [N, D]."""

    ids: np.ndarray
    offsets: np.ndarray
    embeddings: np.ndarray

    def pooled(self, values: np.ndarray) -> np.ndarray:
        """Return the normalised mean of each text's rows of `values`, float32 [P, D]."""
        lengths = torch.from_numpy(np.diff(self.offsets))
        return pool_rows(torch.from_numpy(values), lengths, "mean", normalize=True).numpy()


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


def read(teacher: TeacherModel, texts: list[str]) -> Read:
    """Return the token embeddings of texts."""
    ids, lengths, embeddings = [], [], []
    for slab in iter_slabs(texts):
        own = teacher.read(slab)
        ids.append(own.ids)
        lengths.append(np.diff(own.offsets))
        embeddings.append(own.hidden.astype(np.float16))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return Read(np.concatenate(ids), offsets, np.concatenate(embeddings))


def senses(bench: Bench) -> Figures:
    """Measure Banking77, then CoarseWSD."""
    folders = bench.data("banking77"), bench.data("coarsewsd")
    teacher = load_teacher(bench.workers)
    task = load_task(folders[0])
    parts = {part: read(teacher, texts) for part, texts in task.texts.items()}
    return _banking(parts, task.labels, teacher.info.vocab_size) | _coarse(teacher, str(folders[1]))


def dictionaries(train: Read, vocab_size: int) -> Dictionaries:
    """Return the dictionaries to compare; `auto` has as many senses as `k20`, or as near as possible."""

    def fit(k: int | SenseBudget) -> SenseDictionary:
        return SenseDictionary.from_embeddings(
            train.ids, train.embeddings, k=k, vocab_size=vocab_size, max_occurrences=CAP
        )

    fixed = fit(FIXED)
    wanted = budget = len(fixed)
    auto = fit(SenseBudget(size=budget * sense_bytes(fixed.dim)))
    for _ in range(TRIES):  # a token of few distinct points may have fewer senses than its share
        if len(auto) == wanted:
            break
        budget += wanted - len(auto)
        auto = fit(SenseBudget(size=budget * sense_bytes(fixed.dim)))
    return {"k20": fixed, "auto": auto, "k50": fit(MORE), "default": fit(DEFAULT_BUDGET)}


def distortion(dictionary: SenseDictionary, own: Read, replaced: np.ndarray) -> float:
    """Return the mean squared distance of embeddings to their senses, over tokens that have senses."""
    known = np.diff(dictionary.offsets)[own.ids] > 0
    return float(np.square(own.embeddings[known] - replaced[known]).sum(1).mean(dtype=np.float64))


def _banking(parts: dict[str, Read], labels: dict[str, np.ndarray], vocab_size: int) -> Figures:
    """Compare distortion and few-shot accuracy."""
    plain = {part: own.embeddings.astype(np.float32) for part, own in parts.items()}

    def accuracy_of(values: dict[str, np.ndarray]) -> Result:
        return few_shot({part: own.pooled(values[part]) for part, own in parts.items()}, labels)

    accuracy = {"teacher": accuracy_of(plain)}
    figures: Figures = {}
    for name, dictionary in dictionaries(parts["train"], vocab_size).items():
        replaced = {part: np.asarray(dictionary.replace(own.ids, plain[part])) for part, own in parts.items()}
        figures[f"senses.size_{name}"] = float(len(dictionary))
        figures[f"senses.distortion_{name}"] = distortion(dictionary, parts["train"], replaced["train"])
        figures[f"senses.test_distortion_{name}"] = distortion(dictionary, parts["test"], replaced["test"])
        figures[f"senses.in_sample_distortion_{name}"] = corpus_distortion(
            Arrays(dictionary.offsets, dictionary.counts, dictionary.rms_distance, dictionary.token_counts)
        )
        accuracy[name] = accuracy_of(replaced)
        logger.info("banking77 %s: %d senses, accuracy %.4f", name, len(dictionary), accuracy[name].score)
    for kind in ("distortion", "test_distortion", "in_sample_distortion"):
        figures[f"senses.{kind}_ratio"] = figures[f"senses.{kind}_auto"] / figures[f"senses.{kind}_k20"]
    figures |= {f"senses.banking77_{name}": result.score for name, result in accuracy.items()}
    gain, low, high = difference(accuracy["auto"], accuracy["k20"])
    return figures | {
        "senses.banking77_gain": gain,
        "senses.banking77_gain_low": low,
        "senses.banking77_gain_high": high,
    }


def _coarse(teacher: TeacherModel, folder: str) -> Figures:
    """Compare how well senses, named by the majority of their training contexts, predict the test contexts."""
    words = coarsewsd.words(folder)
    texts = [text for word in words for text in coarsewsd.read_contexts(folder, word, "train").texts]
    figures: Figures = {"senses.coarsewsd_words": float(len(words))}
    for name, dictionary in dictionaries(read(teacher, texts), teacher.info.vocab_size).items():
        teacher.dictionary = dictionary
        figures[f"senses.coarsewsd_{name}"] = coarsewsd.measure(teacher, folder).score
        figures[f"senses.coarsewsd_size_{name}"] = float(len(dictionary))
        logger.info("coarsewsd %s: %d senses, %.4f", name, len(dictionary), figures[f"senses.coarsewsd_{name}"])
    return figures | {"senses.coarsewsd_gain": figures["senses.coarsewsd_auto"] - figures["senses.coarsewsd_k20"]}
