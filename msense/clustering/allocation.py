"""Allocate a budget of senses to tokens from their variance curves.

Minimises the distortion of the whole corpus, the sum over tokens of
    occurrences in the corpus x mean squared distance of the token's points to the nearest of its K centroids,
for a fixed sum of all K. If every token's distortion is convex in K, giving senses one at a time to the token that gains
most is optimal (Fox 1966, Discrete optimization via marginal analysis, Management Science 13(3)); other curves are
replaced by their lower convex hulls, as in bit allocation among quantizers (Shoham and Gersho 1988, IEEE Trans. ASSP
36(9)). Memory: about 100 bytes x steps of the curve for TOKENS_AT_A_TIME tokens, and 24 bytes per corner of a hull.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from msense.clustering.kmeans.curve import POINTS_PER_SENSE
from msense.constants import MAX_SENSES, MAX_TOKEN_NUMBERS
from msense.errors import InputError

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
    variance: NDArray[np.float64]  # [T, G], see `kmeans.variance_curves`


class _Steps(NamedTuple):
    """Segments of hulls: `senses` more senses lower the token's distortion by `gain` each."""

    token: NDArray[np.int64]
    senses: NDArray[np.int64]
    gain: NDArray[np.float64]


def allocate(curves: Curves, grid: NDArray[np.int64], budget: int, dim: int) -> NDArray[np.int64]:
    """Allocate a budget of senses to tokens.

    Args:
        curves: of T tokens.
        grid: int64 [G], the K of the curves' columns.
        budget: total number of senses.
        dim: width D, because one token's senses are read at once (`MAX_TOKEN_NUMBERS`).

    Returns:
        int64 [T], K of each token, from 1 to max(1, points // POINTS_PER_SENSE). Their sum is the budget, or less if no
        token gains from another sense.

    Raises:
        InputError: the budget is smaller than the number of tokens.
    """
    tokens = len(curves.points)
    if budget < tokens:
        raise InputError(f"a budget of {budget:,} senses is below one sense for each of {tokens:,} tokens; increase it")
    if not tokens:
        return np.zeros(0, np.int64)
    most = np.clip(curves.points // POINTS_PER_SENSE, 1, min(MAX_SENSES, MAX_TOKEN_NUMBERS // dim))
    batches = []
    for at in range(0, tokens, BATCH_TOKENS):
        own = slice(at, at + BATCH_TOKENS)
        chunk = Curves(curves.points[own], curves.occurrences[own], curves.variance[own])
        steps = _hulls(*_distortions(chunk, grid, most[own]))
        batches.append(steps._replace(token=steps.token + at))
    token, senses, gain = map(np.concatenate, zip(*batches, strict=True))
    order = np.lexsort((token, -gain))  # stable, so a token's steps of equal gain stay in order
    before = np.cumsum(senses[order]) - senses[order]
    taken = np.clip(budget - tokens - before, 0, senses[order])
    return 1 + np.bincount(token[order], weights=taken, minlength=tokens).astype(np.int64)


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


def _hulls(senses: NDArray[np.int64], distortion: NDArray[np.float64]) -> _Steps:
    """Return the lower convex hulls of T curves, both [T, C], as steps of falling gain for each token."""
    token, at = np.arange(len(senses)), np.zeros(len(senses), np.int64)  # unfinished tokens, and their current corners
    result = [_Steps(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    while len(token):  # from each corner to the one of steepest descent
        rows = np.arange(len(token))
        more = senses - senses[rows, at][:, None]
        fall = np.where(more > 0, distortion[rows, at][:, None] - distortion, 0.0) / np.maximum(more, 1)
        corner = fall.argmax(1)
        goes = np.flatnonzero(fall[rows, corner] > 0)
        token, at, senses, distortion = token[goes], corner[goes], senses[goes], distortion[goes]
        result.append(_Steps(token, more[goes, at], fall[goes, at]))
    return _Steps(*map(np.concatenate, zip(*result, strict=True)))
