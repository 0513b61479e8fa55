"""Markov clustering of graphs, and the paper's rule for the number of senses of a token of a decoder teacher.

Small graphs run in batches; a graph that has fallen apart into components continues as several small flows. Memory: 22
bytes x n^2 for the graph (0.35 GB at 4,000 nodes; 0.55 GB if all is float64) and 16 bytes x n x D for its points.

Twins, nodes with the same edges such as equal points, have equal flows in exact arithmetic. In floating point, rounding
differences grow by the power `inflation` in each round until one twin takes all the flow: in float64 too slowly to matter
before convergence, in float32 soon. So twins are made equal when a flow switches from float32 to float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msense.clustering.kmeans.seeding import Device, Points, as_points, check_limits, check_points
from msense.clustering.kmeans.threads import open_threads
from msense.clustering.matmul import product

OFFSET = 0.01  # from the paper: the similarity of two points is 1 / (OFFSET + Euclidean distance)
MCL_POINTS = 4000  # points of a token that are used; as many as remain of the paper's merged samples
# defaults of the package `markov-clustering`, which the paper keeps
LOOP_WEIGHT = 1.0  # of the edge from each node to itself
MAX_ROUNDS = 100
PRUNE_BELOW = 0.001  # smaller flow values become 0, except the largest value of a node

BATCH_VALUES = 1 << 17  # flow values of a batch of small graphs: what fits in a core's cache
SPLIT_WORK = 1 << 22  # multiplications per product below which a search for components does not pay off
LABEL_PASSES = 12  # of label propagation, after which a graph counts as connected
SPLIT_WIDTH = 16  # components of at most this many nodes share a flow; larger ones share it within a factor of 2
EXACT_NODES = 128  # larger flows are float32; later rounds in float64 smooth away the errors of 1e-7
COMPACT = 15 / 16  # columns are dropped only below this share of remaining ones: copying the rest costs more
WIDTHS = 32  # float32 flows keep a multiple of this many columns: `product` is slow on new shapes
TOLERANCE = 1e-12  # relative for sums of float64 weights, absolute for transition probabilities

_Cluster: TypeAlias = tuple[int, ...]
_Component: TypeAlias = tuple[int, NDArray[np.int64], NDArray[np.int64]]  # its block, rows and columns


@dataclass(frozen=True)
class MclConfig:
    """Settings of Markov clustering and of the rule that derives K from it; defaults of Wang et al. 2025.

    Raises:
        InputError: lists every setting out of range.
    """

    expansion: int = 2  # matrix power applied to the flow in each round
    inflation: float = 1.65  # power applied to each value after that; larger values give more clusters
    share: float = 0.1  # K is this fraction of the token's number of clusters, rounded down,
    large_share: float = 0.4  # or this one for tokens of more than `large` clusters
    large: int = 900
    least: int = 5  # minimum K; a token of fewer points keeps each point as a sense

    def __post_init__(self) -> None:
        limits = {"expansion": (2, 100), "inflation": (1.001, 100), "share": (0, 1), "large_share": (0, 1)}
        check_limits("Markov clustering settings", self, limits | {"large": (0, np.inf), "least": (1, np.inf)})


def mcl_senses(
    points: Points,
    sizes: NDArray[np.int64],
    config: MclConfig,
    *,
    token_ids: NDArray[np.int64] | None = None,
    device: Device = "cpu",
) -> NDArray[np.int64]:
    """Return K of every token: a fraction of its Markov clusters (Wang et al. 2025, the rule for Llama).

    K is int(share * clusters), or int(large_share * clusters) for more than `large` clusters, but at least `least`. A
    token of fewer than `least` points has K = number of points. Only the first MCL_POINTS points of a token are used.
    Rounds end early once the remaining clusters cannot give more than `least`. Three or more equal points form one
    cluster; two alone, with an edge of 100 next to loops of 1, stay separate. `points` and `sizes` are as for
    `cluster_tokens`; errors name `token_ids` int64 [T], or positions. K is int64 [T], 0 for a token without points.

    Raises:
        InputError: the arrays' lengths do not match.
        MsenseError: a value is NaN, infinite or above LARGEST_VALUE; names the token.
    """
    view = as_points(points)
    check_points(view, sizes, np.arange(len(sizes)) if token_ids is None else token_ids)
    starts, used = np.cumsum(sizes) - sizes, np.minimum(sizes, MCL_POINTS)
    counts = np.arange(MCL_POINTS + 1)
    rule = np.where(counts > config.large, config.large_share * counts, config.share * counts).astype(np.int64)
    rule = np.maximum(rule, config.least)
    enough = int(np.flatnonzero(np.maximum.accumulate(rule) <= config.least)[-1])  # up to here the rule gives `least`
    large = np.flatnonzero(used > enough)

    def weights(batch: NDArray[np.int64]) -> Tensor:
        return _similarities(view, starts[large[batch]], used[large[batch]], device)

    senses = np.minimum(sizes, config.least)
    senses[large] = rule[[len(clusters) for clusters in markov_clusters(weights, used[large], config, enough)]]
    return senses


def _similarities(points: Tensor, starts: NDArray[np.int64], sizes: NDArray[np.int64], device: Device) -> Tensor:
    """Return 1 / (OFFSET + Euclidean distance) of each token's points: float64 [B, n, n], 0 on padding."""
    mask = np.arange(sizes.max()) < sizes[:, None]
    rows = np.where(mask, starts[:, None] + np.arange(sizes.max()), starts[:, None])
    stored = points.index_select(0, torch.from_numpy(rows.ravel()).to(points.device))
    # float64, because squared distances of near points are small differences of large numbers
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
    weights: Callable[[NDArray[np.int64]], Tensor], sizes: NDArray[np.int64], config: MclConfig, enough: int = 0
) -> list[list[_Cluster]]:
    """Cluster graphs by simulated flow (van Dongen 2000, Graph clustering by flow simulation).

    Rounds, pruning and convergence follow the package `markov-clustering`: the clusters of a graph are the distinct
    supports of the rows of its attractors (nodes whose own flow is not zero). Clusters may overlap.

    `weights` maps the indices of a batch of graphs, of `sizes` nodes, to the weights float64 [B, n, n] of edges from rows
    to columns, from 0 to 1e100, padded with zeros; they are overwritten. A graph of at most `enough` live nodes stops at
    once, with at most that many clusters. Each graph's clusters are ascending tuples of nodes, in ascending order.
    """
    result: list[list[_Cluster]] = [[] for _ in sizes]
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    with open_threads(1):
        while len(order):
            batch = order[: max(1, BATCH_VALUES // int(sizes[order[0]]) ** 2)]
            order = order[len(batch) :]
            several = _rounds(start(weights(batch), sizes[batch], config), config, enough)
            for at, clusters in zip(batch.tolist(), several, strict=True):
                result[at] = clusters
    return result


@dataclass(frozen=True)
class Flow:
    """Blocks of flow: B graphs or components, padded with zeros to n nodes, L of them live.

    This is the transpose of the paper's matrix: row j holds the distribution of walkers from node j and sums to 1.
    Nodes without walkers have no column; walkers never return to them.
    """

    values: Tensor  # float32 or float64 [B, n, L]
    live: Tensor  # int64 [B, L]: each column's node, as a row; ascending, arbitrary for columns of zeros
    nodes: NDArray[np.int64]  # [B, n]: each row's node in its graph, ascending; -1 on padding
    graph: NDArray[np.int64]  # [B]: the block's graph within the batch
    full: float  # share of nonzero values when components were last searched
    twins: list[list[NDArray[np.int64]]]  # per graph of the batch, see `_find_twins`; empty if it started in float64


def start(weights: Tensor, sizes: NDArray[np.int64], config: MclConfig) -> Flow:
    """Return the initial flow for weights float64 [B, n, n] from rows to columns, which are overwritten."""
    width = weights.shape[1]
    real = np.arange(width) < sizes[:, None]
    weights.diagonal(dim1=1, dim2=2).copy_(torch.from_numpy(real * LOOP_WEIGHT))
    sums = _normalize(weights)
    rough = width > EXACT_NODES and config.inflation * config.expansion <= 8  # higher powers exceed float32's range
    twins = [_find_twins(x[:n, :n], y[:n, 0]) for x, y, n in zip(weights, sums, sizes, strict=True)] if rough else []
    rough = rough and None not in twins
    live = torch.arange(width, device=weights.device).expand(len(weights), width)
    nodes = np.where(real, np.arange(width), -1)
    values = weights.float() if rough else weights
    return Flow(values, live, nodes, np.arange(len(weights)), 1.0, [sets or [] for sets in twins])


def _rounds(flow: Flow, config: MclConfig, enough: int) -> list[list[_Cluster]]:
    """Run graphs until each has converged or has at most `enough` live nodes, and return their clusters."""
    flows, graphs = [flow], len(flow.graph)
    result: list[set[_Cluster]] = [set() for _ in range(graphs)]
    for number in range(1, MAX_ROUNDS + 1):
        moving, live = np.zeros(graphs, np.int64), np.zeros(graphs, np.int64)
        for place, flow in enumerate(flows):
            after = _one_round(flow, config)
            moving += np.bincount(flow.graph[~_settled(after, flow.values)], minlength=graphs)
            flows[place], alive = _without_dead(flow, after)
            live += np.bincount(flow.graph, alive, graphs).astype(np.int64)
        over = (moving == 0) | (live <= enough) | (number == MAX_ROUNDS)
        left = []
        for flow in flows:
            ends = over[flow.graph]
            for block in np.flatnonzero(ends).tolist():
                result[flow.graph[block]].update(_read_clusters(flow, block))
            left += split(_some_blocks(flow, ~ends) if ends.any() else flow) if not ends.all() else []
        flows = left
        if not flows:
            break
    return [sorted(clusters) for clusters in result]


def _one_round(flow: Flow, config: MclConfig) -> Tensor:
    """Return the values [B, n, L] after one round; only live nodes are multiplied: n L^2 operations, not n^3."""
    after = flow.values
    steps = _select(after, 1, flow.live)  # [B, L, L]
    for _ in range(config.expansion - 1):
        after = product(after[0], steps[0])[None] if len(after) == 1 else torch.bmm(after, steps)
    if after.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        np.power(after.numpy(), config.inflation, out=after.numpy())  # takes three quarters of torch's time there
    else:
        after.pow_(config.inflation)
    _normalize(after)
    _prune(after)
    return after


def _settled(after: Tensor, before: Tensor) -> NDArray[np.bool_]:
    """Return which blocks have converged, bool [B]: |a - b| <= 1e-8 + 1e-5 |b| everywhere, as numpy.allclose."""

    def near(a: Tensor, b: Tensor) -> Tensor:
        return ((a - b).abs_() <= b * 1e-5 + 1e-8).flatten(1).all(1)

    few = near(after[:, :4], before[:, :4])  # almost always enough to see that a block has not
    return (few & near(after, before) if few.any() else few).cpu().numpy()


def _without_dead(flow: Flow, values: Tensor) -> tuple[Flow, NDArray[np.int64]]:
    """Return the flow with new values, without most columns of zeros; and the number of live nodes per block."""
    live, alive = flow.live, values.sum(1) > 0
    counts = alive.sum(1).cpu().numpy()
    keep = max(1, int(counts.max()))
    if values.dtype == torch.float32:
        keep = -(-keep // WIDTHS) * WIDTHS
    if keep <= COMPACT * values.shape[2]:
        order = alive.int().sort(dim=1, descending=True, stable=True).indices[:, :keep]  # keeps their order
        values, live = _select(values, 2, order), live.gather(1, order)
    return _exact_if_small(replace(flow, values=values, live=live)), counts


def _some_blocks(flow: Flow, kept: NDArray[np.bool_]) -> Flow:
    index = torch.from_numpy(np.flatnonzero(kept)).to(flow.live.device)
    values, live = flow.values[index], flow.live[index]
    return replace(flow, values=values, live=live, nodes=flow.nodes[kept], graph=flow.graph[kept])


def _read_clusters(flow: Flow, block: int) -> set[_Cluster]:
    """Return, for each attractor, the nodes whose walkers reach it; duplicates are merged."""
    values, nodes = flow.values[block], flow.nodes[block]
    own = values.gather(0, flow.live[block][None])[0] != 0
    reached = (values[:, own] != 0).T.cpu().numpy()
    return {tuple(nodes[mask].tolist()) for mask in reached}


def _normalize(values: Tensor) -> Tensor:
    """Scale rows of [B, n, L] to sum 1, in place, and return their former sums [B, n, 1]; rows of zeros stay."""
    sums = values.sum(2, keepdim=True)
    values.div_(sums.masked_fill(sums == 0, 1.0))
    return sums


def _select(values: Tensor, axis: int, index: Tensor) -> Tensor:
    """Select rows (axis 1) or columns (2) of each block of [B, n, L], by int64 [B, .]."""
    if len(values) == 1:
        return values.index_select(axis, index[0])  # much faster than gather
    return values.take_along_dim(index[..., None] if axis == 1 else index[:, None], axis)


def _prune(values: Tensor) -> None:
    """Set values below PRUNE_BELOW to 0, in place, except the largest of each row of [B, n, L], whose sum is 1."""
    kind = np.float32 if values.dtype == torch.float32 else np.float64
    below = float(np.nextafter(kind(PRUNE_BELOW), kind(0)))
    if PRUNE_BELOW * values.shape[2] < 0.99:  # the largest is at least the mean
        torch.nn.functional.threshold_(values, below, 0.0)
        return
    top, first = values.max(2, keepdim=True)  # the first of equal ones
    torch.nn.functional.threshold_(values, below, 0.0)
    values.scatter_(2, first, top)


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
    return _exact_if_small(Flow(values, torch.from_numpy(places).to(values.device), nodes, graph, 1.0, flow.twins))


def _components(edges: Tensor, live: Tensor) -> NDArray[np.int64]:
    """Label the nodes of each block by component: int64 [B, n]; all 0 if LABEL_PASSES do not suffice.

    A node's label is the greatest node known to be in its component. Each pass propagates labels along incoming edges,
    along outgoing edges, and then from the node that a label names. Labels in float32 are fast and exact.
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


def _exact_if_small(flow: Flow) -> Flow:
    """Convert a float32 flow of at most EXACT_NODES columns to float64 and make its twins equal."""
    if flow.values.dtype == torch.float64 or flow.values.shape[2] > EXACT_NODES:
        return flow
    values = flow.values.double()
    for block, (graph, nodes) in enumerate(zip(flow.graph, flow.nodes, strict=True)):
        if flow.twins[graph]:
            rows = [np.flatnonzero(np.isin(nodes, twins)) for twins in flow.twins[graph]]
            _equalize_twins(values[block], flow.live[block].cpu().numpy(), rows)
    return replace(flow, values=values)


def _find_twins(chances: Tensor, sums: Tensor) -> list[NDArray[np.int64]] | None:
    """Return the nodes of each set of twins, or None if nodes have equal sums but are no twins: they may tie as well."""
    ordered, order = sums.sort()
    apart = (ordered.diff() >= TOLERANCE * ordered[:-1]).cpu().numpy()
    sets = [nodes for nodes in np.split(order.cpu().numpy(), np.flatnonzero(apart) + 1) if len(nodes) > 1]
    return sets if all(_are_twins(chances, torch.from_numpy(nodes).to(chances.device)) for nodes in sets) else None


def _are_twins(chances: Tensor, nodes: Tensor) -> bool:
    """Return whether nodes, int64 [m], have equal edges to and from all others, equal loops and edges between them."""
    others = torch.ones(len(chances), dtype=torch.bool, device=chances.device).index_fill_(0, nodes, False)
    among = chances[nodes][:, nodes]
    loops = torch.eye(len(nodes), dtype=torch.bool, device=chances.device)
    edges = (chances[nodes][:, others], chances[others][:, nodes].T, among[loops], among[~loops])
    return all(not x.numel() or float((x - x[:1]).abs().amax()) <= TOLERANCE for x in edges)


def _equalize_twins(values: Tensor, live: NDArray[np.int64], twins: list[NDArray[np.int64]]) -> None:
    """Give all twins of a set (given as rows) the flow of the first one, in place, unless only some of them are live."""
    column_of = {row: column for column, row in reversed(list(enumerate(live.tolist())))}  # repeated rows are padding
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
