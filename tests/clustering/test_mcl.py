"""Markov clustering: the clusters match those of the package `markov-clustering`, and K follows the paper's rule."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msense.clustering import mcl
from msense.clustering.mcl import MclConfig, mcl_senses
from msense.errors import InputError, MsenseError

Matrix = np.ndarray[Any, Any]
Clusters = list[tuple[int, ...]]


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small graphs are split and kept in float32, as graphs of thousands of nodes are."""
    for name, value in {"SPLIT_WORK": 0, "SPLIT_WIDTH": 2, "BATCH_VALUES": 500, "EXACT_NODES": 20}.items():
        monkeypatch.setattr(mcl, name, value)


def package(similarity: Matrix, config: MclConfig | None = None) -> Clusters:
    """The package's clusters; its defaults are our constants."""
    package = pytest.importorskip("markov_clustering.mcl")
    config, weights = config or MclConfig(), np.array(similarity, dtype=np.float64)
    result = package.run_mcl(weights, expansion=config.expansion, inflation=config.inflation)
    return package.get_clusters(result)


def markov_clusters(graphs: list[Matrix], config: MclConfig) -> list[Clusters]:
    """Cluster graphs given as similarity matrices, in which column j holds the edges that leave node j."""
    sizes = np.array([len(graph) for graph in graphs], np.int64)

    def weights(batch: Matrix) -> torch.Tensor:
        padded = torch.zeros(len(batch), sizes[batch].max(), sizes[batch].max(), dtype=torch.float64)
        for place, at in enumerate(batch):
            padded[place, : sizes[at], : sizes[at]] = torch.from_numpy(graphs[at].T)
        return padded

    return mcl.markov_clusters(weights, sizes, config)


def one(similarity: Matrix, config: MclConfig | None = None) -> Clusters:
    return markov_clusters([similarity], config or MclConfig())[0]


def similarities(points: Matrix) -> Matrix:
    x = points.astype(np.float64)
    return 1 / (0.01 + np.sqrt(((x[:, None] - x) ** 2).sum(2)))


def mixture(points: int, clusters: int, width: int, noise: float, seed: int) -> Matrix:
    rng = np.random.default_rng(seed)
    centers = 3 * rng.normal(size=(clusters, width))
    return (centers[rng.integers(0, clusters, points)] + noise * rng.normal(size=(points, width))).astype(np.float16)


def planted(sizes: list[int], inside: float = 1.0, between: float = 0.0, seed: int = 0) -> tuple[Matrix, Clusters]:
    """A graph of blocks, its nodes shuffled; and the blocks."""
    block = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    graph = np.where(block[:, None] == block, inside, between)
    np.fill_diagonal(graph, 0)
    return graph, sorted(tuple(np.flatnonzero(block == b).tolist()) for b in range(len(sizes)))


def random_graph(rng: np.random.Generator) -> Matrix:
    """A graph of up to 24 nodes: weights of few values (many ties) or of any, with few or many edges."""
    nodes = int(rng.integers(1, 25))
    weights = rng.integers(1, 4, (nodes, nodes)) if rng.random() < 0.5 else rng.random((nodes, nodes))
    upper = np.triu(weights * (rng.random((nodes, nodes)) < rng.choice([0.1, 0.3, 0.7, 1])), 1)
    return (upper + upper.T).astype(np.float64)


@pytest.mark.parametrize("between", [0.0, 0.001])
def test_planted_blocks_are_recovered(between: float) -> None:
    graph, blocks = planted([40, 3, 1, 17, 60, 2, 9], between=between)
    assert one(graph) == blocks == package(graph)


@pytest.mark.parametrize("case", [(200, 12, 384, 0.05), (200, 30, 4, 0.1), (180, 1, 2, 1.0)])
def test_mixtures_are_clustered_as_by_the_package(case: tuple[int, int, int, float]) -> None:
    graph = similarities(mixture(*case, seed=case[0] + case[2]))
    assert one(graph) == package(graph)


@pytest.mark.parametrize(("seed", "times"), [(0, 2), (1, 2), (2, 3)])
def test_equal_points_are_separated_as_by_the_package(seed: int, times: int) -> None:
    points = mixture(200, 1, 8, 1.0, seed=seed)
    points[-20:] = np.tile(points[: 20 // (times - 1)], (times - 1, 1))
    graph = similarities(points)
    assert one(graph) == package(graph)
    begun = mcl.start(torch.from_numpy(graph)[None], np.array([200]), MclConfig())
    assert begun.values.dtype == torch.float32
    assert sorted(map(len, begun.twins[0])) == [times] * (20 // (times - 1))
    no_twins = torch.from_numpy(planted([50, 50, 50], between=0.1)[0])[None]  # but of equal sums
    assert mcl.start(no_twins, np.array([150]), MclConfig()).values.dtype == torch.float64


def test_a_node_between_two_clusters_is_in_both() -> None:
    graph = np.zeros((7, 7))
    for clique in ((0, 1, 2), (4, 5, 6)):
        for a, b in itertools.permutations(clique, 2):
            graph[a, b] = 10
    graph[3, [2, 4]] = graph[[2, 4], 3] = 1
    assert one(graph) == [(0, 1, 2, 3), (3, 4, 5, 6)] == package(graph)
    asymmetric = np.random.default_rng(5).random((30, 30)) ** 8
    assert one(asymmetric) == package(asymmetric)


def test_the_smallest_graphs() -> None:
    graphs = [np.zeros((0, 0)), np.zeros((1, 1)), np.full((1, 1), 7.0), np.ones((2, 2)), np.zeros((3, 3))]
    assert markov_clusters(graphs, MclConfig()) == [[], [(0,)], [(0,)], [(0, 1)], [(0,), (1,), (2,)]]
    assert markov_clusters([], MclConfig()) == []


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), option=st.sampled_from([{}, {"inflation": 1.3}, {"expansion": 3}]))
def test_random_graphs_as_the_package(seed: int, option: dict[str, Any]) -> None:
    config, rng = MclConfig(**option), np.random.default_rng(seed)
    graphs = [random_graph(rng) for _ in range(4)]
    assert markov_clusters(graphs, config) == [package(graph, config) for graph in graphs]


@pytest.mark.usefixtures("small_limits")
def test_split_flows_give_the_same_clusters() -> None:
    rng = np.random.default_rng(11)
    graphs = [random_graph(rng) for _ in range(60)]
    graphs += [planted(rng.integers(1, 12, 9).tolist(), 1, 0.0, seed=s)[0] for s in range(5)]
    graphs += [similarities(mixture(60, 12, 3, 0.1, seed=s)) for s in range(5)]
    ours, theirs = markov_clusters(graphs, MclConfig()), [package(graph) for graph in graphs]
    assert [len(result) for result in ours] == [len(result) for result in theirs]
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 68


@pytest.mark.usefixtures("small_limits")
def test_a_flow_is_split_into_its_components() -> None:
    graph, blocks = planted([30, 7, 12, 1, 3])
    parts = mcl.split(mcl.start(torch.from_numpy(np.stack([graph, graph.T])), np.array([53, 53]), MclConfig()))
    result = [sorted(row[row >= 0].tolist()) for part in parts for row in part.nodes]
    assert sorted(map(tuple, result)) == sorted(blocks * 2)
    assert all(torch.allclose(part.values.sum(2), torch.from_numpy(part.nodes >= 0).to(part.values)) for part in parts)


def test_all_invalid_settings_are_reported_at_once() -> None:
    message = "expansion is 1, .*; inflation is 1.0, .*; share is 2, .*; large_share is nan, .*; large is -1, .*; least"
    with pytest.raises(InputError, match=message):
        MclConfig(expansion=1, inflation=1.0, share=2, large_share=float("nan"), large=-1, least=0)


def pairs(groups: int, members: int = 2) -> Matrix:
    """Groups of points at distance 1, in shuffled order, 100 from each other."""
    points = np.stack([np.repeat(np.arange(groups) * 100.0, members), np.tile(np.arange(members), groups)], 1)
    return np.random.default_rng(groups).permutation(points).astype(np.float32)


def senses(points: list[Matrix], config: MclConfig | None = None) -> list[int]:
    sizes = np.array([len(x) for x in points])
    return mcl_senses(np.concatenate(points), sizes, config or MclConfig()).tolist()


def test_the_rule() -> None:
    few = np.arange(8, dtype=np.float32).reshape(4, 2)
    assert senses([few, few[:0], few[:1], pairs(5), pairs(37), pairs(99)]) == [4, 0, 1, 5, 5, 9]
    assert senses([pairs(950, members=1)]) == [380]
    assert senses([pairs(89)], MclConfig(large=88)) == [int(0.4 * 89)]
    assert senses([pairs(89)], MclConfig(large=89, share=0.3)) == [int(0.3 * 89)]
    assert senses([pairs(30), few], MclConfig(least=2)) == [3, 2]
    assert senses([pairs(30)], MclConfig(share=1, least=1)) == [30]
    assert senses([pairs(30)], MclConfig(share=0, large_share=0, least=1)) == [1]


def test_equal_points_are_one_cluster() -> None:
    config = MclConfig(share=1, least=1)
    same = np.full((80, 6), 0.37, np.float16)
    tripled = np.repeat(pairs(12, members=1), 3, axis=0).astype(np.float16)
    assert [senses([x], config) for x in (same, same[:5], same[:1], tripled[:, :2])] == [[1], [1], [1], [12]]
    assert senses([same]) == [5]
    # an edge of 1 / OFFSET = 100 between two points with loops of 1 makes walkers alternate: two clusters
    assert senses([same[:2]], config) == [2] == [len(package(similarities(same[:2])))]


def test_only_the_first_points_of_a_large_token_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcl, "MCL_POINTS", 100)
    large = np.concatenate([pairs(50), pairs(500, members=1)])
    assert senses([large, pairs(50)], MclConfig(share=0.5, least=1)) == [25, 25]


def test_invalid_points_are_named() -> None:
    points = np.concatenate([pairs(5), pairs(5)])
    points[13, 1] = np.nan
    with pytest.raises(MsenseError, match="token 77 has an embedding that is NaN or infinite"):
        mcl_senses(points, np.array([10, 10]), MclConfig(), token_ids=np.array([5, 77]))
