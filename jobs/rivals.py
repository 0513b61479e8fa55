"""Compare msense's students with models of other libraries, like for like: `python jobs/rivals.py --data DATA [NAME ...]`.

For every data set, all are distilled from the same teacher's vectors of the same texts (its passages and their spans) for as many
epochs. A table per set has the paired differences of the students to every model, and the last line of the output has all
scores as one JSON object. DATA contains retrieval/NAME/ (documents, queries, judgements), NAME/ (csv of text and label) or
sts/NAME/ (csv of two sentences and their similarity).
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from benchmarks import rival_models
from benchmarks.artifacts import ArtifactCache, made_once
from benchmarks.rival_models import LEARNING_RATES, RivalModels
from benchmarks.sets import (
    DEFAULT_SETS,
    STUDENTS,
    TextSet,
    as_models,
    distill_all,
    evaluate_models,
    open_set,
    open_similarity,
    score,
)
from benchmarks.texts import export_texts
from tokenizers import Tokenizer

from msense.cli.console import run_job, show_table
from msense.constants import DEMO_TEACHER
from msense.dictionary import DictionaryFiles
from msense.errors import InputError
from msense.evaluation.report import Evaluation, TaskReport, difference_to_baseline
from msense.evaluation.result import Result
from msense.run.folder import RunFolder
from msense.teacher.files import body_folder
from msense.training.label_dataset import LabelSet

RIVALS = {
    "st-table": "sentence-transformers' StaticEmbedding, trained from random vectors by its own trainer and cosine loss",
    "st-table-warm": "the same from model2vec's vectors (--model2vec-python)",
    "st-minilm-2": "the teacher's first two layers, trained by sentence-transformers; about a third of the time",
    "model2vec": "distilled from the teacher without texts (--model2vec-python)",
    "tokenlearn": "a model2vec table that tokenlearn trains until it stops improving (--tokenlearn-python)",
    "wordllama": "the model in that package, of another teacher and other texts (--tokenlearn-python)",
}
LEAST_SAME = 0.99  # share of the texts that must be tokenized as the students' are
logger = logging.getLogger("msense.rivals")
Figures = dict[str, float]


class Comparison(argparse.Namespace):
    """The command line's settings; makes and evaluates models in the folder `output`."""

    @cached_property
    def rivals(self) -> list[str]:
        """Models of other libraries that can be made here and are not left out."""
        reasons = rival_models.obstacles(self.model2vec_python, self.tokenlearn_python)
        wanted = {name: reason for name, reason in reasons.items() if name not in self.without}
        for name, reason in wanted.items():
            if reason:
                logger.warning("%s is left out: %s", name, reason)
        return [name for name, reason in wanted.items() if not reason]

    def models(self, name: str, corpus: Sequence[str]) -> tuple[list[str], float]:
        """Return students and rivals of a text, and the share of the texts that rivals read as the students do."""
        cache = ArtifactCache(self.output / name, corpus, self.workers)
        students = distill_all(cache, [own for own in STUDENTS if own not in self.without], epochs=self.epochs)
        tokenizer = DictionaryFiles(Path(RunFolder(str(cache.dictionary("auto"))).dictionary)).tokenizer
        labels = LabelSet.open(str(next(iter(students.values()))))

        def export(new: Path) -> None:
            share = export_texts(labels, Tokenizer.from_file(str(tokenizer)), new)
            (new / "same.json").write_text(json.dumps(share))

        texts = made_once(self.output / name / "texts", {"labels": labels.manifest.inputs_hash}, export)
        same = float(json.loads((texts / "same.json").read_text()))
        level = logging.INFO if same >= LEAST_SAME else logging.WARNING
        logger.log(level, "%s: rivals read %.2f %% of the texts as the same tokens as the students", name, 100 * same)
        make = RivalModels(
            folder=self.output / name,
            shared=self.output / "without-texts",
            texts=texts,
            teacher=body_folder(DEMO_TEACHER, None),
            tokenizer=tokenizer,
            epochs=self.epochs,
            threads=self.workers,
            model2vec_python=self.model2vec_python,
            tokenlearn_python=self.tokenlearn_python,
        )
        return [*as_models(students), *(word for rival in self.rivals for word in self._rival(make, rival))], same

    def _rival(self, make: RivalModels, name: str) -> list[str]:
        """Return a rival as models of jobs/evaluate.py: one per learning rate."""
        if name in LEARNING_RATES:
            rates = self.lr.get(name, [LEARNING_RATES[name]])
            labels = [name] if len(rates) == 1 else [f"{name} lr {rate:g}" for rate in rates]
            return [f"{label}={make.trained(name, rate)}" for label, rate in zip(labels, rates, strict=True)]
        if name == "model2vec":
            return [name]
        return [f"{name}={make.tokenlearn() if name == 'tokenlearn' else make.wordllama()}"]

    def compare(self, name: str, corpus: Sequence[str], sets: Sequence[TextSet]) -> Figures:
        """Evaluate students and rivals of a text on the tasks of data sets."""
        models, same = self.models(name, corpus)
        lexical = ["bm25"] if any(own.is_retrieval for own in sets) else []
        peer = {"model2vec_python": self.model2vec_python, "workers": self.workers}
        tasks, output = [own.task for own in sets], self.output / f"{name}.json"
        results = evaluate_models(["teacher", *models, *lexical], tasks, output, **peer)
        figures = {f"rivals.{name}.same_tokens": same}
        for task, own in zip(results.tasks, sets, strict=True):
            show_gaps(results, task, [student for student in STUDENTS if student not in self.without])
            prefix = f"rivals.{name}" + ("" if own.name == name else f".{own.name}")
            measured = [row for row, result in task.rows.items() if isinstance(result, Result)]
            figures |= {f"{prefix}.{row}": score(task, row) for row in measured}
        return figures


def show_gaps(results: Evaluation, task: TaskReport, students: Sequence[str]) -> None:
    """Print every model's score, and by how many points each student is above it."""
    rows = []
    for row in results.models:
        if isinstance(result := task.rows[row], Result):
            gaps = [difference_to_baseline(results, task, student, row) for student in students]
            cells = [
                "–" if g is None else f"{100 * g.gain:+.1f} [{100 * g.low:+.1f}, {100 * g.high:+.1f}]" for g in gaps
            ]
            rows.append([row, f"{result.score:.3f}", *cells])
    head = ["model", "score", *(f"{student} above it" for student in students)]
    show_table(f"{task.name}: points above each model, with 95 % intervals", rows, head)


def parse(argv: Sequence[str] | None = None) -> Comparison:
    """Parse the command line; InputError for unknown names."""
    listed = "\n".join(f"  {name:<15}{what}" for name, what in RIVALS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"models of other libraries:\n{listed}\n\nThe default takes less than an hour on two cores. To save time, name "
        "fewer sets, lower --epochs,\nor leave out st-minilm-2 and layers2, which take two thirds of it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, folder = parser.add_argument, lambda name: Path(name).absolute()
    add("names", nargs="*", metavar="NAME", help=f"data sets (default: {' '.join(DEFAULT_SETS)})")
    add("--data", required=True, type=folder, metavar="DIR", help="folder of the data sets")
    add(
        "--general",
        nargs="+",
        default=(),
        metavar="URI",
        help="distill from these texts instead of the sets' own, and evaluate on all sets",
    )
    add("--sts", nargs="+", default=(), metavar="NAME", help="with --general, also evaluate on DATA/sts/NAME")
    add("--output", default="runs/rivals", type=folder, metavar="DIR", help="output folder (default: runs/rivals)")
    add("--epochs", type=int, default=5, metavar="N", help="of all students and rivals (default: 5)")
    add("--without", nargs="+", default=(), metavar="MODEL", help=f"leave out: {', '.join((*STUDENTS, *RIVALS))}")
    add("--lr", nargs="+", default=(), metavar="MODEL=LR", help="peak learning rates, to tune: a row for each")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes or threads (default: all cores)",
    )
    add(
        "--model2vec-python",
        metavar="FILE",
        help='Python with `pip install "model2vec[distill,quantization]"`, else left out',
    )
    add("--tokenlearn-python", metavar="FILE", help="Python with `pip install tokenlearn wordllama`, else left out")
    given = parser.parse_args(argv, namespace=Comparison())
    given.names = given.names or DEFAULT_SETS
    given.lr = _rates(given.lr)
    if unknown := [name for name in given.without if name not in (*STUDENTS, *RIVALS)]:
        raise InputError(f"--without {unknown[0]}: no such model; use {', '.join((*STUDENTS, *RIVALS))}")
    if given.sts and not given.general:
        raise InputError("--sts: similarity sets have no text to distill from; give texts as --general")
    if set(STUDENTS) <= set(given.without):
        raise InputError(f"--without {' '.join(STUDENTS)}: keep one of the students")
    return given


def _rates(words: Sequence[str]) -> dict[str, list[float]]:
    """Return the learning rates of `MODEL=LR` by model; InputError if one is invalid."""
    rates: dict[str, list[float]] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            rate = float(value)
        except ValueError:
            rate = 0.0
        if name not in LEARNING_RATES or not 0 < rate < float("inf"):
            raise InputError(
                f"--lr {word}: use MODEL=LR, such as st-table=0.1, with MODEL one of {', '.join(LEARNING_RATES)}"
            )
        rates.setdefault(name, []).append(rate)
    return rates


def main() -> None:
    """Compare on the requested data sets and print the scores as one JSON object."""
    run = parse()
    sets = [open_set(run.data, name, run.output / name) for name in run.names]
    figures: Figures = {}
    if run.general:
        figures = run.compare("general", run.general, [*sets, *(open_similarity(run.data, word) for word in run.sts)])
    else:
        for own in sets:
            figures |= run.compare(own.name, [own.corpus], [own])
    sys.stdout.write(json.dumps({key: float(f"{value:.4g}") for key, value in figures.items()}) + "\n")


if __name__ == "__main__":
    sys.exit(run_job(main))
