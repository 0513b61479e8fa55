"""One model on one task: the unit of work of an evaluation, and its dispatch to the module of the task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from msense.corpus.labelled import Columns, read_labelled
from msense.errors import InputError, MsenseError
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.models import TeacherModel, open_model
from msense.evaluation.result import Result
from msense.evaluation.search import Bm25
from msense.evaluation.spec import OfVectors, Spec, TaskSpec
from msense.evaluation.tasks import (
    classification,
    classifier,
    coarsewsd,
    mteb,
    mteb_vectors,
    pairs,
    retrieval,
    tokens,
    wordsim,
)
from msense.evaluation.tasks.beir import read_retrieval
from msense.evaluation.tasks.classification import Protocol
from msense.runtime.resources import Resources
from msense.text import redact

WITH_TOKENS = ("teacher", "replaced", "student", "truncated")  # model kinds with token embeddings
OF_TOKENS = ("classifier", "coarsewsd", "tokens")  # task kinds that need them
AGAINST_TEACHER = ("classifier", "tokens")  # task kinds on which every result depends on the teacher
DRAWN = ("classification", "mteb")
DESCRIPTIONS = {
    "classification": "logistic regression on sentence vectors, {shots}, {draws}; accuracy on the test texts",
    "mteb": "logistic regression on sentence vectors by the mteb package, {shots}, {draws}",
    "retrieval": "documents ranked by cosine, means over queries; with bm25: by the sum of min-max normalised scores",
    "similarity": "Spearman correlation of cosines with the scores of pairs",
    "pairs": "average precision of cosines for pairs with labels 0 and 1; accuracy and F1 at their best thresholds",
    "mteb retrieval": "documents ranked by cosine by the mteb package",
    "mteb similarity": "Spearman correlation of cosines with the scores of pairs by the mteb package",
    "mteb pairs": "average precision of cosines for pairs with labels 0 and 1 by the mteb package",
    "classifier": "test texts under the teacher's own frozen classifier",
    "wordsim": "Spearman correlation of cosines with human scores; mean over sets, weighted by their pairs",
    "coarsewsd": "senses of the target word, labelled by the majority of their training contexts; mean accuracy over words",
    "tokens": "cosine of each token's embedding with the teacher's, mean over tokens; share of tokens with the teacher's sense",
}


@dataclass(frozen=True)
class EvaluationJob:
    """One model on one task; sent to a worker."""

    spec: Spec
    task: TaskSpec
    title: str  # of the task's table: its name, with the number of shots if any
    protocol: Protocol  # how training texts are sampled
    columns: Columns  # of labelled texts
    pair_columns: Columns | None  # of pairs of texts; None: those with usual names
    bm25: Spec  # with which retrieval is fused
    device: str
    threads: int

    @property
    def rows(self) -> list[str]:
        """Rows of its table that it fills: the model's, and for retrieval that of its fusion with BM25."""
        fused = self.task.kind == "retrieval" and self.spec.kind != "bm25"
        return [self.spec.name, *([f"{self.spec.name} + {self.bm25.name}"] if fused else [])]

    @property
    def keys(self) -> list[str]:
        """Keys of its results: table and row."""
        return [f"{self.title} | {row}" for row in self.rows]

    @property
    def obstacle(self) -> str:
        """Why the model cannot be measured on the task; empty if it can."""
        if self.spec.kind == "bm25":
            return "" if self.task.kind == "retrieval" else "for retrieval:NAME=DATA only"
        return "no token embeddings" if self.spec.kind not in WITH_TOKENS and self.task.kind in OF_TOKENS else ""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that its result depends on, besides model and data."""
        own: dict[str, Any] = {"kind": self.task.kind, "name": self.task.name, "columns": list(self.columns)}
        if self.task.kind in DRAWN and not self.task.of:
            own |= self.protocol._asdict()
        if (self.task.of or self.task.kind) in get_args(OfVectors):
            own |= {"of": self.task.of, "split": self.task.split, "columns": self.pair_columns}
        return own | ({"stemmer": self.bm25.stemmer} if len(self.rows) > 1 else {})

    @property
    def description(self) -> str:
        """One-line description of the measurement."""
        shots = f"{self.protocol.shots} training texts per class" if self.protocol.shots else "all training texts"
        draws = f"{self.protocol.draws} draws" if self.protocol.shots else "one draw"
        return DESCRIPTIONS[f"{self.task.kind} {self.task.of}".strip()].format(shots=shots, draws=draws)


def make_jobs(
    config: EvaluateConfig, specs: Sequence[Spec], tasks: Sequence[TaskSpec], resources: Resources
) -> list[EvaluationJob]:
    """Return all combinations of models and tasks; classification once per number of shots.

    Raises:
        InputError: a label is also the name of another model's fusion with BM25.
    """
    jobs: list[EvaluationJob] = []
    concurrent = resources.actors if resources.device == "cuda" else resources.tasks
    threads = max(1, config.cores // concurrent)
    columns = Columns((config.text_column,), config.label_column)
    pair_columns = Columns(config.pair_columns[:2], config.pair_columns[2]) if config.pair_columns else None
    bm25 = next((spec for spec in specs if spec.kind == "bm25"), Spec("bm25", "bm25"))
    for task in tasks:
        for shots in config.shots if task.kind in DRAWN and not task.of else ("",):
            protocol = Protocol(int(shots) if shots.isdecimal() else 0, config.draws, config.seed)
            title = task.title + (f", {shots} shots" if shots.isdecimal() else f", {shots}" if shots else "")
            common = (task, title, protocol, columns, pair_columns, bm25, resources.device, threads)
            jobs += [EvaluationJob(spec, *common) for spec in specs]
    keys = [key for job in jobs for key in job.keys]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise InputError(f"two rows have the name {redact(twice)!r}: set another name with --model LABEL=...")
    return jobs


def measure(number: int, jobs: Sequence[EvaluationJob]) -> dict[str, Any]:
    """Evaluate one model on one task; runs on a worker and returns the title and the results by row as JSON values."""
    job = jobs[number]
    try:
        with open_model(job.spec, job.device, job.threads) as model:
            result = MEASURES[job.task.kind](model, job)
    except MsenseError as error:
        raise type(error)(f"{job.spec.name} on {job.title}: {error}") from error
    results = result if isinstance(result, list) else [result]
    return {"title": job.title, "rows": {row: own.to_json() for row, own in zip(job.rows, results, strict=True)}}


def _tokens(model: Any, job: EvaluationJob) -> Result:
    spec = replace(job.spec, kind="teacher", replace=None, layers=0)
    teacher = TeacherModel(spec, job.device, job.threads, like=model.dictionary)
    return tokens.measure(model, teacher, job.task.source, job.columns.texts[0])


def _mteb(model: Any, job: EvaluationJob) -> Result:
    if job.task.of:
        return mteb_vectors.measure(model, job.task, job.pair_columns)
    return mteb.measure(model, job.task.name, job.task.source, job.columns, job.protocol)


def texts(job: EvaluationJob) -> list[str]:
    """Return the texts of a job's task, on which speed is measured."""
    return TEXTS[job.task.of or job.task.kind](job)


MEASURES: dict[
    str, Callable[[Any, EvaluationJob], Result | list[Result]]
] = {  # by task kind; a result per row of the job
    "classification": lambda model, job: classification.measure(model, job.task.source, job.columns, job.protocol),
    "retrieval": lambda model, job: retrieval.measure(model, job.task.source, job.task.split, Bm25(job.bm25.stemmer)),
    "similarity": lambda model, job: pairs.measure_similarity(model, job.task.source, job.task.split, job.pair_columns),
    "pairs": lambda model, job: pairs.measure_pairs(model, job.task.source, job.task.split, job.pair_columns),
    "mteb": _mteb,
    "classifier": lambda model, job: classifier.measure(model, job.task.source, job.task.name, job.spec, job.columns),
    "wordsim": lambda model, job: wordsim.measure(model, job.task.source),
    "coarsewsd": lambda model, job: coarsewsd.measure(model, job.task.source),
    "tokens": _tokens,
}
TEXTS: dict[str, Callable[[EvaluationJob], list[str]]] = {  # by task kind; on which speed is measured
    "classification": lambda job: read_labelled(job.task.source, "test", job.columns).first,
    "mteb": lambda job: read_labelled(job.task.source, "test", job.columns).first,
    "retrieval": lambda job: read_retrieval(job.task.source, job.task.split).documents,
    "similarity": lambda job: pairs.read_pairs(job.task.source, job.task.split, "similarity", job.pair_columns).first,
    "pairs": lambda job: pairs.read_pairs(job.task.source, job.task.split, "pairs", job.pair_columns).first,
    "classifier": lambda job: classifier.texts(job.task.source, job.task.name, job.spec, job.columns),
    "wordsim": lambda job: wordsim.words(wordsim.read_sets(job.task.source)),
    "coarsewsd": lambda job: coarsewsd.read_texts(job.task.source, "test"),
    "tokens": lambda job: tokens.read_texts(job.task.source, job.columns.texts[0]),
}
