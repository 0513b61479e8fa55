"""Results: metrics with known values, the paired bootstrap against a plain one, and invalid JSON."""

import json

import numpy as np
import pytest

from msense.evaluation import result
from msense.evaluation.result import Result, comparable, difference
from msense.metrics import METRICS


def draws(*values: float) -> Result:
    return Result("accuracy", "draws", list(values))


def labels(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    return rng.integers(0, k, n).astype(str)


def test_score_is_the_weighted_mean_and_deviation_is_over_draws() -> None:
    assert draws(0.5, 0.7, 0.9).score == pytest.approx(0.7)
    assert draws(0.5, 0.7, 0.9).deviation == pytest.approx(0.2)
    weighted = Result("Spearman", "sets", [0.2, 0.8], [3.0, 1.0])
    assert (weighted.score, weighted.deviation) == (pytest.approx(0.35), None)


@pytest.mark.parametrize(
    ("metric", "gold", "found", "wanted"),
    [
        ("accuracy", ["a", "b", "b", "a"], ["a", "b", "a", "a"], 0.75),
        ("F1", ["0", "1", "1", "0"], ["1", "1", "0", "0"], 0.5),
        ("F1", ["0", "0"], ["0", "0"], 0.0),
        ("macro F1", ["a", "a", "b", "b"], ["a", "a", "b", "a"], (0.8 + 2 / 3) / 2),
        ("Matthews", ["0", "1", "1", "0"], ["0", "1", "1", "0"], 1.0),
        ("Matthews", ["0", "1", "1", "0"], ["1", "0", "0", "1"], -1.0),
        ("Pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 1.0),
        ("Spearman", [1.0, 2.0, 3.0], [9.0, 4.0, 1.0], -1.0),
        ("Pearson", [1.0, 2.0], [3.0, 3.0], 0.0),
    ],
)
def test_metrics_have_known_values(metric: str, gold: list, found: list, wanted: float) -> None:
    assert Result(metric, "texts", gold=gold, found=found).score == pytest.approx(wanted)


@pytest.mark.parametrize("metric", ["accuracy", "macro F1", "F1", "Matthews", "Pearson"])
def test_bootstrap_over_texts_equals_scoring_every_resample(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "RESAMPLES", 60)
    rng, n, of = np.random.default_rng(5), 50, METRICS[metric]
    gold, a, b = (rng.normal(size=n) if metric == "Pearson" else labels(rng, n, 3) for _ in range(3))
    ours, theirs = (Result(metric, "texts", gold=gold.tolist(), found=own.tolist()) for own in (a, b))
    samples = np.random.default_rng(7).integers(0, n, (60, n))
    gains = [of(gold[rows], a[rows]) - of(gold[rows], b[rows]) for rows in samples]
    wanted = (of(gold, a) - of(gold, b), *np.quantile(gains, [0.025, 0.975]))
    assert difference(ours, theirs, 7) == pytest.approx(wanted, abs=1e-12)


def test_pairing_removes_noise_common_to_both_models() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 10)
    ours, theirs = draws(*(0.7 + noise + rng.normal(0, 0.002, 10))), draws(*(0.65 + noise))
    gain, low, high = difference(ours, theirs)
    assert gain == pytest.approx(ours.score - theirs.score)
    assert 0.045 < low <= gain <= high < 0.055
    assert difference(ours, ours) == (0.0, 0.0, 0.0)


def test_resampling_does_not_depend_on_the_order_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "RESAMPLES", 100)
    rng = np.random.default_rng(2)
    gold, a, b = (labels(rng, 80, 3) for _ in range(3))
    by_text = [Result("macro F1", "texts", gold=gold.tolist(), found=own.tolist()) for own in (a, b)]
    by_set = [Result("Spearman", "sets", rng.random(12).tolist(), [9.0, 1.0, 4.0, 2.0] * 3) for _ in range(2)]
    for ours, theirs in (by_text, by_set):
        gain, low, high = difference(ours, theirs, 3)
        assert low < gain < high
        assert difference(theirs, ours, 3) == pytest.approx((-gain, -high, -low), abs=1e-12)
        assert difference(ours, theirs, 4) != (gain, low, high)


@pytest.mark.parametrize("over", ["draws", "texts"])
def test_intervals_contain_a_planted_gain(over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "RESAMPLES", 400)
    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        if over == "draws":
            common = rng.normal(0.7, 0.1, 30)
            own = [draws(*(common + rng.normal(by, 0.02, 30))) for by in (0.05, 0.0)]
        else:
            right = [rng.random(300) < p for p in (0.85, 0.80)]
            own = [Result("accuracy", over, gold=["1"] * 300, found=np.where(r, "1", "0").tolist()) for r in right]
        _, low, high = difference(own[0], own[1], seed)
        held += low <= 0.05 <= high
    assert held >= 34  # of 95 %; percentile intervals of few draws are slightly narrow


def test_weights_count_in_the_bootstrap() -> None:
    ours, theirs = (Result("s", "sets", [v, 0.5], [1000.0, 1.0]) for v in (0.9, 0.1))
    gain, _, high = difference(ours, theirs)
    assert gain == pytest.approx(0.8 * 1000 / 1001)
    assert high == pytest.approx(0.8)
    ours, theirs = (Result("s", "sets", [0.0, value], [0.0, 2.0]) for value in (0.6, 0.4))
    assert difference(ours, theirs) == pytest.approx((0.2, 0.2, 0.2))  # zero weights are not drawn


@pytest.mark.parametrize(
    "other",
    [
        Result("s", "words", [0.1, 0.9], names=["b", "a"]),
        Result("s", "words", [0.1, 0.9]),
        Result("s", "words", [0.1, 0.9], [1.0, 2.0], ["a", "b"]),
        Result("s", "words", [0.1, 0.9, 0.3], names=["a", "b", "c"]),
        Result("s", "draws", [0.1, 0.9], names=["a", "b"]),
        Result("t", "words", [0.1, 0.9], names=["a", "b"]),
        Result("accuracy", "words", gold=["a", "b"], found=["a", "b"], names=["a", "b"]),
    ],
)
def test_results_of_different_tasks_are_not_compared(other: Result) -> None:
    own = Result("s", "words", [0.9, 0.1], names=["a", "b"])
    assert comparable(own, own)
    assert not comparable(own, other)
    with pytest.raises(ValueError, match="not of the same task"):
        difference(own, other)


@pytest.mark.parametrize(
    "own",
    [
        Result("accuracy", "texts", gold=["a", "b"], found=["a", "a"], more={"macro F1": 1 / 3, "pairs": 3}),
        Result("Pearson", "texts", gold=[1.5, 2.0], found=[1.0, 3.0]),
        Result("s", "sets", [0.5, 1.0], [3.0, 0.0], ["a", "b"]),
    ],
)
def test_json_round_trip_of_every_kind(own: Result) -> None:
    loaded = Result.from_json(json.loads(json.dumps(own.to_json())))
    assert loaded == own
    assert {name: type(value) for name, value in loaded.more.items()} == {n: type(v) for n, v in own.more.items()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": "abc"}, "values"),
        ({"values": ["x", 1.0]}, "values"),
        ({"values": [True, 1.0]}, "values"),
        ({"values": []}, "0 values"),
        ({"weights": [1.0]}, "another number of weights or names"),
        ({"names": ["a"]}, "another number of weights or names"),
        ({"weights": [0.0, 0.0]}, "all 0"),
        ({"weights": [2.0, -1.0]}, "negative"),
        ({"more": [1.0]}, "more"),
        ({"more": {"a": "b"}}, "more"),
        ({"metric": 3}, "metric"),
        ({"gold": ["a"], "found": ["a"]}, "do not match"),
        ({"metric": "accuracy", "gold": ["a", "b"], "found": ["a"]}, "do not match"),
        ({"metric": "accuracy", "gold": ["a"], "found": None}, "do not match"),
        ({"metric": "accuracy", "gold": [], "found": []}, "do not match"),
    ],
)
def test_invalid_json_is_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Result.from_json(Result("s", "sets", [0.5, 1.0]).to_json() | changed)
