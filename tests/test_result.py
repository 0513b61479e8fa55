"""Results with fresh eyes: metrics beside scikit-learn's, the bootstrap beside a plain one, what is never compared or read."""

from collections.abc import Callable

import numpy as np
import pytest
from sklearn import metrics

from msense.evaluation import result
from msense.evaluation.result import METRICS, Result, comparable, difference

SKLEARN: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": metrics.accuracy_score,
    "macro F1": lambda gold, found: metrics.f1_score(gold, found, average="macro", zero_division=0),
    "F1": lambda gold, found: metrics.f1_score(gold == "1", found == "1", zero_division=0),
    "Matthews": metrics.matthews_corrcoef,
}


def labels(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    return rng.integers(0, k, n).astype(str)


@pytest.mark.filterwarnings("ignore:A single label")
@pytest.mark.parametrize("metric", SKLEARN)
@pytest.mark.parametrize(("n", "classes", "known"), [(1, 2, 2), (40, 2, 2), (40, 2, 1), (300, 7, 4), (60, 3, 9)])
def test_metrics_of_labels_are_those_of_scikit_learn(metric: str, n: int, classes: int, known: int) -> None:
    rng = np.random.default_rng(n + classes)
    for _ in range(20):
        gold, found = labels(rng, n, classes), labels(rng, n, known)
        assert METRICS[metric](gold, found) == pytest.approx(SKLEARN[metric](gold, found), abs=1e-12)


@pytest.mark.parametrize("metric", [*SKLEARN, "Pearson"])
@pytest.mark.filterwarnings("ignore:A single label")
def test_the_bootstrap_is_that_of_all_texts_one_by_one(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "RESAMPLES", 200)
    rng = np.random.default_rng(5)
    n = 50
    gold, a, b = (rng.normal(size=n) if metric == "Pearson" else labels(rng, n, 3) for _ in range(3))
    ours, theirs = (Result(metric, "texts", gold=gold.tolist(), found=own.tolist()) for own in (a, b))
    of = METRICS[metric] if metric == "Pearson" else SKLEARN[metric]
    plain, drawn = np.random.default_rng(7), []
    for _ in range(result.RESAMPLES):
        rows = plain.integers(0, n, n)
        drawn.append(of(gold[rows], a[rows]) - of(gold[rows], b[rows]))
    wanted = (of(gold, a) - of(gold, b), *np.quantile(drawn, [0.025, 0.975]))
    assert difference(ours, theirs, 7) == pytest.approx(wanted, abs=1e-12)


def test_samples_are_the_same_whichever_model_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "RESAMPLES", 200)
    rng = np.random.default_rng(2)
    gold, a, b = (labels(rng, 80, 3) for _ in range(3))
    by_text = [Result("macro F1", "texts", gold=gold.tolist(), found=own.tolist()) for own in (a, b)]
    by_draw = [Result("accuracy", "draws", rng.random(9).tolist()) for _ in range(2)]
    by_set = [Result("Spearman", "sets", rng.random(12).tolist(), [9.0, 1.0, 4.0, 2.0] * 3) for _ in range(2)]
    for ours, theirs in (by_text, by_draw, by_set):
        gain, low, high = difference(ours, theirs, 3)
        assert low < gain < high
        assert difference(theirs, ours, 3) == pytest.approx((-gain, -high, -low), abs=1e-12)
        assert difference(ours, theirs, 4) != (gain, low, high)


@pytest.mark.parametrize("over", ["draws", "texts"])
def test_an_interval_holds_the_gain_that_there_is(over: str) -> None:
    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        if over == "draws":
            common = rng.normal(0.7, 0.1, 30)
            own = [Result("accuracy", over, (common + rng.normal(by, 0.02, 30)).tolist()) for by in (0.05, 0.0)]
        else:
            right = [rng.random(300) < p for p in (0.85, 0.80)]
            own = [Result("accuracy", over, gold=["1"] * 300, found=np.where(r, "1", "0").tolist()) for r in right]
        _, low, high = difference(own[0], own[1], seed)
        held += low <= 0.05 <= high
    assert held >= 34  # of 95 %; a bootstrap of few is a little narrow


def test_what_has_no_weight_is_not_drawn() -> None:
    ours, theirs = (Result("s", "sets", [0.0, value], [0.0, 2.0]) for value in (0.6, 0.4))
    assert difference(ours, theirs) == pytest.approx((0.2, 0.2, 0.2))


@pytest.mark.parametrize(
    "other",
    [
        Result("s", "words", [0.1, 0.9], names=["b", "a"]),
        Result("s", "words", [0.1, 0.9]),
        Result("s", "words", [0.1, 0.9], [1.0, 2.0], ["a", "b"]),
        Result("s", "words", [0.1, 0.9, 0.3], names=["a", "b"]),
        Result("s", "draws", [0.1, 0.9], names=["a", "b"]),
        Result("accuracy", "words", gold=["a", "b"], found=["a", "b"], names=["a", "b"]),
    ],
)
def test_what_is_of_other_words_or_weights_is_not_paired(other: Result) -> None:
    own = Result("s", "words", [0.9, 0.1], names=["a", "b"])
    assert comparable(own, own)
    assert not comparable(own, other)
    with pytest.raises(ValueError, match="not of the same task"):
        difference(own, other)


@pytest.mark.parametrize(
    "own",
    [
        Result("accuracy", "texts", gold=["a", "b"], found=["a", "a"], more={"macro F1": 1 / 3}),
        Result("Pearson", "texts", gold=[1.5, 2.0], found=[1.0, 3.0]),
        Result("s", "sets", [0.5, 1.0], [3.0, 0.0], ["a", "b"]),
    ],
)
def test_every_kind_of_result_travels_as_json(own: Result) -> None:
    assert Result.from_json(own.to_json()) == own


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"values": "abc"}, "values of a result are not numbers"),
        ({"values": ["x", 1.0]}, "values of a result are not numbers"),
        ({"values": [True, 1.0]}, "values of a result are not numbers"),
        ({"values": []}, "0 values"),
        ({"weights": [1.0]}, "weights or names of another number"),
        ({"names": ["a"]}, "weights or names of another number"),
        ({"weights": [0.0, 0.0]}, "all 0"),
        ({"weights": [2.0, -1.0]}, "below 0"),
        ({"more": [1.0]}, "more of a result"),
        ({"more": {"a": "b"}}, "more of a result"),
        ({"metric": 3}, "metric or over"),
        ({"gold": ["a"], "found": ["a"]}, "predictions that do not fit"),
        ({"metric": "accuracy", "gold": ["a", "b"], "found": ["a"]}, "predictions that do not fit"),
        ({"metric": "accuracy", "gold": ["a"], "found": None}, "predictions that do not fit"),
        ({"metric": "accuracy", "gold": [], "found": []}, "predictions that do not fit"),
    ],
)
def test_json_that_is_no_result_is_refused(changed: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Result.from_json(Result("s", "sets", [0.5, 1.0]).to_json() | changed)
