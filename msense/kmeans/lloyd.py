"""Lloyd's algorithm on a batch of tokens of like size, as tensors [B, ...] on any device.

In: points or their inner products, uniform numbers for the seeds. Out: each point's cluster. Holds a few tensors of
[B, K, n] and [B, K, D] beside what it is given. Every sum is taken in an order that is always the same.
"""

import math
from dataclasses import dataclass

import torch

from msense.kmeans.seeding import KMeansConfig, Metric, greedy_seeds, lowest

# Kinds of device where index_add adds in order, and where it pays to add and multiply only what has changed. A GPU adds
# in whatever order its threads arrive; there sums are products with a matrix of 0 and 1.
SPARSE = {"cpu"}
FEW = 2  # points a cluster, on average: of such tokens points also move one by one


@dataclass
class _Batch:
    """The B tokens of a batch that have not converged; n points and K clusters each, padding included."""

    table: torch.Tensor  # [A, n, W] points, or their inner products (W = n); 0 on padding
    turned: tuple[torch.Tensor, ...]  # A views [W, n] of the table
    at: torch.Tensor  # int64 [B] where the token is in the table
    place: torch.Tensor  # int64 [B] where its result goes
    mask: torch.Tensor  # bool [B, n] false on padding
    unused: torch.Tensor  # bool [B, K] true on clusters past the token's own K
    norms: torch.Tensor  # [B, n] squared lengths of points
    sums: torch.Tensor  # [B, K, W] rows of the table summed by cluster
    products: torch.Tensor  # [B, K, n] inner products of the summed points and all points; maybe the same as sums
    squares: torch.Tensor  # [B, K] squared lengths of the summed points
    counts: torch.Tensor  # [B, K] points of a cluster, at least 1
    single: torch.Tensor  # bool [B, K] true where the sum is one point that does not belong to the cluster yet
    own: torch.Tensor  # int64 [B, n] each point's cluster; -1 before the first round
    before: torch.Tensor  # float64 [B] inertia of the last round

    def keep(self, which: torch.Tensor) -> None:
        """Drop all tokens but int64 [B']."""
        gram, table = self.products is self.sums, self.table
        for name in vars(self).keys() - {"table", "turned", "products"}:
            setattr(self, name, getattr(self, name)[which])
        self.products = self.sums if gram else self.products[which]
        if table.device.type not in SPARSE:
            self.table, self.at = table[self.at], torch.arange(len(which), device=table.device)


def lloyd(
    table: torch.Tensor,
    mask: torch.Tensor,
    unused: torch.Tensor,
    uniforms: torch.Tensor,
    gram: bool,
    config: KMeansConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run Lloyd's algorithm on a batch of B tokens of n points (padding included, where `table` is 0).

    Where clusters have but two points on average, Lloyd's rounds end in poor optima, which points then leave one by
    one: the move that lowers a token's inertia most, while it does so by more than `config.tol`. This is Hartigan's
    method (Telgarsky and Vattani, Hartigan's Method: k-means Clustering without Voronoi, AISTATS 2010). It needs inner
    products.

    A round needs the inner products of summed clusters and points. If the rows of `table` are points, it multiplies
    them by the sums that have changed. If they are inner products with all points, their sums are those products, and
    a round costs no product of matrices. On a CPU only the points that changed their cluster are added up.

    Args:
        table: float32 [B, n, D] points, or [B, n, n] their inner products.
        mask: bool [B, n], false on padding.
        unused: bool [B, K], true on clusters past a token's own K, which get no points.
        uniforms: float64 [B, K, L] for seeding.
        gram: whether `table` holds inner products.
        config: metric, tol and max_rounds.

    Returns:
        Each point's cluster, int64 [B, n] (arbitrary on padding), and the rounds, int64 [B].
    """
    batch = _seeded(table, mask, unused, uniforms, gram)
    clusters, rounds = torch.zeros_like(batch.own), torch.zeros_like(batch.place)
    for number in range(1, config.max_rounds + 1):
        low, nearest = lowest(_scores(batch, config.metric))
        away = (low + batch.norms).clamp_(min=0).mul_(batch.mask)
        inertia = away.sum(1, dtype=torch.float64)
        batch.counts = batch.unused.float().scatter_add_(1, nearest, batch.mask.float())
        settled = (batch.before - inertia <= config.tol * batch.before) & (batch.counts > 0).all(1)
        running = ~settled if 1 < number < config.max_rounds else torch.full_like(settled, number < config.max_rounds)
        if not running.all():
            clusters[batch.place[~running]], rounds[batch.place[~running]] = nearest[~running], number
            left = running.nonzero()[:, 0]
            if not len(left):
                break
            nearest, away, inertia = nearest[left], away[left], inertia[left]
            batch.keep(left)
        batch.before = inertia
        _update(batch, nearest, away)
    if gram:
        few = (mask.sum(1) <= FEW * (~unused).sum(1)).nonzero()[:, 0]
        clusters[few] = _exchanged(table, few, mask[few], unused[few], clusters[few], config)
    return clusters, rounds


def _seeded(
    table: torch.Tensor, mask: torch.Tensor, unused: torch.Tensor, uniforms: torch.Tensor, gram: bool
) -> _Batch:
    """Start with a point a cluster."""
    norms = table.diagonal(dim1=1, dim2=2).clone() if gram else torch.linalg.vector_norm(table, dim=2).square_()

    flat, turned, place = table.flatten(0, 1), table.transpose(1, 2), torch.arange(len(mask), device=mask.device)
    first = (place * mask.shape[1])[:, None]  # row of a token

    def scores(index: torch.Tensor) -> torch.Tensor:
        rows = flat.index_select(0, (first + index).flatten()).view(*index.shape, -1)
        lengths = norms.gather(1, index)[..., None]
        return rows.mul_(-2).add_(lengths) if gram else torch.baddbmm(lengths, rows, turned, alpha=-2)

    seeds, _ = greedy_seeds(scores, norms, mask, uniforms)
    sums = flat.index_select(0, (first + seeds).flatten()).view(*seeds.shape, -1)
    batch = _Batch(
        table=table,
        turned=turned.unbind(),
        at=place,
        place=place,
        mask=mask,
        unused=unused,
        norms=norms,
        sums=sums,
        products=sums if gram else sums.new_zeros(*seeds.shape, table.shape[1]),
        squares=norms.gather(1, seeds),
        counts=torch.ones_like(sums[..., 0]),
        single=torch.ones_like(unused),
        own=torch.full_like(mask, -1, dtype=torch.int64),
        before=torch.full_like(norms[:, 0], math.inf, dtype=torch.float64),
    )
    _multiply(batch, ~unused)
    return batch


def _scores(batch: _Batch, metric: Metric) -> torch.Tensor:
    """Squared distances from centroids to points, less the points' squared lengths: [B, K, n].

    A sum that float32 cannot tell from 0 has no direction: under "cosine" its centroid is 0.
    """
    scale = 1 / batch.counts
    if metric == "cosine":
        straight = batch.squares > 1e-6 * batch.counts * batch.counts
        scale = torch.where(straight, batch.squares.clamp_min(1e-30).rsqrt(), 0.0)
    offset = (scale * scale * batch.squares).masked_fill_(batch.unused, math.inf)
    return (batch.products * (-2 * scale)[..., None]).add_(offset[..., None])


def _update(batch: _Batch, nearest: torch.Tensor, away: torch.Tensor) -> None:
    """Take over new clusters int64 [B, n]; an empty one takes the point farthest from its centroid as its sum."""
    table, k, gram = batch.table, batch.sums.shape[1], batch.products is batch.sums
    empty, changed = batch.counts == 0, batch.single
    if table.device.type not in SPARSE:
        batch.sums, changed = sum_rows(table, nearest, k), ~batch.unused
    elif changed.all():  # only before the first round
        batch.sums.zero_().flatten(0, 1).index_add_(0, _flat(nearest, k), table.flatten(0, 1))
    else:
        sums = batch.sums.masked_fill_(changed[..., None], 0).flatten(0, 1)
        token, point = ((nearest != batch.own) & batch.mask).nonzero(as_tuple=True)
        rows = table.flatten(0, 1).index_select(0, batch.at[token] * table.shape[1] + point)
        for clusters in (nearest, batch.own):
            index = clusters[token, point] + k * token
            sums.index_add_(0, index, rows)
            changed.flatten().index_fill_(0, index, True)
            rows.neg_()
    token, cluster = empty.nonzero(as_tuple=True)
    if len(token):
        rank = empty.cumsum(1)[token, cluster] - 1
        point = away.sort(dim=1, descending=True, stable=True).indices[token, rank]
        batch.sums[token, cluster] = table[batch.at[token], point]
        batch.counts.clamp_(min=1)
    if gram:
        batch.products = batch.sums
    _multiply(batch, changed | empty)
    inside = batch.products.gather(1, nearest[:, None])[:, 0]  # inner products of points and the sum of their cluster
    batch.squares = sum_rows(inside[..., None], nearest, k)[..., 0]
    if len(token):
        batch.squares[token, cluster] = batch.norms[token, point]
    batch.own, batch.single = nearest, empty


def _multiply(batch: _Batch, changed: torch.Tensor) -> None:
    """Bring products up to date with sums that have changed, bool [B, K]."""
    if batch.products is batch.sums:
        return
    if batch.table.device.type not in SPARSE:
        batch.products = torch.bmm(batch.sums, batch.table.transpose(1, 2))
        return
    # a token at a time: how a product is rounded may depend on its shape, and so must not on the token's neighbours
    rows = changed.flatten().nonzero()[:, 0]
    sums = batch.sums.flatten(0, 1).index_select(0, rows).split(changed.sum(1).tolist())
    products = [some @ batch.turned[at] for some, at in zip(sums, batch.at.tolist(), strict=True)]
    batch.products.flatten(0, 1).index_copy_(0, rows, torch.cat(products))


def _flat(own: torch.Tensor, k: int) -> torch.Tensor:
    """Number the clusters int64 [B, n] of all tokens through: [B n]."""
    return (own + k * torch.arange(len(own), device=own.device)[:, None]).flatten()


def sum_rows(rows: torch.Tensor, own: torch.Tensor, k: int) -> torch.Tensor:
    """Sum the rows [B, n, W] of each cluster, by `own` int64 [B, n]: [B, K, W], in an order that is always the same."""
    batch, n, width = rows.shape
    if rows.device.type in SPARSE:
        sums = rows.new_zeros(batch * k, width).index_add_(0, _flat(own, k), rows.flatten(0, 1))
        return sums.view(batch, k, width)
    return torch.bmm(rows.new_zeros(batch, k, n).scatter_(1, own[:, None], 1.0), rows)


def _exchanged(
    table: torch.Tensor,
    at: torch.Tensor,
    mask: torch.Tensor,
    unused: torch.Tensor,
    own: torch.Tensor,
    config: KMeansConfig,
) -> torch.Tensor:
    """Move single points of B tokens, those `at` int64 [B] in `table`, to other clusters; returns the clusters."""
    result, place, k = own.clone(), torch.arange(len(at), device=at.device), unused.shape[1]
    sums, counts = sum_rows(table[at], own, k), unused.new_zeros(unused.shape, dtype=torch.float32)
    counts.scatter_add_(1, own, mask.float())
    squares = sum_rows(sums.gather(1, own[:, None])[:, 0, :, None], own, k)[..., 0]
    norms = table.diagonal(dim1=1, dim2=2)[at]
    for _ in range(config.max_rounds):
        worth = _worth(squares, counts, config.metric)
        inside = sums.gather(1, own[:, None])[:, 0]
        fewer, members = squares.gather(1, own) - 2 * inside + norms, counts.gather(1, own)
        leaving = worth.gather(1, own) - _worth(fewer, members - 1, config.metric)
        more = (2 * sums).add_(squares[..., None]).add_(norms[:, None])
        joining = worth[..., None] - _worth(more, counts[..., None] + 1, config.metric)
        joining.masked_fill_(unused[..., None], math.inf).scatter_(1, own[:, None], math.inf)
        cost, target = lowest(joining)
        change, point = cost.add_(leaving).masked_fill_(~mask, math.inf).min(1)
        total = norms.sum(1)
        enough = config.tol * (total - worth.sum(1)).clamp_(min=0) + 1e-6 * total  # float32 tells no smaller ones
        going = (-change > enough).nonzero()[:, 0]
        if not len(going):
            break
        at, place, mask, unused, own, sums, counts, squares, norms, point, target, fewer, more = (
            x[going] for x in (at, place, mask, unused, own, sums, counts, squares, norms, point, target, fewer, more)
        )
        token = torch.arange(len(at), device=at.device)
        old, new, row = own[token, point], target[token, point], table[at, point]
        sums[token, old], sums[token, new] = sums[token, old] - row, sums[token, new] + row
        squares[token, old], squares[token, new] = fewer[token, point], more[token, new, point]
        counts[token, old], counts[token, new] = counts[token, old] - 1, counts[token, new] + 1
        own[token, point] = result[place, point] = new
    return result


def _worth(squares: torch.Tensor, counts: torch.Tensor, metric: Metric) -> torch.Tensor:
    """How much lower inertia is than the sum of the points' squared lengths, by a cluster of this sum and count."""
    if metric == "cosine":
        lengths = squares.clamp(min=0).sqrt()
        return torch.where(squares > 1e-6 * counts * counts, 2 * lengths - counts, 0.0)
    return squares / counts.clamp(min=1)
