"""Students of Banking77 against their teacher: few-shot accuracy, senses, and other objectives.

The jobs make dictionary and students from the training texts and keep them beside the shared run.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.artifacts import Artifact, ArtifactCache
from benchmarks.senses import MORE, Task, few_shot, load_task, load_teacher
from benchmarks.shared import Bench, Figures
from msense import SenseDictionary
from msense.config.distill import DistillConfig
from msense.evaluation.models import StudentModel, TokenEmbeddings
from msense.evaluation.result import Result, difference
from msense.evaluation.spec import Spec
from msense.student.encoder import Replace
from msense.training.losses import frequent_sense_accuracy

STUDENTS = {"layers2": "layers:2", "static": "static"}
OBJECTIVE = {"sense": 1.0, "pooled": 100.0, "replaced": 100.0}  # that of the README's figures
RECIPES: dict[str, dict[str, Any]] = {
    "pooled": {"objective": {"pooled": 1.0}},
    "mse": {"objective": {"mse": 1.0}},
    "reference": {"reference": True, "epochs": DistillConfig.model_fields["epochs"].default},
}
REPLACED: dict[str, Replace | None] = {"": None, "_replaced": "soft", "_replaced_hard": "hard"}


def banking_cache(bench: Bench) -> ArtifactCache:
    """Return the dictionaries and students of Banking77's training texts, beside the shared run."""
    corpus = [str(bench.data("banking77") / "train.csv")]
    return ArtifactCache(Path(f"{bench.run.root}-banking77"), corpus, bench.workers)


def student(cache: ArtifactCache, dictionary: Path, name: str) -> Artifact:
    """Distill a student of the README's figures, or return the existing one."""
    return cache.student(dictionary, name, student=STUDENTS[name], objective=OBJECTIVE)


def distill(bench: Bench) -> Figures:
    """Compare students of msense's objective and of others."""
    task, cache, model = load_task(bench.data("banking77")), banking_cache(bench), load_teacher(bench.workers)
    dictionary = cache.dictionary(MORE)
    senses = SenseDictionary.load(dictionary)
    teacher = few_shot({part: model.encode(texts) for part, texts in task.texts.items()}, task.labels)
    test = model.read(task.texts["test"])
    figures: Figures = {"distill.teacher": teacher.score}
    ours: dict[str, Result] = {}
    for name in STUDENTS:
        made = student(cache, dictionary, name)
        for how, replace in REPLACED.items():
            ours[name + how] = result = _accuracy(made, task, replace)
            figures[f"distill.{name}{how}"] = result.score
            figures[f"distill.gap_{name}{how}"] = 100 * (teacher.score - result.score)
        figures[f"distill.sense_acc_{name}"] = made.metrics["held_out_accuracy"]
        figures[f"distill.sense_frequent_{name}"] = made.metrics["held_out_frequent"]
        own, frequent = _test_senses(made, task, test, senses)
        figures[f"distill.sense_acc_test_{name}"], figures[f"distill.sense_frequent_test_{name}"] = own, frequent
    for recipe, settings in RECIPES.items():
        made = cache.student(dictionary, f"layers2-{recipe}", student=STUDENTS["layers2"], **settings)
        result = _accuracy(made, task, "hard" if recipe == "reference" else None)  # the paper replaces its students
        figures[f"distill.layers2_{recipe}"] = result.score
        if recipe == "reference":
            figures["distill.layers2_reference_plain"] = _accuracy(made, task, None).score
        for end, value in zip(("", "_low", "_high"), difference(ours["layers2"], result), strict=True):
            figures[f"distill.over_{recipe}{end}"] = 100 * value
    return figures


def _model(made: Artifact, replace: Replace | None) -> StudentModel:
    return StudentModel(Spec(made.folder.name, "student", str(made.folder), replace=replace), "cpu")


def _accuracy(made: Artifact, task: Task, replace: Replace | None) -> Result:
    model = _model(made, replace)
    return few_shot({part: model.encode(texts) for part, texts in task.texts.items()}, task.labels)


def _test_senses(made: Artifact, task: Task, test: TokenEmbeddings, dictionary: SenseDictionary) -> tuple[float, float]:
    """Return how often a student picks the teacher's sense on the test texts, and how often the most frequent is it."""
    wanted = np.asarray(dictionary.assign(test.ids, test.hidden))
    picked = np.asarray(dictionary.assign(test.ids, _model(made, None).read(task.texts["test"]).senses))
    known = wanted >= 0
    frequent = frequent_sense_accuracy(test.ids[known], wanted[known].astype(np.uint16), dictionary)
    return float((picked == wanted)[known].mean()), float(frequent.total) / frequent.count
