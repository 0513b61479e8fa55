"""Reproduce the README's results: `python jobs/reproduce.py --data DATA [NAME ...]`.

The jobs write dictionaries, teachers and students into --output, with evaluations next to them as NAME.json, NAME.md and
plots; existing ones are reused. A final table compares every figure with its target, and the last line of the output is the
same as one JSON object. DATA contains banking77/, tweet_emotion/, sst2/ (csv of text and label), coarsewsd/, wordsim/ and
wikitext2/.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.artifacts import ArtifactCache

from msense.cli.console import run_job, show_table
from msense.cli.reports import show_evaluation
from msense.config.base import validate_config
from msense.config.finetune import FinetuneConfig
from msense.constants import DEMO_TEACHER
from msense.errors import InputError
from msense.evaluation.config import EvaluateConfig
from msense.evaluation.report import Evaluation, difference_to_baseline
from msense.evaluation.result import Result
from msense.evaluation.run import evaluate
from msense.evaluation.tasks.coarsewsd import read_contexts, words
from msense.pipelines.finetune import finetune

SENSES = 50  # per token, in dictionaries of a task's own texts
OTHER_SIZES = (1, 10, "auto")
OF_WORDS = 20  # senses per token for CoarseWSD
GENERAL_DOCS = "pydocs:sklearn"
STUDENTS: dict[str, dict[str, Any]] = {
    "layers2": {"student": "layers:2"},
    "static": {"student": "static"},
    "layers2-pooled": {"student": "layers:2", "objective": {"pooled": 1.0}},
}
TWO_OUTPUTS = ("layers2", "static")
OF_TASK: dict[str, Any] = {"epochs": 5}
OF_CONTEXTS: dict[str, Any] = {"epochs": 3}
OF_GENERAL: dict[str, Any] = {"epochs": 3, "train_tokens": 100_000}
OF_CLASSIFIER = {"lr": 3e-4}  # a fine-tuned teacher is further from its first layers: larger steps overshoot
VERDICTS = {True: "met", False: "missed", None: ""}


class Figure(NamedTuple):
    """A figure and its target."""

    what: str
    value: float
    bar: str = ""
    is_met: bool | None = None  # None: no target


@dataclass(frozen=True)
class Maker:
    """Builds models and evaluations in a folder."""

    data: Path
    output: Path
    workers: int
    model2vec_python: str | None

    def task(self, name: str) -> str:
        """Return a folder of the data; InputError if it is missing."""
        folder = self.data / name
        if not folder.is_dir():
            raise InputError(f"{folder} does not exist: --data must be a folder that contains {name}/")
        return str(folder)

    def cache(self, name: str, *corpus: str, teacher: str = DEMO_TEACHER) -> ArtifactCache:
        """Return the dictionaries and students of a corpus."""
        return ArtifactCache(self.output / name, corpus, self.workers, teacher)

    def evaluate(self, name: str, models: Sequence[str], tasks: Sequence[str], **more: Any) -> Evaluation:
        """Evaluate, by default without costs, and print the results."""
        given: dict[str, Any] = {"model": models, "task": tasks, "output": str(self.output / f"{name}.json")}
        given |= {"teacher": DEMO_TEACHER, "workers": self.workers, "model2vec_python": self.model2vec_python}
        evaluation = evaluate(validate_config(EvaluateConfig, {"cost": False, **given, **more}))
        show_evaluation(evaluation)
        return evaluation

    def with_model2vec(self) -> tuple[str, ...]:
        """Return model2vec as a model if its Python is known."""
        return ("model2vec",) if self.model2vec_python else ()


def students(cache: ArtifactCache, dictionary: Path, names: Sequence[str], **settings: Any) -> list[str]:
    """Distil students and return them as models."""
    return [f"{name}=student:{cache.student(dictionary, name, **STUDENTS[name], **settings).folder}" for name in names]


def replaced(models: Sequence[str], how: str) -> list[str]:
    """Return students with every token replaced by senses, "soft" or "hard"."""
    return [f"{model.replace('=', ', replaced=', 1)},{how}" for model in models]


def banking77(make: Maker) -> list[Figure]:
    """Banking77: the replaced teacher, students of its training texts, and baselines."""
    return _own_text(make, "banking77", "banking77", sizes=(), bar=1.5)


def emotion(make: Maker) -> list[Figure]:
    """TweetEval's emotion: the same with dictionaries of several sizes, costs, and the mteb package."""
    return [*_own_text(make, "emotion", "tweet_emotion", sizes=OTHER_SIZES, bar=3.0), *_by_mteb(make)]


def _own_text(make: Maker, name: str, folder: str, sizes: Sequence[int | str], bar: float) -> list[Figure]:
    """Evaluate a dictionary and students of a task's training texts on that task."""
    source = make.task(folder)
    cache = make.cache(name, f"{source}/train.csv")
    main = cache.dictionary(SENSES)
    models = ["teacher", *(f"replaced K {k}=replaced:{cache.dictionary(k)}" for k in sizes)]
    models += [f"replaced K {SENSES}=replaced:{main}", f"replaced K {SENSES}, hard=replaced:{main},hard"]
    own = students(cache, main, TWO_OUTPUTS, **OF_TASK)
    models += [*own, *replaced(own, "soft"), "truncated:2", *make.with_model2vec()]
    results = make.evaluate(name, models, [f"{name}={source}"], cost=bool(sizes))
    title = f"{name}, 8 shots"
    figures = [_loss(results, title, f"replaced K {SENSES}", 2.5)]
    return figures + [_loss(results, title, student, bar) for student in TWO_OUTPUTS]


def _by_mteb(make: Maker) -> list[Figure]:
    """Compare our protocol with that of the mteb package on the same models and data."""
    source, folder = make.task("tweet_emotion"), make.output / "emotion"
    models = ["teacher", *(f"{name}=student:{folder / name}" for name in TWO_OUTPUTS)]
    results = make.evaluate("mteb", models, [f"emotion={source}", f"mteb:emotion={source}"])
    figures = []
    for model in ("teacher", *TWO_OUTPUTS):
        ours, theirs = (_result(results, title, model) for title in ("emotion, 8 shots", "emotion (mteb), 8 shots"))
        gap = 100 * (ours.score - theirs.score)
        noise = 196 * sum((row.deviation or 0) ** 2 / len(row.values) for row in (ours, theirs)) ** 0.5
        what = f"emotion, {model}: our protocol minus mteb's, points"
        figures.append(Figure(what, gap, f"within the draws' noise, {noise:.1f}", abs(gap) <= noise))
    return figures


def general(make: Maker) -> list[Figure]:
    """Dictionary and students of general text on both classification tasks."""
    cache = make.cache("general", make.task("wikitext2"), GENERAL_DOCS)
    own = students(cache, cache.dictionary("auto"), tuple(STUDENTS), **OF_GENERAL)
    tasks = [f"banking77={make.task('banking77')}", f"emotion={make.task('tweet_emotion')}"]
    results = make.evaluate("general", [*make.with_model2vec(), *own], tasks)
    figures = []
    for task in results.tasks:
        rows = {name: row.score for name, row in task.rows.items() if isinstance(row, Result)}
        figures += [Figure(f"{task.name}, general text: {name}", score) for name, score in rows.items()]
    return figures


def wordsim(make: Maker) -> list[Figure]:
    """Word similarity by the senses of the general dictionary."""
    main = make.cache("general", make.task("wikitext2"), GENERAL_DOCS).dictionary("auto")
    results = make.evaluate("wordsim", [f"replaced=replaced:{main}"], [f"wordsim={make.task('wordsim')}"])
    row = _result(results, "wordsim", "replaced")
    gap = row.score - row.more["one embedding"]
    return [
        Figure("word similarity: best pair of senses", row.score),
        Figure("word similarity: best pair over one embedding per word", gap, "above 0", gap > 0),
    ]


def coarsewsd(make: Maker) -> list[Figure]:
    """Word sense disambiguation by the teacher's dictionary and by students; students' token-level fidelity."""
    source = make.task("coarsewsd")
    corpus, test = (make.output / name for name in ("coarsewsd.txt", "coarsewsd-test.txt"))
    for path, part in ((corpus, "train"), (test, "test")):
        _write_once(path, "".join(f"{t}\n" for w in words(source) for t in read_contexts(source, w, part).texts))
    cache = make.cache("coarsewsd", str(corpus))
    main = cache.dictionary(OF_WORDS)
    own = students(cache, main, tuple(STUDENTS), **OF_CONTEXTS)
    models = [f"teacher=replaced:{main},hard", *own, *replaced(own[: len(TWO_OUTPUTS)], "hard")]
    results = make.evaluate("coarsewsd", models, [f"coarsewsd={source}", f"tokens:contexts={test}"])
    teacher, student = (_result(results, "coarsewsd", name) for name in ("teacher", "layers2"))
    over, below = 100 * (teacher.score - teacher.more["gold centroids"]), 100 * (teacher.score - student.score)
    return [
        Figure("CoarseWSD, teacher's senses: accuracy", teacher.score),
        Figure("CoarseWSD, teacher's senses over a centroid per gold sense, points", over, "at least 3", over >= 3),
        Figure("CoarseWSD, layers2 below the teacher, points", below, "at most 3", below <= 3),
    ]


def sst2(make: Maker) -> list[Figure]:
    """SST-2: a fine-tuned teacher, replaced by senses, and students under its frozen classifier."""
    source = make.task("sst2")
    given = {"task": f"sst2={source}", "output": str(make.output / "sst2" / "finetuned"), "workers": make.workers}
    tuned = finetune(validate_config(FinetuneConfig, given))
    cache = make.cache("sst2", tuned["corpus"], teacher=tuned["teacher"])
    main = cache.dictionary(SENSES)
    own = students(cache, main, TWO_OUTPUTS, **OF_CLASSIFIER)
    models = ["teacher", f"replaced=replaced:{main}", f"replaced, hard=replaced:{main},hard", *own]
    models += replaced(own, "soft")
    results = make.evaluate("sst2", models, [f"classifier:sst2={source}"], teacher=tuned["teacher"])
    title = "sst2 (classifier)"
    accuracy = Figure("sst2, fine-tuned teacher: accuracy", _result(results, title, "teacher").score)
    return [accuracy, _loss(results, title, "replaced", 0.5), _loss(results, title, "layers2", 3.0)]


def _write_once(path: Path, text: str) -> None:
    """Write a file unless it already has this text: its modification time is part of cache keys."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _result(results: Evaluation, title: str, model: str) -> Result:
    row = next(task.rows[model] for task in results.tasks if task.name == title)
    assert isinstance(row, Result)
    return row


def _loss(results: Evaluation, title: str, model: str, bar: float) -> Figure:
    """Return by how many points a model is below the teacher, with its confidence interval."""
    gap = difference_to_baseline(results, next(task for task in results.tasks if task.name == title), model)
    assert gap is not None
    lost = -100 * gap.gain
    what = f"{title}: {model} below the teacher, points [{-100 * gap.high:.1f}, {-100 * gap.low:.1f}]"
    return Figure(what, lost, f"at most {bar:g}", lost <= bar)


NAMES: dict[str, Callable[[Maker], list[Figure]]] = {
    own.__name__: own for own in (banking77, emotion, general, wordsim, coarsewsd, sst2)
}


def main() -> None:
    """Reproduce the requested results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"results: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of the data sets")
    parser.add_argument("--output", default="runs/results", metavar="DIR", help="output folder (default: runs/results)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one per core")
    parser.add_argument("--model2vec-python", metavar="FILE", help="Python with model2vec, to include it")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in NAMES]:
        raise InputError(f"unknown result {unknown[0]!r}: use {', '.join(NAMES)}")
    make = Maker(Path(given.data).absolute(), Path(given.output).absolute(), given.workers, given.model2vec_python)
    figures = [figure for name in given.names or NAMES for figure in NAMES[name](make)]
    rows = [
        (figure.what, f"{figure.value:.4g}  {figure.bar}  {VERDICTS[figure.is_met]}".rstrip()) for figure in figures
    ]
    show_table("Results", rows)
    sys.stdout.write(json.dumps({figure.what: float(f"{figure.value:.4g}") for figure in figures}) + "\n")


if __name__ == "__main__":
    sys.exit(run_job(main))
