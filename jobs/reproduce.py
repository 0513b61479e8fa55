"""Reproduce the earlier results of jobs/benchmarks/README.md: `python jobs/reproduce.py --data DATA [NAME ...]`.

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
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.artifacts import ArtifactCache, data_folder
from benchmarks.sets import evaluate_models

from msense.cli.console import run_job, show_table
from msense.config.base import validate_config
from msense.config.finetune import FinetuneConfig
from msense.constants import DEMO_TEACHER
from msense.errors import InputError
from msense.evaluation.report import Evaluation, difference_to_baseline
from msense.evaluation.result import Result
from msense.evaluation.tasks.coarsewsd import read_contexts, words
from msense.pipelines.finetune import finetune

SENSES = 50  # per token, in dictionaries of a task's own texts
STUDENTS: dict[str, dict[str, Any]] = {
    "layers2": {"student": "layers:2"},
    "static": {"student": "static"},
    "layers2-pooled": {"student": "layers:2", "objective": {"pooled": 1.0}},
}
TWO_OUTPUTS = ("layers2", "static")
VERDICTS = {True: "met", False: "missed", None: ""}


class Figure(NamedTuple):
    """A figure and its target; `is_met` is None if it has none."""

    what: str
    value: float
    bar: str = ""
    is_met: bool | None = None


class Maker(argparse.Namespace):
    """The command line's settings; builds models and evaluations in the folder `output`."""

    def task(self, name: str) -> str:
        """Return a folder of the data; InputError if it is missing."""
        return str(data_folder(self.data, name))

    def cache(self, name: str, *corpus: str, teacher: str = DEMO_TEACHER) -> ArtifactCache:
        """Return the dictionaries and students of a corpus."""
        return ArtifactCache(self.output / name, corpus, self.workers, teacher)

    def general(self) -> ArtifactCache:
        """Return the dictionaries and students of general text."""
        return self.cache("general", self.task("wikitext2"), "pydocs:sklearn")

    def evaluate(self, name: str, models: Sequence[str], tasks: Sequence[str], **more: Any) -> Evaluation:
        """Evaluate, by default without costs, and print the results."""
        given = {"workers": self.workers, "model2vec_python": self.model2vec_python, **more}
        return evaluate_models(models, tasks, self.output / f"{name}.json", **given)

    def peers(self) -> list[str]:
        """Return model2vec as a model if its Python is known."""
        return ["model2vec"] if self.model2vec_python else []


def students(cache: ArtifactCache, dictionary: Path, names: Sequence[str], **settings: Any) -> list[str]:
    """Distill students and return them as models."""
    return [f"{name}=student:{cache.student(dictionary, name, **STUDENTS[name], **settings)}" for name in names]


def replaced(models: Sequence[str], how: str) -> list[str]:
    """Return students with every token replaced by senses, "soft" or "hard"."""
    return [f"{model.replace('=', ', replaced=', 1)},{how}" for model in models]


def banking77(make: Maker) -> list[Figure]:
    """Banking77: the replaced teacher, students of its training texts, and baselines."""
    return _own_text(make, "banking77", "banking77", sizes=(), bar=1.5)


def emotion(make: Maker) -> list[Figure]:
    """TweetEval's emotion: the same with dictionaries of several sizes, costs, and the mteb package."""
    figures = _own_text(make, "emotion", "tweet_emotion", sizes=(1, 10, "auto"), bar=3.0)
    source, folder = make.task("tweet_emotion"), make.output / "emotion"
    models = ["teacher", *(f"{name}=student:{folder / name}" for name in TWO_OUTPUTS)]
    results = make.evaluate("mteb", models, [f"emotion={source}", f"mteb:emotion={source}"])
    for model in ("teacher", *TWO_OUTPUTS):
        ours, theirs = (_result(results, title, model) for title in ("emotion, 8 shots", "emotion (mteb), 8 shots"))
        gap = 100 * (ours.score - theirs.score)
        noise = 196 * sum((row.deviation or 0) ** 2 / len(row.values) for row in (ours, theirs)) ** 0.5
        what = f"emotion, {model}: our protocol minus mteb's, points"
        figures.append(Figure(what, gap, f"within the draws' noise, {noise:.1f}", abs(gap) <= noise))
    return figures


def _own_text(make: Maker, name: str, folder: str, sizes: Sequence[int | str], bar: float) -> list[Figure]:
    """Evaluate a dictionary and students of a task's training texts on that task."""
    source = make.task(folder)
    cache = make.cache(name, f"{source}/train.csv")
    main = cache.dictionary(SENSES)
    models = ["teacher", *(f"replaced K {k}=replaced:{cache.dictionary(k)}" for k in sizes)]
    models += [f"replaced K {SENSES}=replaced:{main}", f"replaced K {SENSES}, hard=replaced:{main},hard"]
    own = students(cache, main, TWO_OUTPUTS, epochs=5)
    models += [*own, *replaced(own, "soft"), "truncated:2", *make.peers()]
    results = make.evaluate(name, models, [f"{name}={source}"], cost=bool(sizes))
    title = f"{name}, 8 shots"
    figures = [_loss(results, title, f"replaced K {SENSES}", 2.5)]
    return figures + [_loss(results, title, student, bar) for student in TWO_OUTPUTS]


def general(make: Maker) -> list[Figure]:
    """Dictionary and students of general text on both classification tasks."""
    cache = make.general()
    own = students(cache, cache.dictionary("auto"), tuple(STUDENTS), epochs=3, train_tokens=100_000)
    tasks = [f"banking77={make.task('banking77')}", f"emotion={make.task('tweet_emotion')}"]
    results = make.evaluate("general", [*make.peers(), *own], tasks)
    rows = [(task.name, name, row) for task in results.tasks for name, row in task.rows.items()]
    return [Figure(f"{title}, general text: {name}", r.score) for title, name, r in rows if isinstance(r, Result)]


def wordsim(make: Maker) -> list[Figure]:
    """Word similarity by the senses of the general dictionary."""
    main = make.general().dictionary("auto")
    results = make.evaluate("wordsim", [f"replaced=replaced:{main}"], [f"wordsim={make.task('wordsim')}"])
    row = _result(results, "wordsim", "replaced")
    gap = row.score - row.more["one embedding"]
    best = "word similarity: best pair"
    return [
        Figure(f"{best} of senses", row.score),
        Figure(f"{best} over one embedding per word", gap, "above 0", gap > 0),
    ]


def coarsewsd(make: Maker) -> list[Figure]:
    """Word sense disambiguation by the teacher's dictionary and by students; students' token-level fidelity."""
    source = make.task("coarsewsd")
    corpus, test = (make.output / name for name in ("coarsewsd.txt", "coarsewsd-test.txt"))
    for path, part in ((corpus, "train"), (test, "test")):
        if not path.exists():  # its modification time is part of cache keys
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [f"{text}\n" for word in words(source) for text in read_contexts(source, word, part).texts]
            path.write_text("".join(lines), encoding="utf-8")
    cache = make.cache("coarsewsd", str(corpus))
    main = cache.dictionary(20)
    own = students(cache, main, tuple(STUDENTS), epochs=3)
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
    # a fine-tuned teacher is further from its first layers: larger steps overshoot
    own = students(cache, main, TWO_OUTPUTS, lr=3e-4)
    models = ["teacher", f"replaced=replaced:{main}", f"replaced, hard=replaced:{main},hard", *own]
    models += replaced(own, "soft")
    results = make.evaluate("sst2", models, [f"classifier:sst2={source}"], teacher=tuned["teacher"])
    title = "sst2 (classifier)"
    accuracy = Figure("sst2, fine-tuned teacher: accuracy", _result(results, title, "teacher").score)
    return [accuracy, _loss(results, title, "replaced", 0.5), _loss(results, title, "layers2", 3.0)]


def _result(results: Evaluation, title: str, model: str) -> Result:
    row = results.rows(title)[model]
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
    add, folder = parser.add_argument, lambda name: Path(name).absolute()
    add("names", nargs="*", metavar="NAME", help=f"results: {', '.join(NAMES)} (default: all)")
    add("--data", required=True, type=folder, metavar="DIR", help="folder of the data sets")
    add("--output", default="runs/results", type=folder, metavar="DIR", help="output folder (default: runs/results)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one per core")
    add("--model2vec-python", metavar="FILE", help="Python with model2vec, to include it")
    make = parser.parse_args(namespace=Maker())
    if unknown := [name for name in make.names if name not in NAMES]:
        raise InputError(f"unknown result {unknown[0]!r}: use {', '.join(NAMES)}")
    figures = [figure for name in make.names or NAMES for figure in NAMES[name](make)]
    rows = [(f.what, f"{f.value:.4g}  {f.bar}  {VERDICTS[f.is_met]}".rstrip()) for f in figures]
    show_table("Results", rows)
    sys.stdout.write(json.dumps({figure.what: float(f"{figure.value:.4g}") for figure in figures}) + "\n")


if __name__ == "__main__":
    sys.exit(run_job(main))
