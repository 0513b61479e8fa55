"""Markov clustering of graphs.

In: similarity matrices [n, n]. Out: the clusters of each graph. A graph that has fallen into components goes on as several
small flows, and small graphs run in batches. Each thread holds 22 bytes x n^2 for the graph it works on (0.35 GB at 4,000
nodes; 0.55 GB where all is float64). No Ray.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from msense.errors import BadInput
from msense.kmeans.threads import open_threads
from msense.mcl.components import split
from msense.mcl.config import MclConfig
from msense.mcl.flow import Cluster, Flow, one_round, read_clusters, settled, some_blocks, start, without_dead

LARGEST = 1e100  # weight: sums of them are finite
BATCH_VALUES = 1 << 17  # flow values of a batch of small graphs: what stays in a core's cache


def markov_clusters(
    similarity: Sequence[torch.Tensor | NDArray[np.generic]] | torch.Tensor,
    config: MclConfig,
    *,
    device: str | torch.device = "cpu",
    threads: int = 1,
) -> list[list[Cluster]]:
    """Cluster graphs by simulated flow (van Dongen 2000, Graph clustering by flow simulation).

    Rounds, pruning and convergence are those of the package `markov-clustering`: the clusters of a graph are the
    distinct supports of the rows of its attractors (nodes whose own flow is not zero). They may overlap, and a node
    without any edge is in none if `loop_value` is 0.

    Args:
        similarity: G matrices [n, n] of weights from 0 to LARGEST, of any n; symmetric or not. Column j is left from.
        config: settings.
        device: where the rounds are computed.
        threads: graphs are worked on in so many threads.

    Returns:
        For each graph its clusters as ascending tuples of nodes, in ascending order.

    Raises:
        BadInput: a matrix is not square, or has a weight that is negative, NaN or above LARGEST; names its place.
    """
    graphs = [torch.as_tensor(x).detach() for x in similarity]
    for at, x in enumerate(graphs):
        if x.ndim != 2 or x.shape[0] != x.shape[1]:
            raise BadInput(f"similarity {at} has shape {tuple(x.shape)}: Markov clustering takes square matrices")
        if x.numel() and not (float(x.amin()) >= 0 and float(x.amax()) <= LARGEST):  # NaN fails both
            raise BadInput(
                f"similarity {at} has a weight that is negative, NaN or above {LARGEST:g}: scale the weights"
            )
    sizes = np.array([len(x) for x in graphs], dtype=np.int64)

    def weights(batch: NDArray[np.int64]) -> torch.Tensor:
        if len(batch) == 1:
            return graphs[batch[0]].T[None].to(device, torch.float64).clone(memory_format=torch.contiguous_format)
        width = int(sizes[batch].max())
        padded = torch.zeros(len(batch), width, width, dtype=torch.float64, device=device)
        for place, at in enumerate(batch):
            padded[place, : sizes[at], : sizes[at]] = graphs[at].T  # see `Flow`
        return padded

    return cluster_in_threads(weights, sizes, config, 0, threads)


def cluster_in_threads(
    weights: Callable[[NDArray[np.int64]], torch.Tensor],
    sizes: NDArray[np.int64],
    config: MclConfig,
    enough: int,
    threads: int,
) -> list[list[Cluster]]:
    """Cluster graphs in Python threads, each with one thread of torch, which the caller gets back as it was.

    Args:
        weights: makes the weights of some of the graphs, float64 [B, n, n] from rows to columns, padded with zeros.
        sizes: int64 [G], nodes of each graph.
        config: settings.
        enough: see `_rounds`.
        threads: how many.

    Returns:
        The clusters of each graph.
    """
    found: list[list[Cluster]] = [[] for _ in sizes]
    batches = _batches(sizes)
    with open_threads(threads) as pool:
        done = pool.map(lambda batch: _rounds(start(weights(batch), sizes[batch], config), config, enough), batches)
    for batch, clusters in zip(batches, done, strict=True):
        for at, some in zip(batch.tolist(), clusters, strict=True):
            found[at] = some
    return found


def _batches(sizes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Cut graphs into batches of up to BATCH_VALUES padded values, or of one graph; like sizes together, large first."""
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    batches = []
    while len(order):
        batches.append(order[: max(1, BATCH_VALUES // int(sizes[order[0]]) ** 2)])
        order = order[len(batches[-1]) :]
    return batches


def _rounds(flow: Flow, config: MclConfig, enough: int) -> list[list[Cluster]]:
    """Let graphs run until each has converged, and read its clusters.

    A graph of at most `enough` live nodes stops at once; what is read then is only sure to be as few clusters.
    """
    flows, graphs = [flow], len(flow.graph)
    found: list[set[Cluster]] = [set() for _ in range(graphs)]
    for number in range(1, config.max_rounds + 1):
        moving, live = np.zeros(graphs, np.int64), np.zeros(graphs, np.int64)
        for place, flow in enumerate(flows):
            after = one_round(flow, config, prune=config.prune > 0 and number % config.prune_every == 0)
            check = number % config.check_every == 0
            still = settled(after, flow.values) if check else np.zeros(len(flow.graph), bool)
            moving += np.bincount(flow.graph[~still], minlength=graphs)
            flows[place], alive = without_dead(flow, after)
            live += np.bincount(flow.graph, alive, graphs).astype(np.int64)
        over = (moving == 0) | (live <= enough) | (number == config.max_rounds)
        left = []
        for flow in flows:
            ends = over[flow.graph]
            for block in np.flatnonzero(ends).tolist():
                found[flow.graph[block]].update(read_clusters(flow, block))
            left += split(some_blocks(flow, ~ends) if ends.any() else flow) if not ends.all() else []
        flows = left
        if not flows:
            break
    return [sorted(clusters) for clusters in found]
