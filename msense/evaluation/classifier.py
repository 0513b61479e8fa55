"""Test texts under the teacher's own classifier, frozen: what is left of its quality when embeddings are replaced or a student's.

The paper's GLUE half (section 4): fine-tuned teacher, its dictionary, and a student under the teacher's pooler and classifier.
Comes in: a model that reads tokens, and labelled texts. Goes out: predictions and their metrics. Holds the embeddings of one
slab of texts.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from msense.classifier import Classifier, load_classifier
from msense.errors import BadInput
from msense.evaluation.models import TokenModel, slabs
from msense.evaluation.result import METRICS, Result
from msense.evaluation.spec import Spec
from msense.glue import TEST, GlueTask, Texts, read_part, task_of
from msense.labelled import Columns
from msense.teacher_folder import locate

logger = logging.getLogger(__name__)


def measure(model: TokenModel, source: str, name: str, spec: Spec, columns: Columns) -> Result:
    """Classify the test texts by a model's embeddings.

    Args:
        model: any whose embeddings have the teacher's width.
        source: folder or dataset of the hub.
        name: of the task; one of GLUE's says columns, part and metrics.
        spec: names the teacher with the classifier, as jobs/finetune.py makes it.
        columns: of a task that is none of GLUE's.

    Raises:
        BadInput: the teacher has no classifier, it is damaged or of another width, or there are no such data.
    """
    classifier = load_classifier(locate(spec.teacher, spec.revision))
    task, part = _test_part(classifier, source, name, columns)
    gold, found = part.labels.tolist(), _classified(model, classifier, part.texts)
    main, *others = task.metrics
    more = {other: METRICS[other](np.array(gold), np.array(found)) for other in others}
    if task.further:
        try:
            further = read_part(name, task, source or task.source, task.further, classifier.config.joiner)
        except BadInput as error:
            logger.info("nothing told of %s (%s)", task.further, error)
        else:
            own = np.array(_classified(model, classifier, further.texts))
            more[f"{main}, {task.further}"] = METRICS[main](further.labels, own)
    return Result(main, "texts", gold=gold, found=found, more=more)


def texts(source: str, name: str, spec: Spec, columns: Columns) -> list[str]:
    """Return the test texts; arguments and errors as of `measure`."""
    return _test_part(load_classifier(locate(spec.teacher, spec.revision)), source, name, columns)[1].texts


def _test_part(classifier: Classifier, source: str, name: str, columns: Columns) -> tuple[GlueTask, Texts]:
    config = classifier.config
    task = task_of(name, columns, regression=config.labels is None)
    if task.regression != (config.labels is None):
        kind = "a number" if config.labels is None else "labels"
        raise BadInput(
            f"the teacher's classifier predicts {kind}, task {name} is of another kind: give the task {config.task}"
        )
    if len(task.columns.texts) > 1 and not config.joiner:
        raise BadInput(
            f"task {name} is of pairs, but the teacher's classifier was trained on single texts: give {config.task}"
        )
    part = read_part(name, task, source or task.source, TEST, config.joiner)
    if config.labels is not None and not np.isin(part.labels, config.labels).any():
        raise BadInput(
            f"no label of task {name}, such as {str(part.labels[0])!r}, is one of the classifier's, such as "
            f"{config.labels[0]!r}: give the data of {config.task}, for which it was trained"
        )
    if "F1" in task.metrics and not set(part.labels.tolist()) <= {"0", "1"}:
        raise BadInput(f"task {name} is measured by F1, so its labels must be 0 and 1, not {str(part.labels[0])!r}")
    return task, part


def _classified(model: TokenModel, classifier: Classifier, texts: Sequence[str]) -> list[Any]:
    """Return the label of each text, or its number, as the classifier has it of a model's embeddings."""
    labels = classifier.config.labels
    found: list[Any] = []
    for slab in slabs(texts):
        read = model.read(slab)
        if read.hidden.shape[1] != classifier.config.dim:
            raise BadInput(
                f"this model's embeddings have width {read.hidden.shape[1]}, the teacher's classifier takes "
                f"{classifier.config.dim}: give models of this teacher"
            )
        with torch.no_grad():
            scores = classifier.of_rows(torch.from_numpy(read.hidden), torch.from_numpy(np.diff(read.offsets)))
        found += scores[:, 0].tolist() if labels is None else [labels[i] for i in scores.argmax(1).tolist()]
    return found
