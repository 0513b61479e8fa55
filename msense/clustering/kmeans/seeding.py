"""Input and initialisation of k-means: settings, exact values, duplicates, random draws, greedy k-means++.

Every draw is a hash of (seed, run, token id, step, candidate), so a token's seeds depend neither on other tokens nor on
the order of work. Memory: about 40 bytes per row, and candidates x points distances.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msense.constants import LARGEST_VALUE, MAX_SENSES, Metric
from msense.errors import InputError, MsenseError

Points: TypeAlias = NDArray[np.generic] | Tensor
Device: TypeAlias = str | torch.device
BLOCK_ROWS = 1024  # rows per block; a token of more points is clustered in blocks
SEED_POINTS = 8192  # the first points by key, from which such a token is seeded
VALUE_GRID = 2.0**24  # values are multiples of 1 / GRID, as every float16 is
WEIGHT = 2.0**60  # sum of the integer weights of the first draw of candidates; it falls from step to step
LEADING = 8  # components that distinguish almost all distinct points


@dataclass(frozen=True)
class KMeansConfig:
    """Settings of k-means.

    Raises:
        InputError: a setting is out of range.

    Example:
        >>> KMeansConfig(k=8, metric="cosine").max_rounds
        100
    """

    k: int = 20  # maximum number of senses of a token; it has fewer if it has fewer distinct points
    # "l2" and "dot" cluster by squared Euclidean distance (they differ only in the assignment to a finished dictionary);
    # "cosine" clusters points scaled to length 1 around centroids of length 1
    metric: Metric = "l2"
    seed: int = 0
    # Number of runs from different seeds; a token keeps the run whose last round has the lowest inertia. A token
    # clustered in blocks runs once, from the seeds of lowest inertia on its seeding points.
    n_init: int = 1
    tol: float = 3e-4  # a token stops when a round lowers its inertia by no more than this fraction
    max_rounds: int = 100  # of assignment

    def __post_init__(self) -> None:
        limits = {"k": (1, MAX_SENSES), "n_init": (1, math.inf), "tol": (0, 1), "max_rounds": (1, math.inf)}
        check_limits("k-means settings", self, limits)
        if self.metric not in get_args(Metric):
            raise InputError(f"metric is {self.metric!r}, but must be one of {', '.join(get_args(Metric))}")


def check_limits(what: str, settings: object, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raise InputError that lists every setting outside its two limits, which are valid themselves."""
    wrong = [
        f"{name} is {value!r}, but must be from {low:g} to {high:g}"
        for name, (low, high) in limits.items()
        if not low <= (value := getattr(settings, name)) <= high
    ]
    if wrong:
        raise InputError(f"{what}: {'; '.join(wrong)}")


def as_points(points: Points) -> Tensor:
    """View a float16, bfloat16 or float32 matrix as a tensor [N, D] without a copy; raise InputError for others."""
    dtype = str(points.dtype).removeprefix("torch.")
    if dtype not in ("float16", "bfloat16", "float32") or points.ndim != 2 or not points.shape[1]:
        raise InputError(
            f"points are {dtype} of shape {tuple(points.shape)}, but must be a float16, bfloat16 or float32 matrix "
            "[points, width]; convert them first"
        )
    # dlpack accepts read-only memory (mapped files, Arrow buffers) without torch's warning, but no negative strides
    return points.detach() if isinstance(points, Tensor) else torch.from_dlpack(np.ascontiguousarray(points))


def read_points(points: Tensor, metric: Metric, device: Device, out: Tensor | None = None) -> Tensor:
    """Return the float32 values [..., D] that k-means works on, in a new tensor or in `out`.

    Stored float16 values are used unchanged. Other dtypes are rounded to multiples of 2^-24, the grid of float16; with
    "cosine", points are scaled to length 1 (zero vectors stay zero) and then rounded to it. So float64 sums are exact,
    and independent of their order, while rows x largest |value| stays below 2^29.
    """
    values = torch.empty(points.shape, dtype=torch.float32, device=device) if out is None else out
    values.copy_(points)
    if metric == "cosine":
        wide = values.double()
        wide /= torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min_(1e-300)
        return values.copy_(wide.mul_(VALUE_GRID).round_().div_(VALUE_GRID))
    if points.dtype != torch.float16:
        values.mul_(VALUE_GRID).round_().div_(VALUE_GRID)
    return values


def centre(values: Tensor, mask: Tensor, metric: Metric) -> None:
    """Subtract each token's mean from its points float32 [B, n, D] (not for "cosine"), and set padding to 0, in place."""
    padding = (~mask).flatten().nonzero()[:, 0]
    values.flatten(0, 1).index_fill_(0, padding, 0)
    if metric != "cosine":  # float32 is precise near 0; unit vectors are near it already
        values.sub_((values.sum(1) / mask.sum(1, keepdim=True))[:, None]).flatten(0, 1).index_fill_(0, padding, 0)


def centroids_of(sums: Tensor, counts: Tensor, metric: Metric) -> Tensor:
    """Return means of float64 sums [..., K, D] with counts [..., K]; for "cosine" unit vectors, or 0 for a zero sum."""
    divisor = torch.linalg.vector_norm(sums, dim=-1).clamp_min(1e-300) if metric == "cosine" else counts.clamp_min(1)
    return (sums / divisor[..., None]).float()


def check_points(points: Tensor, sizes: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
    """Raise InputError if the arrays' lengths do not match, MsenseError if a value is above LARGEST_VALUE or NaN."""
    if len(sizes) != len(token_ids) or int(sizes.sum()) != len(points) or (sizes < 0).any():
        counts = f"{len(token_ids)} token ids and {len(points)} points"
        raise InputError(f"{len(sizes)} sizes of sum {int(sizes.sum())} do not match {counts}")
    for at in range(0, len(points), BLOCK_ROWS):
        block = points[at : at + BLOCK_ROWS]
        low, high = torch.aminmax(block)
        if not (float(low) >= -LARGEST_VALUE and float(high) <= LARGEST_VALUE):  # NaN fails both
            row = at + int((block.float().abs() <= LARGEST_VALUE).all(1).logical_not().nonzero()[0])
            token = token_ids[np.searchsorted(np.cumsum(sizes), row, side="right")]
            raise MsenseError(
                f"token {token} has an embedding that is NaN or infinite, or has values above {LARGEST_VALUE:g}; "
                "remove it or compute it again"
            )


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the output function of SplitMix64 (Steele, Lea, Flood 2014), a bijection that mixes all bits."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def draws(
    token_ids: NDArray[np.int64], config: KMeansConfig, senses: NDArray[np.int64] | None = None, run: int = 0
) -> NDArray[np.float64]:
    """Return uniform numbers in (0, 1) for greedy k-means++: float64 [T, K, L], L candidates at each of K steps.

    L is 2 + floor(ln K), as in Arthur and Vassilvitskii (2007) and scikit-learn, for the K of `config`. `senses` int64 [T]
    are the tokens' own K, at most that (None: that); a token with fewer candidates than L repeats the draw of its first
    one, which cannot win again. `run` is below `config.n_init`.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    own = 2 + np.log(np.full(len(token_ids), config.k) if senses is None else senses).astype(np.int64)
    steps = np.arange(config.k, dtype=np.uint64)
    candidates = np.arange(2 + int(math.log(config.k)), dtype=np.uint64)
    candidates = candidates * (candidates < own[:, None])
    state = _mix(np.array([config.seed % 2**64], dtype=np.uint64) + golden)
    if run:
        state = _mix(state ^ _mix(np.array([run], dtype=np.uint64) + golden))
    state = _mix(state ^ _mix(token_ids.astype(np.uint64) + golden))
    state = _mix(state[:, None] ^ _mix(steps + golden))
    state = _mix(state[:, :, None] ^ _mix(candidates + golden)[:, None])
    return ((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def lowest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the minimum of each column and its first row: [..., K, n] to [..., n] and int64 [..., n].

    Same result as `min`, but four times as fast, because it has no unpredictable branches. Overwrites `scores`.
    """
    low, row = scores.amin(-2), torch.arange(scores.shape[-2], dtype=torch.float32, device=scores.device)[:, None]
    above = scores.sub_(low[..., None, :]).sign_()
    return low, above.mul_(len(row)).add_(row).amin(-2).long()


def greedy_seeds(
    scores: Callable[[Tensor], Tensor], norms: Tensor, mask: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose seeds by greedy k-means++ for a batch of B tokens of at most n points.

    Each step draws candidates in proportion to the squared distance to the nearest seed so far, and keeps the one
    that gives the smallest sum of such distances. `scores` maps points int64 [B, L] to their squared distances from all
    points minus those points' squared lengths, as a new float32 tensor [B, L, n]; `norms` float32 [B, n] are squared
    lengths, 0 on padding, where `mask` is false; `uniforms` float64 [B, K, L] lie in (0, 1).

    Returns the chosen points int64 [B, K], and the sum of squared distances to the nearest of them, minus norms [B].
    """
    steps, sizes = uniforms.unbind(1), mask.sum(1, keepdim=True)
    row, last = torch.arange(len(mask), device=mask.device) * uniforms.shape[2], sizes - 1
    chosen = (steps[0][:, :1] * sizes).long()
    seeds = chosen.repeat(1, len(steps))
    near = scores(chosen)[:, 0].mul_(mask)  # to the nearest seed, minus norms; stays 0 on padding
    scale = None
    for step in range(1, len(steps)):
        weights = (near + norms).clamp_(min=0).scatter_(1, seeds, 0)  # rounding may leave a small weight on a seed
        if scale is None:
            scale = WEIGHT / weights.sum(1, keepdim=True, dtype=torch.float64).clamp_(min=1e-200)
        # integers, because a GPU's order of floating-point additions is not fixed
        whole = (weights * scale).long().cumsum(1)
        targets = (steps[step] * whole[:, -1:]).long()
        candidates = torch.minimum(torch.searchsorted(whole, targets, right=True), last)
        trial = scores(candidates)
        torch.minimum(trial, near[:, None], out=trial)
        best = trial.sum(2).argmin(1)
        seeds[:, step] = candidates.flatten().index_select(0, best.add_(row))
        near = trial.flatten(0, 1).index_select(0, best)
    return seeds, near.sum(1)


@dataclass(frozen=True)
class FewDistinct:
    """Tokens with at most K distinct points, each of which becomes a sense without any clustering."""

    few: NDArray[np.bool_]  # [T]
    distinct: NDArray[np.int64]  # [T], 0 for other tokens
    rows: NDArray[np.int64]  # [R], ascending: the rows of those tokens
    group: NDArray[np.int64]  # [R]: index of each row's distinct point, by token and first appearance
    first: NDArray[np.int64]  # [G]: the first row of each distinct point


def few_distinct(
    points: Tensor, sizes: NDArray[np.int64], senses: NDArray[np.int64], metric: Metric, max_rows: int
) -> FewDistinct:
    """Find the tokens of at most `max_rows` rows with at most K distinct points, which includes tokens without points.

    Rows are compared by a 64-bit hash of their values; a first pass over a few components rules out almost every token.
    For "cosine", points of the same direction are equal.
    """
    token = np.repeat(np.arange(len(sizes)), sizes)
    suspect = (sizes <= senses) & (sizes <= max_rows)
    unclear = (sizes > senses) & (sizes <= max_rows)
    rows = np.flatnonzero(unclear[token])
    # a lower bound is enough here, so token and 40 bits of the hash share one word (np.unique is 100 times slower)
    words = token[rows].astype(np.uint64) << np.uint64(40) | _keys(points, rows, metric, LEADING) >> np.uint64(24)
    words = np.sort(words)
    leading = words[np.diff(words, prepend=np.uint64(2**64 - 1)) != 0] >> np.uint64(40)
    suspect |= unclear & (np.bincount(leading.astype(np.int64), minlength=len(sizes)) <= senses)

    rows = np.flatnonzero(suspect[token])
    words = _keys(points, rows, metric, points.shape[1]) ^ _mix(token[rows].astype(np.uint64))
    _, first, group = np.unique(words, return_index=True, return_inverse=True)
    order = np.argsort(first)  # by first appearance
    first, group = first[order], np.argsort(order)[group]
    distinct = np.bincount(token[rows[first]], minlength=len(sizes))
    few = suspect & (distinct <= senses)
    kept, kept_group = few[token[rows]], few[token[rows[first]]]
    number = np.cumsum(kept_group) - 1
    return FewDistinct(few, distinct * few, rows[kept], number[group[kept]], rows[first[kept_group]])


def _keys(points: Tensor, rows: NDArray[np.int64], metric: Metric, width: int) -> NDArray[np.uint64]:
    """Hash the first `width` values of the given rows: uint64 [R]; -0 counts as 0."""
    keys, width = np.empty(len(rows), np.uint64), min(width, points.shape[1])
    salts = _mix(np.arange(1, (width + 1) // 2 + 1, dtype=np.uint64))
    source = points if metric == "cosine" else points[:, :width]
    for at in range(0, len(rows), BLOCK_ROWS):
        index = torch.from_numpy(rows[at : at + BLOCK_ROWS]).to(points.device)
        values = read_points(source.index_select(0, index), metric, "cpu")[:, :width] + 0.0
        words = torch.nn.functional.pad(values, (0, width % 2)).contiguous().numpy().view(np.uint64)
        keys[at : at + BLOCK_ROWS] = _mix(words ^ salts).sum(1)
    return keys
