"""Driver of an evaluation: every model on every task through an executor, one table per task.

Each result is written to the JSON file as soon as it is available. Rerunning the same command resumes: a stored result is
reused if its key (weights, dictionary, data, settings, versions) is unchanged. The driver holds names and results only.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from msense.constants import DEMO_TEACHER
from msense.dictionary import SenseDictionary
from msense.evaluation import cost
from msense.evaluation.cache_keys import data_key, digest, model_key, teacher_key, versions
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.dispatch import AGAINST_TEACHER, EvaluationJob, make_jobs, measure, texts
from msense.evaluation.report import Evaluation, TaskReport, load_report, write_report
from msense.evaluation.result import Result
from msense.evaluation.search import Bm25
from msense.evaluation.spec import Spec
from msense.evaluation.tasks import mteb
from msense.io.extras import require
from msense.run.folder import RunFolder, resolve_output
from msense.runtime import Executor, open_executor
from msense.student.files import load_student, student_folder
from msense.teacher.body import resolve_dtype
from msense.text import redact

logger = logging.getLogger(__name__)
PENDING = "not evaluated yet"
PACKAGES = {  # optional, with the kinds of models and tasks that need them
    "matplotlib": {"plots"},
    "sentence_transformers": {"encoder"},
    "mteb": {"mteb"},
    "bm25s": {"retrieval"},
    "Stemmer": {"retrieval", "bm25"},
    "pytrec_eval": {"retrieval"},
}


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate all models on all tasks, or resume an interrupted evaluation; write JSON, Markdown and plots.

    Raises:
        InputError: a setting, model or data set is invalid; the message says what to download and where to put it.
        MsenseError: a model or task failed; finished results are kept.
    """
    resolve_output(config.output)
    specs, tasks = config.specs(config.teacher or _teacher_of(config)), config.tasks()
    _check_packages({"plots", *(spec.kind for spec in specs), *(task.kind for task in tasks)})
    for spec in specs:
        Bm25(spec.stemmer)  # raises for an unknown language
    tasks = [mteb.with_kind(task) for task in tasks]
    data = {task.title: data_key(task) for task in tasks}  # raises for missing data before anything is loaded
    executor = open_executor(local=config.local, workers=config.workers)
    device, dtype = executor.resources.device, str(config.dtype)
    if dtype == "auto":
        dtype = executor.run(resolve_dtype, dtype, device, device=device)
    specs = [replace(spec, dtype=dtype) for spec in specs]
    models = {spec.name: model_key(spec) for spec in specs}
    jobs = make_jobs(config, specs, tasks, executor.resources)
    depends = any(job.task.kind in AGAINST_TEACHER for job in jobs)
    teacher = digest([teacher_key(specs[0].teacher, config.revision, config.attention), dtype]) if depends else ""
    keys: dict[str, str] = {}
    for job in jobs:
        against = teacher if job.task.kind in AGAINST_TEACHER else ""
        own = digest([models[job.spec.name], data[job.task.title], job.settings, against, versions()])
        keys |= dict.fromkeys(job.keys, own)
    report = _empty_report(config, specs, jobs, device, keys)
    _reuse(report, config.output)
    todo = [n for n, job in enumerate(jobs) if PENDING in (report.rows(job.title)[row] for row in job.rows)]
    logger.info("reusing %d of %d results", len(jobs) - len(todo), len(jobs))
    needs = {"num_gpus": 1.0} if device == "cuda" else None
    for measured in executor.map("evaluation", measure, todo, jobs, needs=needs):
        for row, result in measured["rows"].items():
            report.rows(measured["title"])[row] = Result.from_json(result)
        write_report(report, config.output, plots=False)
    if config.cost:
        _add_costs(report, config, jobs, executor, models)
    write_report(report, config.output, plots=True)
    return report


def _check_packages(kinds: set[str]) -> None:
    """Raise InputError for optional packages that kinds of models and tasks need, now rather than after hours."""
    require("evaluation", "this evaluation", tuple(name for name, own in PACKAGES.items() if own & kinds))


def _teacher_of(config: EvaluateConfig) -> str:
    """Return the teacher of the first dictionary or student, or the demo's."""
    for spec in config.specs(""):
        if spec.kind == "replaced":
            return RunFolder(spec.source).teacher_folder() or SenseDictionary.load(spec.source).config.teacher.name
        if spec.kind == "student":
            folder = RunFolder(spec.source).teacher_folder()
            return folder or load_student(student_folder(spec.source)).config.teacher.name
    return DEMO_TEACHER


def _empty_report(
    config: EvaluateConfig, specs: Sequence[Spec], jobs: Sequence[EvaluationJob], device: str, keys: dict[str, str]
) -> Evaluation:
    tables: dict[str, TaskReport] = {}
    for job in jobs:
        table = tables.setdefault(job.title, TaskReport(job.title, job.task.kind, job.description, {}, job.bm25.name))
        table.rows |= dict.fromkeys(job.rows, job.obstacle or PENDING)
    settings = config.model_dump(mode="json", exclude={"output", "local", "workers", "log_level"})
    settings |= {name: [redact(word) for word in settings[name]] for name in ("model", "task")}
    made: dict[str, Any] = {"settings": settings, "teacher": redact(specs[0].teacher), "dtype": specs[0].dtype}
    made |= {"device": device, "versions": versions(), "keys": keys}
    return Evaluation([spec.name for spec in specs], list(tables.values()), {}, made)


def _reuse(report: Evaluation, output: str) -> None:
    """Copy the results of an earlier run whose keys are unchanged."""
    if (earlier := load_report(output)) is None:
        return
    keys, known = report.made["keys"], earlier.made.get("keys", {})
    for table in earlier.tasks:
        for model, row in table.rows.items():
            key = f"{table.name} | {model}"
            if isinstance(row, Result) and key in keys and keys[key] == known.get(key):
                report.rows(table.name)[model] = row
    if report.made["settings"]["cost"] and "cost_key" in earlier.made:
        report.costs.update(earlier.costs)
        report.made["cost_key"] = earlier.made["cost_key"]


def _add_costs(
    report: Evaluation, config: EvaluateConfig, jobs: list[EvaluationJob], executor: Executor, models: dict[str, str]
) -> None:
    """Measure the costs of all models side by side, unless an earlier run measured the same models."""
    first = next((job for job in jobs if job.task.source or job.task.kind == "classifier"), None)
    if first is None or all(job.spec.kind == "bm25" for job in jobs):
        logger.info(
            "skipping costs: they need a model with vectors, and a task with its own texts, unlike mteb's own tasks"
        )
        report.costs.clear()
        report.made.pop("cost_key", None)
        return
    device = executor.resources.device
    specs = [job.spec for job in jobs if job.title == first.title and job.spec.kind != "bm25"]
    own = [(spec.name, models[spec.name]) for spec in specs]
    key = digest([own, data_key(first.task), first.settings, device, config.cores, versions()])
    if report.made.get("cost_key") == key:
        return
    logger.info("measuring costs of all models in turn")
    report.costs = executor.run(_cost, specs, first, config.cores, device=device)
    report.made["cost_key"] = key


def _cost(specs: list[Spec], job: EvaluationJob, threads: int) -> dict[str, cost.Cost]:
    return cost.measure(specs, texts(job), job.device, threads)
