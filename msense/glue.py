"""Classification tasks by name: GLUE's eight with their columns, parts and metrics, and any other of texts and labels.

Comes in: a name, and where the data are. Goes out: texts and labels. A pair of texts is one text, the two joined by the
tokenizer's separator: so teacher, dictionary and student read the same tokens. Holds one part.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from msense.errors import BadInput
from msense.labelled import Columns, Labelled, read_labelled

TRAIN, TEST, DEV = "train", "test", "dev"
HUB = "hf://nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """How a task is read and told.

    Attributes:
        columns: of texts and label.
        metrics: as `evaluation.result.METRICS` names them, the main one first.
        test: part that is tested on; GLUE's test labels are not public.
        regression: whether labels are numbers.
        source: of the data, if no other is given.
        further: part that is told of beside the test part, where it is there.
    """

    columns: Columns
    metrics: tuple[str, ...]
    test: str = TEST
    regression: bool = False
    source: str = ""
    further: str = ""


def _glue(name: str, texts: tuple[str, ...], *metrics: str, test: str = "validation", further: str = "") -> GlueTask:
    return GlueTask(Columns(texts, "label"), metrics, test, "Pearson" in metrics, f"{HUB}:{name}", further)


GLUE = {  # Wang et al. 2019, table 1
    "cola": _glue("cola", ("sentence",), "Matthews", "accuracy"),
    "sst2": _glue("sst2", ("sentence",), "accuracy", "macro F1"),
    "mrpc": _glue("mrpc", ("sentence1", "sentence2"), "F1", "accuracy"),
    "stsb": _glue("stsb", ("sentence1", "sentence2"), "Pearson", "Spearman"),
    "qqp": _glue("qqp", ("question1", "question2"), "F1", "accuracy"),
    "mnli": _glue(
        *("mnli", ("premise", "hypothesis"), "accuracy", "macro F1"),
        test="validation_matched",
        further="validation_mismatched",
    ),
    "qnli": _glue("qnli", ("question", "sentence"), "accuracy", "macro F1"),
    "rte": _glue("rte", ("sentence1", "sentence2"), "accuracy", "macro F1"),
}


def task_of(name: str, columns: Columns | None = None, *, regression: bool = False) -> GlueTask:
    """Return a task by name: one of GLUE's, or one of the given columns."""
    if name in GLUE:
        return GLUE[name]
    metrics = ("Pearson", "Spearman") if regression else ("accuracy", "macro F1")
    return GlueTask(columns or Columns(), metrics, regression=regression)


@dataclass(frozen=True)
class Texts:
    """A part of a task: P texts, the two of a pair joined.

    Attributes:
        texts: as the teacher reads them.
        labels: str [P], or float64 [P] of a regression.
        fingerprints: of the files.
    """

    texts: list[str]
    labels: np.ndarray
    fingerprints: tuple[str, ...]


def read_part(name: str, task: GlueTask, source: str, part: str, joiner: str) -> Texts:
    """Read a part of a task.

    A folder under a GLUE name may also hold plain data, `text` and `label` in train and test.

    Args:
        name: of the task, for errors.
        task: how it is read.
        source: folder or dataset of the hub.
        part: train, test (the task's own) or dev (`validation` or `dev`); any other by its own name.
        joiner: put between the texts of a pair.

    Raises:
        BadInput: the part is not there or damaged, or a label is no number where one is needed.
    """
    found = _found(task, source, part)
    labels: np.ndarray = found.labels
    if task.regression:
        try:
            labels = found.labels.astype(np.float64)
        except ValueError as error:
            raise BadInput(
                f"task {name}: a label is no number ({error}): leave --regression out, or mend it"
            ) from error
        if not np.isfinite(labels).all():
            raise BadInput(f"task {name}: a label is NaN or infinite: mend it")
    return Texts([joiner.join(row) for row in found.texts], labels, found.fingerprints)


def _found(task: GlueTask, source: str, part: str) -> Labelled:
    """Read a part under the task's own names, or else under the plain ones."""
    own = {TEST: (task.test,), DEV: ("validation", "dev")}.get(part, (part,))
    tries: list[tuple[str, Columns]] = [(name, task.columns) for name in own]
    if task.source and not source.startswith("hf://"):
        tries += [(part, Columns())]
    errors = []
    for name, columns in tries:
        try:
            return read_labelled(source, name, columns)
        except BadInput as error:
            errors.append(error)
    raise errors[0]


def joiner_of(tokenizer: Any) -> str:  # noqa: ANN401 - a tokenizers.Tokenizer
    """Return what stands between the texts of a pair: the tokenizer's separator, as text that it reads as that token."""
    known = tokenizer.get_vocab(with_added_tokens=True)
    for token in ("[SEP]", "</s>", "<|end_of_text|>", "<eos>"):
        if token in known and tokenizer.encode(f"a {token} a", add_special_tokens=False).ids.count(known[token]) == 1:
            return f" {token} "
    return "\n"
