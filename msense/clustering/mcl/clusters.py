"""Markov clustering of graphs.

Small graphs run in batches; a graph that has fallen apart into components continues as several small flows. Each thread
needs 22 bytes x n^2 for its graph (0.35 GB at 4,000 nodes; 0.55 GB if all is float64).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from msense.clustering.kmeans.threads import open_threads
from msense.clustering.mcl.components import split
from msense.clustering.mcl.config import MAX_ROUNDS, MclConfig
from msense.clustering.mcl.flow import (
    Cluster,
    Flow,
    one_round,
    read_clusters,
    settled,
    some_blocks,
    start,
    without_dead,
)
from msense.errors import InputError

LARGEST = 1e100  # weight whose sums stay finite
BATCH_VALUES = 1 << 17  # flow values of a batch of small graphs: what fits in a core's cache


def markov_clusters(
    similarity: Sequence[torch.Tensor | NDArray[np.generic]] | torch.Tensor,
    config: MclConfig,
    *,
    device: str | torch.device = "cpu",
    threads: int = 1,
) -> list[list[Cluster]]:
    """Cluster graphs by simulated flow (van Dongen 2000, Graph clustering by flow simulation).

    Rounds, pruning and convergence follow the package `markov-clustering`: the clusters of a graph are the distinct
    supports of the rows of its attractors (nodes whose own flow is not zero). Clusters may overlap.

    Args:
        similarity: G matrices [n, n] of weights from 0 to LARGEST, of any n; may be asymmetric. Column j holds the
            edges that leave node j.
        config: settings.
        device: where the rounds are computed.
        threads: number of threads.

    Returns:
        For each graph its clusters as ascending tuples of nodes, in ascending order.

    Raises:
        InputError: a matrix is not square, or has a weight that is negative, NaN or above LARGEST; names its position.

    Example:
        >>> markov_clusters([np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]])], MclConfig())
        [[(0, 1), (2,)]]
    """
    graphs = [torch.as_tensor(x).detach() for x in similarity]
    for at, x in enumerate(graphs):
        if x.ndim != 2 or x.shape[0] != x.shape[1]:
            raise InputError(f"similarity {at} has shape {tuple(x.shape)}; Markov clustering needs square matrices")
        if x.numel() and not (float(x.amin()) >= 0 and float(x.amax()) <= LARGEST):  # NaN fails both
            raise InputError(
                f"similarity {at} has a weight that is negative, NaN or above {LARGEST:g}; rescale the weights"
            )
    sizes = np.array([len(x) for x in graphs], dtype=np.int64)

    def weights(batch: NDArray[np.int64]) -> torch.Tensor:
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
    """Return the clusters of each graph, computed in Python threads; for `enough` see `_rounds`.

    `weights` maps the indices of a batch of graphs, of `sizes` int64 [G] nodes, to their weights float64 [B, n, n] from
    rows to columns, padded with zeros.
    """
    found: list[list[Cluster]] = [[] for _ in sizes]
    batches = _batches(sizes)
    with open_threads(threads) as pool:
        done = pool.map(lambda batch: _rounds(start(weights(batch), sizes[batch], config), config, enough), batches)
    for batch, results in zip(batches, done, strict=True):
        for at, clusters in zip(batch.tolist(), results, strict=True):
            found[at] = clusters
    return found


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
    found: list[set[Cluster]] = [set() for _ in range(graphs)]
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
                found[flow.graph[block]].update(read_clusters(flow, block))
            left += split(some_blocks(flow, ~ends) if ends.any() else flow) if not ends.all() else []
        flows = left
        if not flows:
            break
    return [sorted(clusters) for clusters in found]
