"""Retrieval, similarity and pair classification by the mteb package (its search and scores) on any model of an evaluation.

Data are those of `beir` and `pairs`, or one of mteb's own tasks from the Hub. Memory: the texts and their vectors.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from msense.corpus.labelled import Columns
from msense.evaluation.models import Model
from msense.evaluation.result import Result
from msense.evaluation.spec import TaskSpec
from msense.evaluation.tasks.beir import read_retrieval
from msense.evaluation.tasks.mteb import MtebEncoder, import_mteb, load_own_task
from msense.evaluation.tasks.pairs import read_pairs
from msense.evaluation.tasks.retrieval import MRR, RECALL

_MEASURES = {"ndcg_at": ("nDCG", "ndcg_cut"), "recall_at": ("recall", "recall")}  # mteb's names: ours, trec_eval's
_COSINES = {"cosine_spearman": "Spearman", "cosine_ap": "average precision", "max_ap": "average precision"}
_Scores = dict[tuple[str, str], Mapping[str, Mapping[str, float]]]  # of each query, by split and subset


def measure(model: Model, task: TaskSpec, columns: Columns | None) -> Result:
    """Evaluate with mteb; a task without a source is one of mteb's own, evaluated on its test split if it has one.

    Raises:
        InputError: mteb has no such task, or the data are missing or invalid.
    """
    import_mteb()
    from datasets import disable_progress_bars

    disable_progress_bars()
    own = _local_task(task, columns) if task.source else load_own_task(task.name)
    recorded = _record_scores(own) if task.of == "retrieval" else {}
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is superseded by ")
        options = {"co2_tracker": False, "cache": None, "show_progress_bar": False}
        predictions = None if task.of == "retrieval" else folder  # of retrieval, the scores are recorded instead
        evaluated = import_mteb().evaluate(MtebEncoder(model), own, prediction_folder=predictions, **options)
        predicted = (
            {} if predictions is None else json.loads((Path(folder) / own.prediction_file_name).read_text("utf-8"))
        )
    rows = [(split, row) for split, rows in evaluated.task_results[0].scores.items() for row in rows]
    if task.of == "retrieval":
        return _retrieval_result(own.metadata.main_score, rows, recorded)
    return _pairs_result(own, rows, predicted)


def _local_task(task: TaskSpec, columns: Columns | None) -> Any:
    """Return data of one's own as a task of mteb with loaded data."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    base, kind, main = {
        "retrieval": (AbsTaskRetrieval, "Retrieval", "ndcg_at_10"),
        "similarity": (AbsTaskSTS, "STS", "cosine_spearman"),
        "pairs": (AbsTaskPairClassification, "PairClassification", "cosine_ap"),
    }[task.of]
    metadata = TaskMetadata(
        name=re.sub(r"\W", "-", task.name)[:80],  # becomes a file name in mteb
        description="data of one's own",
        dataset={"path": "local", "revision": "local"},  # required, but unused
        type=kind,
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main,
    )
    local = type("LocalTask", (base,), {"metadata": metadata})()
    local.data_loaded = True
    if task.of == "retrieval":
        data = read_retrieval(task.source, task.split)
        corpus = Dataset.from_dict({"id": data.document_ids, "text": data.documents})
        queries = Dataset.from_dict({"id": data.query_ids, "text": data.queries})
        parts = {"corpus": corpus, "queries": queries, "relevant_docs": data.judgements, "top_ranked": None}
        local.dataset = {"default": {"test": parts}}
    else:
        pairs = read_pairs(task.source, task.split, task.of, columns)
        label = "score" if task.of == "similarity" else "labels"
        texts = {"sentence1": pairs.first, "sentence2": pairs.second, label: pairs.gold.tolist()}
        local.dataset = DatasetDict(test=Dataset.from_dict(texts))
    return local


def _record_scores(task: Any) -> _Scores:
    """Return a mapping that the evaluation of a retrieval task fills with the scores of its queries."""
    recorded: _Scores = {}
    own = task.task_specific_scores

    def record(scores: Any, qrels: Any, results: Any, hf_split: str, hf_subset: str) -> Any:
        recorded[hf_split, hf_subset] = scores
        return own(scores, qrels, results, hf_split=hf_split, hf_subset=hf_subset)

    task.task_specific_scores = record
    return recorded


def _retrieval_result(main: str, rows: Sequence[tuple[str, Any]], recorded: _Scores) -> Result:
    """Return a value per query, weighted so that every split and subset counts the same, or per subset for other metrics."""
    more = {RECALL: "recall_at_100", MRR: "mrr_at_10"}
    means: dict[str, int | float] = {name: float(np.mean([row[key] for _, row in rows])) for name, key in more.items()}
    measured, _, depth = main.rpartition("_")
    if measured not in _MEASURES:
        return _by_subset(main, rows, means)
    name, key = _MEASURES[measured]
    values = {
        f"{split}/{subset}/{query}": (own[query][f"{key}_{depth}"], 1 / len(own))
        for (split, subset), own in sorted(recorded.items())
        for query in sorted(own)
    }
    scores, weights = (list(column) for column in zip(*values.values(), strict=True))
    means.pop(f"{name}@{depth}", None)
    return Result(f"{name}@{depth}", "queries", scores, weights if len(rows) > 1 else None, list(values), more=means)


def _pairs_result(task: Any, rows: Sequence[tuple[str, Any]], predicted: Mapping[str, Any]) -> Result:
    """Return cosines and gold scores or labels of all pairs, or a value per subset if there are several, or another metric."""
    main = task.metadata.main_score
    names = {"best accuracy": "cosine_accuracy", "best F1": "cosine_f1"} | ({main: main} if main == "max_ap" else {})
    more = {name: float(np.mean([row[key] for _, row in rows])) for name, key in names.items() if key in rows[0][1]}
    if len(rows) > 1 or main not in _COSINES:
        more.pop(main, None)
        return _by_subset(main, rows, more)
    ((split, row),) = rows
    data = task.dataset.get(row["hf_subset"], task.dataset)[split]  # a task of one subset holds the splits directly
    data = data[0] if len(data) == 1 else data  # older data sets have one row of lists
    gold = data[task.label_column_name if _COSINES[main] == "average precision" else "score"]
    cosines = predicted[row["hf_subset"]][split]["cosine_scores"]
    return Result(_COSINES[main], "pairs", gold=list(gold), found=list(cosines), more=more)


def _by_subset(main: str, rows: Sequence[tuple[str, Any]], more: Mapping[str, int | float]) -> Result:
    names = [f"{split}/{row['hf_subset']}" for split, row in rows]
    return Result(main, "sets", [float(row["main_score"]) for _, row in rows], names=names, more=dict(more))
