"""k-means: planted clusters are recovered, scikit-learn is matched, and the bytes depend on nothing but the points."""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from msense.clustering import matmul
from msense.clustering.kmeans import BLOCK_ROWS, Clusters, KMeansConfig, batches, blocks, cluster_tokens, lloyd, seeding
from msense.clustering.kmeans.threads import open_threads
from msense.constants import Metric
from msense.errors import InputError, MsenseError

Matrix = np.ndarray[Any, Any]

GRAM, DIRECT, BLOCKED = 60, 500, 2 * BLOCK_ROWS + 300  # one token size for each algorithm
METRICS: list[Metric] = ["l2", "cosine"]


def planted(points: int, clusters: int, width: int, seed: int, directions: bool = False) -> tuple[Matrix, Matrix]:
    """Well separated Gaussians (or bundles of directions of any length): points float16, and their labels."""
    rng = np.random.default_rng(seed)
    centers = 8 * np.linalg.qr(rng.normal(size=(width, width)))[0][:clusters] + 3
    labels = np.r_[np.arange(clusters), rng.integers(0, clusters, points - clusters)]
    x = centers[labels] + 0.3 * rng.normal(size=(points, width))
    if directions:
        x *= rng.uniform(0.2, 5, size=(points, 1))
    return x.astype(np.float16), labels


def one(points: Matrix, config: KMeansConfig, token: int = 7, key_order: Matrix | None = None) -> Clusters:
    return cluster_tokens(points, np.array([len(points)]), np.array([token]), config, key_order=key_order)


def drive(points: Matrix, cuts: list[int], config: KMeansConfig, token: int = 7) -> Clusters:
    """Cluster one token in ranges of rows, as `msense.stages.distributed_kmeans` does; `cuts` are block numbers."""
    edges = [0, *(cut * BLOCK_ROWS for cut in cuts), len(points)]
    parts = [(a, points[a:b]) for a, b in itertools.pairwise(edges)]
    state = blocks.seed_centroids(points[: seeding.SEED_POINTS], token, config)
    while state.final is None:
        total = blocks.combine([blocks.partial(part, state, config) for _, part in parts])
        m = int((total.counts == 0).sum())
        far = [blocks.farthest(part, state, m, config, first_row=a) for a, part in parts] if m else []
        state = blocks.update(state, total, config, blocks.combine_farthest(far, m) if m else None)
    done = [blocks.finish(part, state, config) for _, part in parts]
    counts, rms_distance, inertia = blocks.summary(state, done)
    assignment, distance = (np.concatenate([getattr(d, name) for d in done]) for name in ("assignment", "distance"))
    sizes, rounds = np.array([len(state.final)]), np.array([state.rounds])
    return Clusters(sizes, state.final, counts, rms_distance, assignment, distance, np.array([inertia]), rounds)


def first_point_always(_: object, __: object, ___: object, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces `greedy_seeds`: every seed is point 0, so that all clusters but one start empty."""
    return torch.zeros(uniforms.shape[:2], dtype=torch.int64), torch.zeros(len(uniforms))


def same_bytes(a: Clusters, b: Clusters) -> None:
    for name in Clusters.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        assert (x.dtype, x.tobytes()) == (y.dtype, y.tobytes()), name


def check_consistent(result: Clusters, points: Matrix, sizes: Sequence[int], metric: Metric = "l2") -> None:
    """Check all invariants of a result, recomputed in float64."""
    x = points.astype(np.float64)
    if metric == "cosine":
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        x = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    sense = result.assignment + np.repeat(np.cumsum(result.sizes) - result.sizes, sizes)
    assert ((result.assignment >= 0) & (result.assignment < np.repeat(result.sizes, sizes))).all()
    counts = np.bincount(sense, minlength=len(result.counts))
    assert (counts == result.counts).all()
    assert (counts > 0).all()
    means = np.zeros(result.centroids.shape)
    np.add.at(means, sense, x)
    means /= np.linalg.norm(means, axis=1, keepdims=True).clip(1e-9) if metric == "cosine" else counts[:, None]
    scale = np.abs(x).max(initial=1)
    np.testing.assert_allclose(result.centroids, means, rtol=1e-6, atol=1e-6 * scale)
    away = ((x - result.centroids[sense]) ** 2).sum(1)
    np.testing.assert_allclose(result.distance, away, rtol=1e-4, atol=1e-6 * scale**2)
    squares = np.bincount(sense, weights=result.distance, minlength=len(counts))
    np.testing.assert_allclose(result.rms_distance, np.sqrt(squares / counts), rtol=1e-5)
    token = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_allclose(result.inertia, np.bincount(token, result.distance, len(sizes)), rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [GRAM, DIRECT, BLOCKED])
def test_planted_clusters_are_recovered(n: int, metric: Metric) -> None:
    x, labels = planted(n, 5, 24, n, directions=metric == "cosine")
    x[5::7], labels[5::7] = 0, 5  # zero vectors have no direction
    result = one(x, KMeansConfig(k=6, metric=metric))
    assert adjusted_rand_score(labels, result.assignment) == 1.0
    check_consistent(result, x, [n], metric)


@settings(max_examples=12, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 4)).map(sorted),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 3),
    n_init=st.integers(1, 3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seeded=st.booleans(),
)
def test_ranges_of_rows_give_the_bytes_of_the_whole(
    cuts: list[int], metric: Metric, seed: int, n_init: int, dtype: torch.dtype, seeded: bool
) -> None:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(4 * BLOCK_ROWS + 77, 5)) * 2.0 ** rng.integers(-12, 6, 5)).to(dtype)
    config = KMeansConfig(k=7, metric=metric, seed=seed, max_rounds=8, n_init=n_init)
    with pytest.MonkeyPatch.context() as patch:
        if not seeded:  # clusters run empty
            patch.setattr(seeding, "greedy_seeds", first_point_always)
        result = one(x, config)
        same_bytes(drive(x, cuts, config), result)
    check_consistent(result, x.float().numpy(), [len(x)], metric)


MIXED = np.array([30, 100, 9, 500, 470, BLOCKED, 64, 60, 33, 450, 700, BLOCKED, 100, 61, 2, 40])
MIXED_K = np.array([20, 7, 12, 20, 17, 9, 64, 3, 1, 23, 24, 1, 40, 20, 5, 8])


def mixed(dim: int = 12) -> tuple[Matrix, Matrix]:
    """Points and ids for MIXED, which covers every algorithm and many K."""
    rng = np.random.default_rng(8)
    return rng.normal(size=(MIXED.sum(), dim)).astype(np.float16), rng.permutation(1000)[: len(MIXED)]


def alone(result: Clusters, sizes: Matrix, token: int) -> Clusters:
    """One token's part of a result."""
    rows, senses = np.r_[0, np.cumsum(sizes)], np.r_[0, np.cumsum(result.sizes)]
    cut = {"assignment": rows, "distance": rows} | dict.fromkeys(("centroids", "counts", "rms_distance"), senses)
    each = np.arange(len(sizes) + 1)
    edges = {name: cut.get(name, each) for name in Clusters.__dataclass_fields__}
    return Clusters(**{name: getattr(result, name)[e[token] : e[token + 1]] for name, e in edges.items()})


def test_inertia_matches_scikit_learn() -> None:
    x, ids = mixed(32)
    ours = cluster_tokens(x, MIXED, ids, KMeansConfig(k=8)).inertia.sum()
    tokens = np.split(x.astype(np.float32), np.cumsum(MIXED)[:-1])
    theirs = sum(KMeans(8, n_init=1, random_state=0).fit(token).inertia_ for token in tokens if len(token) > 8)
    assert ours <= 1.01 * theirs


@pytest.mark.parametrize(("metric", "threads", "shared"), [("l2", 1, 4), ("cosine", 1, 4), ("l2", 2, 8), ("l2", 5, 0)])
def test_a_token_has_the_bytes_that_it_has_alone(
    metric: Metric, threads: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any number of threads; a large token runs on one of them, or on all."""
    x, ids = mixed()
    own = np.split(x, np.cumsum(MIXED)[:-1])
    single = [one(own[t], KMeansConfig(k=k, metric=metric), ids[t]) for t, k in enumerate(MIXED_K.tolist())]
    monkeypatch.setattr(batches, "SHARED_BLOCKS", shared)
    monkeypatch.setattr(blocks, "HELD_FLOATS", shared * 12 * BLOCK_ROWS // 4)
    if threads > 1:
        monkeypatch.setitem(batches.BATCH_FLOATS, "cpu", 12 * 128)  # many batches
    together = cluster_tokens(x, MIXED, ids, KMeansConfig(metric=metric), senses=MIXED_K, threads=threads)
    assert together.sizes.tolist() == np.minimum(MIXED, MIXED_K).tolist()
    check_consistent(together, x, MIXED, metric)
    for t, expected in enumerate(single):
        same_bytes(alone(together, MIXED, t), expected)


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 30), st.integers(0, 9)), min_size=1, max_size=6),
    width=st.integers(1, 3),
    largest=st.integers(1, 3),
    metric=st.sampled_from(["l2", "dot", "cosine"]),
    seeded=st.booleans(),
    gram=st.booleans(),
    threads=st.integers(1, 3),
)
def test_any_points_give_any_token_min_k_distinct_senses(
    tokens: list[tuple[int, int, int]], width: int, largest: int, metric: Metric, seeded: bool, gram: bool, threads: int
) -> None:
    sizes, senses, ids = np.array(tokens).T
    x = np.random.default_rng(1).integers(-largest, largest + 1, (sizes.sum(), width)).astype(np.float16)
    with pytest.MonkeyPatch.context() as patch:
        if not seeded:  # empty clusters are filled
            patch.setattr(seeding, "greedy_seeds", first_point_always)
        patch.setattr(batches, "GRAM_ROWS", 384 if gram else 0)
        result = cluster_tokens(x, sizes, ids, KMeansConfig(metric=metric), senses=senses, threads=threads)
        last = one(x[len(x) - sizes[-1] :], KMeansConfig(k=int(senses[-1]), metric=metric), ids[-1])
    directions = np.round(x / np.linalg.norm(x.astype(float), axis=1, keepdims=True).clip(1e-9), 6)
    different = (directions if metric == "cosine" else x) + 0.0
    own = np.repeat(np.arange(len(sizes)), sizes)
    distinct = [len(np.unique(different[own == t], axis=0)) for t in range(len(sizes))]
    assert result.sizes.tolist() == np.minimum(distinct, senses).tolist()
    own = np.repeat(np.arange(len(sizes)), result.sizes)
    assert len(np.unique(np.c_[own, result.centroids + 0.0], axis=0)) == len(own)
    check_consistent(result, x, sizes, metric)
    same_bytes(alone(result, sizes, len(sizes) - 1), last)


@pytest.mark.parametrize("good", [0, 1, 2])
@pytest.mark.parametrize("n", [GRAM, DIRECT, BLOCKED])
def test_the_best_of_several_runs_is_kept(n: int, good: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs but one start with two seeds in one of three clusters, which no round repairs."""
    x, labels = planted(n, 3, 8, 6)
    bad = torch.from_numpy(np.r_[np.flatnonzero(labels == 0)[:2], np.flatnonzero(labels == 1)[:1]])
    runs = itertools.count()

    def seeds(*given: object) -> tuple[torch.Tensor, torch.Tensor]:
        return real(*given) if next(runs) == good else (bad[None], torch.full((1,), 1e9))

    real = seeding.greedy_seeds
    monkeypatch.setattr(seeding, "greedy_seeds", seeds)
    result = one(x, KMeansConfig(k=3, n_init=3))
    assert next(runs) == 3
    assert adjusted_rand_score(labels, result.assignment) == 1.0


@pytest.mark.parametrize("metric", METRICS)
def test_single_points_move_where_clusters_are_small(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    """No move of a single point lowers the inertia by more than the tolerance (plain Lloyd leaves many that do)."""

    def improvable(token: int) -> bool:
        x = np.random.default_rng(token).normal(size=(24, 6)).astype(np.float16)
        result = one(x, KMeansConfig(k=12, metric=metric), token)
        moved = (np.where(np.arange(24) == i, c, result.assignment) for i in range(24) for c in range(12))
        return any(inertia_of(x, own, metric) < result.inertia[0] * (1 - 4e-4) for own in moved)

    assert not any(map(improvable, range(8)))
    monkeypatch.setattr(lloyd, "FEW", 0)
    assert sum(map(improvable, range(8))) >= 4


def inertia_of(points: Matrix, assignment: Matrix, metric: Metric) -> float:
    def scaled(x: Matrix) -> Matrix:
        return x / np.linalg.norm(x, axis=-1, keepdims=True) if metric == "cosine" else x

    clusters = [scaled(points.astype(np.float64))[assignment == c] for c in np.unique(assignment)]
    return sum(float(((own - scaled(own.mean(0))) ** 2).sum()) for own in clusters)


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_the_gpu_algorithm_agrees_with_the_cpu(metric: Metric, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on CPU tensors: batches of a GPU's size, and sums and products as matrix products."""
    x, ids = mixed(64)
    config = KMeansConfig(metric=metric)
    expected = cluster_tokens(x, MIXED, ids, config, senses=MIXED_K)
    if device == "cpu":
        monkeypatch.setattr(lloyd, "SPARSE", set())
        monkeypatch.setitem(batches.BATCH_FLOATS, "cpu", batches.BATCH_FLOATS["cuda"])
    result, again = (cluster_tokens(x, MIXED, ids, config, senses=MIXED_K, device=device) for _ in range(2))
    assert result.sizes.tolist() == expected.sizes.tolist()
    check_consistent(result, x, MIXED, metric)
    assert result.inertia.sum() == pytest.approx(expected.inertia.sum(), rel=1e-3 if device == "cpu" else 1e-2)
    same_bytes(again, result)


@pytest.mark.parametrize("fast", [True, False])
def test_products_equal_those_of_float64(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(matmul, "_linear", lambda: None)
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((1, 1, 1), (4, 384, 1024), (20, 7, 1000), (130, 130, 130)):
        left, right = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
        for a, b in ((left, right.T), (left, right.T.contiguous()), (left.T.contiguous().T, right.T)):
            product = matmul.product(a, b).double()
            torch.testing.assert_close(product, a.double() @ b.double(), rtol=1e-5, atol=1e-5 * k**0.5)


def test_draws_are_uniform_and_depend_on_their_own_coordinates_only() -> None:
    config, ids = KMeansConfig(k=20, seed=-5), np.arange(2000)
    u = seeding.draws(ids, config)
    assert 0 < u.min() < u.max() < 1
    assert (np.abs(np.histogram(u, 10, (0, 1))[0] - 16000) < 5 * np.sqrt(16000 * 0.9)).all()
    assert len(np.unique(u)) == u.size
    assert (seeding.draws(ids[1234:1235], config)[0] == u[1234]).all()
    for other in (seeding.draws(ids, config, run=1), seeding.draws(ids, KMeansConfig(k=20, seed=-4))):
        assert not (other == u).any()
    fewer = seeding.draws(ids, config, np.where(ids % 2, 20, 7))  # of 3 candidates
    assert (fewer[1::2] == u[1::2]).all()
    assert (fewer[::2] == u[::2][..., [0, 1, 2, 0]]).all()


def test_few_points_are_all_kept_in_order_of_first_appearance() -> None:
    x = np.array([[5, 1], [2, 2], [5, 1], [-0.0, 3], [0.0, 3], [2, 2], [5, 1], [1, 1]], np.float16)
    result = cluster_tokens(x, np.array([7, 1]), np.array([3, 9]), KMeansConfig(k=3))
    assert result.centroids.tolist() == [[5, 1], [2, 2], [0, 3], [1, 1]]
    assert result.assignment.tolist() == [0, 1, 0, 2, 2, 1, 0, 0]
    assert not np.r_[result.distance, result.rounds].any()


@pytest.mark.parametrize("n", [GRAM, DIRECT, BLOCKED])
def test_senses_that_stay_empty_are_dropped(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "greedy_seeds", first_point_always)
    x = np.random.default_rng(1).normal(size=(n + 5, 3)).astype(np.float16)
    x[n:] = 1
    result = cluster_tokens(x, np.array([n, 5]), np.array([1, 2]), KMeansConfig(k=5, max_rounds=1))
    assert result.sizes.tolist() == [1, 1]
    check_consistent(result, x, [n, 5])


def test_the_farthest_points_fill_empty_clusters() -> None:
    x = np.array([[0], [1], [-9], [9], [9], [2]], np.float16)
    config, centroids = KMeansConfig(k=3), np.array([[0], [500], [600]], np.float32)
    state = blocks.BlockedState(1, centroids, np.zeros(1, np.float32), np.zeros(3, np.int64))
    total = blocks.partial(x, state, config)
    parts = [blocks.farthest(x[a:b], state, 2, config, first_row=a) for a, b in ((3, 6), (0, 3))]
    far = blocks.combine_farthest(parts, 2)
    assert far.rows.tolist() == [2, 3]
    assert blocks.update(state, total, config, far).centroids.tolist() == [[2], [-9], [9]]


def test_the_callers_torch_threads_are_restored_after_an_error() -> None:
    torch.set_num_threads(3)
    with pytest.raises(RuntimeError, match="planted"), open_threads(2):
        raise RuntimeError("planted")
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)


def test_ties_go_to_the_lowest_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "greedy_seeds", lambda *_: (torch.tensor([[2, 0]]), torch.zeros(1)))
    for n in (GRAM, DIRECT):
        x = np.tile(np.array([[-1], [0], [1], [0]], np.float16), (n // 4, 1))  # the mean is exactly 0
        assert one(x, KMeansConfig(k=2, max_rounds=1)).assignment[:4].tolist() == [1, 0, 0, 0]
    state = blocks.BlockedState(1, np.array([[1], [-1]], np.float32), np.zeros(1, np.float32), np.zeros(2, np.int64))
    assert blocks.partial(x[:3], state, KMeansConfig(k=2)).counts.tolist() == [2, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e16])
@pytest.mark.parametrize("n", [3, GRAM, BLOCKED])
def test_bad_values_name_the_first_bad_token(bad: float, n: int) -> None:
    x = np.ones((3 * n, 2), np.float32)
    x[n, 1] = x[2 * n, 0] = bad
    with pytest.raises(MsenseError, match="token 55 has an embedding that is NaN or infinite"):
        cluster_tokens(x, np.array([n, n, n]), np.array([77, 55, 66]), KMeansConfig(k=2))


@pytest.mark.parametrize("metric", [*METRICS, "dot"])
def test_dtypes_agree_and_inputs_are_not_changed(metric: Metric) -> None:
    whole = np.random.default_rng(2).integers(-40, 40, (300, 6))
    config = KMeansConfig(k=4, metric=metric)
    expected = one(whole.astype(np.float16), KMeansConfig(k=4, metric="cosine" if metric == "cosine" else "l2"))
    frozen = whole.astype(np.float32)
    frozen.flags.writeable = False
    for points in (frozen, torch.from_numpy(whole).bfloat16(), torch.from_numpy(whole).half()):
        same_bytes(one(points, config), expected)
    assert (frozen == whole).all()


def test_blocked_tokens_are_seeded_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "SEED_POINTS", 50)
    x = np.random.default_rng(4).normal(size=(BLOCKED, 3)).astype(np.float16)
    ranks = np.random.default_rng(5).permutation(BLOCKED)
    config = KMeansConfig(k=6, max_rounds=1)
    result = one(x, config, key_order=ranks)
    state = blocks.seed_centroids(x[np.argsort(ranks)[:50]], 7, config)
    nearest = ((x[:, None].astype(float) - state.centroids) ** 2).sum(2).argmin(1)
    assert (result.assignment == nearest).all()


@pytest.mark.parametrize(
    ("points", "sizes", "message"),
    [
        (np.zeros((3, 2)), [2, 1], "points are float64 .* must be a float16, bfloat16 or"),
        (np.zeros(3, np.float16), [2, 1], r"points are float16 of shape \(3,\), but must"),
        (np.zeros((3, 2), np.float16), [2, 2], "2 sizes of sum 4 do not match 2 token ids and 3 points"),
    ],
)
def test_invalid_arrays_are_refused(points: Matrix, sizes: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cluster_tokens(points, np.array(sizes), np.array([1, 2]), KMeansConfig())


@pytest.mark.parametrize("senses", [[2], [2, 3, 4], [-1, 2], [0, 2], [2, 10**6]])
def test_invalid_numbers_of_senses_are_refused(senses: list[int]) -> None:
    points, ids = np.zeros((3, 2), np.float16), np.array([1, 2])
    with pytest.raises(InputError, match=r"one K per token|but must be from 1 to"):
        cluster_tokens(points, np.array([2, 1]), ids, KMeansConfig(), senses=np.array(senses))


def test_a_token_without_points_needs_no_sense() -> None:
    points, sizes = np.ones((50, 2), np.float16), np.array([0, 50])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = cluster_tokens(points, sizes, np.array([1, 2]), KMeansConfig(), senses=np.array([0, 4]))
    assert result.sizes.tolist() == [0, 1]


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(InputError, match=r"k is 0, .*; n_init is 0, .*; tol is 1.5, .* from 0 to 1; max_rounds is 0, "):
        KMeansConfig(k=0, n_init=0, tol=1.5, max_rounds=0)
    with pytest.raises(InputError, match="metric is 'l1', but must be one of l2, "):
        KMeansConfig(metric="l1")  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [GRAM, DIRECT])
def test_the_scale_of_the_points_changes_nothing(rows: int) -> None:
    """The tolerance is relative to the inertia."""
    points = np.random.default_rng(0).normal(size=(rows, 6)).astype(np.float32)
    config = KMeansConfig(k=8, tol=0.02)
    small, large = one(points / 2**8, config), one(points * 2**4, config)
    np.testing.assert_array_equal(small.assignment, large.assignment)
