"""Markov clustering of graphs, and the paper's rule for the number of senses of a token of a decoder teacher.

Small graphs run in batches; a graph that has fallen apart into components continues as several small flows. Each thread
needs 22 bytes x n^2 for its graph (0.35 GB at 4,000 nodes; 0.55 GB if all is float64) and 16 bytes x n x D for its points.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from msense.clustering.kmeans.seeding import Points, as_points, check_points
from msense.clustering.kmeans.threads import open_threads
from msense.clustering.mcl.flow import (
    MAX_ROUNDS,
    Cluster,
    Flow,
    MclConfig,
    exact_if_small,
    one_round,
    read_clusters,
    settled,
    some_blocks,
    start,
    without_dead,
)

OFFSET = 0.01  # from the paper: the similarity of two points is 1 / (OFFSET + Euclidean distance)
MCL_POINTS = 4000  # points of a token that are used; as many as remain of the paper's merged samples
BATCH_VALUES = 1 << 17  # flow values of a batch of small graphs: what fits in a core's cache
_Component: TypeAlias = tuple[int, NDArray[np.int64], NDArray[np.int64]]  # its block, rows and columns
SPLIT_WORK = 1 << 22  # multiplications per product below which a search for components does not pay off
LABEL_PASSES = 12  # of label propagation, after which a graph counts as connected
SPLIT_WIDTH = 16  # components of at most this many nodes share a flow; larger ones share it within a factor of 2


def mcl_senses(
    points: Points,
    sizes: NDArray[np.int64],
    config: MclConfig,
    *,
    token_ids: NDArray[np.int64] | None = None,
    device: str | torch.device = "cpu",
    threads: int = 1,
) -> NDArray[np.int64]:
    """Return K of every token: a fraction of its Markov clusters (Wang et al. 2025, the rule for Llama).

    K is int(share * clusters), or int(large_share * clusters) for more than `large` clusters, but at least `least`. A
    token of fewer than `least` points has K = number of points. Only the first MCL_POINTS points of a token are used.
    Rounds end early once the remaining clusters cannot give more than `least`. Three or more equal points form one
    cluster; two alone, with an edge of 100 next to loops of 1, stay separate.

    Args:
        points: [N, D] float16, bfloat16 or float32, rows grouped by token.
        sizes: int64 [T], points of each token, with sum N.
        config: settings.
        token_ids: int64 [T], for error messages; None: positions.
        device: where the rounds are computed.
        threads: number of threads; each holds one graph.

    Returns:
        int64 [T]; 0 for a token without points.

    Raises:
        InputError: the arrays' lengths do not match.
        MsenseError: a value is NaN, infinite or above LARGEST_VALUE; names the token.
    """
    view = as_points(points)
    token_ids = np.arange(len(sizes)) if token_ids is None else token_ids
    check_points(view, sizes, token_ids)
    starts, used = np.cumsum(sizes) - sizes, np.minimum(sizes, MCL_POINTS)
    counts = np.arange(MCL_POINTS + 1)
    rule = np.where(counts > config.large, config.large_share * counts, config.share * counts).astype(np.int64)
    rule = np.maximum(rule, config.least)
    enough = int(np.flatnonzero(np.maximum.accumulate(rule) <= config.least)[-1])  # up to here the rule gives `least`
    large = np.flatnonzero(used > enough)

    def weights(batch: NDArray[np.int64]) -> torch.Tensor:
        return _similarities(view, starts[large[batch]], used[large[batch]], device)

    senses = np.minimum(sizes, config.least)
    clusters_of = markov_clusters(weights, used[large], config, enough, threads)
    senses[large] = rule[[len(clusters) for clusters in clusters_of]]
    return senses


def _similarities(
    points: torch.Tensor, starts: NDArray[np.int64], sizes: NDArray[np.int64], device: str | torch.device
) -> torch.Tensor:
    """Return 1 / (OFFSET + Euclidean distance) of each token's points: float64 [B, n, n], 0 on padding.

    In float64, because squared distances of near points are small differences of large numbers.
    """
    mask = np.arange(sizes.max()) < sizes[:, None]
    rows = np.where(mask, starts[:, None] + np.arange(sizes.max()), starts[:, None])
    stored = points.index_select(0, torch.from_numpy(rows.ravel()).to(points.device))
    x = stored.to(device).double().view(*rows.shape, -1)
    x -= x.mean(1, keepdim=True)
    squares = x.square().sum(2)
    away = torch.baddbmm(squares[:, None], x, x.transpose(1, 2), alpha=-2).add_(squares[..., None]).clamp_(min=0)
    away.diagonal(dim1=1, dim2=2).zero_()
    weights = away.sqrt_().add_(OFFSET).reciprocal_()
    if mask.all():
        return weights
    real = torch.from_numpy(mask).to(device)
    return weights.mul_(real[:, None] & real[..., None])


def markov_clusters(
    weights: Callable[[NDArray[np.int64]], torch.Tensor],
    sizes: NDArray[np.int64],
    config: MclConfig,
    enough: int = 0,
    threads: int = 1,
) -> list[list[Cluster]]:
    """Cluster graphs by simulated flow (van Dongen 2000, Graph clustering by flow simulation).

    Rounds, pruning and convergence follow the package `markov-clustering`: the clusters of a graph are the distinct
    supports of the rows of its attractors (nodes whose own flow is not zero). Clusters may overlap.

    Args:
        weights: maps the indices of a batch of graphs to their weights float64 [B, n, n] of edges from rows to columns,
            from 0 to 1e100, padded with zeros; they are overwritten.
        sizes: int64 [G], nodes of each graph.
        config: settings.
        enough: see `_rounds`.
        threads: number of threads.

    Returns:
        For each graph its clusters as ascending tuples of nodes, in ascending order.
    """
    result: list[list[Cluster]] = [[] for _ in sizes]
    batches = _batches(sizes)
    with open_threads(threads) as pool:
        done = pool.map(lambda batch: _rounds(start(weights(batch), sizes[batch], config), config, enough), batches)
    for batch, several in zip(batches, done, strict=True):
        for at, clusters in zip(batch.tolist(), several, strict=True):
            result[at] = clusters
    return result


def _batches(sizes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Group graphs of similar size, large ones first, into batches of up to BATCH_VALUES padded values or one graph."""
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    batches = []
    while len(order):
        batches.append(order[: max(1, BATCH_VALUES // int(sizes[order[0]]) ** 2)])
        order = order[len(batches[-1]) :]
    return batches


def _rounds(flow: Flow, config: MclConfig, enough: int) -> list[list[Cluster]]:
    """Run graphs until each has converged, and return their clusters.

    A graph of at most `enough` live nodes stops at once: its clusters are not final, but they are at most that many.
    """
    flows, graphs = [flow], len(flow.graph)
    result: list[set[Cluster]] = [set() for _ in range(graphs)]
    for number in range(1, MAX_ROUNDS + 1):
        moving, live = np.zeros(graphs, np.int64), np.zeros(graphs, np.int64)
        for place, flow in enumerate(flows):
            after = one_round(flow, config)
            moving += np.bincount(flow.graph[~settled(after, flow.values)], minlength=graphs)
            flows[place], alive = without_dead(flow, after)
            live += np.bincount(flow.graph, alive, graphs).astype(np.int64)
        over = (moving == 0) | (live <= enough) | (number == MAX_ROUNDS)
        left = []
        for flow in flows:
            ends = over[flow.graph]
            for block in np.flatnonzero(ends).tolist():
                result[flow.graph[block]].update(read_clusters(flow, block))
            left += split(some_blocks(flow, ~ends) if ends.any() else flow) if not ends.all() else []
        flows = left
        if not flows:
            break
    return [sorted(clusters) for clusters in result]


def split(flow: Flow) -> list[Flow]:
    """Split blocks into connected components where that may save work; flow never crosses between components."""
    values = flow.values
    if values.numel() * values.shape[2] <= SPLIT_WORK:
        return [flow]
    edges = values.sign().float()  # much faster than a comparison
    full = float(edges.mean())
    if full > flow.full / 2:  # two components of equal size halve it
        return [flow]
    labels, live = _components(edges, flow.live), flow.live.cpu().numpy()
    alive = (values.amax(1) > 0).cpu().numpy()
    by_size: dict[int, list[_Component]] = {}
    for block, label in enumerate(labels):
        real, columns = np.flatnonzero(flow.nodes[block] >= 0), np.flatnonzero(alive[block])
        for value in np.unique(label[real]):
            rows = real[label[real] == value]
            component = (block, rows, columns[label[live[block, columns]] == value])
            by_size.setdefault(max(len(rows), SPLIT_WIDTH).bit_length(), []).append(component)
    if sum(map(len, by_size.values())) <= len(values):
        return [replace(flow, full=full)]
    return [_cut(flow, live, components) for components in by_size.values()]


def _cut(flow: Flow, live: NDArray[np.int64], components: list[_Component]) -> Flow:
    """Return one flow whose blocks are the given components; `live` is `flow.live` in NumPy."""
    n, size = max(len(rows) for _, rows, _ in components), max(len(columns) for _, _, columns in components)
    values = flow.values.new_zeros(len(components), n, size)
    places, nodes = np.zeros((len(components), size), np.int64), np.full((len(components), n), -1)
    for at, (block, rows, columns) in enumerate(components):
        chosen = flow.values[block].index_select(0, torch.from_numpy(rows).to(values.device))
        chosen = chosen.index_select(1, torch.from_numpy(columns).to(values.device))
        values[at, : len(rows), : len(columns)] = chosen
        places[at, : len(columns)] = np.searchsorted(rows, live[block, columns])
        nodes[at, : len(rows)] = flow.nodes[block, rows]
    graph = flow.graph[[block for block, _, _ in components]]
    return exact_if_small(Flow(values, torch.from_numpy(places).to(values.device), nodes, graph, 1.0, flow.twins))


def _components(edges: torch.Tensor, live: torch.Tensor) -> NDArray[np.int64]:
    """Label the nodes of each block by component: int64 [B, n]; all 0 if LABEL_PASSES do not suffice.

    A node's label is the greatest node known to be in its component. Each pass propagates labels along incoming edges,
    along outgoing edges, and then from the node that a label names. Edges are 0 or 1, float32 [B, n, L]; labels in
    float32 are fast and exact.
    """
    labels = torch.arange(edges.shape[1], device=edges.device, dtype=torch.float32).repeat(len(edges), 1)
    for _ in range(LABEL_PASSES):
        incoming = torch.maximum((edges * labels[..., None]).amax(1), labels.gather(1, live))
        outgoing = torch.maximum((edges * incoming[:, None]).amax(2), labels)
        after = outgoing.scatter_reduce(1, live, incoming, "amax")
        after = after.gather(1, after.long())
        if torch.equal(after, labels):
            return labels.long().cpu().numpy()
        labels = after
    return np.zeros(labels.shape, np.int64)
