"""Classification tasks by name: the eight of GLUE with columns, splits and metrics, or any other of texts and labels.

A pair of texts is joined by the tokenizer's separator into one text, so that teacher, dictionary and student read the
same tokens. Memory: one split.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from msense.corpus.labelled import Columns, Labelled, read_labelled
from msense.errors import InputError

TRAIN, TEST, DEV = "train", "test", "dev"
HUB = "hf://nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """How a task is read and reported.

    Example:
        >>> get_task("sst2").metrics
        ('accuracy', 'macro F1')
    """

    columns: Columns
    metrics: tuple[str, ...]  # keys of `metrics.METRICS`, the main one first
    test: str = TEST  # split to test on; GLUE's test labels are not public
    regression: bool = False  # labels are numbers
    source: str = ""  # default source of the data
    further: str = ""  # additional split to report, if available


def _glue(name: str, texts: str, *metrics: str, test: str = "validation", further: str = "") -> GlueTask:
    columns = Columns(tuple(texts.split()), "label")
    return GlueTask(columns, metrics, test, "Pearson" in metrics, f"{HUB}:{name}", further)


GLUE = {  # Wang et al. 2019, table 1
    "cola": _glue("cola", "sentence", "Matthews", "accuracy"),
    "sst2": _glue("sst2", "sentence", "accuracy", "macro F1"),
    "mrpc": _glue("mrpc", "sentence1 sentence2", "F1", "accuracy"),
    "stsb": _glue("stsb", "sentence1 sentence2", "Pearson", "Spearman"),
    "qqp": _glue("qqp", "question1 question2", "F1", "accuracy"),
    "mnli": _glue(
        *("mnli", "premise hypothesis", "accuracy", "macro F1"),
        test="validation_matched",
        further="validation_mismatched",
    ),
    "qnli": _glue("qnli", "question sentence", "accuracy", "macro F1"),
    "rte": _glue("rte", "sentence1 sentence2", "accuracy", "macro F1"),
}


def get_task(name: str, columns: Columns | None = None, *, regression: bool = False) -> GlueTask:
    """Return the GLUE task of a name, or a task with the given columns."""
    if name in GLUE:
        return GLUE[name]
    metrics = ("Pearson", "Spearman") if regression else ("accuracy", "macro F1")
    return GlueTask(columns or Columns(), metrics, regression=regression)


@dataclass(frozen=True)
class Texts:
    """One split of a task: P texts, pairs joined, for the teacher."""

    texts: list[str]
    labels: np.ndarray  # str [P], or float64 [P] for a regression
    fingerprints: tuple[str, ...]  # of the files


def read_split(name: str, task: GlueTask, source: str, part: str, joiner: str) -> Texts:
    """Read one split of a task.

    A folder for a GLUE task may also hold plain data: `text` and `label` in train and test.

    Args:
        name: of the task, for errors.
        task: how to read it.
        source: folder or Hub dataset.
        part: train, test (the task's own) or dev (`validation` or `dev`); any other by its own name.
        joiner: placed between the texts of a pair.

    Raises:
        InputError: the split is missing or corrupted, or a label of a regression is not a number.
    """
    names = {TEST: (task.test,), DEV: ("validation", "dev")}.get(part, (part,))
    candidates = [(own, task.columns) for own in names]
    if task.source and not source.startswith("hf://"):
        candidates.append((part, Columns()))
    data = _first_readable(source, candidates)
    labels: np.ndarray = data.labels
    if task.regression:
        try:
            labels = data.labels.astype(np.float64)
        except ValueError as error:
            raise InputError(
                f"task {name}: a label is not a number ({error}): remove --regression, or fix the label"
            ) from error
        if not np.isfinite(labels).all():
            raise InputError(f"task {name}: a label is NaN or infinite: fix it")
    return Texts([joiner.join(row) for row in data.texts], labels, data.fingerprints)


def _first_readable(source: str, candidates: list[tuple[str, Columns]]) -> Labelled:
    """Read the first of several splits that can be read; else raise the error of the first."""
    errors = []
    for part, columns in candidates:
        try:
            return read_labelled(source, part, columns)
        except InputError as error:
            errors.append(error)
    raise errors[0]


def pair_separator(tokenizer: Any) -> str:
    """Return the separator of a pair of texts: the tokenizer's own, if it reads it as one token in a text."""
    known = tokenizer.get_vocab(with_added_tokens=True)
    for token in ("[SEP]", "</s>", "<|end_of_text|>", "<eos>"):
        if token in known and tokenizer.encode(f"a {token} a", add_special_tokens=False).ids.count(known[token]) == 1:
            return f" {token} "
    return "\n"
