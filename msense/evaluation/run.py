"""Driver of an evaluation: every model on every task as a Ray task, one table per task.

Each result is written to the JSON file as soon as it is available. Rerunning the same command resumes: a stored result is
reused if its key (weights, dictionary, data, settings, versions) is unchanged. The driver holds names and results only.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from msense.constants import DEMO_TEACHER
from msense.dictionary import SenseDictionary
from msense.evaluation import cost
from msense.evaluation.cache_keys import data_key, digest, model_key, teacher_key, versions
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.cost import Cost
from msense.evaluation.dispatch import EvaluationJob, load_texts, make_jobs, measure
from msense.evaluation.models import folder_of_student
from msense.evaluation.plots import check_matplotlib
from msense.evaluation.report import Evaluation, TaskReport, load_report, write_report
from msense.evaluation.result import Result
from msense.evaluation.spec import Spec
from msense.run.folder import resolve_output
from msense.runtime import Executor, open_executor
from msense.runtime.resources import Resources
from msense.student.files import load_student
from msense.teacher.body import resolve_dtype
from msense.text import redact

logger = logging.getLogger(__name__)
PENDING = "not evaluated yet"
UNFIT = "no token embeddings"


@dataclass
class _Store:
    """Results so far, and their file."""

    report: Evaluation
    output: str

    def rows(self, title: str) -> dict[str, Result | str]:
        """Return a table's rows."""
        return next(table.rows for table in self.report.tasks if table.name == title)

    def add(self, title: str, model: str, result: Result) -> None:
        """Add a result and write it to the file."""
        self.rows(title)[model] = result
        write_report(self.report, self.output, plots=False)


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate all models on all tasks, or resume an interrupted evaluation; write JSON, Markdown and plots.

    Raises:
        InputError: a setting, model or data set is invalid; the message says what to download and where to put it.
        MsenseError: a model or task failed; finished results are kept.
    """
    check_matplotlib()  # fail now rather than after hours
    resolve_output(config.output)
    specs, tasks = config.specs(config.teacher or _teacher_of(config)), config.tasks()
    data = {task.title: data_key(task) for task in tasks}  # finds missing data before anything is loaded
    executor = open_executor(local=config.local, workers=config.workers)
    resources = executor.resources
    dtype: str = config.dtype
    if dtype == "auto":
        dtype = executor.run(resolve_dtype, dtype, resources.device, device=resources.device)
    specs = [replace(spec, dtype=dtype) for spec in specs]
    models = {spec.name: model_key(spec) for spec in specs}
    works = make_jobs(config, specs, tasks, resources)
    teacher = digest([teacher_key(specs[0].teacher, specs[0].revision), dtype])
    keys = {
        work.place: digest(
            [
                models[work.spec.name],
                data[work.task.title],
                work.settings,
                teacher if work.is_against_teacher else "",
                versions(),
            ]
        )
        for work in works
    }
    store = _Store(_empty(config, specs, works, resources, keys), config.output)
    _reuse(store)
    todo = [n for n, work in enumerate(works) if store.rows(work.title)[work.spec.name] == PENDING]
    logger.info("reusing %d of %d results", len(works) - len(todo), len(works))
    needs = {"num_gpus": 1.0} if resources.device == "cuda" else None
    for row in executor.map("evaluation", measure, todo, works, needs=needs):
        store.add(row["title"], row["model"], Result.from_json(row["result"]))
    if config.cost:
        _add_costs(store.report, config, works, executor, models)
    write_report(store.report, config.output, plots=True)
    return store.report


def _teacher_of(config: EvaluateConfig) -> str:
    """Return the teacher of the first dictionary or student, or the demo's."""
    for spec in config.specs(""):
        if spec.kind == "replaced":
            return SenseDictionary.load(spec.source).config.teacher.name
        if spec.kind == "student":
            return load_student(folder_of_student(spec.source)).config.teacher.name
    return DEMO_TEACHER


def _empty(
    config: EvaluateConfig,
    specs: Sequence[Spec],
    works: Sequence[EvaluationJob],
    resources: Resources,
    keys: dict[str, str],
) -> Evaluation:
    """Return a report without results."""
    tables: dict[str, TaskReport] = {}
    for work in works:
        table = tables.setdefault(work.title, TaskReport(work.title, work.task.kind, work.what, {}))
        table.rows[work.spec.name] = PENDING if work.fits else UNFIT
    settings = config.model_dump(mode="json", exclude={"output", "local", "workers", "log_level"})
    settings |= {name: [redact(word) for word in settings[name]] for name in ("model", "task")}
    made = {
        "settings": settings,
        "teacher": redact(specs[0].teacher),
        "dtype": specs[0].dtype,
        "device": resources.device,
        "versions": versions(),
        "sizes": _of_other_sizes(specs),
        "keys": keys,
    }
    return Evaluation([spec.name for spec in specs], list(tables.values()), {}, made)


def _of_other_sizes(specs: Sequence[Spec]) -> list[str]:
    """Return the largest group of replaced teachers that differ only in their dictionary."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for spec in specs:
        if spec.kind == "replaced":
            groups.setdefault((spec.replace, spec.metric, spec.temperature), []).append(spec.name)
    return max(groups.values(), key=len, default=[])


def _reuse(store: _Store) -> None:
    """Copy the results of an earlier run whose keys are unchanged."""
    earlier, made = load_report(store.output), store.report.made
    if earlier is None:
        return
    known = earlier.made.get("keys", {})
    for table in earlier.tasks:
        for model, row in table.rows.items():
            place = f"{table.name} | {model}"
            if isinstance(row, Result) and place in known and made["keys"].get(place) == known[place]:
                store.rows(table.name)[model] = row
    if made["settings"]["cost"] and "cost_key" in earlier.made:
        store.report.costs.update(earlier.costs)
        made["cost_key"] = earlier.made["cost_key"]


def _add_costs(
    report: Evaluation,
    config: EvaluateConfig,
    works: Sequence[EvaluationJob],
    executor: Executor,
    models: dict[str, str],
) -> None:
    """Measure the costs of all models side by side, unless an earlier run measured the same models."""
    first = next((work for work in works if work.task.source or work.task.kind == "classifier"), None)
    if first is None:
        logger.info("skipping costs: they need a task with its own texts, which mteb's own tasks do not provide")
        return
    key = digest(
        [
            list(models.items()),
            data_key(first.task),
            first.settings,
            executor.resources.device,
            config.cores,
            versions(),
        ]
    )
    if report.made.get("cost_key") == key:
        return
    logger.info("measuring costs of all models in turn")
    specs = [work.spec for work in works if work.title == first.title]
    costs: dict[str, Cost] = executor.run(_cost, specs, first, config.cores, device=executor.resources.device)
    report.costs = costs
    report.made["cost_key"] = key


def _cost(specs: list[Spec], work: EvaluationJob, threads: int) -> dict[str, Cost]:
    """Measure costs; runs on a worker."""
    return cost.measure(specs, load_texts(work), work.device, threads)
