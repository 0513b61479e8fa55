"""Numbers of senses: curves against real runs, budgets against the best of all allocations, and builds."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty import Corpus, MakeTeacher
from hypothesis import given, settings
from hypothesis import strategies as st

from msense import SenseDictionary
from msense.clustering.allocation import CURVE_POINTS, GRID, Allocation, Curves, allocate, variance_curves
from msense.clustering.budget import SenseBudget
from msense.clustering.kmeans import KMeansConfig, cluster_tokens
from msense.clustering.mcl import MclConfig, mcl_senses
from msense.config.build import BuildConfig
from msense.constants import Metric
from msense.dictionary.layout import corpus_distortion
from msense.errors import InputError, MsenseError
from msense.io.arrays import load_arrays
from msense.pipelines.build import build_dictionary
from msense.run.folder import RunFolder
from msense.stages.embedding_store import record_type

pytestmark = pytest.mark.usefixtures("in_process")


def mixture(points: int, clusters: int, width: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = 6 * rng.normal(size=(clusters, width)) / np.sqrt(width)
    x = centers[rng.integers(0, clusters, points)] + 0.4 * rng.normal(size=(points, width))
    return x.astype(np.float16)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("n", "clusters"), [(40, 3), (300, 9), (CURVE_POINTS, 25)])
def test_a_curve_is_near_that_of_full_runs(n: int, clusters: int, metric: Metric) -> None:
    points = mixture(n, clusters)
    curve = variance_curves(points, np.array([n]), np.array([3]), KMeansConfig(metric=metric))[0]
    known = max(1, n // 2) >= GRID
    assert np.isnan(curve[~known]).all()
    numbers = GRID[known].tolist()
    configs = [KMeansConfig(k=k, metric=metric) for k in numbers]
    full = np.array([cluster_tokens(points, np.array([n]), np.array([3]), config).inertia[0] for config in configs])
    above = curve[known] * (n - GRID[known]) / full - 1
    assert above[0] == pytest.approx(0, abs=1e-5)  # one sense
    assert np.abs(above).max() < 0.35  # a full run may end in a better optimum, or a worse one
    assert np.median(np.abs(above)) < 0.06
    assert (np.diff(curve[known]) <= 0).all()


def test_curves_of_few_and_of_equal_points() -> None:
    points = np.ones((1 + 2 + 50, 4), np.float16)
    curves = variance_curves(points, np.array([1, 2, 50]), np.arange(3), KMeansConfig())
    assert (np.nan_to_num(curves) == 0).all()
    assert np.isfinite(curves).sum(1).tolist() == [1, 1, (GRID <= 25).sum()]
    points[-1] = np.nan
    with pytest.raises(MsenseError, match="token 2 has an embedding that is NaN"):
        variance_curves(points, np.array([1, 2, 50]), np.arange(3), KMeansConfig())


def distortion(curves: Curves, senses: np.ndarray) -> float:
    """The corpus distortion, where the K of every token is in the grid."""
    variance = curves.variance[np.arange(len(senses)), np.searchsorted(GRID, senses)]
    return float((curves.occurrences * variance * (curves.points - senses) / curves.points).sum())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_other_allocation_of_the_same_size_is_better(data: st.DataObject) -> None:
    """Against all allocations of two or three tokens: convex curves, K up to 4, which are all in the grid."""
    tokens = data.draw(st.integers(2, 3))
    falls = [sorted(data.draw(st.tuples(*[st.floats(0.1, 9)] * 3)), reverse=True) for _ in range(tokens)]
    points = np.array(data.draw(st.lists(st.integers(8, 9), min_size=tokens, max_size=tokens)))
    sums = np.array([np.cumsum([sum(f) + 1, *(-x for x in f)]) for f in falls])  # distortions, convex in K
    variance = np.full((tokens, len(GRID)), np.nan)
    variance[:, :4] = sums / (points[:, None] - GRID[:4])
    occurrences = points * np.array(data.draw(st.lists(st.integers(1, 50), min_size=tokens, max_size=tokens)))
    curves, budget = Curves(points, occurrences, variance), data.draw(st.integers(tokens, 4 * tokens))
    found = allocate(curves, GRID, budget, 8)
    assert found.sum() == budget
    others = (np.array(k) for k in itertools.product(range(1, 5), repeat=tokens) if sum(k) <= budget)
    assert distortion(curves, found) <= min(distortion(curves, k) for k in others) * (1 + 1e-9) + 1e-9
    expected = [(k.sum(), distortion(curves, k) / occurrences.sum()) for k in (np.ones(tokens, int), found)]
    estimated = Allocation(curves, GRID, 8).estimates((0, tokens, budget))
    assert np.array(estimated) == pytest.approx(np.array(list(dict(expected).items())), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    points=st.lists(st.integers(1, 3000), min_size=1, max_size=30),
    average=st.floats(1, 40),
    flat=st.booleans(),
    seed=st.integers(0, 99),
)
def test_an_allocation_keeps_its_bounds(points: list[int], average: float, flat: bool, seed: int) -> None:
    rng, n = np.random.default_rng(seed), np.array(points)
    falling = np.zeros((len(n), len(GRID))) if flat else GRID ** -rng.uniform(0, 2, (len(n), 1))
    known = np.maximum(1, np.minimum(n, CURVE_POINTS) // 2)[:, None] >= GRID
    curves = Curves(n, n * rng.integers(1, 9, len(n)), np.where(known, falling * rng.uniform(0.1, 9), np.nan))
    budget = int(average * len(n))
    found = allocate(curves, GRID, budget, 384)
    assert (found >= 1).all()
    assert (found <= np.maximum(1, n // 2)).all()
    assert found.sum() == (len(n) if flat else min(budget, np.maximum(1, n // 2).sum()))
    order = rng.permutation(len(n))
    moved = allocate(Curves(n[order], curves.occurrences[order], curves.variance[order]), GRID, budget, 384)
    assert (found[order] != moved).sum() <= 2  # except at the edge of the budget, where gains are equal
    with pytest.raises(InputError, match=f"a budget of 0 senses is below one sense for each of {len(n)} tokens"):
        allocate(curves, GRID, 0, 384)


def test_budgets_are_parsed() -> None:
    assert SenseBudget.parse("2.5").senses(10, 384) == 25
    assert SenseBudget.parse("78kB").senses(10, 384) == 100  # 780 bytes per sense
    assert SenseBudget.parse("2 GB") == SenseBudget(size=2 * 10**9)
    for wrong in ("", "0.9", "-3", "10%", "1e3", "5 senses", "nan", "0MB", "60MiB"):
        with pytest.raises(InputError, match="must be"):
            SenseBudget.parse(wrong)
    for average, size in ((0, 0), (0.5, 0), (float("nan"), 0), (float("inf"), 0), (0, -1), (5, 100)):
        with pytest.raises(InputError, match=r"must be an average .* or a size above 0"):
            SenseBudget(average, size)


def test_a_dictionary_in_memory_follows_its_budget() -> None:
    x = np.concatenate([mixture(900, 30), mixture(100, 2, seed=1), mixture(3, 1, seed=2)])
    ids = np.repeat([4, 2, 9], [900, 100, 3])
    budgeted = SenseDictionary.from_embeddings(ids, x, k=SenseBudget(average=12.0))
    sizes = {token: len(budgeted.senses(token).counts) for token in (2, 4, 9)}
    assert sum(sizes.values()) == 36
    assert sizes[4] > 20
    assert sizes[9] == 1
    assert budgeted.config.senses == "auto"
    fixed = SenseDictionary.from_embeddings(ids, x, k=18)  # 18 + 18 + 3 senses: more of them, but worse
    error = [((d.replace(ids, x.astype(np.float32)) - x) ** 2).sum() for d in (budgeted, fixed)]
    assert error[0] < error[1]
    per_token = [corpus_distortion(d._arrays) for d in (budgeted, fixed)]  # all embeddings were clustered
    assert per_token == pytest.approx([e / len(ids) for e in error], rel=1e-3)
    room = SenseBudget(size=40 * (4 * x.shape[1] + 12))
    assert len(SenseDictionary.from_embeddings(ids, x, k=room, dtype="float32")) == 40


def test_a_dictionary_in_memory_follows_markov_clusters() -> None:
    x, ids = np.concatenate([mixture(100, 2, seed=1), mixture(300, 30)]), np.repeat([4, 2], [100, 300])
    dictionary = SenseDictionary.from_embeddings(ids, x, k=MclConfig(inflation=2.0))
    assert dictionary.config.senses == "mcl"
    expected = mcl_senses(x[np.argsort(ids, kind="stable")], np.array([300, 100]), MclConfig(inflation=2.0))
    assert [len(dictionary.senses(token).counts) for token in (2, 4)] == expected.tolist()


@pytest.mark.parametrize("rule", ["auto", "mcl"])
def test_a_build_chooses_the_senses_from_its_stored_points(made: Corpus, rule: str) -> None:
    output, given = made.folder / "run", {"sense_budget": "7"} if rule == "auto" else {"mcl": {"inflation": "1.8"}}
    summary = made.build(senses=rule, **given, max_occurrences=100, keep=("occurrences", "centroids"))
    dictionary, run = SenseDictionary.load(output), RunFolder(str(output))
    numbers = load_arrays(run.senses)["senses"]
    got = np.diff(dictionary.offsets)
    assert (got <= numbers).all()
    assert got.sum() > 0.95 * numbers.sum()
    assert summary["stages"]["senses"]["senses"] == numbers.sum()
    assert dictionary.config.senses == rule
    stored = np.concatenate([np.fromfile(p, record_type(16)) for p in sorted(output.glob("occurrences/*.records"))])
    by_key = stored[np.lexsort((stored["key"], stored["token"]))]
    rank = np.arange(len(by_key)) - np.searchsorted(by_key["token"], by_key["token"])
    chosen = by_key[rank < 100]
    tokens, sizes = np.unique(chosen["token"], return_counts=True)
    points = torch.from_numpy(chosen["embedding"].copy()).view(torch.float16)
    if rule == "mcl":
        expected = mcl_senses(points, sizes, MclConfig(inflation=1.8))
    else:
        curves = Curves(sizes, dictionary.token_counts[tokens], variance_curves(points, sizes, tokens, KMeansConfig()))
        expected = allocate(curves, GRID, 7 * len(tokens), 16)
        assert expected.sum() == 7 * len(tokens)
        curve = summary["stages"]["senses"]["budget_curve"]
        assert 7 * len(tokens) in [senses for senses, _ in curve]
        assert [y for _, y in curve] == sorted((y for _, y in curve), reverse=True)
    assert np.flatnonzero(numbers).tolist() == tokens.tolist()
    assert numbers[tokens].tolist() == expected.tolist()


def test_a_budget_below_one_sense_per_token_is_refused_before_the_teacher_runs(made: Corpus) -> None:
    with pytest.raises(InputError, match=r"--sense-budget 500B .* 17 tokens"):
        made.build(sense_budget="500B")
    assert not (made.folder / "run" / "occurrences").exists()


@pytest.mark.parametrize(("kind", "senses"), [("bert", 20), ("llama", "mcl")])
def test_the_reference_follows_the_paper(
    tmp_path: Path, made: Corpus, make_teacher: MakeTeacher, kind: str, senses: object
) -> None:
    given = {
        "corpus": made.settings["corpus"],
        "dtype": "float32",
        "reference": True,
        "keep": ("centroids",),
        "local": True,
    }
    config = BuildConfig(teacher=str(make_teacher(kind)), output=str(tmp_path / "run"), **given)
    assert (config.metric, config.special_tokens, config.per_passage) == ("dot", "include", 0)
    build_dictionary(config)
    built = SenseDictionary.load(tmp_path / "run").config
    assert (built.senses, built.metric, built.special_tokens) == (senses, "dot", "include")
    assert (tmp_path / "run" / "senses").exists() == (senses == "mcl")
