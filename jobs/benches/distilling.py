"""Students against their teacher: sentence vectors, senses, other objectives, text of another kind.

In: Banking77; for `ood` also the text of --corpus. Dictionary and students are made by the jobs, of training texts only,
into the output folder, which keeps them. Out: few-shot accuracy of teacher and students, as they are and with every token
replaced by its sense, and how often a student picks the teacher's sense. Holds vectors of all texts.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benches.few_shot import Task, few_shot, read_task
from benches.senses import MORE, Reader, pooled
from benches.shared import Bench, Figures, model2vec
from benches.workshop import Made, Workshop
from msense import SenseDictionary, SenseEncoder
from msense.distill_config import DistillConfig
from msense.errors import BadInput
from msense.evaluation.result import Result, difference
from msense.losses import frequent_sense_accuracy
from msense.student import load_student
from msense.teacher import TOKEN_BUDGET, pad_batch, token_batches

logger = logging.getLogger("msense.bench")

STUDENTS = {"layers2": "layers:2", "static": "static"}
OBJECTIVE = {"sense": 1.0, "pooled": 100.0, "replaced": 100.0}  # what the README's figures are of
RECIPES: dict[str, dict[str, Any]] = {
    "pooled": {"objective": {"pooled": 1.0}},
    "mse": {"objective": {"mse": 1.0}},
    "reference": {"reference": True, "epochs": DistillConfig.model_fields["epochs"].default},
}
REPLACED = {"": None, "_replaced": "soft", "_replaced_hard": "hard"}


def bench_shop(bench: Bench, name: str, corpus: str) -> Workshop:
    """Return the workshop of a benchmark's text, beside the shared run."""
    return Workshop(Path(f"{bench.run.root}-{name}"), [corpus], bench.workers)


def distill(bench: Bench) -> Figures:
    """Students of Banking77's training texts, by one objective of ours and by others."""
    task = read_task(bench.data("banking77"))
    shop = bench_shop(bench, "banking77", str(bench.data("banking77") / "train.csv"))
    dictionary = shop.dictionary(MORE)
    read, teacher = _teacher(bench, task)
    figures: Figures = {"distill.teacher": teacher.score}
    ours: dict[str, Result] = {}
    for name, kind in STUDENTS.items():
        made = shop.student(dictionary, name, student=kind, objective=OBJECTIVE)
        for how, replace in REPLACED.items():
            found = _accuracy(made, task, replace)
            ours[name + how] = found
            figures[f"distill.{name}{how}"] = found.score
            figures[f"distill.gap_{name}{how}"] = 100 * (teacher.score - found.score)
        figures[f"distill.sense_acc_{name}"] = made.metrics["held_out_accuracy"]
        figures[f"distill.sense_frequent_{name}"] = made.metrics["held_out_frequent"]
        test = _test_senses(made, read, SenseDictionary.load(dictionary / "dictionary"))
        figures[f"distill.sense_acc_test_{name}"], figures[f"distill.sense_frequent_test_{name}"] = test
    for recipe, settings in RECIPES.items():
        made = shop.student(dictionary, f"layers2-{recipe}", student=STUDENTS["layers2"], **settings)
        found = _accuracy(made, task, "hard" if recipe == "reference" else None)  # the paper's students are replaced
        figures[f"distill.layers2_{recipe}"] = found.score
        if recipe == "reference":
            figures["distill.layers2_reference_plain"] = _accuracy(made, task, None).score
        figures |= _over(f"over_{recipe}", ours["layers2"], found)
    return figures


def ood(bench: Bench) -> Figures:
    """Students of another kind of text, tested on Banking77."""
    task = read_task(bench.data("banking77"))
    if len(bench.config.corpus) != 1:
        raise BadInput(f"ood takes one --corpus, not {len(bench.config.corpus)}: give a folder or a glob of all files")
    shop = bench_shop(bench, "ood", bench.config.corpus[0])
    _, teacher = _teacher(bench, task)
    figures: Figures = {"distill.ood_teacher": teacher.score}
    dictionary = shop.dictionary("auto")
    known, means = _means(SenseDictionary.load(dictionary / "dictionary"))
    ways = [(normalize, special) for normalize in (False, True) for special in (False, True)]
    tables = {way: _table(bench, task, (known, means), *way) for way in ways}
    best = max(tables.values(), key=lambda found: found.score)
    figures |= {
        "distill.ood_table": best.score,
        "distill.ood_table_as_teacher": tables[True, True].score,
    }
    for name, kind in reversed(STUDENTS.items()):
        made = shop.student(dictionary, name, student=kind, objective=OBJECTIVE)
        for how, replace in REPLACED.items():
            found = _accuracy(made, task, replace)
            figures[f"distill.ood_{name}{how}"] = found.score
            if replace is None:
                figures |= _over(f"ood_{name}_over_table", found, best)
    with model2vec(bench) as peer:
        vectors = {} if peer is None else {part: peer.encode(texts) for part, texts in task.texts.items()}
    if vectors:
        figures["distill.ood_model2vec"] = few_shot(vectors, task.labels).score
    return figures


def _over(key: str, ours: Result, theirs: Result) -> Figures:
    """Return by how many points one accuracy exceeds another on the same draws, and its 95 % interval."""
    told = zip(("", "_low", "_high"), difference(ours, theirs), strict=True)
    return {f"distill.{key}{end}": 100 * value for end, value in told}


def _teacher(bench: Bench, task: Task) -> tuple[Any, Result]:
    """Read the texts with the teacher; return the test part token by token, and the accuracy of every draw."""
    reader = Reader(bench)
    parts = {part: reader.read(reader.tokenizer.encode_batch(texts)) for part, texts in task.texts.items()}
    vectors = {part: pooled(read.embeddings.astype(np.float32), read.offsets) for part, read in parts.items()}
    return parts["test"], few_shot(vectors, task.labels)


def _accuracy(made: Made, task: Task, replace: Any) -> Result:  # noqa: ANN401 - how tokens are replaced
    encoder = SenseEncoder.from_pretrained(made.folder)
    vectors = {part: np.asarray(encoder.encode(texts, replace=replace)) for part, texts in task.texts.items()}
    found = few_shot(vectors, task.labels)
    logger.info("%s, replaced %s: %.4f", made.folder.name, replace, found.score)
    return found


@torch.no_grad()
def _test_senses(made: Made, read: Any, dictionary: SenseDictionary) -> tuple[float, float]:  # noqa: ANN401
    """How often a student picks the teacher's sense of a test text's token, and how often that is the most frequent."""
    student = load_student(made.folder)
    wanted = dictionary.assign(read.ids, read.embeddings)
    found = np.full(len(wanted), -2)
    for batch in token_batches(np.diff(read.offsets), TOKEN_BUDGET["cpu"]):
        rows = [np.arange(read.offsets[i], read.offsets[i + 1]) for i in batch]
        ids, mask = (torch.from_numpy(x) for x in pad_batch([read.ids[row] for row in rows]))
        output = student(ids.long(), mask)
        places = np.concatenate(rows)
        found[places] = dictionary.assign(torch.from_numpy(read.ids[places]), output.senses[mask]).numpy()
    known = wanted >= 0
    frequent = frequent_sense_accuracy(read.ids[known], wanted[known].astype(np.uint16), dictionary)
    return float((found == wanted)[known].mean()), float(frequent.total) / frequent.count


def _means(dictionary: SenseDictionary) -> tuple[np.ndarray, np.ndarray]:
    """Return which tokens have points, bool [V], and the mean of each one's points [V, D]: a dictionary of one sense each."""
    sizes = np.diff(dictionary.offsets)
    token = np.repeat(np.arange(len(sizes)), sizes)
    sums = np.zeros((len(sizes), dictionary.dim))
    np.add.at(sums, token, dictionary.centroids.double().numpy() * np.asarray(dictionary.counts)[:, None])
    points = np.bincount(token, np.asarray(dictionary.counts), len(sizes))
    return points > 0, sums / np.maximum(points, 1)[:, None]


def _table(bench: Bench, task: Task, table: tuple[np.ndarray, np.ndarray], normalize: bool, special: bool) -> Result:
    """Accuracies of the mean of a text's token means, with special tokens or not; tokens without one are left out."""
    tokenizer, vectors = Reader(bench).tokenizer, {}
    known, means = table
    for part, texts in task.texts.items():
        rows = [np.array(found.ids) for found in tokenizer.encode_batch(texts, add_special_tokens=special)]
        mean = np.stack([means[row[known[row]]].mean(0) for row in rows])
        vectors[part] = mean / np.linalg.norm(mean, axis=1, keepdims=True) if normalize else mean
    return few_shot(vectors, task.labels)
