"""Quality of students that are distilled from a data set's own texts, and of a general student, against the teacher.

Students, dictionaries and evaluations are kept in a folder beside the shared run's, and reused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.artifacts import ArtifactCache
from benchmarks.sets import STUDENTS, as_models, distill_all, evaluate_models, open_set, open_similarity, score
from benchmarks.shared import Bench, Figures
from msense.errors import InputError
from msense.evaluation.report import TaskReport

FUSED = "static"  # the student of `over_bm25` without a name


def tasks(bench: Bench) -> Figures:
    """Evaluate `table`, `static` and `layers:2` on every data set, then the general student, if given, on all of them."""
    folder = Path(f"{bench.run.root}-tasks")
    sets = [open_set(bench.data, name, folder / name) for name in bench.sets]
    similarities = _similarities(bench)
    figures: Figures = {}
    for own in sets:
        cache = ArtifactCache(folder / own.name, [own.corpus], bench.workers)
        models = as_models(distill_all(cache, list(STUDENTS), epochs=bench.epochs))
        lexical = ["bm25"] if own.is_retrieval else []
        output = folder / f"{own.name}.json"
        results = evaluate_models(["teacher", *models, *lexical], [own.task], output, workers=bench.workers)
        (task,) = results.tasks
        figures |= retrieval_figures(own.name, task, list(STUDENTS)) if lexical else _distill_figures(own.name, task)
    figures |= _means(figures, [own.name for own in sets if own.is_retrieval])
    if not bench.general:
        return figures
    output = folder / "general.json"
    return figures | _general(bench, {f"general.{own.name}": own.task for own in sets} | similarities, output)


def retrieval_figures(name: str, task: TaskReport, students: Sequence[str]) -> Figures:
    """Return nDCG@10 of every row; of students also over the teacher's, and of their fusion minus BM25's in points."""
    teacher, bm25 = score(task, "teacher"), score(task, "bm25")
    figures = {f"retrieval.{name}.ndcg.{row}": score(task, row) for row in ("teacher", "bm25", *students)}
    for own in students:
        figures[f"retrieval.{name}.{own}"] = score(task, own) / teacher
        figures[f"retrieval.{name}.over_bm25.{own}"] = 100 * (score(task, f"{own} + bm25") - bm25)
    return figures


def _means(figures: Figures, sets: Sequence[str]) -> Figures:
    """Return the means over retrieval sets of the students' figures."""
    if not sets:
        return {}
    ends = [end for own in STUDENTS for end in (own, f"over_bm25.{own}")]
    means = {f"retrieval.{end}": sum(figures[f"retrieval.{name}.{end}"] for name in sets) / len(sets) for end in ends}
    return means | {"retrieval.over_bm25": means[f"retrieval.over_bm25.{FUSED}"]}


def _distill_figures(name: str, task: TaskReport) -> Figures:
    """Return 8-shot accuracies, and the students' points below the teacher."""
    figures = {f"distill.{name}.{row}": score(task, row) for row in task.rows}
    gaps = {f"distill.{name}.gap.{own}": 100 * (score(task, "teacher") - score(task, own)) for own in STUDENTS}
    return figures | gaps


def _similarities(bench: Bench) -> dict[str, str]:
    """Return the similarity tasks of the general student, by the names of their figures; InputError if it is missing."""
    if not bench.general:
        return {}
    if not Path(bench.general).is_dir():
        raise InputError(f"--general {bench.general}: there is no such folder; give the run folder of a student")
    return {f"sts.{own.name}": own.task for own in (open_similarity(bench.data, word) for word in bench.sts)}


def _general(bench: Bench, named: Mapping[str, str], output: Path) -> Figures:
    """Return the scores of the general student and the teacher on tasks by name, and the points between them."""
    models = ["teacher", f"general=student:{Path(bench.general).absolute()}"]
    results = evaluate_models(models, list(named.values()), output, workers=bench.workers)
    figures: Figures = {}
    for name, task in zip(named, results.tasks, strict=True):
        teacher, own = score(task, "teacher"), score(task, "general")
        figures |= {name: own, f"{name}.teacher": teacher, f"{name}.gap": 100 * (teacher - own)}
    return figures
