"""The flow of Markov clustering, and one round of it.

In: weights of graphs [B, n, n]. Out: after each round the flow [B, n, L], of which only nodes that walkers still come to
keep their place; at the end its clusters. Holds two flows and their product's steps.
"""

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from msense.mcl.config import MclConfig
from msense.mcl.twins import find_twins, make_equal
from msense.products import product

Cluster: TypeAlias = tuple[int, ...]

EXACT_NODES = 128  # flows of more live nodes are float32, whose errors of 1e-7 the later rounds in float64 smooth away
COMPACT = 15 / 16  # a flow that keeps more than this share of its columns keeps all: leaving a few out costs more
WIDTHS = 32  # a float32 flow is cut to a multiple of so many columns: see `product` on new shapes


@dataclass(frozen=True)
class Flow:
    """Blocks of flow: B graphs or components, padded with zeros to n nodes of which L are live.

    The transpose of the paper's matrix: row j says where walkers from node j are, and sums to 1. Nodes where no walker
    is have no column; none will ever be there again.
    """

    values: torch.Tensor  # float32 or float64 [B, n, L]
    live: torch.Tensor  # int64 [B, L]: the column's node, as a row; ascending, then any where the column is all zero
    nodes: NDArray[np.int64]  # [B, n]: the row's node in its graph, ascending; -1 on padding
    graph: NDArray[np.int64]  # [B]: which graph of the batch a block belongs to
    full: float  # share of values that were not zero when components were last looked for
    twins: list[list[NDArray[np.int64]]]  # of each graph of the batch, see `find_twins`; none if it started in float64


def start(weights: torch.Tensor, sizes: NDArray[np.int64], config: MclConfig) -> Flow:
    """The flow before any round, of weights float64 [B, n, n] from rows to columns, which are written over."""
    width = weights.shape[1]
    real = np.arange(width) < sizes[:, None]
    if config.loop_value > 0:
        loops = torch.from_numpy(real * config.loop_value).to(weights.device)
        weights.diagonal(dim1=1, dim2=2).copy_(loops)
    sums = _normalize(weights)
    # without pruning, what is left of a value however small decides; high powers leave the range of float32
    rough = width > EXACT_NODES and config.prune > 0 and config.inflation * config.expansion <= 8
    twins = [find_twins(x[:n, :n], y[:n, 0]) for x, y, n in zip(weights, sums, sizes, strict=True)] if rough else []
    rough = rough and None not in twins
    live = torch.arange(width, device=weights.device).expand(len(weights), width)
    nodes = np.where(real, np.arange(width), -1)
    values = weights.float() if rough else weights
    return Flow(values, live, nodes, np.arange(len(weights)), 1.0, [some or [] for some in twins])


def one_round(flow: Flow, config: MclConfig, prune: bool) -> torch.Tensor:
    """One round of expansion, inflation and pruning: the new values [B, n, L].

    Nodes that are not live are nobody's next place, so a product takes n L^2 multiplications, not n^3.
    """
    values = flow.values
    steps = _taken(values, 1, flow.live)  # [B, L, L]
    after = values
    for _ in range(config.expansion - 1):
        after = _product(after, steps)
    _raise(after, config.inflation)
    _normalize(after)
    if prune:
        _prune(after, config.prune)
    return after


def settled(after: torch.Tensor, before: torch.Tensor) -> NDArray[np.bool_]:
    """Which blocks have converged: |a - b| <= 1e-8 + 1e-5 |b| everywhere, as numpy.allclose; bool [B]."""

    def near(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((a - b).abs_() <= b * 1e-5 + 1e-8).flatten(1).all(1)

    few = near(after[:, :4], before[:, :4])  # almost always tells that it has not
    return (few & near(after, before) if few.any() else few).cpu().numpy()


def without_dead(flow: Flow, values: torch.Tensor) -> tuple[Flow, NDArray[np.int64]]:
    """The flow with new values; the live nodes of each block. Columns of zeros are left out where they are many."""
    live, alive = flow.live, values.sum(1) > 0
    counts = alive.sum(1).cpu().numpy()
    keep = max(1, int(counts.max()))
    if values.dtype == torch.float32:
        keep = -(-keep // WIDTHS) * WIDTHS
    if keep <= COMPACT * values.shape[2]:
        order = alive.int().sort(dim=1, descending=True, stable=True).indices[:, :keep]  # in the order they had
        values, live = _taken(values, 2, order), live.gather(1, order)
    return exact_if_small(replace(flow, values=values, live=live)), counts


def some_blocks(flow: Flow, kept: NDArray[np.bool_]) -> Flow:
    """The flow of some of the blocks, by a mask [B]."""
    some = torch.from_numpy(np.flatnonzero(kept)).to(flow.live.device)
    values, live = flow.values[some], flow.live[some]
    return replace(flow, values=values, live=live, nodes=flow.nodes[kept], graph=flow.graph[kept])


def read_clusters(flow: Flow, block: int) -> set[Cluster]:
    """For each attractor the nodes whose walkers come to it; each set once."""
    values, nodes = flow.values[block], flow.nodes[block]
    own = values.gather(0, flow.live[block][None])[0] != 0
    comers = (values[:, own] != 0).T.cpu().numpy()
    return {tuple(nodes[some].tolist()) for some in comers}


def exact_if_small(flow: Flow) -> Flow:
    """The flow in float64, twins made equal, if it has at most EXACT_NODES columns and was float32."""
    if flow.values.dtype == torch.float64 or flow.values.shape[2] > EXACT_NODES:
        return flow
    values = flow.values.double()
    for block, (graph, nodes) in enumerate(zip(flow.graph, flow.nodes, strict=True)):
        if flow.twins[graph]:
            rows = [np.flatnonzero(np.isin(nodes, some)) for some in flow.twins[graph]]
            make_equal(values[block], flow.live[block].cpu().numpy(), rows)
    return replace(flow, values=values)


def _normalize(values: torch.Tensor) -> torch.Tensor:
    """Scale rows of [B, n, L] to sum 1, in place, and return their sums [B, n, 1]; a row of zeros stays."""
    sums = values.sum(2, keepdim=True)
    values.div_(sums.masked_fill(sums == 0, 1.0))
    return sums


def _taken(values: torch.Tensor, axis: int, index: torch.Tensor) -> torch.Tensor:
    """Rows (axis 1) or columns (2) of each block of [B, n, L], by int64 [B, .]."""
    if len(values) == 1:
        return values.index_select(axis, index[0])  # much faster than gather
    shape = list(values.shape)
    shape[axis] = index.shape[1]
    return values.gather(axis, (index[..., None] if axis == 1 else index[:, None]).expand(shape))


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[B, n, L] @ [B, L, L]."""
    return product(left[0], right[0])[None] if len(left) == 1 else torch.bmm(left, right)


def _raise(values: torch.Tensor, power: float) -> None:
    """Raise [B, n, L] to a power, in place."""
    if values.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        array = values.numpy()
        np.power(array, power, out=array)  # there in three quarters of torch's time
    else:
        values.pow_(power)


def _prune(values: torch.Tensor, limit: float) -> None:
    """Make what is below the limit 0, in place, but not the largest value of a row of [B, n, L], whose sum is 1."""
    kind = np.float32 if values.dtype == torch.float32 else np.float64
    below = float(np.nextafter(kind(limit), kind(0)))
    if limit * values.shape[2] < 0.99:  # the largest is no less than the mean
        torch.nn.functional.threshold_(values, below, 0.0)
        return
    top, first = values.max(2, keepdim=True)  # of equals the first
    torch.nn.functional.threshold_(values, below, 0.0)
    values.scatter_(2, first, top)
