"""One model on one task: the unit of work of an evaluation, and its dispatch to the module of the task."""

from collections.abc import Callable, Sequence
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
AGAINST_TEACHER = ("classifier", "tokens")  # task kinds on which every result depends on the teacher
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
    """One model on one task; sent to a worker."""

    spec: Spec
    task: TaskSpec
    title: str  # of the task's table: its name, with the number of shots if any
    protocol: Protocol  # how training texts are sampled
    columns: Columns  # of labelled texts
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
    jobs: list[EvaluationJob] = []
    concurrent = resources.actors if resources.device == "cuda" else resources.tasks
    threads = max(1, config.cores // concurrent)
    columns = Columns((config.text_column,), config.label_column)
    for task in tasks:
        for shots in config.shots if task.kind in DRAWN else ("",):
            protocol = Protocol(int(shots) if shots.isdecimal() else 0, config.draws, config.seed)
            title = task.title + (f", {shots} shots" if shots.isdecimal() else f", {shots}" if shots else "")
            common = (task, title, protocol, columns, resources.device, threads)
            jobs += [EvaluationJob(spec, *common) for spec in specs]
    return jobs


def measure(number: int, jobs: Sequence[EvaluationJob]) -> dict[str, Any]:
    """Evaluate one model on one task; runs on a worker and returns title, model and result as JSON values."""
    job = jobs[number]
    try:
        with open_model(job.spec, job.device, job.threads) as model:
            result = MEASURES[job.task.kind](model, job)
    except MsenseError as error:
        raise type(error)(f"{job.spec.name} on {job.title}: {error}") from error
    return {"title": job.title, "model": job.spec.name, "result": result.to_json()}


def _tokens(model: Any, job: EvaluationJob) -> Result:
    spec = replace(job.spec, kind="teacher", replace=None, layers=0)
    teacher = TeacherModel(spec, job.device, job.threads, like=model.dictionary)
    return tokens.measure(model, teacher, job.task.source, job.columns.texts[0])


MEASURES: dict[str, Callable[[Any, EvaluationJob], Result]] = {  # by task kind; of a loaded model
    "classification": lambda model, job: classification.measure(model, job.task.source, job.columns, job.protocol),
    "mteb": lambda model, job: mteb.measure(model, job.task.name, job.task.source, job.columns, job.protocol),
    "classifier": lambda model, job: classifier.measure(model, job.task.source, job.task.name, job.spec, job.columns),
    "wordsim": lambda model, job: wordsim.measure(model, job.task.source),
    "coarsewsd": lambda model, job: coarsewsd.measure(model, job.task.source),
    "tokens": _tokens,
}
TEXTS: dict[str, Callable[[EvaluationJob], list[str]]] = {  # by task kind; on which speed is measured
    "classification": lambda job: read_labelled(job.task.source, "test", job.columns).first,
    "mteb": lambda job: read_labelled(job.task.source, "test", job.columns).first,
    "classifier": lambda job: classifier.texts(job.task.source, job.task.name, job.spec, job.columns),
    "wordsim": lambda job: wordsim.words(wordsim.read_sets(job.task.source)),
    "coarsewsd": lambda job: coarsewsd.read_texts(job.task.source, "test"),
    "tokens": lambda job: tokens.read_texts(job.task.source, job.columns.texts[0]),
}
