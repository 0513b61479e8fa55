"""Data sets that students are distilled for: the texts to distill from, the task, and its students and evaluation.

Students of a retrieval set read its documents, never its queries; those of a classification set its training texts without
labels.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.artifacts import ArtifactCache, data_folder
from msense.cli.reports import show_evaluation
from msense.config.base import validate_config
from msense.constants import DEMO_TEACHER
from msense.errors import InputError
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.report import Evaluation, TaskReport
from msense.evaluation.result import Result
from msense.evaluation.run import evaluate
from msense.evaluation.tasks.beir import data_files

DEFAULT_SETS = ("cranfield", "wikiqa", "banking77")  # development sets
STUDENTS = {"table": "table", "static": "static", "layers2": "layers:2"}


class TextSet(NamedTuple):
    """A data set."""

    name: str
    corpus: str  # texts to distill from; empty if it has none
    task: str  # as for jobs/evaluate.py

    @property
    def is_retrieval(self) -> bool:
        """Whether its task is retrieval."""
        return self.task.startswith("retrieval:")


def open_set(data: str | Path | None, name: str, folder: Path) -> TextSet:
    """Return DATA/retrieval/NAME, whose documents are written into a folder, or the classification set DATA/NAME.

    Raises:
        InputError: neither of the two exists.
    """
    source = Path(data or "", "retrieval", name)
    if data is not None and source.is_dir():
        return TextSet(name, str(write_documents(source, folder / "documents.jsonl")), f"retrieval:{name}={source}")
    source = data_folder(data, name)
    return TextSet(name, str(source / "train.csv"), f"{name}={source}")


def open_similarity(data: str | Path | None, word: str) -> TextSet:
    """Return the similarity set DATA/sts/NAME of `NAME` or `NAME,split=...`, which has no text to distill from.

    Raises:
        InputError: there is no such folder.
    """
    name, comma, rest = word.partition(",")
    return TextSet(name, "", f"similarity:{name}={data_folder(data, f'sts/{name}')}{comma}{rest}")


def write_documents(source: Path, path: Path) -> Path:
    """Write the documents of a retrieval set, each with its title as the first line, unless they are there already."""
    (file, *_), *_ = data_files(str(source))
    if not file.format.startswith("jsonl"):
        raise InputError(f"{file.uri} is not jsonl: convert the documents")
    table = pd.read_json(file.uri, lines=True, dtype=False).reindex(columns=["_id", "title", "text"]).fillna("")
    texts = [f"{title}\n{text}".strip() for title, text in zip(table["title"], table["text"], strict=True)]
    rows = [{"id": str(own), "text": text} for own, text in zip(table["_id"], texts, strict=True) if text]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != content:  # its modification time is part of cache keys
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return path


def distill_all(cache: ArtifactCache, names: Sequence[str], **settings: Any) -> dict[str, Path]:
    """Return the run folders of students of a corpus, by the names in `STUDENTS`; settings of None are defaults."""
    given = {key: value for key, value in settings.items() if value is not None}
    dictionary = cache.dictionary("auto")
    return {name: cache.student(dictionary, name, student=STUDENTS[name], **given) for name in names}


def as_models(students: dict[str, Path]) -> list[str]:
    """Return students as models of jobs/evaluate.py."""
    return [f"{name}=student:{folder}" for name, folder in students.items()]


def evaluate_models(models: Sequence[str], tasks: Sequence[str], output: Path, **more: Any) -> Evaluation:
    """Evaluate models against the demo's teacher, by default without costs, and print the results."""
    given: dict[str, Any] = {
        "model": models,
        "task": tasks,
        "output": str(output),
        "teacher": DEMO_TEACHER,
        "cost": False,
    }
    evaluation = evaluate(validate_config(EvaluateConfig, {**given, **more}))
    show_evaluation(evaluation)
    return evaluation


def score(task: TaskReport, row: str) -> float:
    """Return the main figure of a row that was measured."""
    result = task.rows[row]
    assert isinstance(result, Result), f"{task.name}, {row}: {result}"
    return result.score
