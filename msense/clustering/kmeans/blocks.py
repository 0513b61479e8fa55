"""k-means of one large token in blocks of BLOCK_ROWS rows, which several workers may share.

A round is `partial`, `combine`, (`farthest`,) `update`; at the end comes `finish`. Results do not depend on how the
blocks are distributed while rows x largest |value| stays below 2^29 (see `read_points`). Memory: a block twice in
float32 and once in float64, and HELD_FLOATS values for seeding.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msense.clustering.kmeans import seeding
from msense.clustering.kmeans.seeding import Device, KMeansConfig, Points
from msense.clustering.kmeans.threads import ALONE, Threads
from msense.clustering.matmul import product

HELD_FLOATS = 1 << 25  # values of seeding points kept as float32; the others are converted again at every step


@dataclass(frozen=True)
class BlockedState:
    """State of a token between two rounds: all that a resumed run needs.

    Example:
        >>> points = np.float16([[0, 0], [0, 1], [9, 9]])
        >>> config = KMeansConfig(k=2)
        >>> state = seed_centroids(points, token_id=7, config=config)
        >>> while state.final is None:
        ...     state = update(state, combine([partial(points, state, config)]), config)
        >>> sorted(state.counts.tolist())
        [1, 2]
    """

    token_id: int
    centroids: NDArray[np.float32]  # [K, D] to which the next round assigns points
    shift: NDArray[np.float32]  # [D] subtracted before distances are computed: float32 is precise near 0
    counts: NDArray[np.int64]  # [K] their points, 0 before the first round
    inertia: float = math.inf  # of the last round
    rounds: int = 0
    final: NDArray[np.float32] | None = None  # [K', D] centroids of the K' senses with points, once converged


@dataclass(frozen=True)
class Partial:
    """One round over some blocks of a token."""

    sums: NDArray[np.float64]  # [K, D] of the values of each cluster's points; exact
    counts: NDArray[np.int64]  # [K]
    inertia: NDArray[np.float64]  # [blocks], in order


@dataclass(frozen=True)
class Farthest:
    """The points farthest from their centroids, in descending order; ties by row."""

    distance: NDArray[np.float32]  # [M]
    rows: NDArray[np.int64]  # [M] row inside the token
    values: NDArray[np.float32]  # [M, D]


@dataclass(frozen=True)
class Finished:
    """Final results of some blocks of a token."""

    assignment: NDArray[np.int32]  # [n]
    distance: NDArray[np.float32]  # [n] squared distance to the assigned centroid
    squares: NDArray[np.float64]  # [blocks, K'] sums of those per sense


@dataclass
class Kept:
    """State of a range of rows kept between rounds, 12 bytes per point, so that only moved points are added up."""

    lengths: list[Tensor] = field(default_factory=list)  # squared, of the centred points [b] of each block
    own: list[Tensor] = field(default_factory=list)  # int64 [b] of each block: its points' clusters
    sums: Tensor | None = None  # float64 [K, D]


@torch.inference_mode()
def seed_centroids(
    points: Points, token_id: int, config: KMeansConfig, *, device: Device = "cpu", threads: Threads = ALONE
) -> BlockedState:
    """Choose the initial centroids of a blocked token, or all distinct points if there are at most `config.k`.

    `points` [n, D] are the token's first SEED_POINTS points by key (all, if it has fewer), in key order. `token_id` and
    `config.seed` determine the random draws. Any number of threads gives the same bytes.

    Raises:
        MsenseError: a value is NaN, infinite or above LARGEST_VALUE.
    """
    view = seeding.as_points(points)
    size, number, metric = np.array([len(view)]), np.array([token_id]), config.metric
    seeding.check_points(view, size, number)
    parts = view.split(seeding.BLOCK_ROWS)
    shift = torch.zeros(view.shape[1], dtype=torch.float32, device=device)
    if metric != "cosine":
        for part in parts:
            shift = shift + seeding.read_points(part, metric, device).double().sum(0)
        shift = (shift / len(view)).float()

    def centred(stored: Tensor) -> Tensor:
        return seeding.read_points(stored, metric, device).sub_(shift)

    distinct = seeding.few_distinct(view, size, np.array([config.k]), metric, len(view))
    chosen = torch.from_numpy(distinct.first)
    if not distinct.few[0]:
        held = threads.map(centred, parts[: HELD_FLOATS // (seeding.BLOCK_ROWS * view.shape[1])])
        share = -(-len(parts) // threads.count)
        shares = [range(at, min(at + share, len(parts))) for at in range(0, len(parts), share)]

        def joined(function: Callable[[Tensor], Tensor]) -> Tensor:
            def over(numbers: range) -> Tensor:
                values = (held[i] if i < len(held) else centred(parts[i]) for i in numbers)
                return torch.cat([function(block) for block in values], -1)

            return torch.cat(threads.map(over, shares), -1)

        norms = joined(lambda block: torch.linalg.vector_norm(block, dim=1).square_())

        def scores(index: Tensor) -> Tensor:
            rows, lengths = centred(view.index_select(0, index[0].to(view.device))), norms[index[0], None]
            return joined(lambda block: product(rows, block.T).mul_(-2).add_(lengths))[None]

        mask, runs = torch.ones(1, len(view), dtype=torch.bool, device=device), []
        for run in range(config.n_init):
            uniforms = torch.from_numpy(seeding.draws(number, config, run=run)).to(device)
            runs.append(seeding.greedy_seeds(scores, norms[None], mask, uniforms))
        chosen = min(runs, key=lambda seeds_and_inertia: float(seeds_and_inertia[1]))[0][0]
    centroids = seeding.read_points(view.index_select(0, chosen.to(view.device)), metric, "cpu")
    return BlockedState(int(token_id), centroids.numpy(), shift.cpu().numpy(), np.zeros(len(chosen), np.int64))


def _assigned(
    points: Points, state: BlockedState, config: KMeansConfig, device: Device, lengths: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield per block its points as stored, nearest centroids int64 [b] and squared distances to them [b].

    `lengths` is as in `Kept`; missing ones are appended. Only this function compares blocked points with centroids,
    always in the same shapes, so a block gives the same bytes wherever it is processed.
    """
    shift = torch.from_numpy(state.shift).to(device)
    centroids = torch.from_numpy(state.centroids).to(device) - shift
    offset = centroids.square().sum(1)[:, None]
    rows = min(seeding.BLOCK_ROWS, len(points))
    buffer = torch.empty(
        rows, len(shift), dtype=torch.float32, device=device
    )  # allocating new pages costs more than the work
    for number, block in enumerate(seeding.as_points(points).split(seeding.BLOCK_ROWS)):
        centred = seeding.read_points(block, config.metric, device, buffer[: len(block)]).sub_(shift)
        scores = product(centroids, centred.T)
        low, own = seeding.lowest(torch.add(offset, scores, alpha=-2, out=scores))
        if number == len(lengths):
            lengths.append(torch.linalg.vector_norm(centred, dim=1).square_())
        yield block, own, low.add_(lengths[number]).clamp_(min=0)


@torch.inference_mode()
def partial(
    points: Points,
    state: BlockedState,
    config: KMeansConfig,
    *,
    device: Device = "cpu",
    kept: Kept | None = None,
) -> Partial:
    """Assign a range of points to the nearest centroids and sum them per cluster.

    `points` [n, D] are rows of the token from a multiple of BLOCK_ROWS to another one or the token's end. `kept`, from
    the range's last round, is updated in place; an empty one, or None, gives the same bytes.

    Raises:
        MsenseError: a value is NaN, infinite or above LARGEST_VALUE (checked in the first round).
    """
    if state.rounds == 0:
        seeding.check_points(seeding.as_points(points), np.array([len(points)]), np.array([state.token_id]))
    kept, (k, width) = kept or Kept(), state.centroids.shape
    sums = torch.zeros(k, width, dtype=torch.float64, device=device) if kept.sums is None else kept.sums
    counts = torch.zeros(k, dtype=torch.int64, device=device)
    wide = torch.empty(min(seeding.BLOCK_ROWS, len(points)), width, dtype=torch.float64, device=device)
    inertia: list[Tensor] = []
    owns: list[Tensor] = []
    for block, own, away in _assigned(points, state, config, device, kept.lengths):
        new, old, moved = own, None, block
        if kept.own:
            at = (own != (old := kept.own[len(owns)])).nonzero()[:, 0]
            new, old, moved = own[at], old[at], block.index_select(0, at.to(block.device))
        values = wide[: len(moved)].copy_(seeding.read_points(moved, config.metric, device))
        sums.index_add_(0, new, values)  # exact, so the order of additions does not matter
        if old is not None:
            sums.index_add_(0, old, values, alpha=-1)
        counts += torch.bincount(own, minlength=k)
        inertia.append(away.sum(dtype=torch.float64))
        owns.append(own)
    kept.own, kept.sums = owns, sums
    return Partial(sums.cpu().numpy().copy(), counts.cpu().numpy(), torch.stack(inertia).cpu().numpy())


def combine(parts: Iterable[Partial]) -> Partial:
    """Add up the results of a round, in row order, with only two in memory; the same bytes for any grouping."""
    parts = iter(parts)
    first = next(parts)
    sums, counts, inertia = first.sums.copy(), first.counts.copy(), [first.inertia]
    for part in parts:
        sums += part.sums
        counts += part.counts
        inertia.append(part.inertia)
    return Partial(sums, counts, np.concatenate(inertia))


@torch.inference_mode()
def farthest(
    points: Points,
    state: BlockedState,
    m: int,
    config: KMeansConfig,
    *,
    first_row: int = 0,
    device: Device = "cpu",
) -> Farthest:
    """Return the `m` points of a range farthest from their centroids, for a round that left `m` clusters empty.

    `first_row` is the range's first row inside the token; the other arguments are as for `partial`.
    """
    result: list[Farthest] = []
    for number, (block, _, away) in enumerate(_assigned(points, state, config, device, [])):
        top = away.sort(descending=True, stable=True).indices[:m]
        rows = top.cpu().numpy() + (first_row + number * seeding.BLOCK_ROWS)
        values = seeding.read_points(block.index_select(0, top.to(block.device)), config.metric, "cpu").numpy()
        result = [combine_farthest([*result, Farthest(away[top].cpu().numpy(), rows, values)], m)]
    return result[0]


def combine_farthest(parts: Sequence[Farthest], m: int) -> Farthest:
    """Return the `m` farthest points of several results."""
    names = ("distance", "rows", "values")
    distance, rows, values = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
    order = np.lexsort((rows, -distance))[:m]
    return Farthest(distance[order], rows[order], values[order])


def update(state: BlockedState, total: Partial, config: KMeansConfig, far: Farthest | None = None) -> BlockedState:
    """Close a round: compute new centroids, or final ones if the token converged or reached `config.max_rounds`.

    `total` holds all results of the round, combined; `far` as many farthest points as `total.counts` has zeros, which
    become those clusters' centroids.
    """
    inertia, empty = math.fsum(total.inertia), total.counts == 0
    means = seeding.centroids_of(torch.from_numpy(total.sums), torch.from_numpy(total.counts), config.metric).numpy()
    rounds = state.rounds + 1
    settled = rounds > 1 and not empty.any() and state.inertia - inertia <= config.tol * state.inertia
    closed = replace(state, counts=total.counts, inertia=inertia, rounds=rounds)
    if settled or rounds == config.max_rounds:
        return replace(closed, final=means[~empty])
    if empty.any():
        assert far is not None
        means[empty] = far.values
    return replace(closed, centroids=means)


@torch.inference_mode()
def finish(points: Points, state: BlockedState, config: KMeansConfig, *, device: Device = "cpu") -> Finished:
    """Compute the final assignment of a range of points, as for `partial`, once `state.final` is set."""
    assert state.final is not None
    number = torch.from_numpy(np.cumsum(state.counts > 0) - 1).to(device)
    final = torch.from_numpy(state.final).to(device)
    assignment, distance, squares = [], [], []
    for block, own, _ in _assigned(points, state, config, device, []):
        sense = number[own]
        away = seeding.read_points(block, config.metric, device).sub_(final[sense]).square_().sum(1).cpu().numpy()
        assignment.append(sense.cpu().numpy().astype(np.int32))
        distance.append(away)
        squares.append(np.bincount(assignment[-1], weights=away, minlength=len(final)))
    return Finished(np.concatenate(assignment), np.concatenate(distance), np.stack(squares))


def summary(state: BlockedState, parts: Sequence[Finished]) -> tuple[NDArray[np.int64], NDArray[np.float32], float]:
    """Return counts [K'] and RMS distances [K'] of a finished token's senses, and its inertia, for any grouping."""
    counts, squares = state.counts[state.counts > 0], np.concatenate([part.squares for part in parts])
    sums = np.array([math.fsum(column) for column in squares.T])
    return counts, np.sqrt(sums / counts).astype(np.float32), math.fsum(squares.ravel())
