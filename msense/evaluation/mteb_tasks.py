"""Text classification by the package mteb: its sampling, its logistic regression, its scores, on any model of an evaluation.

Comes in: a model, and either labelled texts or the name of one of mteb's own tasks, which it takes from the hub. Goes out: the
main score of every experiment, and macro F1. Holds the texts and their vectors. mteb is imported when it is first asked for;
its results cache is left out.
"""

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from msense.errors import BadInput
from msense.evaluation.models import Model
from msense.evaluation.result import Result
from msense.labelled import Columns, Labelled, read_labelled
from msense.text import first_line, redact

PAPER_TASKS: tuple[str, ...] = (  # of Wang et al. (2025), as their code names them; mteb has since made a `.v2` of most
    "ArxivClassification",
    "Banking77Classification",
    "DBpediaClassification",
    "EmotionClassification",
    "FinancialPhrasebankClassification",
    "FrenkEnClassification",
    "ImdbClassification",
    "CanadaTaxCourtOutcomesLegalBenchClassification",
    "NewsClassification",
    "PatentClassification",
    "PoemSentimentClassification",
    "ToxicChatClassification",
    "ToxicConversationsClassification",
    "TweetSentimentExtractionClassification",
    "TweetTopicSingleClassification",
    "YelpReviewFullClassification",
)
_METRICS = {"f1": "macro F1"}  # mteb's name of a score: its name here, where that is another
_TRAIN, _TEST = "train", "test"
_OWN_DATA = "--task mteb:NAME=DIR"


class MtebEncoder:
    """A model as mteb's protocol of encoders (`mteb.models.EncoderProtocol`) has it."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def mteb_model_meta(self) -> Any:  # noqa: ANN401 - a class of mteb
        """What mteb would write on its leaderboard: nothing."""
        return _mteb().models.ModelMeta.create_empty()

    def encode(self, inputs: Iterable[Mapping[str, Any]], **_: object) -> np.ndarray:
        """Return sentence vectors.

        Args:
            inputs: batches, with `text` a list of texts.
            **_: task, split and prompts; every model reads a text as it does elsewhere in an evaluation.

        Returns:
            float32 [n, D].
        """
        return self.model.encode([text for batch in inputs for text in batch["text"]])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:  # noqa: ANN401 - arrays or tensors
        """Return the cosines of all pairs, float32 [n, m], of [n, D] and [m, D]."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:  # noqa: ANN401 - arrays or tensors
        """Return the cosines of rows with each other, float32 [n], of [n, D] and [n, D]."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(-1)


def measure(model: Model, name: str, source: str, columns: Columns, shots: int, draws: int, seed: int) -> Result:
    """Classify as mteb does.

    Args:
        model: anything that makes vectors of texts.
        name: of the task; without a source, one of mteb's own, of which the test part is taken where it has one.
        source: labelled texts, with parts train and test; empty: those of mteb's own task, from the hub.
        columns: of texts and labels in the source.
        shots: training texts a class; 0 = all of them, in one experiment.
        draws: experiments.
        seed: of mteb's sampling; which texts mteb's own task has does not depend on it.

    Raises:
        BadInput: mteb is not installed, has no such task, or the data are missing, damaged or of one class.
    """
    task = local_task(name, source, columns) if source else _own_task(name)
    task.seed = seed
    task.samples_per_label = shots or sys.maxsize
    task.n_experiments = draws if shots else 1
    with TemporaryDirectory() as folder, threadpool_limits(1, user_api="blas"), warnings.catch_warnings():
        # more threads of BLAS only wait for each other in the fits; those of torch, which encode, are left as they are
        warnings.simplefilter("ignore", ConvergenceWarning)  # mteb bounds the rounds
        warnings.filterwarnings("ignore", ".* is superseded by ")  # the paper's tasks are, and asked for by their names
        done = _mteb().evaluate(
            MtebEncoder(model),
            task,
            co2_tracker=False,
            cache=None,
            prediction_folder=None if shots else folder,
            show_progress_bar=False,
        )
        predicted = {} if shots else json.loads((Path(folder) / task.prediction_file_name).read_text("utf-8"))
    rows = [row for split in done.task_results[0].scores.values() for row in split]
    return _result(task, rows, predicted)


def local_task(name: str, source: str, columns: Columns) -> Any:  # noqa: ANN401 - a class of mteb
    """Return labelled texts as a classification task of mteb, an `AbsTaskClassification` whose data are loaded.

    Args:
        name: of the task.
        source: a folder, or `hf://dataset[:config]`, with parts train and test.
        columns: of texts and labels.

    Raises:
        BadInput: mteb is not installed, or the data are missing, damaged or of one class.
    """
    _mteb()
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.classification import AbsTaskClassification
    from mteb.abstasks.task_metadata import TaskMetadata

    class LocalTask(AbsTaskClassification):
        """Labelled texts of our own."""

        metadata = TaskMetadata(
            name=re.sub(r"\W", "-", name)[:80],  # mteb names a file by it
            description="labelled texts",
            dataset={"path": "local", "revision": "local"},  # which it wants to be told, and nothing reads here
            type="Classification",
            category="t2c",
            eval_splits=[_TEST],
            eval_langs=["eng-Latn"],
            main_score="accuracy",
        )
        data_loaded: bool = False

        def load_data(self, **_: object) -> None:
            """Read both parts, once."""
            if self.data_loaded:
                return
            parts = {part: read_labelled(source, part, columns) for part in (_TRAIN, _TEST)}
            numbers = _numbered(parts)
            self.dataset = DatasetDict(
                {
                    part: Dataset.from_dict({"text": own.first, "label": [numbers[label] for label in own.labels]})
                    for part, own in parts.items()
                }
            )
            self.data_loaded = True

    task = LocalTask()
    task.load_data()
    return task


def task_class(name: str) -> Any:  # noqa: ANN401 - a class of mteb
    """Return the class of one of mteb's own tasks; reads no data.

    Raises:
        BadInput: mteb is not installed, has no such task, or it is none of text classification.
    """
    _mteb()
    from mteb.abstasks.classification import AbsTaskClassification
    from mteb.get_tasks import TASK_LIST

    known = {task.metadata.name: task for task in TASK_LIST}
    if name not in known:
        of_text = [n for n, task in known.items() if task.metadata.type == "Classification"]
        near = _near(name, of_text) or list(PAPER_TASKS[:3])
        raise BadInput(
            f"mteb has no task {redact(name)!r}; close to it: {', '.join(near)}. Give one of mteb's names, or data of your "
            f"own: {_OWN_DATA}"
        )
    found, told = known[name], known[name].metadata
    if told.type != "Classification" or told.modalities != ["text"] or not issubclass(found, AbsTaskClassification):
        raise BadInput(
            f"mteb's task {name} is of {told.type} on {', '.join(told.modalities)}: name one of Classification"
        )
    return found


def _own_task(name: str) -> Any:  # noqa: ANN401 - a class of mteb
    """Return one of mteb's own tasks, with its data from the hub."""
    task = task_class(name)()
    from datasets.exceptions import DatasetsError

    if _TEST in task.metadata.eval_splits:
        task.filter_eval_splits([_TEST])
    data = task.metadata.dataset
    try:
        task.load_data()  # before a seed is set: some tasks draw their test texts by it
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # among them what huggingface_hub raises
        config = f", configuration {data['name']}" if "name" in data else ""
        raise BadInput(
            f"the data of mteb's task {name} could not be had from the hub ({first_line(error)}). Elsewhere, `hf "
            f"download --repo-type dataset {data['path']} --revision {data['revision']} --local-dir DIR`{config}; bring DIR "
            f"here, with files named train*.csv, .jsonl or .parquet and test* of its two parts, and give --task "
            f"mteb:{name}=DIR"
        ) from error
    return task


def _result(task: Any, rows: Sequence[Mapping[str, Any]], predicted: Mapping[str, Any]) -> Result:  # noqa: ANN401 - of mteb
    """Put scores together.

    Args:
        task: of mteb, with its data.
        rows: scores of each of its splits and subsets, whose means are taken.
        predicted: labels by subset, split and experiment, where all training texts were taken.
    """
    main = task.metadata.main_score
    by_row = [row["scores_per_experiment"] for row in rows]
    more = {"macro F1": float(np.mean([[one["f1"] for one in own] for own in by_row]))}
    metric = _METRICS.get(main, main)
    if predicted and len(rows) == 1 and main == "accuracy" and not task.is_cross_validation:
        # one experiment has no spread over draws: texts are what two models can be compared on
        (split,) = task.eval_splits
        subset = rows[0]["hf_subset"]
        data = task.dataset.get(subset, task.dataset)  # of a task with one subset, its parts
        gold = list(data[split][task.label_column_name])
        return Result(metric, "texts", gold=gold, found=predicted[subset][split][0], more=more)
    values = np.mean([[one[main] for one in own] for own in by_row], axis=0)
    return Result(metric, "draws", values.tolist(), more=more)


def _numbered(parts: Mapping[str, Labelled]) -> dict[str, int]:
    """Number labels; those of the test part come first, as mteb's score of two classes wants them to be 0 and 1."""
    train, test = (set(parts[part].labels.tolist()) for part in (_TRAIN, _TEST))
    if len(train) < 2:
        raise BadInput(
            f"the training part has {len(train)} class(es) of label: give data of two or more, or name the column of "
            "labels with --label-column"
        )
    if not train & test:
        raise BadInput("no label of the test part is among those of the training part: give parts of one data set")
    return {label: number for number, label in enumerate([*sorted(test), *sorted(train - test)])}


def _near(name: str, known: Sequence[str]) -> list[str]:
    """Return up to five names that a slip of the pen may have meant, whatever their case."""
    low = {own.lower(): own for own in known}
    holding = [own for own in low if len(name) > 2 and name.lower() in own]
    close = get_close_matches(name.lower(), list(low), 5, 0.6)
    return [low[own] for own in dict.fromkeys([*holding, *close])][:5]


def _unit(vectors: Any) -> torch.Tensor:  # noqa: ANN401 - an array or tensor
    return torch.nn.functional.normalize(torch.as_tensor(vectors, dtype=torch.float32), dim=-1)


def _mteb() -> Any:  # noqa: ANN401 - a module
    """Import mteb, without the cache folder that it otherwise makes in the user's home."""
    if "mteb" in sys.modules and hasattr(sys.modules["mteb"], "evaluate"):
        return sys.modules["mteb"]
    before = os.environ.get("MTEB_CACHE")
    with TemporaryDirectory() as folder:
        os.environ["MTEB_CACHE"] = folder
        try:
            import mteb
        except ImportError as error:
            raise BadInput(
                f"tasks of mteb need the package mteb, which cannot be imported ({first_line(error)}): pip install "
                "msense[evaluation]"
            ) from error
        finally:
            os.environ.pop("MTEB_CACHE")
            if before is not None:
                os.environ["MTEB_CACHE"] = before
    return mteb
