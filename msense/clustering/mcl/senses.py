"""Number of senses of each token of a decoder teacher, by the paper's rule.

Each thread needs 16 bytes x n x D for a token of n points, in addition to the memory of Markov clustering.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from msense.clustering.kmeans.seeding import Points, as_points, check_points
from msense.clustering.mcl.clusters import cluster_in_threads
from msense.clustering.mcl.config import OFFSET, MclConfig
from msense.errors import InputError

MCL_POINTS = 4000  # points of a token that are used; as many as remain of the paper's merged samples


def mcl_senses(
    points: Points,
    sizes: NDArray[np.int64],
    config: MclConfig,
    *,
    token_ids: NDArray[np.int64] | None = None,
    device: str | torch.device = "cpu",
    threads: int = 1,
) -> NDArray[np.int64]:
    """Return K of every token: a fraction of its Markov clusters (Wang et al. 2025, the rule for Llama).

    K is int(share * clusters), or int(large_share * clusters) for more than `large` clusters, but at least `least`. A
    token of fewer than `least` points has K = number of points. Only the first MCL_POINTS points of a token are used.
    Rounds end early once the remaining clusters cannot give more than `least`. Three or more equal points form one
    cluster; two alone, with an edge of 100 next to loops of 1, stay separate.

    Args:
        points: [N, D] float16, bfloat16 or float32, rows grouped by token.
        sizes: int64 [T], points of each token, with sum N.
        config: settings.
        token_ids: int64 [T], for error messages; None: positions.
        device: where the rounds are computed.
        threads: number of threads; each holds one graph.

    Returns:
        int64 [T]; 0 for a token without points.

    Raises:
        InputError: the arrays' lengths do not match.
        MsenseError: a value is NaN, infinite or above LARGEST_VALUE; names the token.
    """
    view = as_points(points)
    if int(sizes.sum()) != len(view) or (len(sizes) and int(sizes.min()) < 0):
        raise InputError(f"{len(sizes)} sizes of sum {int(sizes.sum())} do not match {len(view)} points")
    token_ids = np.arange(len(sizes)) if token_ids is None else token_ids
    if len(token_ids) != len(sizes):
        raise InputError(f"{len(sizes)} sizes do not match {len(token_ids)} token ids")
    check_points(view, sizes, token_ids)
    starts, used = np.cumsum(sizes) - sizes, np.minimum(sizes, MCL_POINTS)
    counts = np.arange(MCL_POINTS + 1)
    rule = np.where(counts > config.large, config.large_share * counts, config.share * counts).astype(np.int64)
    rule = np.maximum(rule, config.least)
    enough = int(np.flatnonzero(np.maximum.accumulate(rule) <= config.least)[-1])  # up to here the rule gives `least`
    large = np.flatnonzero(used > enough)

    def weights(batch: NDArray[np.int64]) -> torch.Tensor:
        return _similarities(view, starts[large[batch]], used[large[batch]], device)

    senses = np.minimum(sizes, config.least)
    clusters_of = cluster_in_threads(weights, used[large], config, enough, threads)
    senses[large] = rule[[len(clusters) for clusters in clusters_of]]
    return senses


def _similarities(
    points: torch.Tensor, starts: NDArray[np.int64], sizes: NDArray[np.int64], device: str | torch.device
) -> torch.Tensor:
    """Return 1 / (OFFSET + Euclidean distance) of each token's points: float64 [B, n, n], 0 on padding.

    In float64, because squared distances of near points are small differences of large numbers.
    """
    mask = np.arange(sizes.max()) < sizes[:, None]
    rows = np.where(mask, starts[:, None] + np.arange(sizes.max()), starts[:, None])
    stored = points.index_select(0, torch.from_numpy(rows.ravel()).to(points.device))
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
