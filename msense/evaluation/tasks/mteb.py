"""Text classification by the mteb package (its sampling, logistic regression and scores) on any model of an evaluation.

`mteb_vectors` has its other kinds of tasks. Data are labelled texts or one of mteb's own tasks from the Hub. mteb is imported
lazily and its results cache is disabled. Memory: the texts and their vectors.
"""

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from msense.corpus.labelled import Columns, read_labelled
from msense.errors import InputError
from msense.evaluation.models import Model, encode_as
from msense.evaluation.result import Result
from msense.evaluation.spec import PAPER_TASKS, OfVectors, TaskSpec
from msense.evaluation.tasks.classification import PARTS, Protocol, check_labels
from msense.text import first_line, redact

KINDS: dict[str, OfVectors | Literal[""]] = {  # of msense, by mteb's type
    "Classification": "",
    "Retrieval": "retrieval",
    "STS": "similarity",
    "PairClassification": "pairs",
}


class MtebEncoder:
    """Adapter of a model to mteb's `mteb.models.EncoderProtocol`."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def mteb_model_meta(self) -> Any:
        """Empty metadata: nothing is submitted to mteb's leaderboard."""
        return import_mteb().models.ModelMeta.create_empty()

    def encode(self, inputs: Iterable[Mapping[str, Any]], *, prompt_type: Any = None, **_: object) -> np.ndarray:
        """Return sentence vectors, float32 [n, D], of batches with texts under `text`; prompts of tasks are ignored."""
        texts = [text for batch in inputs for text in batch["text"]]
        return self.model.encode(texts) if prompt_type is None else encode_as(self.model, prompt_type.value, texts)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return the cosine of every pair of rows, float32 [n, m]."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return the cosine of corresponding rows, float32 [n]."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(-1)


def measure(model: Model, name: str, source: str, columns: Columns, protocol: Protocol) -> Result:
    """Classify with mteb.

    Without a `source` of labelled texts, `name` is one of mteb's own tasks, evaluated on its test split if it has one; its
    texts do not depend on the seed.

    Raises:
        InputError: mteb has no such task, or the data are missing, corrupted or of one class.
    """
    shots, draws, seed = protocol
    task = _local_task(name, source, columns) if source else load_own_task(name)
    task.seed, task.samples_per_label, task.n_experiments = seed, shots or sys.maxsize, draws if shots else 1
    with TemporaryDirectory() as folder, threadpool_limits(1, user_api="blas"), warnings.catch_warnings():
        # such small fits are slower with more BLAS threads; torch's threads, which encode, are unaffected
        warnings.simplefilter("ignore", ConvergenceWarning)  # mteb limits the iterations
        warnings.filterwarnings("ignore", ".* is superseded by ")  # as most of the paper's tasks are
        options = {"co2_tracker": False, "cache": None, "show_progress_bar": False}
        predictions = None if shots else folder
        evaluated = import_mteb().evaluate(MtebEncoder(model), task, prediction_folder=predictions, **options)
        predicted = {} if shots else json.loads((Path(folder) / task.prediction_file_name).read_text("utf-8"))
    rows = [row for split in evaluated.task_results[0].scores.values() for row in split]
    return _result(task, rows, predicted)


def _local_task(name: str, source: str, columns: Columns) -> Any:
    """Return labelled texts with splits train and test as an mteb `AbsTaskClassification` with loaded data."""
    import_mteb()
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.classification import AbsTaskClassification
    from mteb.abstasks.task_metadata import TaskMetadata

    class LocalTask(AbsTaskClassification):
        """Labelled texts that mteb does not bring along."""

        metadata = TaskMetadata(
            name=re.sub(r"\W", "-", name)[:80],  # becomes a file name in mteb
            description="labelled texts",
            dataset={"path": "local", "revision": "local"},  # required, but unused
            type="Classification",
            category="t2c",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="accuracy",
        )

    parts = {part: read_labelled(source, part, columns) for part in PARTS}
    classes = check_labels({part: own.labels for part, own in parts.items()}).tolist()
    # test labels first: mteb's binary scores require classes 0 and 1
    numbers = {label: number for number, label in enumerate(dict.fromkeys([*sorted(parts["test"].labels), *classes]))}
    task = LocalTask()
    task.dataset, task.data_loaded = DatasetDict(), True
    for part, own in parts.items():
        labels = [numbers[label] for label in own.labels]
        task.dataset[part] = Dataset.from_dict({"text": own.first, "label": labels})
    return task


def task_class(name: str) -> Any:
    """Return the class of one of mteb's own tasks without loading data; InputError if its type is not one of `KINDS`."""
    import_mteb()
    from mteb.abstasks import AbsTaskClassification, AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS
    from mteb.get_tasks import TASK_LIST

    known = {task.metadata.name: task for task in TASK_LIST}
    if name not in known:
        names = [own for own, task in known.items() if task.metadata.type in KINDS]
        near = get_close_matches(name, names, 5, cutoff=0.4) or PAPER_TASKS[:3]
        raise InputError(
            f"mteb has no task {redact(name)!r}; similar names: {', '.join(near)}. Use one of mteb's names, or your own "
            "data: --task mteb:NAME=DIR"
        )
    task, data = known[name], known[name].metadata
    bases = (AbsTaskClassification, AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS)  # no aggregates of several
    if data.type not in KINDS or data.modalities != ["text"] or not issubclass(task, bases):
        raise InputError(
            f"mteb task {name} is {data.type} on {', '.join(data.modalities)}, or several tasks: use one of type "
            f"{', '.join(KINDS)} on text"
        )
    return task


def with_kind(task: TaskSpec) -> TaskSpec:
    """Return one of mteb's own tasks with the kind that it measures, any other task as it is; InputError if it is unknown."""
    if task.kind != "mteb" or task.source:
        return task
    return replace(task, of=KINDS[task_class(task.name).metadata.type])


def load_own_task(name: str) -> Any:
    """Return one of mteb's own tasks with its data loaded from the Hub."""
    task = task_class(name)()
    from datasets.exceptions import DatasetsError

    if "test" in task.metadata.eval_splits:
        task.filter_eval_splits(["test"])
    data = task.metadata.dataset
    try:
        task.load_data()  # before the seed is set: some tasks sample their test texts with it
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # includes what huggingface_hub raises
        config = f", configuration {data['name']}" if "name" in data else ""
        kind = KINDS[task.metadata.type]
        how = "with its splits as train.csv and test.csv, .jsonl or .parquet"
        how = f"in the form that --task {kind}:NAME=DIR takes" if kind else how
        raise InputError(
            f"cannot download the data of mteb task {name} from the Hub ({first_line(error)}): on a connected machine, run "
            f"`hf download --repo-type dataset {data['path']} --revision {data['revision']} --local-dir DIR`{config}; copy "
            f"DIR here {how}, and pass --task mteb:{f'{kind}:' if kind else ''}{name}=DIR"
        ) from error
    return task


def _result(task: Any, rows: Sequence[Mapping[str, Any]], predicted: Mapping[str, Any]) -> Result:
    """Average the scores of each split and subset; `predicted` has labels by subset, split and experiment, if any."""
    main = task.metadata.main_score
    by_row = [row["scores_per_experiment"] for row in rows]
    more = {"macro F1": float(np.mean([[one["f1"] for one in own] for own in by_row]))}
    metric = "macro F1" if main == "f1" else main
    if predicted and len(rows) == 1 and main == "accuracy" and not task.is_cross_validation:
        # a single experiment has no variance over draws, so models are compared over texts
        (split,) = task.eval_splits
        subset = rows[0]["hf_subset"]
        data = task.dataset.get(subset, task.dataset)  # a task of one subset holds the splits directly
        gold = list(data[split][task.label_column_name])
        return Result(metric, "texts", gold=gold, found=predicted[subset][split][0], more=more)
    values = np.mean([[one[main] for one in own] for own in by_row], axis=0)
    return Result(metric, "draws", values.tolist(), more=more)


def _unit(vectors: Any) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.as_tensor(vectors, dtype=torch.float32), dim=-1)


def import_mteb() -> Any:
    """Import mteb without the cache folder that it would create in the user's home."""
    with TemporaryDirectory() as folder:
        kept = os.environ.setdefault("MTEB_CACHE", folder)
        try:
            import mteb
        finally:
            if kept == folder:
                del os.environ["MTEB_CACHE"]
    return mteb
