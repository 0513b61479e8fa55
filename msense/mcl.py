"""Markov clustering: how many senses a token of a decoder teacher gets, by the rule of the paper.

In: similarity matrices [n, n], or points [N, D] grouped by token. Out: the clusters of each graph, or K of each token.
Only nodes that walkers still come to keep their place in the flow, a graph that has fallen into components goes on as
several small ones, and small graphs run in batches. Each thread holds 22 bytes x n^2 for the graph it works on (0.35 GB
at MCL_POINTS; 0.55 GB without pruning, where all is float64), and 16 bytes x n x D for its points. No Ray.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from msense.errors import BadInput
from msense.kmeans.seeding import Points, as_points, check_points

Cluster: TypeAlias = tuple[int, ...]
_Part: TypeAlias = tuple[int, NDArray[np.int64], NDArray[np.int64]]  # a component's block, rows and columns

MCL_POINTS = 4000  # a token of more points is judged by its first ones; so many are left of the paper's merged samples
EXACT_NODES = 128  # flows of more live nodes are float32, whose errors of 1e-7 the later rounds in float64 smooth away
BATCH_VALUES = 1 << 17  # flow values of a batch of small graphs: what stays in a core's cache
SPLIT_WORK = 1 << 22  # a flow whose product takes fewer multiplications is not worth looking for components
LABEL_PASSES = 12  # most passes of labels over a graph in search of its components
SPLIT_WIDTH = 16  # components of up to so many nodes go on in one flow; above, a flow spans a factor of 2


@dataclass(frozen=True)
class MclConfig:
    """Settings of Markov clustering, and of the rule that takes K from it (Wang et al. 2025); defaults are the paper's.

    Attributes:
        expansion: power that the flow is raised to in a round.
        inflation: power of its values after that.
        loop_value: weight of every node's edge to itself; 0 leaves the diagonal as it is.
        max_rounds: most rounds.
        prune: values below this become 0 (but not a column's largest); 0 never prunes.
        prune_every: prune in every so manieth round.
        check_every: look for convergence in every so manieth round.
        offset: similarity of two points is 1 / (offset + Euclidean distance).
        share: K is this share of a token's clusters, rounded down,
        large_share: or this share where it has more clusters than
        large: so many,
        least: but at least so many; a token of fewer points keeps all of them as senses.

    Raises:
        BadInput: lists every setting that is out of range.
    """

    expansion: int = 2
    inflation: float = 1.65
    loop_value: float = 1.0
    max_rounds: int = 100
    prune: float = 0.001
    prune_every: int = 1
    check_every: int = 1
    offset: float = 0.01
    share: float = 0.1
    large_share: float = 0.4
    large: int = 900
    least: int = 5

    def __post_init__(self) -> None:
        bounds = {
            "expansion": (2, 100, "from 2 to 100"),
            "inflation": (np.nextafter(1, 2), 100, "above 1 and up to 100"),
            "loop_value": (0, 1e6, "from 0 to 1e6"),
            "max_rounds": (1, np.inf, "1 or more"),
            "prune": (0, np.nextafter(1, 0), "from 0 to below 1"),
            "prune_every": (1, np.inf, "1 or more"),
            "check_every": (1, np.inf, "1 or more"),
            "offset": (1e-6, 1e6, "from 1e-6 to 1e6"),
            "share": (0, 1, "from 0 to 1"),
            "large_share": (0, 1, "from 0 to 1"),
            "large": (0, np.inf, "0 or more"),
            "least": (1, np.inf, "1 or more"),
        }
        wrong = [
            f"{name} is {getattr(self, name)}, but must be {told}"
            for name, (low, high, told) in bounds.items()
            if not low <= getattr(self, name) <= high
        ]
        if wrong:
            raise BadInput("Markov clustering settings: " + "; ".join(wrong))


@dataclass(frozen=True)
class _Flow:
    """Blocks of flow: B graphs or components, padded with zeros to n nodes of which L are live.

    The transpose of the paper's matrix: row j says where walkers from node j are, and sums to 1. Nodes where no walker
    is have no column; none will ever be there again.
    """

    values: torch.Tensor  # float32 or float64 [B, n, L]
    live: torch.Tensor  # int64 [B, L]: the column's node, as a row; ascending, then any where the column is all zero
    nodes: NDArray[np.int64]  # [B, n]: the row's node in its graph, ascending; -1 on padding
    graph: NDArray[np.int64]  # [B]: which graph of the batch a block belongs to
    full: float  # share of values that were not zero when components were last looked for


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
        similarity: G matrices [n, n] of finite weights >= 0, of any n; symmetric or not. Column j is left from.
        config: settings.
        device: where the rounds are computed.
        threads: graphs are worked on in so many threads.

    Returns:
        For each graph its clusters as ascending tuples of nodes, in ascending order.

    Raises:
        BadInput: a matrix is not square, or has a weight that is negative, NaN or infinite; names its place.
    """
    graphs = [torch.as_tensor(x).detach() for x in similarity]
    for at, x in enumerate(graphs):
        if x.ndim != 2 or x.shape[0] != x.shape[1]:
            raise BadInput(f"similarity {at} has shape {tuple(x.shape)}: Markov clustering takes square matrices")
        if x.numel() and not (float(x.amin()) >= 0 and float(x.amax()) < np.inf):  # NaN fails both
            raise BadInput(f"similarity {at} has a weight that is negative, NaN or infinite: make weights finite, >= 0")
    sizes = np.array([len(x) for x in graphs], dtype=np.int64)

    def weights(batch: NDArray[np.int64]) -> torch.Tensor:
        if len(batch) == 1:
            return graphs[batch[0]].T[None].to(device, torch.float64, copy=True)
        width = int(sizes[batch].max())
        padded = torch.zeros(len(batch), width, width, dtype=torch.float64, device=device)
        for place, at in enumerate(batch):
            padded[place, : sizes[at], : sizes[at]] = graphs[at].T  # see `_Flow`
        return padded

    found: list[list[Cluster]] = [[] for _ in graphs]
    for at, clusters in _in_threads(weights, sizes, config, 0, threads):
        found[at] = clusters
    return found


def mcl_senses(
    points: Points,
    sizes: NDArray[np.int64],
    config: MclConfig,
    *,
    token_ids: NDArray[np.int64] | None = None,
    device: str | torch.device = "cpu",
    threads: int = 1,
) -> NDArray[np.int64]:
    """Choose K for every token: a share of the clusters that Markov clustering finds (Wang et al. 2025, the rule for Llama).

    K is int(share * clusters), or int(large_share * clusters) where they are more than `large`: rounded down; at least
    `least`. A token of fewer than `least` points has K = its points. A token of more than MCL_POINTS points is judged by
    its first MCL_POINTS. Rounds end early where the clusters cannot be enough for more than `least`. Equal points are at
    distance 0: three or more gather in one cluster, but two alone, with an edge of 100 beside loops of 1, are parted.

    Args:
        points: [N, D] float16, bfloat16 or float32, rows grouped by token.
        sizes: int64 [T], points of each token, with sum N.
        config: settings.
        token_ids: int64 [T], for messages; None: the tokens' numbers.
        device: where the rounds are computed.
        threads: tokens are worked on in so many threads; each holds a graph of its own.

    Returns:
        int64 [T], K of each token; 0 for a token of no points.

    Raises:
        BadInput: the arrays do not fit together.
        MsenseError: a value is NaN or infinite; names the token.
    """
    view = as_points(points)
    if int(sizes.sum()) != len(view) or (len(sizes) and int(sizes.min()) < 0):
        raise BadInput(f"{len(sizes)} sizes of sum {int(sizes.sum())} do not fit {len(view)} points")
    token_ids = np.arange(len(sizes)) if token_ids is None else token_ids
    if len(token_ids) != len(sizes):
        raise BadInput(f"{len(sizes)} sizes do not fit {len(token_ids)} token ids")
    check_points(view, sizes, token_ids)
    starts, judged = np.cumsum(sizes) - sizes, np.minimum(sizes, MCL_POINTS)
    counts = np.arange(MCL_POINTS + 1)
    rule = np.where(counts > config.large, config.large_share * counts, config.share * counts).astype(np.int64)
    rule = np.maximum(rule, config.least)
    enough = int(np.flatnonzero(np.maximum.accumulate(rule) <= config.least)[-1])  # up to here the rule says `least`
    large = np.flatnonzero(judged > enough)

    def weights(batch: NDArray[np.int64]) -> torch.Tensor:
        return _similarities(view, starts[large[batch]], judged[large[batch]], config.offset, device)

    senses = np.minimum(sizes, config.least)
    for at, clusters in _in_threads(weights, judged[large], config, enough, threads):
        senses[large[at]] = rule[len(clusters)]
    return senses


def _batches(sizes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Cut graphs into batches of up to BATCH_VALUES padded values, or of one graph; like sizes together, large first."""
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    batches = []
    while len(order):
        batches.append(order[: max(1, BATCH_VALUES // int(sizes[order[0]]) ** 2)])
        order = order[len(batches[-1]) :]
    return batches


def _in_threads(
    weights: Callable[[NDArray[np.int64]], torch.Tensor],
    sizes: NDArray[np.int64],
    config: MclConfig,
    enough: int,
    threads: int,
) -> Iterable[tuple[int, list[Cluster]]]:
    """Cluster graphs in Python threads, each with one thread of torch, which the caller gets back as it was.

    `weights` makes the padded weights of some of the graphs, float64 [B, n, n]; `sizes` int64 [G] are their nodes;
    for `enough` see `_rounds`. Yields graphs and their clusters, graphs of no nodes left out.
    """
    before = torch.get_num_threads()

    def work(batch: NDArray[np.int64]) -> Iterable[tuple[int, list[Cluster]]]:
        if threads > 1:
            torch.set_num_threads(1)
        with torch.inference_mode():
            flow = _start(weights(batch), sizes[batch], config)
            return zip(batch.tolist(), _rounds(flow, config, enough), strict=True)

    if threads <= 1:
        for batch in _batches(sizes):
            yield from work(batch)
        return
    try:
        with ThreadPoolExecutor(threads) as pool:
            for done in pool.map(work, _batches(sizes)):
                yield from done
    finally:
        torch.set_num_threads(before)


def _similarities(
    points: torch.Tensor, starts: NDArray[np.int64], sizes: NDArray[np.int64], offset: float, device: str | torch.device
) -> torch.Tensor:
    """1 / (offset + Euclidean distance) of each token's points: float64 [B, n, n], 0 on padding.

    float64, because squared distances of near points are small differences of large numbers.
    """
    mask = np.arange(sizes.max()) < sizes[:, None]
    rows = np.where(mask, starts[:, None] + np.arange(sizes.max()), starts[:, None])
    stored = points.index_select(0, torch.from_numpy(rows.ravel()).to(points.device))
    x = stored.to(device).double().view(*rows.shape, -1)
    x -= x.mean(1, keepdim=True)
    squares = x.square().sum(2)
    away = torch.baddbmm(squares[:, None], x, x.transpose(1, 2), alpha=-2).add_(squares[..., None]).clamp_(min=0)
    away.diagonal(dim1=1, dim2=2).zero_()
    real = torch.from_numpy(mask).to(device)
    weights = away.sqrt_().add_(offset).reciprocal_()
    return weights if mask.all() else weights.mul_(real[:, None] & real[..., None])


def _start(weights: torch.Tensor, sizes: NDArray[np.int64], config: MclConfig) -> _Flow:
    """The flow before any round, of weights float64 [B, n, n] from rows to columns, which are written over."""
    width = weights.shape[1]
    real = np.arange(width) < sizes[:, None]
    if config.loop_value > 0:
        loops = torch.from_numpy(real * config.loop_value).to(weights.device)
        weights.diagonal(dim1=1, dim2=2).copy_(loops)
    _normalize(weights)
    # without pruning, what is left of a value however small decides; high powers leave the range of float32
    rough = width > EXACT_NODES and config.prune > 0 and config.inflation * config.expansion <= 8
    live = torch.arange(width, device=weights.device).expand(len(weights), width)
    nodes = np.where(real, np.arange(width), -1)
    values = weights.float() if rough else weights
    return _Flow(values, live, nodes, np.arange(len(weights)), 1.0)


def _rounds(flow: _Flow, config: MclConfig, enough: int) -> list[list[Cluster]]:
    """Let graphs run until each has converged, and read its clusters.

    A graph of at most `enough` live nodes stops at once; what is read then is only sure to be as few clusters.
    """
    flows, graphs = [flow], len(flow.graph)
    found: list[set[Cluster]] = [set() for _ in range(graphs)]
    for number in range(1, config.max_rounds + 1):
        moving, live = np.zeros(graphs, np.int64), np.zeros(graphs, np.int64)
        for place, flow in enumerate(flows):
            after = _round(flow, config, prune=config.prune > 0 and number % config.prune_every == 0)
            check = number % config.check_every == 0
            settled = _settled(after, flow.values) if check else np.zeros(len(flow.graph), bool)
            moving += np.bincount(flow.graph[~settled], minlength=graphs)
            flows[place], alive = _without_dead(flow, after)
            live += np.bincount(flow.graph, alive, graphs).astype(np.int64)
        over = (moving == 0) | (live <= enough) | (number == config.max_rounds)
        left = []
        for flow in flows:
            ends = over[flow.graph]
            for block in np.flatnonzero(ends).tolist():
                found[flow.graph[block]].update(_read_clusters(flow, block))
            left += _split(_blocks(flow, ~ends) if ends.any() else flow) if not ends.all() else []
        flows = left
        if not flows:
            break
    return [sorted(clusters) for clusters in found]


def _normalize(values: torch.Tensor) -> None:
    """Scale rows of [B, n, L] to sum 1, in place; a row of zeros stays."""
    sums = values.sum(2, keepdim=True)
    values.div_(sums.masked_fill_(sums == 0, 1.0))


def _round(flow: _Flow, config: MclConfig, prune: bool) -> torch.Tensor:
    """One round of expansion, inflation and pruning: the new values [B, n, L].

    Nodes that are not live are nobody's next place, so a product takes n L^2 multiplications, not n^3.
    """
    values = flow.values
    steps = _taken(values, 1, flow.live)  # [B, L, L]
    after = values
    for _ in range(config.expansion - 1):
        after = _product(after, steps)
    _normalize(after.pow_(config.inflation))
    if prune:
        limit = np.array(config.prune, np.float32 if after.dtype == torch.float32 else np.float64)
        below = float(np.nextafter(limit, 0, dtype=limit.dtype))
        top = after.amax(2, keepdim=True)
        first = after.argmax(2, keepdim=True) if bool((top <= below).any()) else None  # of equals the first
        torch.nn.functional.threshold_(after, below, 0.0)
        if first is not None:
            after.scatter_(2, first, top)
    return after


def _taken(values: torch.Tensor, axis: int, index: torch.Tensor) -> torch.Tensor:
    """Rows (axis 1) or columns (2) of each block of [B, n, L], by int64 [B, .]."""
    if len(values) == 1:
        return values.index_select(axis, index[0])  # much faster than gather
    shape = list(values.shape)
    shape[axis] = index.shape[1]
    return values.gather(axis, (index[..., None] if axis == 1 else index[:, None]).expand(shape))


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[B, n, L] @ [B, L, L]."""
    if left.dtype == torch.float32 and left.device.type == "cpu" and torch.backends.mkldnn.is_available():
        # oneDNN uses what the processor has; MKL, which torch takes elsewhere, half of it on an AMD one
        linear = torch.nn.functional.linear
        each = [linear(a.to_mkldnn(), b.T).to_dense() for a, b in zip(left, right, strict=True)]
        return torch.stack(each) if len(each) > 1 else each[0][None]
    return torch.bmm(left, right)


def _settled(after: torch.Tensor, before: torch.Tensor) -> NDArray[np.bool_]:
    """Which blocks have converged: |a - b| <= 1e-8 + 1e-5 |b| everywhere, as numpy.allclose; bool [B]."""

    def near(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((a - b).abs_() <= b * 1e-5 + 1e-8).flatten(1).all(1)

    few = near(after[:, :4], before[:, :4])  # almost always tells that it has not
    return (few & near(after, before) if few.any() else few).cpu().numpy()


def _without_dead(flow: _Flow, values: torch.Tensor) -> tuple[_Flow, NDArray[np.int64]]:
    """The flow with new values, columns that are zero in every block left out; and the live nodes of each block."""
    live, alive = flow.live, values.amax(1) > 0
    counts = alive.sum(1).cpu().numpy()
    keep = max(1, int(counts.max()))
    if keep < values.shape[2]:
        order = alive.int().sort(dim=1, descending=True, stable=True).indices[:, :keep]  # in the order they had
        values, live = _taken(values, 2, order), live.gather(1, order)
    values = values.double() if keep <= EXACT_NODES else values
    return _Flow(values, live, flow.nodes, flow.graph, flow.full), counts


def _blocks(flow: _Flow, kept: NDArray[np.bool_]) -> _Flow:
    some = torch.from_numpy(np.flatnonzero(kept)).to(flow.live.device)
    return _Flow(flow.values[some], flow.live[some], flow.nodes[kept], flow.graph[kept], flow.full)


def _read_clusters(flow: _Flow, block: int) -> set[Cluster]:
    """For each attractor the nodes whose walkers come to it; each set once."""
    values, nodes = flow.values[block], flow.nodes[block]
    own = values.gather(0, flow.live[block][None])[0] != 0
    comers = (values[:, own] != 0).T.cpu().numpy()
    return {tuple(nodes[some].tolist()) for some in comers}


def _split(flow: _Flow) -> list[_Flow]:
    """Cut blocks into their connected components, where that may spare work: nothing ever flows between them."""
    values = flow.values
    if values.numel() * values.shape[2] <= SPLIT_WORK:
        return [flow]
    edges = values.sign().float()  # much faster than a comparison
    full = float(edges.mean())
    if full > flow.full / 2:  # two components of equal size halve it
        return [flow]
    labels, live = _components(edges, flow.live), flow.live.cpu().numpy()
    alive = (values.amax(1) > 0).cpu().numpy()
    parts: dict[int, list[_Part]] = {}
    for block, label in enumerate(labels):
        real = np.flatnonzero(flow.nodes[block] >= 0)
        some = np.flatnonzero(alive[block])
        for value in np.unique(label[real]):
            rows, columns = real[label[real] == value], some[label[live[block, some]] == value]
            if len(columns):  # else a node without edges, which is in no cluster
                parts.setdefault(max(len(rows), SPLIT_WIDTH).bit_length(), []).append((block, rows, columns))
    if sum(map(len, parts.values())) <= len(values):
        return [_Flow(values, flow.live, flow.nodes, flow.graph, full)]
    return [_cut(flow, live, like) for like in parts.values()]


def _cut(flow: _Flow, live: NDArray[np.int64], parts: list[_Part]) -> _Flow:
    """The flow of components, given the block, rows and columns of each, and `flow.live` in NumPy."""
    n, size = max(len(rows) for _, rows, _ in parts), max(len(columns) for _, _, columns in parts)
    values = flow.values.new_zeros(len(parts), n, size)
    places, nodes = np.zeros((len(parts), size), np.int64), np.full((len(parts), n), -1)
    for at, (block, rows, columns) in enumerate(parts):
        chosen = flow.values[block].index_select(0, torch.from_numpy(rows).to(values.device))
        chosen = chosen.index_select(1, torch.from_numpy(columns).to(values.device))
        values[at, : len(rows), : len(columns)] = chosen
        places[at, : len(columns)] = np.searchsorted(rows, live[block, columns])
        nodes[at, : len(rows)] = flow.nodes[block, rows]
    values = values.double() if size <= EXACT_NODES else values
    graph = flow.graph[[block for block, _, _ in parts]]
    return _Flow(values, torch.from_numpy(places).to(values.device), nodes, graph, 1.0)


def _components(edges: torch.Tensor, live: torch.Tensor) -> NDArray[np.int64]:
    """Label the nodes of each block: int64 [B, n], equal labels inside a component; all 0 if that takes long.

    Labels are the greatest node heard of. In a pass a column asks its comers, a row the places it goes to, and then
    every node the one that its label names. Edges float32 [B, n, L], 0 or 1; float32 labels are fast and exact.
    """
    labels = torch.arange(edges.shape[1], device=edges.device, dtype=torch.float32).repeat(len(edges), 1)
    for _ in range(LABEL_PASSES):
        heard = torch.maximum((edges * labels[..., None]).amax(1), labels.gather(1, live))
        told = torch.maximum((edges * heard[:, None]).amax(2), labels).scatter_reduce(1, live, heard, "amax")
        told = told.gather(1, told.long())
        if torch.equal(told, labels):
            return labels.long().cpu().numpy()
        labels = told
    return np.zeros(labels.shape, np.int64)
