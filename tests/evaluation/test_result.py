"""Results: metrics with known values, the paired bootstrap against a plain one, and invalid JSON."""

from dataclasses import replace

import numpy as np
import pytest

from msense.evaluation import result
from msense.evaluation.result import Result, comparable, difference
from msense.metrics import METRICS


def draws(*values: float) -> Result:
    return Result("accuracy", "draws", list(values))


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
    gold, a, b = (rng.normal(size=n) if metric == "Pearson" else rng.integers(0, 3, n).astype(str) for _ in range(3))
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


def test_weights_count_in_the_bootstrap() -> None:
    ours, theirs = (Result("s", "sets", [v, 0.5], [1000.0, 1.0]) for v in (0.9, 0.1))
    gain, _, high = difference(ours, theirs)
    assert gain == pytest.approx(0.8 * 1000 / 1001)
    assert high == pytest.approx(0.8)
    ours, theirs = (Result("s", "sets", [0.0, value], [0.0, 2.0]) for value in (0.6, 0.4))
    assert difference(ours, theirs) == pytest.approx((0.2, 0.2, 0.2))  # zero weights are not drawn


@pytest.mark.parametrize(
    "changes",
    [
        {"names": ["b", "a"]},
        {"names": None},
        {"weights": [1.0, 2.0]},
        {"values": [0.1, 0.9, 0.3], "names": ["a", "b", "c"]},
        {"over": "draws"},
        {"metric": "t"},
        {"metric": "accuracy", "values": [], "gold": ["a", "b"], "found": ["a", "b"]},
    ],
)
def test_results_of_different_tasks_are_not_compared(changes: dict) -> None:
    own = Result("s", "words", [0.9, 0.1], names=["a", "b"])
    other = replace(own, **changes)
    assert comparable(own, own)
    assert not comparable(own, other)
    with pytest.raises(ValueError, match="not of the same task"):
        difference(own, other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": [True, 1.0]}, "values"),
        ({"values": []}, "0 values"),
        ({"weights": [1.0]}, "another number of weights or names"),
        ({"names": ["a"]}, "another number of weights or names"),
        ({"weights": [0.0, 0.0]}, "all 0"),
        ({"weights": [2.0, -1.0]}, "negative"),
        ({"more": {"a": "b"}}, "more"),
        ({"gold": ["a"], "found": ["a"]}, "do not match"),
        ({"metric": "accuracy", "gold": ["a", "b"], "found": ["a"]}, "do not match"),
        ({"metric": "accuracy", "gold": ["a"], "found": None}, "do not match"),
        ({"metric": "accuracy", "gold": [], "found": []}, "do not match"),
    ],
)
def test_invalid_json_is_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Result.from_json(Result("s", "sets", [0.5, 1.0]).to_json() | changed)
