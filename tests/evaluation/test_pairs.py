"""Pairs of texts with scores or labels, by msense and by mteb, on models with known vectors."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics
from task_data import Encoder

from msense.corpus.labelled import Columns
from msense.errors import InputError
from msense.evaluation.result import Result, difference
from msense.evaluation.spec import TaskSpec
from msense.evaluation.tasks import mteb, mteb_vectors, pairs

Write = Callable[..., str]
MEASURES = {"similarity": pairs.measure_similarity, "pairs": pairs.measure_pairs}


def by_angle(text: str) -> list[float]:
    return [math.cos(float(text)), math.sin(float(text))]


def by_mteb(model: Encoder, source: str, kind: str) -> Result:
    return mteb_vectors.measure(model, TaskSpec("own", "mteb", source, of=kind), None)  # type: ignore[arg-type]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def call(labels: object, first: str = "s1", second: str = "s2", label: str = "score", split: str = "test") -> str:
        table = pd.DataFrame({first: "0", second: [f"{i / 10:g}" for i in range(len(labels))], label: labels})  # type: ignore[arg-type]
        table.to_csv(tmp_path / f"{split}.csv", index=False)
        return str(tmp_path)

    return call


def test_scores_are_correlated_with_cosines(write: Write) -> None:
    scores = [5.0, 3.5, 3.5, 0.0, 1.0]
    result = pairs.measure_similarity(Encoder(by_angle), write(scores), "test")
    assert (result.metric, result.over, result.gold) == ("Spearman", "pairs", scores)
    assert result.score == pytest.approx(stats.spearmanr(scores, [5, 4, 3, 2, 1])[0])
    reverse = pairs.measure_similarity(Encoder(lambda text: by_angle(f"-{3 - float(text)}" if text != "0" else text)),
                                       write(scores), "test")  # fmt: skip
    gain, low, high = difference(result, reverse)
    assert gain == pytest.approx(result.score - reverse.score)
    assert low < gain < high


def test_labels_are_ranked_by_cosines(write: Write) -> None:
    result = pairs.measure_pairs(Encoder(by_angle), write([1, 1, 0, 1, 0, 0], label="label"), "test")
    assert (result.metric, result.over, result.gold) == ("average precision", "pairs", [1, 1, 0, 1, 0, 0])
    assert result.score == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert result.more == {"best accuracy": pytest.approx(5 / 6), "best F1": pytest.approx(6 / 7)}
    a, b = (Result("average precision", "pairs", gold=[0, 1] * 20, found=own) for own in ([0.0, 1] * 20, [1.0, 1] * 20))
    gain, low, high = difference(a, b)
    assert (gain, a.score) == (pytest.approx(0.5), 1.0)
    assert 0.3 < low < gain < high < 0.7


@pytest.mark.parametrize("kind", ["similarity", "pairs"])
def test_mteb_has_the_same_scores(kind: str, write: Write) -> None:
    rng = np.random.default_rng(0)
    cosines = np.round(np.cos(np.arange(80) / 10), 1)  # with equal ones
    labels = (
        rng.integers(0, 6, 80) / 2 + cosines
        if kind == "similarity"
        else (rng.random(80) < 0.5 + cosines / 3).astype(int)
    )
    source = write(labels, label="label")
    model = Encoder(lambda text: [c := round(math.cos(float(text)), 1), math.sqrt(1 - c * c)])
    ours, theirs = MEASURES[kind](model, source, "test"), by_mteb(model, source, kind)
    assert 0.3 < ours.score < 0.99
    assert (theirs.metric, theirs.over, theirs.gold) == (ours.metric, ours.over, ours.gold)
    assert theirs.score == pytest.approx(ours.score, abs=1e-3)
    np.testing.assert_allclose(theirs.found, ours.found, atol=1e-6)
    assert theirs.more == pytest.approx(ours.more, abs=1e-3)


def test_columns_and_splits(write: Write) -> None:
    for first, second, label in (("sentence1", "sentence2", "label"), ("text1", "text2", "score")):
        source = write([2, 1], first, second, label)
        assert pairs.read_pairs(source, "test", "similarity").gold.tolist() == [2, 1]
    source = write([1, 0, 1], "a", "b", "c", "dev")
    assert pairs.read_pairs(source, "dev", "pairs", Columns(("b", "a"), "c")).first == ["0", "0.1", "0.2"]
    table = pd.read_csv(Path(source) / "dev.csv")
    (Path(source) / "dev.csv").unlink()
    table.rename(columns={"a": "s1", "b": "s2", "c": "labels"}).to_parquet(Path(source) / "dev-0000.parquet")
    assert pairs.read_pairs(source, "dev", "pairs").gold.tolist() == [1, 0, 1]
    assert pairs.read_pairs(write([True, False, True]), "test", "pairs").gold.tolist() == [1, 0, 1]
    assert pairs.read_pairs(write(["false", "1.0"]), "test", "pairs").gold.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("labels", "columns", "kind", "message"),
    [
        (
            [1, 2],
            {"label": "value"},
            "similarity",
            r"no column score or label; available: 's1', 's2', 'value'; .*--pair-columns",
        ),
        ([1, 2], {"second": "s3"}, "pairs", "no pair of columns s1/s2, sentence1/sentence2, text1/text2"),
        ([1, "x"], {}, "similarity", "column 'score': 'x' is no number"),
        ([1, "NaN"], {}, "similarity", "row 1 is NaN"),
        ([3, 3], {}, "similarity", "all scores are equal"),
        ([0, 2], {}, "pairs", "needs labels 0 and 1, both present"),
        ([1, 1], {}, "pairs", "needs labels 0 and 1, both present"),
        ([], {}, "pairs", "is empty"),
    ],
)
def test_invalid_pairs_are_refused(labels: list, columns: dict, kind: str, message: str, write: Write) -> None:
    with pytest.raises(InputError, match=message):
        pairs.read_pairs(write(labels, **columns), "test", kind)


@pytest.mark.parametrize(("name", "kind"), [("STSBenchmark", "similarity"), ("SprintDuplicateQuestions", "pairs")])
def test_tasks_of_mteb_are_measured(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, DatasetDict

    texts = {"sentence1": ["0"] * 4, "sentence2": ["0", "1", "2", "3"]}
    labels = {"score": [4.0, 1.0, 2.0, 0.0], "labels": [1, 0, 1, 0]}
    columns = texts | labels if kind == "similarity" else {key: [own] for key, own in (texts | labels).items()}
    data = DatasetDict(test=Dataset.from_dict(columns))
    monkeypatch.setattr("mteb.abstasks.abstask.load_dataset", lambda **_: data)
    monkeypatch.setattr(mteb.task_class(name), "dataset_transform", lambda *_, **__: None)
    task = mteb.with_kind(TaskSpec(name, "mteb", ""))
    assert task.of == kind
    result = mteb_vectors.measure(Encoder(by_angle), task, None)
    cosines = [math.cos(i) for i in range(4)]
    wanted = {
        "similarity": stats.spearmanr(labels["score"], cosines)[0],
        "pairs": metrics.average_precision_score(labels["labels"], cosines),
    }
    assert result.score == pytest.approx(wanted[kind])
    assert ("max_ap" in result.more) == (kind == "pairs")
