"""How many senses a token of a decoder teacher gets, by the rule of the paper.

In: points [N, D] grouped by token. Out: K of each token. Each thread holds 16 bytes x n x D for a token's n points beside
what clustering holds. No Ray.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from msense.errors import BadInput
from msense.kmeans.seeding import Points, as_points, check_points
from msense.mcl.clusters import cluster_in_threads
from msense.mcl.config import MclConfig

MCL_POINTS = 4000  # a token of more points is judged by its first ones; so many are left of the paper's merged samples


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
        MsenseError: a value is NaN, infinite or above LARGEST_VALUE; names the token.
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
    found = cluster_in_threads(weights, judged[large], config, enough, threads)
    senses[large] = rule[[len(clusters) for clusters in found]]
    return senses


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
