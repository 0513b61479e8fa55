"""One model on one task: the unit of work of an evaluation, and its dispatch to the module of the task."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from msense.corpus.labelled import Columns, read_labelled
from msense.errors import MsenseError
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.models import TeacherModel, open_model
from msense.evaluation.result import Result
from msense.evaluation.spec import Spec, TaskSpec
from msense.evaluation.tasks import classification, classifier, coarsewsd, mteb, tokens, wordsim
from msense.evaluation.tasks.classification import Protocol
from msense.runtime.resources import Resources

WITH_TOKENS = ("teacher", "replaced", "student", "truncated")  # model kinds with token embeddings
OF_TOKENS = ("classifier", "coarsewsd", "tokens")  # task kinds that need them
DRAWN = ("classification", "mteb")
DESCRIPTIONS = {
    "classification": "logistic regression on sentence vectors, {shots}, {draws}; accuracy on the test texts",
    "mteb": "logistic regression on sentence vectors by the mteb package, {shots}, {draws}",
    "classifier": "test texts under the teacher's own frozen classifier",
    "wordsim": "Spearman correlation of cosines with human scores; mean over sets, weighted by their pairs",
    "coarsewsd": "senses of the target word, labelled by the majority of their training contexts; mean accuracy over words",
    "tokens": "cosine of each token's embedding with the teacher's, mean over tokens; share of tokens with the teacher's sense",
}


@dataclass(frozen=True)
class EvaluationJob:
    """One model on one task; sent to a worker.

    Attributes:
        spec: model.
        task: task.
        title: title of the task's table: its name, with the number of shots if any.
        protocol: sampling of training texts.
        columns: columns of labelled texts.
        device: cuda or cpu.
        threads: torch threads.
    """

    spec: Spec
    task: TaskSpec
    title: str
    protocol: Protocol
    columns: Columns
    device: str
    threads: int

    @property
    def key(self) -> str:
        """Key of its result: table and model."""
        return f"{self.title} | {self.spec.name}"

    @property
    def is_possible(self) -> bool:
        """Whether the model provides the embeddings that the task needs."""
        return self.spec.kind in WITH_TOKENS or self.task.kind not in OF_TOKENS

    @property
    def is_against_teacher(self) -> bool:
        """Whether every model's result depends on the teacher."""
        return self.task.kind in ("classifier", "tokens")

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that its result depends on, besides model and data."""
        drawn = self.protocol._asdict() if self.task.kind in DRAWN else {}
        return {"kind": self.task.kind, "name": self.task.name, "columns": list(self.columns), **drawn}

    @property
    def description(self) -> str:
        """One-line description of the measurement."""
        shots = f"{self.protocol.shots} training texts per class" if self.protocol.shots else "all training texts"
        draws = f"{self.protocol.draws} draws" if self.protocol.shots else "one draw"
        return DESCRIPTIONS[self.task.kind].format(shots=shots, draws=draws)


def make_jobs(
    config: EvaluateConfig, specs: Sequence[Spec], tasks: Sequence[TaskSpec], resources: Resources
) -> list[EvaluationJob]:
    """Return all combinations of models and tasks; classification once per number of shots."""
    jobs = []
    concurrent = resources.actors if resources.device == "cuda" else resources.tasks
    threads = max(1, config.cores // concurrent)
    for task in tasks:
        for shots in config.shots if task.kind in DRAWN else ("",):
            protocol = Protocol(int(shots) if shots.isdecimal() else 0, config.draws, config.seed)
            title = task.title + (f", {shots} shots" if shots.isdecimal() else f", {shots}" if shots else "")
            common = (task, title, protocol, config.columns, resources.device, threads)
            jobs += [EvaluationJob(spec, *common) for spec in specs]
    return jobs


def measure(number: int, jobs: Sequence[EvaluationJob]) -> dict[str, Any]:
    """Evaluate one model on one task; runs on a worker and returns title, model and result as JSON values."""
    job = jobs[number]
    try:
        with open_model(job.spec, job.device, job.threads) as model:
            result = _measure(job, model)
    except MsenseError as error:
        raise type(error)(f"{job.spec.name} on {job.title}: {error}") from error
    return {"title": job.title, "model": job.spec.name, "result": result.to_json()}


def _measure(job: EvaluationJob, model: Any) -> Result:
    """Return the result of a loaded model; `is_possible` guarantees that it has token embeddings where needed."""
    name, kind, source = job.task.name, job.task.kind, job.task.source
    if kind == "classification":
        return classification.measure(model, source, job.columns, job.protocol)
    if kind == "mteb":
        return mteb.measure(model, name, source, job.columns, job.protocol)
    if kind == "wordsim":
        return wordsim.measure(model, source)
    if kind == "classifier":
        return classifier.measure(model, source, name, job.spec, job.columns)
    if kind == "coarsewsd":
        return coarsewsd.measure(model, source)
    spec = replace(job.spec, kind="teacher", replace=None)
    teacher = TeacherModel(spec, job.device, job.threads, like=model.dictionary)
    return tokens.measure(model, teacher, source, job.columns.texts[0])


def load_texts(job: EvaluationJob) -> list[str]:
    """Return the texts of a task, on which speed is measured."""
    kind, source = job.task.kind, job.task.source
    if kind == "classifier":
        return classifier.texts(source, job.task.name, job.spec, job.columns)
    if kind in ("classification", "mteb"):
        return read_labelled(source, "test", job.columns).first
    if kind == "wordsim":
        return [word for pairs in wordsim.read_sets(source).values() for pair in pairs for word in pair[:2]]
    if kind == "coarsewsd":
        return [t for word in coarsewsd.words(source) for t in coarsewsd.read_contexts(source, word, "test").texts]
    return tokens.read_texts(source, job.columns.texts[0])
