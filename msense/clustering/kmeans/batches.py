"""k-means per token: many small tokens in batches, large ones in blocks (see `blocks`).

Memory: a batch (about 24 bytes x BATCH_FLOATS) or a block per thread, and 12 bytes per point of a large token; never a
float32 copy of all points.
"""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msense.clustering.kmeans import blocks, seeding
from msense.clustering.kmeans.lloyd import LloydResult, lloyd
from msense.clustering.kmeans.seeding import Device, KMeansConfig, Points
from msense.clustering.kmeans.threads import ALONE, Threads, open_threads
from msense.constants import MAX_SENSES
from msense.errors import InputError

# all threads share a token of more than SHARED_BLOCKS blocks per thread, if there are few such tokens per thread
SHARED_BLOCKS, SHARED_TOKENS = 4, 4
GRAM_ROWS = 384  # up to this size, keeping a token's inner products is cheaper than computing distances every round
BATCH_FLOATS = {"cpu": 1 << 21, "cuda": 1 << 26}  # values of a batch: what fits in a cache, what fills a GPU


@dataclass(frozen=True)
class Clusters:
    """Senses of T tokens, in token order; S senses and N points in total.

    A centroid is the mean (for "cosine" the mean scaled to length 1) of exactly the points assigned to it. They belong to
    the nearest centroid of the round before, or have moved since, so another centroid may be slightly closer.
    """

    sizes: NDArray[np.int64]  # [T] senses of each token
    centroids: NDArray[np.float32]  # [S, D]
    counts: NDArray[np.int64]  # [S] points of a sense, never 0
    rms_distance: NDArray[np.float32]  # [S] RMS distance of a sense's points to the centroid
    assignment: NDArray[np.int32]  # [N] index of the sense within the token
    distance: NDArray[np.float32]  # [N] squared distance to the assigned centroid
    inertia: NDArray[np.float64]  # [T] sum of the squared distances
    rounds: NDArray[np.int64]  # [T] assignment rounds; 0 where every distinct point is a sense


class _Scratch(threading.local):
    """Buffers of each thread, reused because the allocation of new pages takes longer than filling them."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor, which replaces the last one of that name."""
        numel, held = math.prod(shape), getattr(self, name, None)
        if held is None or held.numel() < numel:
            held = torch.empty(numel, dtype=dtype, device=device)
            setattr(self, name, held)
        return held[:numel].view(shape)


@dataclass(frozen=True)
class _Task:
    """Arguments of `cluster_tokens` and its result, which the jobs fill in."""

    points: Tensor  # [N, D]
    starts: NDArray[np.int64]  # [T] first row of a token
    sizes: NDArray[np.int64]  # [T] rows of a token
    token_ids: NDArray[np.int64]  # [T]
    senses: NDArray[np.int64]  # [T] K of a token
    config: KMeansConfig  # `senses` overrides its k
    device: torch.device
    opens: NDArray[np.int64]  # [T] first sense of a token
    result: Clusters  # `sizes` senses are reserved; those not used have a count of 0
    key_order: NDArray[np.int64] | None  # [N]
    scratch: _Scratch


def cluster_tokens(  # noqa: PLR0913 - the package's main entry point
    points: Points,
    sizes: NDArray[np.int64],
    token_ids: NDArray[np.int64],
    config: KMeansConfig,
    *,
    senses: NDArray[np.int64] | None = None,
    device: Device = "cpu",
    key_order: NDArray[np.int64] | None = None,
    threads: int = 1,
) -> Clusters:
    """Cluster every token's points.

    Lloyd's algorithm from greedy k-means++ seeds. Ties go to the lowest sense; empty senses take the points farthest from
    their centroids (the first of equal ones). Rounds within a batch sum in float32; final centroids are float64 sums of
    the stored values, rounded once to float32. A token's result depends only on its points, id, K, key order and
    `config`, not on other tokens or `threads`.

    Args:
        points: [N, D] float16, bfloat16 or float32, rows grouped by token; see `read_points`.
        sizes: int64 [T], points of each token, with sum N.
        token_ids: int64 [T]; with `config.seed` they determine each token's random draws.
        config: settings.
        senses: int64 [T], each token's K; None: `config.k` for all.
        device: where batches and blocks are computed.
        key_order: int64 [N], a point's rank by key within its token; a token of more than BLOCK_ROWS points is seeded
            from the first SEED_POINTS. None: the rows are in that order.
        threads: number of batches (or shares of a token's blocks) computed in parallel, each on one torch thread.

    Raises:
        InputError: the arrays' lengths do not match, or a K is not from 1 to MAX_SENSES.
        MsenseError: a value is NaN, infinite or above LARGEST_VALUE; names the token.

    Example:
        >>> points = np.float16([[0], [1], [9], [5], [5]])
        >>> clusters = cluster_tokens(points, np.array([3, 2]), np.array([10, 11]), KMeansConfig(k=2))
        >>> clusters.sizes, clusters.centroids[clusters.sizes[0]:]
        (array([2, 1]), array([[5.]], dtype=float32))
    """
    view = seeding.as_points(points)
    seeding.check_points(view, sizes, token_ids)
    k = np.full(len(token_ids), config.k) if senses is None else _checked_senses(senses, sizes, token_ids)
    with open_threads(threads) as pool:
        distinct = seeding.few_distinct(view, sizes, k, config.metric, seeding.BLOCK_ROWS)
        room = np.where(distinct.few, distinct.distinct, np.minimum(sizes, k))
        opens, starts = np.cumsum(room) - room, np.cumsum(sizes) - sizes
        total = int(room.sum())
        result = Clusters(
            sizes=room,
            centroids=np.empty((total, view.shape[1]), np.float32),
            counts=np.zeros(total, np.int64),
            rms_distance=np.zeros(total, np.float32),
            assignment=np.zeros(len(view), np.int32),
            distance=np.zeros(len(view), np.float32),
            inertia=np.zeros(len(room)),
            rounds=np.zeros(len(room), np.int64),
        )
        task = _Task(
            view, starts, sizes, token_ids, k, config, torch.device(device), opens, result, key_order, _Scratch()
        )
        _keep_distinct(task, distinct)
        widths = np.where(distinct.few, 0, padded(sizes))
        blocked = widths[widths > seeding.BLOCK_ROWS].sum()
        shared = widths > max(seeding.BLOCK_ROWS * SHARED_BLOCKS * threads, blocked // (SHARED_TOKENS * threads))
        for token in np.flatnonzero(shared).tolist():
            _cluster_blocked(task, token, pool)
        unshared = np.flatnonzero((widths > seeding.BLOCK_ROWS) & ~shared).tolist()
        jobs = [partial(_cluster_blocked, task, token, ALONE) for token in unshared]
        jobs += [partial(_cluster_batch, task, tokens, width) for tokens, width in _batches(task, widths)]
        pool.map(lambda job: job(), jobs)
    return _without_gaps(task)


def _checked_senses(
    senses: NDArray[np.int64], sizes: NDArray[np.int64], token_ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return K of each token, int64 [T]; a token without points may have 0."""
    k = senses.astype(np.int64)
    if k.shape != token_ids.shape:
        raise InputError(f"senses of shape {k.shape} do not match {len(token_ids)} token ids: pass one K per token")
    for wrong in np.flatnonzero((k > MAX_SENSES) | (k < (sizes > 0))):
        raise InputError(f"senses of token {token_ids[wrong]} are {k[wrong]}, but must be from 1 to {MAX_SENSES}")
    return k


def _batches(task: _Task, widths: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Group tokens of up to BLOCK_ROWS points and similar K into batches; yield their indices and padded width.

    Where `lloyd` multiplies candidates by points, tokens of a batch have equally many candidates: float32 products of
    another shape may be rounded differently.
    """
    exact = np.where(widths > GRAM_ROWS, np.log(np.maximum(task.senses, 1)).astype(np.int64), 0)
    order = np.lexsort((task.senses, exact, -widths))  # the largest first, for an even load of the threads
    order = order[(widths[order] > 0) & (widths[order] <= seeding.BLOCK_ROWS)]
    border = (np.diff(widths[order]) != 0) | (np.diff(exact[order]) != 0)
    for tokens in np.split(order, np.flatnonzero(border) + 1) if len(order) else []:
        width, k = int(widths[tokens[0]]), int(task.senses[tokens].max())
        values = width * max(k, width if width <= GRAM_ROWS else task.points.shape[1])  # of a token
        step = max(1, BATCH_FLOATS[task.device.type] // values)
        for at in range(0, len(tokens), step):
            yield tokens[at : at + step], width


def _without_gaps(task: _Task) -> Clusters:
    """Drop senses without points and renumber the others."""
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
        rms_distance=result.rms_distance[live],
        assignment=(before[first + result.assignment] - before[first]).astype(np.int32),
    )


def padded(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Round sizes up to 8 steps per octave and to multiples of 16.

    The width of a token's batch depends only on its own size, so that its float32 results do not depend on the others.
    """
    step = 2 ** np.maximum(np.log2(np.maximum(sizes, 1)).astype(np.int64) - 3, 4)
    return -(-sizes // step) * step


def _keep_distinct(task: _Task, few: seeding.FewDistinct) -> None:
    """Make every distinct point a sense, for tokens with at most K of them."""
    token = np.repeat(np.arange(len(task.sizes)), few.distinct)
    number = np.arange(len(token)) - (np.cumsum(few.distinct) - few.distinct)[token]
    place = task.opens[token] + number
    task.result.assignment[few.rows] = number[few.group]
    task.result.counts[place] = np.bincount(few.group, minlength=len(token))
    for at in range(0, len(place), seeding.BLOCK_ROWS):
        block = torch.from_numpy(few.first[at : at + seeding.BLOCK_ROWS]).to(task.points.device)
        values = seeding.read_points(task.points.index_select(0, block), task.config.metric, "cpu")
        task.result.centroids[place[at : at + seeding.BLOCK_ROWS]] = values.numpy()


def _cluster_batch(task: _Task, tokens: NDArray[np.int64], width: int) -> None:
    """Cluster B tokens of more than K distinct points, each padded to `width` points and the largest K."""
    config, device, senses, k = task.config, task.device, task.senses[tokens], int(task.senses[tokens].max())
    real, used = np.arange(width) < task.sizes[tokens, None], np.arange(k) < senses[:, None]
    mask, unused = torch.from_numpy(real).to(device), torch.from_numpy(~used).to(device)
    gram = width <= GRAM_ROWS
    table = _table(task, tokens, mask, gram)

    def run(number: int) -> LloydResult:
        drawn = seeding.draws(task.token_ids[tokens], replace(config, k=k), senses, number)
        return lloyd(table, mask, unused, torch.from_numpy(drawn).to(device), gram, config)

    best = run(0)
    for number in range(1, config.n_init):
        result = run(number)
        lower = result.inertia <= best.inertia
        for kept, values in zip(best, result, strict=True):
            kept[lower] = values[lower]
    task.result.rounds[tokens] = best.rounds.cpu().numpy()
    _finish(task, tokens, best.own.cpu().numpy()[real])


def _table(task: _Task, tokens: NDArray[np.int64], mask: Tensor, gram: bool) -> Tensor:
    """Return the table for `lloyd`: points centred by their token's mean [B, n, D], or inner products [B, n, n]."""
    (batch, n), width = mask.shape, task.points.shape[1]
    step = max(1, BATCH_FLOATS[task.device.type] // (n * width)) if gram else batch
    table = task.scratch.take("table", (batch, n, n if gram else width), torch.float32, task.device)
    for first in range(0, batch, step):
        own = mask[first : first + step]
        rows = torch.from_numpy(task.starts[tokens[first : first + step], None] + np.arange(n)) * own.cpu()
        values = _values(task, rows.flatten(), "values" if gram else "table").view(*own.shape, width)
        seeding.centre(values, own, task.config.metric)
        if gram:
            out = table[first : first + step]
            if task.device.type == "cpu":  # 1.5 times as fast as torch: half of the product is computed and mirrored
                np.matmul(values.numpy(), values.numpy().transpose(0, 2, 1), out=out.numpy())
            else:
                torch.bmm(values, values.transpose(1, 2), out=out)
    return table


def _values(task: _Task, rows: Tensor, name: str) -> Tensor:
    """Read rows int64 [R] into the thread's buffer of that name: float32 [R, D]."""
    shape, points = (len(rows), task.points.shape[1]), task.points
    stored = task.scratch.take("stored", shape, points.dtype, points.device)
    torch.index_select(points, 0, rows.to(points.device), out=stored)
    out = task.scratch.take(name, shape, torch.float32, task.device)
    return seeding.read_points(stored, task.config.metric, task.device, out)


def _finish(task: _Task, tokens: NDArray[np.int64], sense: NDArray[np.int64]) -> None:
    """Store the result of B tokens whose rows have these senses [R]; in groups of tokens that fit in the cache."""
    result, config, width = task.result, task.config, task.points.shape[1]
    step, ends, first = BATCH_FLOATS[task.device.type] // (8 * width), np.cumsum(task.sizes[tokens]), 0
    while first < len(tokens):
        start = int(ends[first] - task.sizes[tokens[first]])
        last = max(first + 1, int(np.searchsorted(ends, start + step, side="right")))
        some, own = tokens[first:last], sense[start : ends[last - 1]]
        sizes, room = task.sizes[some], result.sizes[some]
        opens = np.cumsum(room) - room  # of each token in this group
        rows = np.arange(len(own)) + np.repeat(task.starts[some] - (np.cumsum(sizes) - sizes), sizes)
        place = np.arange(int(room.sum())) + np.repeat(task.opens[some] - opens, room)
        number = torch.from_numpy(own + np.repeat(opens, sizes))  # index of the sense within this group
        index, counts = number.to(task.device), torch.bincount(number, minlength=len(place))
        values = _values(task, torch.from_numpy(rows), "values")
        wide = task.scratch.take("wide", values.shape, torch.float64, task.device).copy_(values)
        sums = wide.new_zeros(len(place), width).index_add_(0, index, wide)  # exact: the order does not matter
        centroids = seeding.centroids_of(sums, counts.to(task.device), config.metric)
        away = values.sub_(centroids.index_select(0, index)).square_().sum(1).cpu()
        squares = torch.bincount(number, away.double(), minlength=len(place))
        torch.from_numpy(result.centroids).index_copy_(0, torch.from_numpy(place), centroids.cpu())
        result.counts[place], result.rms_distance[place] = counts, (squares / counts.clamp(min=1)).sqrt_()
        result.assignment[rows], result.distance[rows] = own, away
        result.inertia[some] = np.add.reduceat(squares.numpy(), opens)
        first = last


def _cluster_blocked(task: _Task, token: int, threads: Threads) -> None:
    """Cluster one large token with one range of blocks per thread."""
    device, result = task.device, task.result
    config = replace(task.config, k=int(task.senses[token]))
    rows = slice(task.starts[token], task.starts[token] + task.sizes[token])
    points = task.points[rows]
    first = points[: seeding.SEED_POINTS]
    if task.key_order is not None:
        order = np.argsort(task.key_order[rows], kind="stable")[: seeding.SEED_POINTS]
        first = points.index_select(0, torch.from_numpy(order).to(points.device))
    state = blocks.seed_centroids(first, int(task.token_ids[token]), config, device=device, threads=threads)
    size = -(-len(points) // (seeding.BLOCK_ROWS * threads.count)) * seeding.BLOCK_ROWS
    parts = points.split(size)
    kept = [blocks.Kept() for _ in parts]

    def one_round(number: int) -> blocks.Partial:
        return blocks.partial(parts[number], state, config, device=device, kept=kept[number])

    while state.final is None:
        total = blocks.combine(threads.map(one_round, range(len(parts))))
        far = None
        if empty := int((total.counts == 0).sum()):
            numbered = enumerate(parts)
            each = [blocks.farthest(p, state, empty, config, first_row=i * size, device=device) for i, p in numbered]
            far = blocks.combine_farthest(each, empty)
        state = blocks.update(state, total, config, far)
    finished = threads.map(lambda part: blocks.finish(part, state, config, device=device), parts)
    result.assignment[rows] = np.concatenate([part.assignment for part in finished])
    result.distance[rows] = np.concatenate([part.distance for part in finished])
    senses = slice(task.opens[token], task.opens[token] + len(state.final))
    result.centroids[senses], result.rounds[token] = state.final, state.rounds
    result.counts[senses], result.rms_distance[senses], result.inertia[token] = blocks.summary(state, finished)
