"""One model on one task: which module measures it, and what a worker is told.

Comes in: models, tasks and settings. Goes out: `Work`s, and on the workers a `Result` each. Holds one model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from msense.errors import MsenseError
from msense.evaluation import classification, classifier, coarsewsd, mteb_tasks, tokens, wordsim
from msense.evaluation.classification import Protocol
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.models import Model, TeacherModel, TokenModel, opened
from msense.evaluation.result import Result
from msense.evaluation.spec import Spec, TaskSpec
from msense.labelled import Columns, read_labelled
from msense.runtime import Resources

READ_TOKENS = ("teacher", "replaced", "student", "truncated")  # kinds of models
OF_TOKENS = ("classifier", "coarsewsd", "tokens")  # kinds of tasks that take no others
DRAWN = ("classification", "mteb")
WHAT = {
    "classification": "logistic regression on sentence vectors, {shots}, {draws}; accuracy on the test texts",
    "mteb": "the same by the package mteb, {shots}, {draws}",
    "classifier": "the test texts under the teacher's own frozen classifier",
    "wordsim": "Spearman's correlation of cosines with people's scores, mean over sets weighted by their pairs",
    "coarsewsd": "senses of the target word named by the majority of its training contexts; mean accuracy over words",
    "tokens": "cosine of each token's embedding with the teacher's, mean over tokens, and how often its sense is the teacher's",
}


@dataclass(frozen=True)
class Work:
    """One model on one task; travels to a worker.

    Attributes:
        spec: the model.
        task: the task.
        title: of the task's table: its name, with the shots where there are such.
        protocol: how training texts are drawn.
        columns: of labelled texts.
        device: cuda or cpu.
        threads: of torch.
    """

    spec: Spec
    task: TaskSpec
    title: str
    protocol: Protocol
    columns: Columns
    device: str
    threads: int

    @property
    def place(self) -> str:
        """Where its result stands."""
        return f"{self.title} | {self.spec.name}"

    @property
    def fits(self) -> bool:
        """Whether the task can be asked of the model."""
        return self.spec.kind in READ_TOKENS or self.task.kind not in OF_TOKENS

    @property
    def is_against_teacher(self) -> bool:
        """Whether the teacher takes part in every model's result."""
        return self.task.kind in ("classifier", "tokens")

    @property
    def settings(self) -> dict[str, Any]:
        """Return what its result depends on beside model and data."""
        drawn = self.protocol._asdict() if self.task.kind in DRAWN else {}
        return {"kind": self.task.kind, "name": self.task.name, "columns": list(self.columns), **drawn}

    @property
    def what(self) -> str:
        """Say in a line what is measured."""
        shots = f"{self.protocol.shots} training texts a class" if self.protocol.shots else "all training texts"
        draws = f"{self.protocol.draws} draws" if self.protocol.shots else "once"
        return WHAT[self.task.kind].format(shots=shots, draws=draws)


def works_of(
    config: EvaluateConfig, specs: Sequence[Spec], tasks: Sequence[TaskSpec], resources: Resources
) -> list[Work]:
    """Return all models on all tasks; classification once for each number of shots."""
    found = []
    at_a_time = resources.actors if resources.device == "cuda" else resources.tasks
    threads = max(1, config.cores // at_a_time)
    for task in tasks:
        shots = config.shots if task.kind in DRAWN else ("",)
        for shot in shots:
            protocol = Protocol(int(shot) if shot.isdecimal() else 0, config.draws, config.seed)
            title = task.title + (f", {shot} shots" if shot.isdecimal() else f", {shot}" if shot else "")
            found += [Work(spec, task, title, protocol, config.columns, resources.device, threads) for spec in specs]
    return found


def measure(number: int, works: Sequence[Work]) -> dict[str, Any]:
    """Measure one model on one task; on a worker.

    Args:
        number: which of the works.
        works: all of them.

    Returns:
        Title, model and result, as JSON values.

    Raises:
        BadInput, MsenseError: naming the model and what is wrong.
    """
    work = works[number]
    try:
        with opened(work.spec, work.device, work.threads) as model:
            found = _result(work, model)
    except MsenseError as error:
        raise type(error)(f"{work.spec.name} on {work.title}: {error}") from error
    return {"title": work.title, "model": work.spec.name, "result": found.to_json()}


def _result(work: Work, model: Model) -> Result:
    task, source = work.task, work.task.source
    if task.kind == "classification":
        return classification.measure(model, source, work.columns, work.protocol)
    if task.kind == "mteb":
        return mteb_tasks.measure(model, task.name, source, work.columns, *work.protocol)
    if task.kind == "wordsim":
        return wordsim.measure(model, source)
    reader = cast(TokenModel, model)  # as `fits` says
    if task.kind == "classifier":
        return classifier.measure(reader, source, task.name, work.spec, work.columns)
    if task.kind == "coarsewsd":
        return coarsewsd.measure(reader, source)
    spec = replace(work.spec, kind="teacher", replace=None)
    teacher = TeacherModel(spec, work.device, work.threads, like=reader.dictionary)
    return tokens.measure(reader, teacher, source, work.columns.texts[0])


def texts_of(work: Work) -> list[str]:
    """Return the texts of a task, on which speed is measured.

    Raises:
        BadInput: they are not there.
    """
    task = work.task
    if task.kind == "classifier":
        return classifier.texts(task.source, task.name, work.spec, work.columns)
    if task.kind in ("classification", "mteb"):
        return read_labelled(task.source, "test", work.columns).first
    if task.kind == "wordsim":
        return [word for pairs in wordsim.read_sets(task.source).values() for pair in pairs for word in pair[:2]]
    if task.kind == "coarsewsd":
        return [
            t for word in coarsewsd.words(task.source) for t in coarsewsd.read_contexts(task.source, word, "test").texts
        ]
    return tokens.read_texts(task.source, work.columns.texts[0])
