"""k-means per token: many small tokens in batches, large ones in blocks that several workers may share.

In: points [N, D] as stored, grouped by token. Out: `Clusters`, as NumPy arrays.
Tokens of up to BLOCK_ROWS points run in batches; a larger token runs in blocks of exactly BLOCK_ROWS rows through
`seed_centroids`, `partial`, `update` and `finish`, whose results do not depend on how its blocks are cut into parts.
Holds one batch (about 24 bytes x BATCH_FLOATS) or one block; never a float32 copy of all points. No Ray.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from msense.errors import BadInput
from msense.kmeans.blocks import farthest, finish, partial, seed_centroids, summary, update
from msense.kmeans.seeding import (
    BLOCK_ROWS,
    SEED_POINTS,
    FewDistinct,
    KMeansConfig,
    Metric,
    Points,
    as_points,
    centroids_of,
    check_points,
    draws,
    few_distinct,
    greedy_seeds,
    read_points,
)

COMPACT_AT = 0.75  # a batch is copied without its converged tokens once no more than this share of them runs
GRAM_ROWS = 384  # up to here a token's inner products are cheaper to keep than to compute again every round
BATCH_FLOATS = {"cpu": 1 << 20, "cuda": 1 << 26}  # values of a batch: what stays in a core's cache, what fills a GPU


@dataclass(frozen=True)
class Clusters:
    """Senses of T tokens, in the order of the tokens; S senses and N points in all.

    A centroid is the mean (under "cosine" the mean scaled to length 1) of exactly the points assigned to it. They were
    assigned to the nearest centroid of the round before, so near a border a point may be a hair closer to another.
    """

    sizes: NDArray[np.int64]  # [T] senses of each token
    centroids: NDArray[np.float32]  # [S, D]
    counts: NDArray[np.int64]  # [S] points of a sense, never 0
    spread: NDArray[np.float32]  # [S] root of the mean squared distance of a sense's points
    assignment: NDArray[np.int32]  # [N] sense number inside the token
    distance: NDArray[np.float32]  # [N] squared distance to the own centroid
    inertia: NDArray[np.float64]  # [T] sum of the squared distances
    rounds: NDArray[np.int64]  # [T] rounds of assignment; 0 where every distinct point is a sense


@dataclass(frozen=True)
class _Task:
    """What `cluster_tokens` was given, and its results as they fill up."""

    points: torch.Tensor  # [N, D]
    starts: NDArray[np.int64]  # [T] first row of a token
    sizes: NDArray[np.int64]  # [T] rows of a token
    token_ids: NDArray[np.int64]  # [T]
    config: KMeansConfig
    device: torch.device
    opens: NDArray[np.int64]  # [T] first sense of a token
    result: Clusters  # sizes: room for that many senses; counts are 0 where it is not used


def cluster_tokens(
    points: Points,
    sizes: NDArray[np.int64],
    token_ids: NDArray[np.int64],
    config: KMeansConfig,
    *,
    device: str | torch.device = "cpu",
    key_order: NDArray[np.int64] | None = None,
) -> Clusters:
    """Cluster every token's points.

    Lloyd's algorithm from greedy k-means++ seeds. Ties go to the lowest sense; an empty sense takes the point farthest
    from its centroid (of equals the first), several empty senses several points. Rounds inside a batch sum in float32;
    final centroids are float64 sums of the stored values, rounded once to float32.

    Args:
        points: [N, D] float16, bfloat16 or float32, rows grouped by token. See `read_points` for what is computed on.
        sizes: int64 [T], points of each token, with sum N.
        token_ids: int64 [T]; with `config.seed` they fix each token's random draws.
        config: settings.
        device: where batches and blocks are computed.
        key_order: int64 [N], a point's rank by key inside its token; a token of more than BLOCK_ROWS points is seeded
            from the first SEED_POINTS by it. None: the rows are in that order.

    Raises:
        BadInput: the arrays do not fit together.
        MsenseError: a value is NaN or infinite; names the token.
    """
    view = as_points(points)
    if len(sizes) != len(token_ids) or int(sizes.sum()) != len(view) or (len(sizes) and int(sizes.min()) < 0):
        raise BadInput(
            f"{len(sizes)} sizes of sum {int(sizes.sum())} do not fit {len(token_ids)} token ids and {len(view)} points"
        )
    check_points(view, sizes, token_ids)
    with torch.inference_mode():
        found = few_distinct(view, sizes, config.k, config.metric, BLOCK_ROWS)
        room = np.where(found.few, found.distinct, np.minimum(sizes, config.k))
        opens, starts = np.cumsum(room) - room, np.cumsum(sizes) - sizes
        result = _empty_result(room, len(view), view.shape[1])
        task = _Task(view, starts, sizes, token_ids, config, torch.device(device), opens, result)
        _keep_distinct(task, found)
        widths = np.where(found.few, 0, _padded(sizes))
        for width in np.unique(widths[(widths > 0) & (widths <= BLOCK_ROWS)]).tolist():
            tokens = np.flatnonzero(widths == width)
            step = max(1, BATCH_FLOATS.get(task.device.type, BATCH_FLOATS["cuda"]) // (width * view.shape[1]))
            for at in range(0, len(tokens), step):
                _cluster_batch(task, tokens[at : at + step], width)
        for token in np.flatnonzero(widths > BLOCK_ROWS).tolist():
            _cluster_blocked(task, token, key_order)
    return _without_gaps(task)


def _empty_result(room: NDArray[np.int64], points: int, width: int) -> Clusters:
    tokens, senses = len(room), int(room.sum())
    return Clusters(
        sizes=room,
        centroids=np.empty((senses, width), np.float32),
        counts=np.zeros(senses, np.int64),
        spread=np.zeros(senses, np.float32),
        assignment=np.zeros(points, np.int32),
        distance=np.zeros(points, np.float32),
        inertia=np.zeros(tokens),
        rounds=np.zeros(tokens, np.int64),
    )


def _without_gaps(task: _Task) -> Clusters:
    """Drop senses without points, and number the others anew."""
    result, live = task.result, task.result.counts > 0
    if live.all():
        return result
    before: NDArray[np.int64] = np.cumsum(live) - live  # senses kept before a sense
    first = np.repeat(task.opens, task.sizes)  # of each point's token
    token = np.repeat(np.arange(len(task.sizes)), result.sizes)
    return replace(
        result,
        sizes=np.bincount(token[live], minlength=len(task.sizes)),
        centroids=result.centroids[live],
        counts=result.counts[live],
        spread=result.spread[live],
        assignment=(before[first + result.assignment] - before[first]).astype(np.int32),
    )


def _padded(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Round sizes up to 8 steps an octave.

    A token's batch is that wide whatever else is in it, so that its float32 results do not depend on its neighbours.
    """
    step = 2 ** (np.log2(np.maximum(sizes, 8)).astype(np.int64) - 3)
    return -(-sizes // step) * step


def _keep_distinct(task: _Task, found: FewDistinct) -> None:
    """Make every distinct point a sense, where a token has at most k of them."""
    token = np.repeat(np.arange(len(task.sizes)), found.distinct)
    number = np.arange(len(token)) - (np.cumsum(found.distinct) - found.distinct)[token]
    place = task.opens[token] + number
    task.result.assignment[found.rows] = number[found.group]
    task.result.counts[place] = np.bincount(found.group, minlength=len(token))
    for at in range(0, len(place), BLOCK_ROWS):
        block = torch.from_numpy(found.first[at : at + BLOCK_ROWS]).to(task.points.device)
        values = read_points(task.points.index_select(0, block), task.config.metric, "cpu")
        task.result.centroids[place[at : at + BLOCK_ROWS]] = values.numpy()


def _cluster_batch(task: _Task, tokens: NDArray[np.int64], width: int) -> None:
    """Cluster B tokens of more than k distinct points, each padded to `width` points."""
    config, device, k = task.config, task.device, task.config.k
    starts, sizes = task.starts[tokens, None], task.sizes[tokens, None]
    real = np.arange(width) < sizes
    rows = np.where(real, starts + np.arange(width), starts)
    stored = task.points.index_select(0, torch.from_numpy(rows.ravel()).to(task.points.device))
    mask = torch.from_numpy(real).to(device)
    values = read_points(stored.view(*rows.shape, -1), config.metric, device).mul_(mask[..., None])
    uniforms = torch.from_numpy(draws(task.token_ids[tokens], config)).to(device)
    gram = width <= GRAM_ROWS
    own, rounds = _lloyd(_table(values, mask, gram, config.metric), mask, uniforms, gram, config)
    sums = _sum_rows(values.double(), own, k)
    counts = torch.zeros(len(tokens), k, dtype=torch.float64, device=device).scatter_add_(1, own, mask.double())
    centroids = centroids_of(sums, counts, config.metric)
    sense = (own + k * torch.arange(len(tokens), device=device)[:, None]).flatten()
    away = values.flatten(0, 1).sub_(centroids.flatten(0, 1).index_select(0, sense)).square_().sum(1)

    result, place = task.result, task.opens[tokens, None] + np.arange(k)
    flat, distance = sense.cpu().numpy()[real.ravel()], away.cpu().numpy()[real.ravel()]
    squares = np.bincount(flat, weights=distance, minlength=place.size).reshape(place.shape)
    members = counts.cpu().numpy()
    result.assignment[rows[real]], result.distance[rows[real]] = flat % k, distance
    result.centroids[place], result.counts[place] = centroids.cpu().numpy(), members
    result.spread[place] = np.sqrt(squares / np.maximum(members, 1))
    result.inertia[tokens], result.rounds[tokens] = squares.sum(1), rounds.cpu().numpy()


def _table(values: torch.Tensor, mask: torch.Tensor, gram: bool, metric: Metric) -> torch.Tensor:
    """What `_lloyd` works on: points centred by their token's mean [B, n, D], or their inner products [B, n, n]."""
    if metric != "cosine":  # float32 is precise near 0; unit vectors are near it as they are
        values = (values - (values.sum(1) / mask.sum(1, keepdim=True))[:, None]).mul_(mask[..., None])
    return torch.bmm(values, values.transpose(1, 2)) if gram else values


def _sum_rows(rows: torch.Tensor, own: torch.Tensor, k: int) -> torch.Tensor:
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


def _lloyd(
    table: torch.Tensor, mask: torch.Tensor, uniforms: torch.Tensor, gram: bool, config: KMeansConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run Lloyd's algorithm on a batch of B tokens of n points (padding included, where `table` is 0).

    Works on `sums`, the rows of `table` summed by cluster. If the rows are points, those are centroids times counts.
    If the rows are inner products with all points, those are the inner products of centroids and points, times counts:
    all that distances need, and a round costs no product of matrices.

    Args:
        table: float32 [B, n, D] points, or [B, n, n] their inner products.
        mask: bool [B, n], false on padding.
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
    place = torch.arange(len(mask), device=mask.device)  # of the tokens in `table` among those of the batch
    running = torch.ones_like(place, dtype=torch.bool)  # which of them have not converged
    before = torch.full(place.shape, math.inf, dtype=torch.float64, device=mask.device)
    for number in range(1, config.max_rounds + 1):
        low, nearest = _scores(table, sums, squares, counts, gram, config.metric).min(1)  # the first of equals
        away = (low + norms).clamp_(min=0).mul_(mask)
        inertia = away.sum(1, dtype=torch.float64)
        counts = torch.zeros_like(counts).scatter_add_(1, nearest, mask.float())
        settled = (before - inertia <= config.tol * before) & (counts > 0).all(1) & (number > 1)
        stop = running & (settled | (number == config.max_rounds))
        own[place[stop]], rounds[place[stop]] = nearest[stop], number
        running, before = running & ~stop, inertia
        left = int(running.sum())
        if not left:
            break
        if left <= COMPACT_AT * len(place):
            keep = running.nonzero()[:, 0]
            table, mask, norms, nearest, away, counts, place, running, before = (
                x[keep] for x in (table, mask, norms, nearest, away, counts, place, running, before)
            )
        sums, squares, counts = _update(table, nearest, away, counts, gram)
    return own, rounds


def _scores(
    table: torch.Tensor, sums: torch.Tensor, squares: torch.Tensor, counts: torch.Tensor, gram: bool, metric: Metric
) -> torch.Tensor:
    """Squared distances from centroids to points, less the points' squared lengths: [B, K, n].

    `squares` [B, K] are the squared lengths of the summed points. A sum that float32 cannot tell from 0 has no
    direction: under "cosine" its centroid is 0.
    """
    scale = 1 / counts
    if metric == "cosine":
        scale = torch.where(squares > 1e-6 * counts * counts, squares.clamp_min(1e-30).rsqrt(), 0.0)
    offset = (scale * scale * squares)[..., None]
    if gram:
        return torch.addcmul(offset, sums, scale[..., None], value=-2)
    return torch.baddbmm(offset, sums * scale[..., None], table.transpose(1, 2), alpha=-2)


def _update(
    table: torch.Tensor, nearest: torch.Tensor, away: torch.Tensor, counts: torch.Tensor, gram: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums, their squared lengths and counts of the new clusters; an empty one takes the farthest point as its sum."""
    k = counts.shape[1]
    sums = _sum_rows(table, nearest, k)
    own = sums.gather(1, nearest[:, None])[:, 0, :, None] if gram else sums  # gram: a point times its cluster's sum
    squares = _sum_rows(own, nearest, k)[..., 0] if gram else own.square().sum(2)
    token, cluster = (counts == 0).nonzero(as_tuple=True)
    if len(token):
        rank = (counts == 0).cumsum(1)[token, cluster] - 1
        point = away.sort(dim=1, descending=True, stable=True).indices[token, rank]
        sums[token, cluster] = table[token, point]
        squares[token, cluster] = table[token, point, point] if gram else table[token, point].square().sum(1)
        counts = counts.clamp_min(1)
    return sums, squares, counts


def _cluster_blocked(task: _Task, token: int, key_order: NDArray[np.int64] | None) -> None:
    """Cluster one large token: what the driver of parts does, with a single part."""
    config, device, result = task.config, task.device, task.result
    rows = slice(task.starts[token], task.starts[token] + task.sizes[token])
    points = task.points[rows]
    first = points[:SEED_POINTS]
    if key_order is not None:
        order = np.argsort(key_order[rows], kind="stable")[:SEED_POINTS]
        first = points.index_select(0, torch.from_numpy(order).to(points.device))
    state = seed_centroids(first, int(task.token_ids[token]), config, device=device)
    while state.final is None:
        total = partial(points, state, config, device=device)
        empty = int((total.counts == 0).sum())
        far = farthest(points, state, empty, config, device=device) if empty else None
        state = update(state, total, config, far)
    finished = finish(points, state, config, device=device)
    result.assignment[rows], result.distance[rows] = finished.assignment, finished.distance
    senses = slice(task.opens[token], task.opens[token] + len(state.final))
    result.centroids[senses], result.rounds[token] = state.final, state.rounds
    result.counts[senses], result.spread[senses], result.inertia[token] = summary(state, [finished])
