"""An evaluation: models and tasks in, a table a task out, every result kept in one JSON file as soon as it is there.

Runs on the driver, which holds names and results only: each model on each task is a Ray task. The same command goes on with
what is missing: a result is known by all that it depends on (weights, dictionary, data, settings, versions).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from msense.config import DEMO_TEACHER
from msense.dictionary import SenseDictionary
from msense.evaluation import cost
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.fingerprints import digest, of_data, of_model, of_teacher, versions
from msense.evaluation.measuring import Work, measure, texts_of, works_of
from msense.evaluation.models import folder_of_student
from msense.evaluation.plots import check_matplotlib
from msense.evaluation.report import Cost, Evaluation, TaskReport, load_report, write_report
from msense.evaluation.result import Result
from msense.evaluation.spec import Spec
from msense.run_folder import lasting
from msense.runtime import Resources, connect, map_tasks, run_task
from msense.student.files import load_student
from msense.teacher import resolve_dtype
from msense.text import redact

logger = logging.getLogger(__name__)

PENDING = "not measured yet"
UNFIT = "gives no token embeddings"


@dataclass
class _Sheet:
    """What has been found so far, by table and model."""

    report: Evaluation
    output: str

    def rows(self, title: str) -> dict[str, Result | str]:
        """Return a table's rows."""
        return next(table.rows for table in self.report.tasks if table.name == title)

    def keys(self) -> dict[str, str]:
        """Return what each result depends on, by table and model."""
        told: dict[str, str] = self.report.made["keys"]
        return told

    def add(self, title: str, model: str, result: Result) -> None:
        """Note a result and keep it."""
        self.rows(title)[model] = result
        write_report(self.report, self.output, plots=False)


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measure all models on all tasks, or go on with an evaluation that was cut off; write JSON, Markdown and plots.

    Args:
        config: all settings.

    Raises:
        BadInput: a setting, model or data set that does not work; says what to download and where to put it.
        MsenseError: a model or task failed; what is finished is kept.
    """
    check_matplotlib()  # not after hours
    lasting(config.output)
    specs, tasks = config.specs(config.teacher or _teacher_of(config)), config.tasks()
    data = {task.title: of_data(task) for task in tasks}  # before anything is loaded
    resources = connect(config.workers)
    dtype = config.dtype
    if dtype == "auto":
        dtype = run_task(resolve_dtype, dtype, resources.device, device=resources.device)
    specs = [replace(spec, dtype=dtype) for spec in specs]
    models = {spec.name: of_model(spec) for spec in specs}
    works = works_of(config, specs, tasks, resources)
    against = digest([of_teacher(specs[0].teacher, specs[0].revision), dtype])
    keys = {
        work.place: digest(
            [
                models[work.spec.name],
                data[work.task.title],
                work.settings,
                against if work.is_against_teacher else "",
                versions(),
            ]
        )
        for work in works
    }
    sheet = _Sheet(_empty(config, specs, works, resources, keys), config.output)
    _take_over(sheet)
    todo = [n for n, work in enumerate(works) if sheet.rows(work.title)[work.spec.name] == PENDING]
    logger.info("%d of %d results are there already", len(works) - len(todo), len(works))
    needs = {"num_gpus": 1.0} if resources.device == "cuda" else None
    for row in map_tasks("evaluation", measure, todo, resources, works, needs=needs):
        sheet.add(row["title"], row["model"], Result.from_json(row["result"]))
    if config.cost:
        _add_costs(sheet, config, specs, works, resources, models)
    write_report(sheet.report, config.output, plots=True)
    return sheet.report


def _teacher_of(config: EvaluateConfig) -> str:
    """Return the teacher that the first dictionary or student names, or that of the demo."""
    for spec in config.specs(""):
        if spec.kind == "replaced":
            return SenseDictionary.load(spec.source).config.teacher.name
        if spec.kind == "student":
            return load_student(folder_of_student(spec.source)).config.teacher.name
    return DEMO_TEACHER


def _empty(
    config: EvaluateConfig, specs: Sequence[Spec], works: Sequence[Work], resources: Resources, keys: dict[str, str]
) -> Evaluation:
    """Return a report without results."""
    tables: dict[str, TaskReport] = {}
    for work in works:
        table = tables.setdefault(work.title, TaskReport(work.title, work.task.kind, work.what, {}))
        table.rows[work.spec.name] = PENDING if work.fits else UNFIT
    settings = config.model_dump(mode="json", exclude={"output", "workers", "log_level"})
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
    """Return replaced teachers that differ in nothing but their dictionary: the largest such group."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for spec in specs:
        if spec.kind == "replaced":
            groups.setdefault((spec.replace, spec.metric, spec.temperature), []).append(spec.name)
    return max(groups.values(), key=len, default=[])


def _take_over(sheet: _Sheet) -> None:
    """Take what an earlier run of the same settings has found."""
    earlier = load_report(sheet.output)
    if earlier is None:
        return
    known = earlier.made.get("keys", {})
    for table in earlier.tasks:
        for model, row in table.rows.items():
            place = f"{table.name} | {model}"
            if isinstance(row, Result) and place in known and sheet.keys().get(place) == known[place]:
                sheet.rows(table.name)[model] = row
    if sheet.report.made["settings"]["cost"] and "cost_key" in earlier.made:
        sheet.report.costs.update(earlier.costs)
        sheet.report.made["cost_key"] = earlier.made["cost_key"]


def _add_costs(
    sheet: _Sheet,
    config: EvaluateConfig,
    specs: Sequence[Spec],
    works: Sequence[Work],
    resources: Resources,
    models: dict[str, str],
) -> None:
    """Measure all models side by side, unless an earlier run has measured the same ones."""
    asked = next((work for work in works if work.task.source or work.task.kind == "classifier"), None)
    if asked is None:
        logger.info("no costs: they are measured on the texts of a task, but those of mteb's own are not read here")
        return
    key = digest(
        [list(models.items()), of_data(asked.task), asked.settings, resources.device, config.cores, versions()]
    )
    if sheet.report.made.get("cost_key") == key:
        return
    logger.info("costs: all models in turn ...")
    found: dict[str, Cost] = run_task(_cost, list(specs), asked, config.cores, device=resources.device)
    sheet.report.costs.clear()
    sheet.report.costs.update(found)
    sheet.report.made["cost_key"] = key


def _cost(specs: list[Spec], work: Work, threads: int) -> dict[str, Cost]:
    """Measure costs; on a worker."""
    return cost.measure(specs, texts_of(work), work.device, threads)
