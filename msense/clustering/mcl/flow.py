"""The flow of Markov clustering and one round of it: expansion, inflation, pruning.

Nodes that no walker reaches any more lose their column. Memory: two flows and the intermediate products.

Twins, nodes with the same edges such as equal points, have equal flows in exact arithmetic. In floating point, rounding
differences grow by the power `inflation` in each round until one twin takes all the flow: in float64 too slowly to matter
before convergence, in float32 soon. So twins are made equal when a flow switches from float32 to float64.
"""

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from msense.clustering.kmeans.seeding import check_settings
from msense.clustering.matmul import product

# defaults of the package `markov-clustering`, which the paper keeps
LOOP_WEIGHT = 1.0  # of the edge from each node to itself
MAX_ROUNDS = 100
PRUNE_BELOW = 0.001  # smaller flow values become 0, except the largest value of a node

Cluster: TypeAlias = tuple[int, ...]
EXACT_NODES = 128  # larger flows are float32; later rounds in float64 smooth away the errors of 1e-7
COMPACT = 15 / 16  # columns are dropped only below this share of remaining ones: copying the rest costs more
WIDTHS = 32  # float32 flows keep a multiple of this many columns: `product` is slow on new shapes
TOLERANCE = 1e-12  # relative for sums of float64 weights, absolute for transition probabilities


@dataclass(frozen=True)
class MclConfig:
    """Settings of Markov clustering and of the rule that derives K from it; defaults of Wang et al. 2025.

    Raises:
        InputError: lists every setting out of range.

    Example:
        >>> MclConfig(inflation=1.8).share
        0.1
    """

    expansion: int = 2  # matrix power applied to the flow in each round
    inflation: float = 1.65  # power applied to each value after that; larger values give more clusters
    share: float = 0.1  # K is this fraction of the token's number of clusters, rounded down,
    large_share: float = 0.4  # or this one for tokens of more than `large` clusters
    large: int = 900
    least: int = 5  # minimum K; a token of fewer points keeps each point as a sense

    def __post_init__(self) -> None:
        checks = {
            "expansion": (2 <= self.expansion <= 100, "from 2 to 100"),
            "inflation": (1 < self.inflation <= 100, "above 1 and up to 100"),
            "share": (0 <= self.share <= 1, "from 0 to 1"),
            "large_share": (0 <= self.large_share <= 1, "from 0 to 1"),
            "large": (self.large >= 0, "0 or more"),
            "least": (self.least >= 1, "1 or more"),
        }
        check_settings("Markov clustering settings", self, checks)


@dataclass(frozen=True)
class Flow:
    """Blocks of flow: B graphs or components, padded with zeros to n nodes, L of them live.

    This is the transpose of the paper's matrix: row j holds the distribution of walkers from node j and sums to 1.
    Nodes without walkers have no column; walkers never return to them.
    """

    values: torch.Tensor  # float32 or float64 [B, n, L]
    live: torch.Tensor  # int64 [B, L]: each column's node, as a row; ascending, arbitrary for columns of zeros
    nodes: NDArray[np.int64]  # [B, n]: each row's node in its graph, ascending; -1 on padding
    graph: NDArray[np.int64]  # [B]: the block's graph within the batch
    full: float  # share of nonzero values when components were last searched
    twins: list[list[NDArray[np.int64]]]  # per graph of the batch, see `find_twins`; empty if it started in float64


def start(weights: torch.Tensor, sizes: NDArray[np.int64], config: MclConfig) -> Flow:
    """Return the initial flow for weights float64 [B, n, n] from rows to columns, which are overwritten."""
    width = weights.shape[1]
    real = np.arange(width) < sizes[:, None]
    weights.diagonal(dim1=1, dim2=2).copy_(torch.from_numpy(real * LOOP_WEIGHT))
    sums = _normalize(weights)
    rough = width > EXACT_NODES and config.inflation * config.expansion <= 8  # higher powers exceed float32's range
    twins = [find_twins(x[:n, :n], y[:n, 0]) for x, y, n in zip(weights, sums, sizes, strict=True)] if rough else []
    rough = rough and None not in twins
    live = torch.arange(width, device=weights.device).expand(len(weights), width)
    nodes = np.where(real, np.arange(width), -1)
    values = weights.float() if rough else weights
    return Flow(values, live, nodes, np.arange(len(weights)), 1.0, [sets or [] for sets in twins])


def one_round(flow: Flow, config: MclConfig) -> torch.Tensor:
    """Return the values [B, n, L] after one round; only live nodes are multiplied: n L^2 operations, not n^3."""
    values = flow.values
    steps = _select(values, 1, flow.live)  # [B, L, L]
    after = values
    for _ in range(config.expansion - 1):
        after = product(after[0], steps[0])[None] if len(after) == 1 else torch.bmm(after, steps)
    _raise(after, config.inflation)
    _normalize(after)
    _prune(after)
    return after


def settled(after: torch.Tensor, before: torch.Tensor) -> NDArray[np.bool_]:
    """Return which blocks have converged, bool [B]: |a - b| <= 1e-8 + 1e-5 |b| everywhere, as numpy.allclose."""

    def near(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((a - b).abs_() <= b * 1e-5 + 1e-8).flatten(1).all(1)

    few = near(after[:, :4], before[:, :4])  # almost always enough to see that a block has not
    return (few & near(after, before) if few.any() else few).cpu().numpy()


def without_dead(flow: Flow, values: torch.Tensor) -> tuple[Flow, NDArray[np.int64]]:
    """Return the flow with new values, without most columns of zeros; and the number of live nodes per block."""
    live, alive = flow.live, values.sum(1) > 0
    counts = alive.sum(1).cpu().numpy()
    keep = max(1, int(counts.max()))
    if values.dtype == torch.float32:
        keep = -(-keep // WIDTHS) * WIDTHS
    if keep <= COMPACT * values.shape[2]:
        order = alive.int().sort(dim=1, descending=True, stable=True).indices[:, :keep]  # keeps their order
        values, live = _select(values, 2, order), live.gather(1, order)
    return exact_if_small(replace(flow, values=values, live=live)), counts


def some_blocks(flow: Flow, kept: NDArray[np.bool_]) -> Flow:
    """Return the flow of the blocks in a mask [B]."""
    index = torch.from_numpy(np.flatnonzero(kept)).to(flow.live.device)
    values, live = flow.values[index], flow.live[index]
    return replace(flow, values=values, live=live, nodes=flow.nodes[kept], graph=flow.graph[kept])


def read_clusters(flow: Flow, block: int) -> set[Cluster]:
    """Return, for each attractor, the nodes whose walkers reach it; duplicates are merged."""
    values, nodes = flow.values[block], flow.nodes[block]
    own = values.gather(0, flow.live[block][None])[0] != 0
    reached = (values[:, own] != 0).T.cpu().numpy()
    return {tuple(nodes[mask].tolist()) for mask in reached}


def exact_if_small(flow: Flow) -> Flow:
    """Convert a float32 flow of at most EXACT_NODES columns to float64 and make its twins equal."""
    if flow.values.dtype == torch.float64 or flow.values.shape[2] > EXACT_NODES:
        return flow
    values = flow.values.double()
    for block, (graph, nodes) in enumerate(zip(flow.graph, flow.nodes, strict=True)):
        if flow.twins[graph]:
            rows = [np.flatnonzero(np.isin(nodes, twins)) for twins in flow.twins[graph]]
            equalize_twins(values[block], flow.live[block].cpu().numpy(), rows)
    return replace(flow, values=values)


def _normalize(values: torch.Tensor) -> torch.Tensor:
    """Scale rows of [B, n, L] to sum 1, in place, and return their former sums [B, n, 1]; rows of zeros stay."""
    sums = values.sum(2, keepdim=True)
    values.div_(sums.masked_fill(sums == 0, 1.0))
    return sums


def _select(values: torch.Tensor, axis: int, index: torch.Tensor) -> torch.Tensor:
    """Select rows (axis 1) or columns (2) of each block of [B, n, L], by int64 [B, .]."""
    if len(values) == 1:
        return values.index_select(axis, index[0])  # much faster than gather
    shape = list(values.shape)
    shape[axis] = index.shape[1]
    return values.gather(axis, (index[..., None] if axis == 1 else index[:, None]).expand(shape))


def _raise(values: torch.Tensor, power: float) -> None:
    """Raise [B, n, L] to a power, in place."""
    if values.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        array = values.numpy()
        np.power(array, power, out=array)  # takes three quarters of torch's time there
    else:
        values.pow_(power)


def _prune(values: torch.Tensor) -> None:
    """Set values below PRUNE_BELOW to 0, in place, except the largest of each row of [B, n, L], whose sum is 1."""
    kind = np.float32 if values.dtype == torch.float32 else np.float64
    below = float(np.nextafter(kind(PRUNE_BELOW), kind(0)))
    if PRUNE_BELOW * values.shape[2] < 0.99:  # the largest is at least the mean
        torch.nn.functional.threshold_(values, below, 0.0)
        return
    top, first = values.max(2, keepdim=True)  # the first of equal ones
    torch.nn.functional.threshold_(values, below, 0.0)
    values.scatter_(2, first, top)


def find_twins(chances: torch.Tensor, sums: torch.Tensor) -> list[NDArray[np.int64]] | None:
    """Return the nodes of each set of twins, or None if nodes have equal sums but are no twins: they may tie as well.

    `chances` float64 [n, n] are transition probabilities from rows to columns, normalised by `sums` float64 [n].
    """
    ordered, order = sums.sort()
    apart = (ordered.diff() >= TOLERANCE * ordered[:-1]).cpu().numpy()
    sets = [nodes for nodes in np.split(order.cpu().numpy(), np.flatnonzero(apart) + 1) if len(nodes) > 1]
    return sets if all(_are_twins(chances, torch.from_numpy(nodes).to(chances.device)) for nodes in sets) else None


def _are_twins(chances: torch.Tensor, nodes: torch.Tensor) -> bool:
    """Return whether nodes, int64 [m], have equal edges to and from all others, equal loops and edges between them."""

    def alike(x: torch.Tensor) -> bool:
        return not x.numel() or float((x - x[:1]).abs().amax()) <= TOLERANCE

    others = torch.ones(len(chances), dtype=torch.bool, device=chances.device).index_fill_(0, nodes, False)
    among = chances[nodes][:, nodes]
    loops = torch.eye(len(nodes), dtype=torch.bool, device=chances.device)
    to_others, from_others = chances[nodes][:, others], chances[others][:, nodes].T
    return all(map(alike, (to_others, from_others, among[loops], among[~loops])))


def equalize_twins(values: torch.Tensor, live: NDArray[np.int64], twins: list[NDArray[np.int64]]) -> None:
    """Give all twins of a set (given as rows) the flow of the first one, in place, unless only some of them are live.

    `values` [n, L] and `live` int64 [L] are as in `Flow`; repeated rows in `live` are padding.
    """
    column_of = {row: column for column, row in reversed(list(enumerate(live.tolist())))}
    for rows in twins:
        columns = [column_of[row] for row in rows.tolist() if row in column_of]
        if len(rows) < 2 or 0 < len(columns) < len(rows):
            continue
        values[rows] = values[rows[0]].clone()
        if columns:
            loop, edge = values[rows[0], columns[:2]].tolist()
            values[:, columns] = values[:, columns[:1]].clone()
            values[np.ix_(rows, columns)] = edge
            values[rows, columns] = loop
