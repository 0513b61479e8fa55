"""Lloyd's algorithm on a batch of tokens of like size, as tensors [B, ...] on any device.

In: points or their inner products, uniform numbers for the seeds. Out: each point's cluster. Holds a few tensors of
[B, K, n] and [B, K, D] beside what it is given. Every sum is taken in an order that is always the same.
"""

import math

import torch

from msense.kmeans.seeding import KMeansConfig, Metric, greedy_seeds

COMPACT_AT = 0.75  # a batch is copied without its converged tokens once no more than this share of them runs


def table_of(values: torch.Tensor, mask: torch.Tensor, gram: bool, metric: Metric) -> torch.Tensor:
    """What `_lloyd` works on: points centred by their token's mean [B, n, D], or their inner products [B, n, n]."""
    if metric != "cosine":  # float32 is precise near 0; unit vectors are near it as they are
        values = (values - (values.sum(1) / mask.sum(1, keepdim=True))[:, None]).mul_(mask[..., None])
    return torch.bmm(values, values.transpose(1, 2)) if gram else values


def sum_rows(rows: torch.Tensor, own: torch.Tensor, k: int) -> torch.Tensor:
    """Sum the rows [B, n, W] of each cluster, by `own` int64 [B, n]: [B, K, W], in an order that is always the same."""
    batch, _, width = rows.shape
    if rows.device.type == "cpu":
        index = own + k * torch.arange(batch)[:, None]
        return rows.new_zeros(batch * k, width).index_add_(0, index.flatten(), rows.flatten(0, 1)).view(batch, k, width)
    # index_add on a GPU adds in whatever order its threads arrive
    return torch.bmm(rows.new_zeros(batch, k, rows.shape[1]).scatter_(1, own[:, None], 1.0), rows)


def _rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows [B, L, W] of each token's table [B, n, W], by int64 [B, L]."""
    return table[torch.arange(len(table), device=table.device)[:, None], index]


def lloyd(
    table: torch.Tensor,
    mask: torch.Tensor,
    unused: torch.Tensor,
    uniforms: torch.Tensor,
    gram: bool,
    config: KMeansConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run Lloyd's algorithm on a batch of B tokens of n points (padding included, where `table` is 0).

    Works on `sums`, the rows of `table` summed by cluster. If the rows are points, those are centroids times counts.
    If the rows are inner products with all points, those are the inner products of centroids and points, times counts:
    all that distances need, and a round costs no product of matrices.

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
    norms = table.diagonal(dim1=1, dim2=2).clone() if gram else table.square().sum(2)  # squared lengths [B, n]

    def distances(index: torch.Tensor) -> torch.Tensor:
        chosen = _rows(table, index)
        products = chosen if gram else torch.bmm(chosen, table.transpose(1, 2))
        return torch.add(norms[:, None], products, alpha=-2).add_(norms.gather(1, index)[..., None]).clamp_(min=0)

    seeds = greedy_seeds(distances, mask, uniforms)
    sums, squares, counts = _rows(table, seeds), norms.gather(1, seeds), torch.ones(seeds.shape, device=mask.device)
    own, rounds = seeds.new_zeros(mask.shape), seeds.new_zeros(len(mask))
    penalty = torch.zeros_like(counts).masked_fill_(unused, math.inf)
    place = torch.arange(len(mask), device=mask.device)  # of the tokens in `table` among those of the batch
    running = torch.ones_like(place, dtype=torch.bool)  # which of them have not converged
    before = torch.full(place.shape, math.inf, dtype=torch.float64, device=mask.device)
    for number in range(1, config.max_rounds + 1):
        offset, scale = _offset_and_scale(squares, counts, config.metric)
        offset = (offset + penalty)[..., None]
        if gram:
            scores = torch.addcmul(offset, sums, scale[..., None], value=-2)
        else:
            scores = torch.baddbmm(offset, sums * scale[..., None], table.transpose(1, 2), alpha=-2)
        low, nearest = scores.min(1)  # of distances less norms; the first of equals
        away = (low + norms).clamp_(min=0).mul_(mask)
        inertia = away.sum(1, dtype=torch.float64)
        counts = unused.float().scatter_add_(1, nearest, mask.float())
        settled = (before - inertia <= config.tol * before) & (counts > 0).all(1) & (number > 1)
        stop = running & (settled | (number == config.max_rounds))
        own[place[stop]], rounds[place[stop]] = nearest[stop], number
        running, before = running & ~stop, inertia
        left = int(running.sum())
        if not left:
            break
        if left <= COMPACT_AT * len(place):
            keep = running.nonzero()[:, 0]
            table, mask, unused, penalty, norms, nearest, away, counts, place, running, before = (
                x[keep] for x in (table, mask, unused, penalty, norms, nearest, away, counts, place, running, before)
            )
        sums, squares, counts = _update(table, nearest, away, counts, gram)
    return own, rounds


def _offset_and_scale(squares: torch.Tensor, counts: torch.Tensor, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared lengths of centroids, and what their sums are to be multiplied by: both [B, K].

    `squares` [B, K] are the squared lengths of the summed points. A sum that float32 cannot tell from 0 has no
    direction: under "cosine" its centroid is 0.
    """
    scale = 1 / counts
    if metric == "cosine":
        scale = torch.where(squares > 1e-6 * counts * counts, squares.clamp_min(1e-30).rsqrt(), 0.0)
    return scale * scale * squares, scale


def _update(
    table: torch.Tensor, nearest: torch.Tensor, away: torch.Tensor, counts: torch.Tensor, gram: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums, their squared lengths and counts of the new clusters; an empty one takes the farthest point as its sum."""
    k = counts.shape[1]
    sums = sum_rows(table, nearest, k)
    own = sums.gather(1, nearest[:, None])[:, 0, :, None] if gram else sums  # gram: a point times its cluster's sum
    squares = sum_rows(own, nearest, k)[..., 0] if gram else own.square().sum(2)
    token, cluster = (counts == 0).nonzero(as_tuple=True)
    if len(token):
        rank = (counts == 0).cumsum(1)[token, cluster] - 1
        point = away.sort(dim=1, descending=True, stable=True).indices[token, rank]
        sums[token, cluster] = table[token, point]
        squares[token, cluster] = table[token, point, point] if gram else table[token, point].square().sum(1)
        counts = counts.clamp_min(1)
    return sums, squares, counts
