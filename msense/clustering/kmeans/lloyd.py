"""Lloyd's algorithm on a batch of tokens of similar size, as tensors [B, ...] on any device.

All sums have a fixed order. Memory: a few tensors of [B, K, n] and [B, K, D] in addition to the input.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from msense.clustering.kmeans import seeding
from msense.clustering.kmeans.seeding import KMeansConfig
from msense.constants import Metric

# Device types where index_add adds in order and where updating only what has changed pays off. A GPU adds in the order
# its threads arrive; there sums are products with a matrix of 0 and 1.
SPARSE = {"cpu"}
FEW = 2  # mean points per cluster up to which points also move one by one


class LloydResult(NamedTuple):
    """Result of a run for B tokens of n points."""

    own: Tensor  # int64 [B, n] each point's cluster (arbitrary on padding)
    rounds: Tensor  # int64 [B] of assignment
    inertia: Tensor  # float64 [B] of the last round, with float32 precision


@dataclass
class _Batch:
    """The B tokens of a batch that have not converged; n points and K clusters each, padding included."""

    table: Tensor  # [A, n, W] points, or their inner products (W = n); 0 on padding
    turned: tuple[Tensor, ...]  # A views [W, n] of the table
    place: Tensor  # int64 [B] where the token's result is stored
    rows: Tensor  # int64 [B, n] the points' rows in the flattened table
    mask: Tensor  # bool [B, n] false on padding
    unused: Tensor  # bool [B, K] true on clusters beyond the token's own K
    norms: Tensor  # [B, n] squared lengths of points
    sums: Tensor  # [B, K, W] rows of the table summed by cluster
    products: Tensor  # [B, K, n] inner products of the summed points and all points; the same as sums for "gram"
    squares: Tensor  # [B, K] squared lengths of the summed points
    counts: Tensor  # [B, K] points of a cluster, at least 1
    single: Tensor  # bool [B, K] true where the sum is one point that is not yet assigned to the cluster
    own: Tensor  # int64 [B, n] each point's cluster; -1 before the first round
    before: Tensor  # float64 [B] inertia of the last round

    def keep(self, which: Tensor) -> None:
        """Drop all tokens except int64 [B']."""
        gram, table = self.products is self.sums, self.table
        for name in vars(self).keys() - {"table", "turned", "products"}:
            setattr(self, name, getattr(self, name)[which])
        self.products = self.sums if gram else self.products[which]
        if table.device.type not in SPARSE:
            self.table, self.rows = table[which], _rows(len(which), table)


def lloyd(
    table: Tensor, mask: Tensor, unused: Tensor, uniforms: Tensor, gram: bool, config: KMeansConfig
) -> LloydResult:
    """Run Lloyd's algorithm on a batch of B tokens of n points (padding included, where `table` is 0).

    A round needs the inner products of summed clusters and points. If `table` holds points, float32 [B, n, D], it is
    multiplied by the sums that have changed. If it holds their inner products [B, n, n] (`gram`), the sums are those
    products, and no matrix product is needed. On a CPU only the points that changed their cluster are added up.

    With at most FEW points per cluster Lloyd's rounds end in poor optima, so points then move one by one, if `gram`.
    `mask` bool [B, n] is false on padding, `unused` bool [B, K] true on clusters beyond a token's own K, which get no
    points; `uniforms` float64 [B, K, L] are for seeding.
    """
    batch = _seeded(table, mask, unused, uniforms, gram)
    result = LloydResult(torch.zeros_like(batch.own), torch.zeros_like(batch.place), torch.zeros_like(batch.before))
    for number in range(1, config.max_rounds + 1):
        low, nearest = seeding.lowest(_scores(batch, config.metric))
        away = (low + batch.norms).clamp_(min=0).mul_(batch.mask)
        inertia = away.sum(1, dtype=torch.float64)
        batch.counts = batch.unused.float().scatter_add_(1, nearest, batch.mask.float())
        settled = (batch.before - inertia <= config.tol * batch.before) & (batch.counts > 0).all(1)
        running = ~settled if 1 < number < config.max_rounds else torch.full_like(settled, number < config.max_rounds)
        if not running.all():
            ended, at = (~running).nonzero()[:, 0], batch.place[~running]
            result.own[at], result.rounds[at], result.inertia[at] = nearest[ended], number, inertia[ended]
            left = running.nonzero()[:, 0]
            if not len(left):
                break
            nearest, away, inertia = nearest[left], away[left], inertia[left]
            batch.keep(left)
        batch.before = inertia
        _update(batch, nearest, away)
    if gram:
        _exchange(table, mask, unused, result, config)
    return result


def _seeded(table: Tensor, mask: Tensor, unused: Tensor, uniforms: Tensor, gram: bool) -> _Batch:
    """Return a batch with one seed point per cluster."""
    norms = table.diagonal(dim1=1, dim2=2).clone() if gram else torch.linalg.vector_norm(table, dim=2).square_()
    flat, turned, place = table.flatten(0, 1), table.transpose(1, 2), torch.arange(len(mask), device=mask.device)
    every, all_norms = _rows(len(mask), table), norms.flatten()

    def scores(index: Tensor) -> Tensor:
        at = (every[:, :1] + index).flatten()
        rows = flat.index_select(0, at).view(*index.shape, -1)
        lengths = all_norms.index_select(0, at).view(*index.shape, 1)
        return torch.add(lengths, rows, alpha=-2, out=rows) if gram else torch.baddbmm(lengths, rows, turned, alpha=-2)

    seeds, _ = seeding.greedy_seeds(scores, norms, mask, uniforms)
    sums = flat.index_select(0, (every[:, :1] + seeds).flatten()).view(*seeds.shape, -1)
    batch = _Batch(
        table=table,
        turned=turned.unbind(),
        place=place,
        rows=every,
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


def _scores(batch: _Batch, metric: Metric) -> Tensor:
    """Return squared distances from centroids to points, minus the points' squared lengths: [B, K, n].

    With "cosine", a sum that float32 cannot distinguish from 0 has no direction: its centroid is 0.
    """
    scale = batch.counts.reciprocal()
    if metric == "cosine":
        straight = batch.squares > 1e-6 * batch.counts * batch.counts
        scale = torch.where(straight, batch.squares.clamp_min(1e-30).rsqrt(), 0.0)
    offset = (scale * scale * batch.squares).masked_fill_(batch.unused, math.inf)
    return (batch.products * (-2 * scale)[..., None]).add_(offset[..., None])


def _update(batch: _Batch, nearest: Tensor, away: Tensor) -> None:
    """Apply new clusters int64 [B, n]; an empty cluster's sum becomes the point farthest from its centroid."""
    table, k, gram = batch.table, batch.sums.shape[1], batch.products is batch.sums
    empty, changed = batch.counts == 0, batch.single
    if table.device.type not in SPARSE:
        batch.sums, changed = sum_rows(table, nearest, k), ~batch.unused
    elif changed.all():  # only before the first round
        batch.sums.zero_().flatten(0, 1).index_add_(0, _flat(nearest, k), table.flatten(0, 1))
    else:
        if changed.any():
            batch.sums.masked_fill_(changed[..., None], 0)
        moved = ((nearest != batch.own) & batch.mask).flatten().nonzero()[:, 0]
        new, old = (_flat(own, k).index_select(0, moved) for own in (nearest, batch.own))
        rows = table.flatten(0, 1).index_select(0, batch.rows.flatten().index_select(0, moved))
        batch.sums.flatten(0, 1).index_add_(0, new, rows).index_add_(0, old, rows, alpha=-1)
        if not gram:
            changed.flatten().index_fill_(0, torch.cat([new, old]), True)
    token, cluster = empty.nonzero(as_tuple=True)
    if len(token):
        rank = empty.cumsum(1)[token, cluster] - 1
        point = away.sort(dim=1, descending=True, stable=True).indices[token, rank]
        batch.sums[token, cluster] = table.flatten(0, 1)[batch.rows[token, point]]
        batch.counts.clamp_(min=1)
    if gram:
        batch.products = batch.sums
    _multiply(batch, changed | empty)
    inside = batch.products.gather(1, nearest[:, None])[:, 0]  # inner products of points and the sum of their cluster
    batch.squares = sum_values(inside, nearest, k)
    if len(token):
        batch.squares[token, cluster] = batch.norms[token, point]
    batch.own, batch.single = nearest, empty


def _multiply(batch: _Batch, changed: Tensor) -> None:
    """Recompute the products of sums that have changed, bool [B, K]."""
    if batch.products is batch.sums:
        return
    if batch.table.device.type not in SPARSE:
        batch.products = torch.bmm(batch.sums, batch.table.transpose(1, 2))
        return
    # one token at a time: rounding may depend on the product's shape, which must not depend on the token's neighbours
    rows = changed.flatten().nonzero()[:, 0]
    sums = batch.sums.flatten(0, 1).index_select(0, rows).split(changed.sum(1).tolist())
    tokens = (batch.rows[:, 0] // batch.table.shape[1]).tolist()
    products = [own @ batch.turned[token] for own, token in zip(sums, tokens, strict=True)]
    batch.products.flatten(0, 1).index_copy_(0, rows, torch.cat(products))


def _rows(tokens: int, table: Tensor) -> Tensor:
    """Return indices into the flattened table [B, n, W] of the first tokens' rows: int64 [tokens, n]."""
    return torch.arange(tokens * table.shape[1], device=table.device).view(tokens, -1)


def _flat(own: Tensor, k: int) -> Tensor:
    """Return indices of clusters int64 [B, n] among those of all tokens: [B n]."""
    return (own + k * torch.arange(len(own), device=own.device)[:, None]).flatten()


def sum_rows(rows: Tensor, own: Tensor, k: int) -> Tensor:
    """Sum the rows [B, n, W] of each cluster, by `own` int64 [B, n], in a fixed order: [B, K, W]."""
    batch, n, width = rows.shape
    if rows.device.type in SPARSE:
        sums = rows.new_zeros(batch * k, width).index_add_(0, _flat(own, k), rows.flatten(0, 1))
        return sums.view(batch, k, width)
    return torch.bmm(rows.new_zeros(batch, k, n).scatter_(1, own[:, None], 1.0), rows)


def sum_values(values: Tensor, own: Tensor, k: int) -> Tensor:
    """Sum the values [B, n] of each cluster, by `own` int64 [B, n], in a fixed order: [B, K]."""
    if values.device.type in SPARSE:
        return values.new_zeros(len(values), k).scatter_add_(1, own, values)
    return sum_rows(values[..., None], own, k)[..., 0]


def _exchange(table: Tensor, mask: Tensor, unused: Tensor, result: LloydResult, config: KMeansConfig) -> None:
    """Move single points of tokens with few points per cluster, and update the result.

    Each move lowers the token's inertia most, and by more than `config.tol`. This is Hartigan's method (Telgarsky and
    Vattani, Hartigan's Method: k-means Clustering without Voronoi, AISTATS 2010). `table` holds inner products.
    """
    at, k = (mask.sum(1) <= FEW * (~unused).sum(1)).nonzero()[:, 0], unused.shape[1]
    mask, unused, own = mask[at], unused[at], result.own[at]
    sums, counts = sum_rows(table[at], own, k), unused.new_zeros(unused.shape, dtype=torch.float32)
    counts.scatter_add_(1, own, mask.float())
    squares = sum_values(sums.gather(1, own[:, None])[:, 0], own, k)
    norms = table.diagonal(dim1=1, dim2=2)[at]
    for _ in range(config.max_rounds):
        worth = _worth(squares, counts, config.metric)
        inside = sums.gather(1, own[:, None])[:, 0]
        fewer, members = squares.gather(1, own) - 2 * inside + norms, counts.gather(1, own)
        leaving = worth.gather(1, own) - _worth(fewer, members - 1, config.metric)
        more = (2 * sums).add_(squares[..., None]).add_(norms[:, None])
        joining = worth[..., None] - _worth(more, counts[..., None] + 1, config.metric)
        joining.masked_fill_(unused[..., None], math.inf).scatter_(1, own[:, None], math.inf)
        cost, target = seeding.lowest(joining)
        change, point = cost.add_(leaving).masked_fill_(~mask, math.inf).min(1)
        total = norms.sum(1, dtype=torch.float64)
        result.inertia[at] = left = (total - worth.sum(1)).clamp_(min=0)
        enough = config.tol * left + 1e-6 * total  # smaller changes are below float32's precision
        going = (-change > enough).nonzero()[:, 0]
        if not len(going):
            break
        at, mask, unused, own, sums, counts, squares, norms, point, target, fewer, more = (
            x[going] for x in (at, mask, unused, own, sums, counts, squares, norms, point, target, fewer, more)
        )
        token = torch.arange(len(at), device=at.device)
        old, new, row = own[token, point], target[token, point], table[at, point]
        sums[token, old], sums[token, new] = sums[token, old] - row, sums[token, new] + row
        squares[token, old], squares[token, new] = fewer[token, point], more[token, new, point]
        counts[token, old], counts[token, new] = counts[token, old] - 1, counts[token, new] + 1
        own[token, point] = result.own[at, point] = new


def _worth(squares: Tensor, counts: Tensor, metric: Metric) -> Tensor:
    """Return by how much clusters of these squared sums and counts lower the inertia below the sum of squared lengths."""
    if metric == "cosine":
        lengths = squares.clamp(min=0).sqrt()
        return torch.where(squares > 1e-6 * counts * counts, 2 * lengths - counts, 0.0)
    return squares / counts.clamp(min=1)
