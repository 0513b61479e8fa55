"""Variance curves of tokens, and the allocation of a budget of senses by them.

A curve estimates how a token's distortion falls with the number K of its senses, without a k-means run per number: greedy
k-means++ adds one seed at a time, and at each K of GRID one round of Lloyd's algorithm is evaluated from the token's inner
products. On MiniLM embeddings the estimate is in the median 2 to 4 % above a full run.

The allocation minimises the distortion of the whole corpus, the sum over tokens of
    occurrences in the corpus x mean squared distance of the token's points to the nearest of its K centroids,
for a fixed sum of all K. If every token's distortion is convex in K, giving senses one at a time to the token that gains
most is optimal (Fox 1966, Discrete optimization via marginal analysis, Management Science 13(3)); other curves are
replaced by their lower convex hulls, as in bit allocation among quantizers (Shoham and Gersho 1988, IEEE Trans. ASSP
36(9)). Memory: a small multiple of BATCH_PRODUCTS float32 values for curves; for the allocation 24 bytes per corner of a
hull, and about 100 bytes x steps of the curve for BATCH_TOKENS tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msense.clustering.kmeans import seeding
from msense.clustering.kmeans.batches import padded
from msense.clustering.kmeans.lloyd import sum_rows, sum_values
from msense.clustering.kmeans.seeding import Device, KMeansConfig, Points
from msense.clustering.kmeans.threads import open_threads
from msense.constants import MAX_SENSES, MAX_TOKEN_NUMBERS, Metric
from msense.errors import InputError

CURVE_POINTS = 512  # points of a token that are used
POINTS_PER_SENSE = 2  # with fewer, senses are single points, which do not generalise to other occurrences
GRID = np.array([1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64])  # K; two steps per octave
BATCH_PRODUCTS = {"cpu": 1 << 20, "cuda": 1 << 26}
STEPS_PER_OCTAVE = 16  # K that are evaluated; those between are reached only with the last of the budget
SLOPE_OVER = 3  # last steps of a known curve, whose slope is extrapolated
BATCH_TOKENS = 1 << 13


@dataclass(frozen=True)
class Curves:
    """Variance curves of T tokens with at least one point each.

    Example:
        >>> points, variance = np.array([100, 100]), np.array([[4.0, 1.0], [2.0, 1.9]])
        >>> allocate(Curves(points, points, variance), grid=np.array([1, 2]), budget=3, dim=8)
        array([2, 1])
    """

    points: NDArray[np.int64]  # [T] to be clustered
    occurrences: NDArray[np.int64]  # [T] in the corpus
    variance: NDArray[np.float64]  # [T, G], see `variance_curves`


def variance_curves(
    points: Points,
    sizes: NDArray[np.int64],
    token_ids: NDArray[np.int64],
    config: KMeansConfig,
    *,
    device: Device = "cpu",
) -> NDArray[np.float64]:
    """Estimate every token's within-cluster variance at each K of GRID.

    The variance is the sum of squared distances to the nearest centroid over n - K, because K of the n degrees of
    freedom went into the centroids: so curves of different numbers of points are comparable. The arguments are as for
    `cluster_tokens`, with at least one point per token; CURVE_POINTS are enough.

    Returns:
        float64 [T, len(GRID)], never rising along a row; NaN where K > max(1, n // POINTS_PER_SENSE).

    Raises:
        MsenseError: a value is NaN, infinite or above LARGEST_VALUE; names the token.

    Example:
        >>> points = np.float16([[0], [1], [10], [11]])
        >>> variance_curves(points, np.array([4]), np.array([0]), KMeansConfig())[0, :3]
        array([33.66666667,  0.5       ,         nan])
    """
    view, target = seeding.as_points(points), torch.device(device)
    seeding.check_points(view, sizes, token_ids)
    result = np.full((len(sizes), len(GRID)), np.nan)
    starts, widths = np.cumsum(sizes) - sizes, padded(sizes)
    with open_threads(1):
        for width in np.unique(widths).tolist():
            tokens = np.flatnonzero(widths == width)
            grid = GRID[np.maximum(1, width // POINTS_PER_SENSE) >= GRID]
            step = max(1, BATCH_PRODUCTS[target.type] // (width * max(width, view.shape[1])))
            for at in range(0, len(tokens), step):
                own = tokens[at : at + step]
                real = np.arange(width) < sizes[own, None]
                rows = torch.from_numpy((starts[own, None] + np.arange(width)) * real).to(view.device)
                mask = torch.from_numpy(real).to(target)
                values = seeding.read_points(
                    view.index_select(0, rows.flatten()).view(*rows.shape, -1), config.metric, target
                )
                seeding.centre(values, mask, config.metric)
                drawn = torch.from_numpy(seeding.draws(token_ids[own], replace(config, k=int(grid[-1])))).to(target)
                result[own, : len(grid)] = _distortions_of_seeds(values, mask, drawn, grid, config.metric).cpu().numpy()
    freedom = np.maximum(sizes[:, None] - GRID, 1)
    known = np.maximum(1, sizes // POINTS_PER_SENSE)[:, None] >= GRID
    return np.minimum.accumulate(np.where(known, np.maximum(result, 0) / freedom, np.nan), axis=1)


def _distortions_of_seeds(
    values: Tensor, mask: Tensor, uniforms: Tensor, grid: NDArray[np.int64], metric: Metric
) -> Tensor:
    """Return, for each k of the grid, inertias about the means of the points nearest to the first k seeds: [B, G]."""
    norms, products = values.square().sum(2), torch.bmm(values, values.transpose(1, 2))
    token = torch.arange(len(mask), device=mask.device)[:, None]

    def scores(index: Tensor) -> Tensor:
        return torch.add(norms.gather(1, index)[..., None], products[token, index], alpha=-2)

    own = scores(seeding.greedy_seeds(scores, norms, mask, uniforms)[0]).cummin(1).indices
    total, result = norms.sum(1, dtype=torch.float64), []
    for k in grid.tolist():
        sums = sum_rows(values, own[:, k - 1], k)
        lengths = sums.square().sum(2, dtype=torch.float64)
        if metric == "cosine":  # centroids of length 1: the inertia is 2 (points - sum of the sums' lengths)
            result.append(2 * (total - lengths.sqrt().sum(1)))
        else:
            members = sum_values(mask.float(), own[:, k - 1], k).clamp_(min=1)
            result.append(total - (lengths / members).sum(1))
    return torch.stack(result, 1)


def allocate(curves: Curves, grid: NDArray[np.int64], budget: int, dim: int) -> NDArray[np.int64]:
    """Allocate a budget of senses to tokens with curves over the K of `grid`, int64 [G], and points of width `dim`.

    Returns:
        int64 [T], K of each token, from 1 to max(1, points // POINTS_PER_SENSE), with at most MAX_TOKEN_NUMBERS values.
        Their sum is the budget, or less if no token gains from another sense.

    Raises:
        InputError: the budget is smaller than the number of tokens.
    """
    return Allocation(curves, grid, dim).numbers(budget)


class Allocation:
    """The order in which senses are given to tokens; arguments as of `allocate`."""

    def __init__(self, curves: Curves, grid: NDArray[np.int64], dim: int) -> None:
        self._tokens, self._occurrences = len(curves.points), int(curves.occurrences.sum())
        self._first = 0.0  # distortion with one sense per token
        batches = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
        most = np.clip(curves.points // POINTS_PER_SENSE, 1, min(MAX_SENSES, MAX_TOKEN_NUMBERS // dim))
        for at in range(0, self._tokens, BATCH_TOKENS):
            own = slice(at, at + BATCH_TOKENS)
            chunk = Curves(curves.points[own], curves.occurrences[own], curves.variance[own])
            numbers, distortion = _distortions(chunk, grid, most[own])
            self._first += float(distortion[:, 0].sum())
            token, senses, gain = _hulls(numbers, distortion)
            batches.append((token + at, senses, gain))
        token, senses, gain = map(np.concatenate, zip(*batches, strict=True))
        order = np.lexsort((token, -gain))  # stable, so a token's steps of equal gain stay in order
        self._token, self._senses, self._gain = token[order], senses[order], gain[order]

    def numbers(self, budget: int) -> NDArray[np.int64]:
        """Return K of each token, int64 [T], for a budget; see `allocate`."""
        if budget < self._tokens:
            raise InputError(
                f"a budget of {budget:,} senses is below one sense for each of {self._tokens:,} tokens; increase it"
            )
        taken = self._taken(budget)
        return 1 + np.bincount(self._token, weights=taken, minlength=self._tokens).astype(np.int64)

    def estimates(self, budgets: Iterable[int]) -> list[tuple[int, float]]:
        """Return (senses, estimated mean squared distance in the corpus) for budgets, each number of senses once."""
        found = {}
        for budget in budgets:
            taken = self._taken(budget)
            left = self._first - float(taken @ self._gain)
            found[self._tokens + int(taken.sum())] = max(left, 0.0) / max(1, self._occurrences)
        return list(found.items())

    def _taken(self, budget: int) -> NDArray[np.int64]:
        """Return the senses of each step that a budget pays for."""
        before = np.cumsum(self._senses) - self._senses
        return np.clip(budget - self._tokens - before, 0, self._senses)


def _distortions(
    curves: Curves, grid: NDArray[np.int64], most: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return K [T, C], rising up to each token's maximum, and the corpus distortion at each of them [T, C].

    Between the K of the grid the variance is interpolated in log K; beyond the last known one it is extrapolated as a
    power of K, like a quantizer's distortion (Zador 1982, IEEE Trans. Inf. Theory 28(2)).
    """
    ladder = np.unique(np.round(2 ** np.arange(0, np.log2(most.max()) + 1, 1 / STEPS_PER_OCTAVE)).astype(np.int64))
    senses = np.minimum(ladder, most[:, None])
    known, rows = np.isfinite(curves.variance).sum(1), np.arange(len(most))
    values = np.where(known[:, None] > np.arange(len(grid)), curves.variance, 0.0)
    log_k, log_grid = np.log(senses), np.log(grid)
    right = np.clip(np.searchsorted(grid, senses, side="left"), 1, np.maximum(known - 1, 1)[:, None])
    share = np.clip((log_k - log_grid[right - 1]) / (log_grid[right] - log_grid[right - 1]), 0, 1)
    inside = values[rows[:, None], right - 1] * (1 - share) + values[rows[:, None], right] * share
    last = known - 1
    earlier = np.maximum(last - SLOPE_OVER, 0)
    low, high = values[rows, last], values[rows, earlier]
    falls = (low > 0) & (last > earlier)
    ratio, width = np.where(falls, low / np.where(falls, high, 1), 1), log_grid[last] - log_grid[earlier]
    slope = np.log(ratio) / np.where(falls, width, 1)
    beyond = low[:, None] * np.exp(slope[:, None] * np.maximum(log_k - log_grid[last][:, None], 0))
    variance = np.where(senses > grid[last][:, None], beyond, inside)
    weight = curves.occurrences / curves.points
    return senses, variance * (curves.points[:, None] - senses) * weight[:, None]


def _hulls(
    senses: NDArray[np.int64], distortion: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return the segments of the curves' lower convex hulls, per token by falling gain: token, senses, gain of a sense."""
    token, at = np.arange(len(senses)), np.zeros(len(senses), np.int64)  # unfinished tokens, and their current corners
    result = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    while len(token):  # from each corner to the one of steepest descent
        rows = np.arange(len(token))
        more = senses - senses[rows, at][:, None]
        fall = np.where(more > 0, distortion[rows, at][:, None] - distortion, 0.0) / np.maximum(more, 1)
        corner = fall.argmax(1)
        goes = np.flatnonzero(fall[rows, corner] > 0)
        token, at, senses, distortion = token[goes], corner[goes], senses[goes], distortion[goes]
        result.append((token, more[goes, at], fall[goes, at]))
    steps, added, gain = map(np.concatenate, zip(*result, strict=True))
    return steps, added, gain
