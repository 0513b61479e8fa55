"""Test texts classified by the teacher's own fine-tuned, frozen classifier on top of any model's token embeddings.

This measures how much task quality survives when embeddings are replaced by senses or come from a student (section 4 of the
paper: GLUE). Memory: the token embeddings of one slab of texts.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from msense.corpus.glue import TEST, GlueTask, Texts, get_task, read_split
from msense.corpus.labelled import Columns
from msense.errors import InputError
from msense.evaluation.models import TokenModel, iter_slabs
from msense.evaluation.result import Result
from msense.evaluation.spec import Spec
from msense.metrics import METRICS
from msense.teacher.classifier import Classifier, load_classifier
from msense.teacher.files import locate

logger = logging.getLogger(__name__)


def measure(model: TokenModel, source: str, name: str, spec: Spec, columns: Columns) -> Result:
    """Score the classifier in the folder of `spec.teacher` on a model's embeddings of the test texts.

    The name of a GLUE task defines its columns, split, metrics and, without `source`, its dataset.

    Raises:
        InputError: the classifier is missing, corrupted or of another width, or the data are missing.
    """
    classifier = load_classifier(locate(spec.teacher, spec.revision))
    task, part = _test_split(classifier, source, name, columns)
    gold, predicted = part.labels.tolist(), _classify(model, classifier, part.texts)
    main, *others = task.metrics
    more = {other: METRICS[other](np.array(gold), np.array(predicted)) for other in others}
    if task.further:
        try:
            further = read_split(name, task, source or task.source, task.further, classifier.config.joiner)
        except InputError as error:
            logger.info("skipped split %s: %s", task.further, error)
        else:
            own = np.array(_classify(model, classifier, further.texts))
            more[f"{main}, {task.further}"] = METRICS[main](further.labels, own)
    return Result(main, "texts", gold=gold, found=predicted, more=more)


def texts(source: str, name: str, spec: Spec, columns: Columns) -> list[str]:
    """Return the test texts; see `measure`."""
    return _test_split(load_classifier(locate(spec.teacher, spec.revision)), source, name, columns)[1].texts


def _test_split(classifier: Classifier, source: str, name: str, columns: Columns) -> tuple[GlueTask, Texts]:
    config = classifier.config
    task = get_task(name, columns, regression=config.labels is None)
    other = f"use task {config.task}, on which it was trained"
    if task.regression != (config.labels is None):
        kind = "a number" if config.labels is None else "labels"
        raise InputError(f"the teacher's classifier predicts {kind}, which does not fit task {name}: {other}")
    if len(task.columns.texts) > 1 and not config.joiner:
        raise InputError(f"task {name} has text pairs, but the teacher's classifier takes single texts: {other}")
    part = read_split(name, task, source or task.source, TEST, config.joiner)
    if config.labels is not None and not np.isin(part.labels, config.labels).any():
        raise InputError(
            f"task {name} has labels such as {str(part.labels[0])!r}, but the classifier predicts labels such as "
            f"{config.labels[0]!r}: {other}"
        )
    if "F1" in task.metrics and not set(part.labels.tolist()) <= {"0", "1"}:
        raise InputError(f"task {name} has label {str(part.labels[0])!r}, but its metric F1 needs labels 0 and 1")
    return task, part


def _classify(model: TokenModel, classifier: Classifier, texts: Sequence[str]) -> list[Any]:
    """Return the predicted label of each text, or the predicted number for regression."""
    labels = classifier.config.labels
    predicted: list[Any] = []
    for slab in iter_slabs(texts):
        read = model.read(slab)
        if read.hidden.shape[1] != classifier.config.dim:
            raise InputError(
                f"this model's embeddings have width {read.hidden.shape[1]}, but the teacher's classifier takes "
                f"{classifier.config.dim}: use models derived from this teacher"
            )
        with torch.no_grad():
            scores = classifier.of_rows(torch.from_numpy(read.hidden), torch.from_numpy(np.diff(read.offsets)))
        predicted += scores[:, 0].tolist() if labels is None else [labels[i] for i in scores.argmax(1).tolist()]
    return predicted
