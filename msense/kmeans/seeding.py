"""How k-means reads points, and where it starts: settings, exact values, duplicates, random draws, k-means++.

In: points [N, D] as stored, token ids, settings. Out: blocks of float32 values, tokens of few distinct points, rows to
start from. Every draw is a hash of (seed, token id, step, candidate): a token's seeds depend on no other token, nor on
the order of work. Holds about 40 bytes a row, HELD_FLOATS of a large token's values, candidates x points distances.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from msense.config import LARGEST_VALUE, MAX_SENSES, Metric
from msense.errors import BadInput, MsenseError
from msense.kmeans.threads import Threads
from msense.products import product

Points: TypeAlias = NDArray[np.generic] | torch.Tensor

BLOCK_ROWS = 1024  # rows looked at in one go; a token of more points is clustered in blocks of so many
SEED_POINTS = 8192  # such a token is seeded from its first points by key
HELD_FLOATS = 1 << 25  # values of seeding points that are kept as float32; the others are read anew at every step
GRID = 2.0**24  # values are whole multiples of 1 / GRID, as every float16 is
WEIGHT = 2.0**60  # sum of the weights that the first candidates are drawn by; it falls from step to step
LEADING = 8  # components that tell almost all distinct points apart


@dataclass(frozen=True)
class KMeansConfig:
    """Settings of k-means.

    Attributes:
        k: senses of a token, at most; fewer where it has fewer distinct points.
        metric: "l2" and "dot" cluster by squared Euclidean distance (with "dot", only assignment to a finished
            dictionary differs); "cosine" clusters points scaled to length 1 around centroids of length 1.
        seed: of the random draws; any integer.
        n_init: runs from different seeds, of which a token keeps the one whose last round has the lowest inertia. A
            token clustered in blocks runs once, from the seeds of lowest inertia on the points it is seeded from.
        tol: a token stops when a round lowers its inertia by no more than this fraction.
        max_rounds: most rounds of assignment.

    Raises:
        BadInput: lists every setting that is out of range.
    """

    k: int = 20
    metric: Metric = "l2"
    seed: int = 0
    n_init: int = 1
    tol: float = 3e-4
    max_rounds: int = 100

    def __post_init__(self) -> None:
        wrong = []
        if not 1 <= self.k <= MAX_SENSES:
            wrong.append(f"k is {self.k}, but must be from 1 to {MAX_SENSES}")
        if self.metric not in get_args(Metric):
            wrong.append(f"metric is {self.metric!r}, but must be one of {', '.join(get_args(Metric))}")
        if self.n_init < 1:
            wrong.append(f"n_init is {self.n_init}, but must be 1 or more")
        if not 0 <= self.tol < 1:
            wrong.append(f"tol is {self.tol}, but must be from 0 to below 1")
        if self.max_rounds < 1:
            wrong.append(f"max_rounds is {self.max_rounds}, but must be 1 or more")
        if wrong:
            raise BadInput("k-means settings: " + "; ".join(wrong))


def as_points(points: Points) -> torch.Tensor:
    """View a matrix of points as a tensor [N, D]; nothing is copied, and nothing here ever writes to it.

    Raises:
        BadInput: it is not a matrix of float16, bfloat16 or float32.
    """
    dtype = str(points.dtype).removeprefix("torch.")
    if dtype not in ("float16", "bfloat16", "float32") or points.ndim != 2 or not points.shape[1]:
        raise BadInput(
            f"points are {dtype} of shape {tuple(points.shape)}: k-means reads a float16, bfloat16 or float32 "
            "matrix [points, width]; convert them first"
        )
    # dlpack takes read-only memory (mapped files, Arrow buffers) without torch's warning, but no negative strides
    return points.detach() if isinstance(points, torch.Tensor) else torch.from_dlpack(np.ascontiguousarray(points))


def read_points(
    points: torch.Tensor, metric: Metric, device: str | torch.device, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Values that k-means works on, as a fresh float32 tensor of the same shape [..., D], or written to `out`.

    Stored float16 values are taken as they are. Other dtypes are rounded to the grid of float16, multiples of 2^-24;
    under "cosine" points are scaled to length 1 (zero vectors stay zero) and then rounded to it. So float64 sums of
    values are exact, and hence the same in any order, while rows x largest |value| stays under 2^29.
    """
    values = torch.empty(points.shape, device=device) if out is None else out
    values.copy_(points)
    if metric == "cosine":
        wide = values.double()
        wide /= torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min_(1e-300)
        return values.copy_(wide.mul_(GRID).round_().div_(GRID))
    if points.dtype != torch.float16:
        values.mul_(GRID).round_().div_(GRID)
    return values


def centroids_of(sums: torch.Tensor, counts: torch.Tensor, metric: Metric) -> torch.Tensor:
    """Means of float64 sums [..., K, D] and counts [..., K]; under "cosine" directions, and 0 where a sum is 0."""
    divisor = torch.linalg.vector_norm(sums, dim=-1).clamp_min(1e-300) if metric == "cosine" else counts.clamp_min(1)
    return (sums / divisor[..., None]).float()


def check_points(points: torch.Tensor, sizes: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
    """Refuse values that are NaN, infinite or above LARGEST_VALUE.

    Raises:
        MsenseError: names the first token that has one.
    """
    for at in range(0, len(points), BLOCK_ROWS):
        block = points[at : at + BLOCK_ROWS]
        low, high = torch.aminmax(block)
        if not (float(low) >= -LARGEST_VALUE and float(high) <= LARGEST_VALUE):  # NaN is neither
            row = at + int((block.float().abs() <= LARGEST_VALUE).all(1).logical_not().nonzero()[0])
            token = token_ids[np.searchsorted(np.cumsum(sizes), row, side="right")]
            raise MsenseError(
                f"token {token} has an embedding that is NaN or infinite, or has values above {LARGEST_VALUE:g}: "
                "leave it out, or compute it anew"
            )


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection whose every output bit looks random."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def draws(
    token_ids: NDArray[np.int64], config: KMeansConfig, senses: NDArray[np.int64] | None = None, run: int = 0
) -> NDArray[np.float64]:
    """Uniform numbers in (0, 1) for greedy k-means++: float64 [T, K, L], L candidates at each of K steps.

    Each number is a hash of (seed, run, token id, step, candidate) and of nothing else. L is 2 + floor(ln K), as
    Arthur and Vassilvitskii (2007) and scikit-learn have it.

    Args:
        token_ids: int64 [T].
        config: seed, and K of the array.
        senses: int64 [T], each token's own K, at most that; a token of fewer candidates than L draws its first one
            again, which cannot win then. None: `config.k`.
        run: which of `config.n_init`.
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


def lowest(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least score of each column and its row, the first of equals: [..., K, n] to [..., n] and int64 [..., n].

    What `min` does, without its branches, which no processor foresees: four times as fast. Writes over `scores`.
    """
    low, row = scores.amin(-2), torch.arange(scores.shape[-2], dtype=torch.float32, device=scores.device)[:, None]
    above = scores.sub_(low[..., None, :]).sign_()
    return low, above.mul_(len(row)).add_(row).amin(-2).long()


def greedy_seeds(
    scores: Callable[[torch.Tensor], torch.Tensor], norms: torch.Tensor, mask: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy k-means++ for a batch of B tokens of at most n points.

    Each step draws candidates in proportion to the squared distance to the nearest seed so far, and keeps the one
    that leaves the smallest sum of such distances (Arthur and Vassilvitskii 2007).

    Args:
        scores: maps points int64 [B, L] to their squared distances from all points less those points' squared lengths,
            float32 [B, L, n]; a fresh tensor.
        norms: float32 [B, n], squared lengths of points, 0 on padding.
        mask: bool [B, n], true on points and false on padding, which is never chosen.
        uniforms: float64 [B, K, L] in (0, 1); row 0 needs one number.

    Returns:
        The chosen points int64 [B, K], and the points' sum of squared distances to the nearest of them, less norms [B].
    """
    steps, sizes = uniforms.unbind(1), mask.sum(1, keepdim=True)
    row, last = torch.arange(len(mask), device=mask.device) * uniforms.shape[2], sizes - 1
    chosen = (steps[0][:, :1] * sizes).long()
    seeds = chosen.repeat(1, len(steps))
    near = scores(chosen)[:, 0].mul_(mask)  # to the nearest seed, less norms; stays 0 on padding
    scale = None
    for step in range(1, len(steps)):
        weights = (near + norms).clamp_(min=0).scatter_(1, seeds, 0)  # rounding may leave a trace of weight on a seed
        if scale is None:
            scale = WEIGHT / weights.sum(1, keepdim=True, dtype=torch.float64).clamp_(min=1e-200)
        # whole numbers, because a GPU adds fractions up in an order of its own
        whole = (weights * scale).long().cumsum(1)
        targets = (steps[step] * whole[:, -1:]).long()
        candidates = torch.minimum(torch.searchsorted(whole, targets, right=True), last)
        trial = scores(candidates)
        torch.minimum(trial, near[:, None], out=trial)
        best = trial.sum(2).argmin(1)
        seeds[:, step] = candidates.flatten().index_select(0, best.add_(row))
        near = trial.flatten(0, 1).index_select(0, best)
    return seeds, near.sum(1)


def seed_in_blocks(
    points: torch.Tensor, token_id: int, config: KMeansConfig, device: str | torch.device, threads: Threads
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose starting points of one large token, in float32 blocks of BLOCK_ROWS.

    Args:
        points: [n, D] in the order of keys.
        token_id: fixes the draws.
        config: settings.
        device: where distances are computed.
        threads: that compute them, each some blocks.

    Returns:
        Rows int64 [K], every distinct point if there are at most `config.k`; and the mean of the points float32 [D],
        which distances are to be centred by (0 under "cosine").
    """
    blocks = points.split(BLOCK_ROWS)
    shift = torch.zeros(points.shape[1], device=device)
    if config.metric != "cosine":
        for block in blocks:
            shift = shift + read_points(block, config.metric, device).double().sum(0)
        shift = (shift / len(points)).float()
    found = few_distinct(points, np.array([len(points)]), np.array([config.k]), config.metric, len(points))
    if found.few[0]:
        return torch.from_numpy(found.first).to(points.device), shift

    def centred(stored: torch.Tensor) -> torch.Tensor:
        return read_points(stored, config.metric, device).sub_(shift)

    held = threads.map(centred, blocks[: HELD_FLOATS // (BLOCK_ROWS * points.shape[1])])
    share = -(-len(blocks) // threads.count)
    shares = [range(at, min(at + share, len(blocks))) for at in range(0, len(blocks), share)]

    def joined(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Put side by side what a function makes of each block [..., b]."""

        def of(numbers: range) -> torch.Tensor:
            found = (held[i] if i < len(held) else centred(blocks[i]) for i in numbers)
            return torch.cat([function(block) for block in found], -1)

        return torch.cat(threads.map(of, shares), -1)

    norms = joined(lambda block: torch.linalg.vector_norm(block, dim=1).square_())

    def scores(index: torch.Tensor) -> torch.Tensor:
        rows, lengths = centred(points.index_select(0, index[0].to(points.device))), norms[index[0], None]
        return joined(lambda block: product(rows, block.T).mul_(-2).add_(lengths))[None]

    everywhere, best, least = torch.ones(1, len(points), dtype=torch.bool, device=device), None, math.inf
    for run in range(config.n_init):
        uniforms = torch.from_numpy(draws(np.array([token_id]), config, run=run)).to(device)
        seeds, inertia = greedy_seeds(scores, norms[None], everywhere, uniforms)
        if best is None or float(inertia) < least:
            best, least = seeds[0], float(inertia)
    assert best is not None
    return best.to(points.device), shift


@dataclass(frozen=True)
class FewDistinct:
    """Tokens with at most K distinct points: there every distinct point is a sense, and no clustering is needed."""

    few: NDArray[np.bool_]  # [T]
    distinct: NDArray[np.int64]  # [T], 0 for other tokens
    rows: NDArray[np.int64]  # [R], ascending: the rows of those tokens
    group: NDArray[np.int64]  # [R]: which distinct point the row is, in order of token and first appearance
    first: NDArray[np.int64]  # [G]: the first row of each distinct point


def few_distinct(
    points: torch.Tensor, sizes: NDArray[np.int64], senses: NDArray[np.int64], metric: Metric, max_rows: int
) -> FewDistinct:
    """Find the tokens with at most K distinct points; a token of no points is one.

    Rows are compared by a 64-bit hash of their values. A first look at a few components clears almost every token.

    Args:
        points: [N, D], rows grouped by token.
        sizes: int64 [T], rows of each token.
        senses: int64 [T], K: most distinct points that count as few.
        metric: under "cosine" points of one direction are the same.
        max_rows: tokens of more rows than that are left out.
    """
    token = np.repeat(np.arange(len(sizes)), sizes)
    suspect = (sizes <= senses) & (sizes <= max_rows)
    unclear = (sizes > senses) & (sizes <= max_rows)
    rows = np.flatnonzero(unclear[token])
    # only a lower bound is needed here, so token and 40 bits of hash share one word, and a plain sort is enough
    words = np.sort(
        token[rows].astype(np.uint64) << np.uint64(40) | _keys(points, rows, metric, LEADING) >> np.uint64(24)
    )
    new = np.diff(words, prepend=np.uint64(2**64 - 1)) != 0
    suspect |= unclear & (np.bincount((words[new] >> np.uint64(40)).astype(np.int64), minlength=len(sizes)) <= senses)

    rows = np.flatnonzero(suspect[token])
    group, first = _group(token[rows], _keys(points, rows, metric, points.shape[1]))
    distinct = np.bincount(token[rows[first]], minlength=len(sizes))
    few = suspect & (distinct <= senses)
    kept, kept_group = few[token[rows]], few[token[rows[first]]]
    number = np.cumsum(kept_group) - 1
    return FewDistinct(few, distinct * few, rows[kept], number[group[kept]], rows[first[kept_group]])


def _keys(points: torch.Tensor, rows: NDArray[np.int64], metric: Metric, width: int) -> NDArray[np.uint64]:
    """Hash the first `width` values of the given rows: uint64 [R]; equal values, equal keys (-0 is 0)."""
    keys, width = np.empty(len(rows), np.uint64), min(width, points.shape[1])
    salts = _mix(np.arange(1, (width + 1) // 2 + 1, dtype=np.uint64))
    source = points if metric == "cosine" else points[:, :width]
    for at in range(0, len(rows), BLOCK_ROWS):
        index = torch.from_numpy(rows[at : at + BLOCK_ROWS]).to(points.device)
        values = read_points(source.index_select(0, index), metric, "cpu")[:, :width] + 0.0
        words = torch.nn.functional.pad(values, (0, width % 2)).contiguous().numpy().view(np.uint64)
        keys[at : at + BLOCK_ROWS] = _mix(words ^ salts).sum(1)
    return keys


def _group(token: NDArray[np.int64], keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number rows of equal (token, key), `token` ascending, by first appearance: group [R] and first row [G]."""
    order = np.lexsort((keys, token))
    opens = np.ones(len(order), bool)
    opens[1:] = (np.diff(token[order]) != 0) | (np.diff(keys[order]) != 0)
    first = order[opens]  # lexsort is stable: the first of equal rows comes first
    appearance = np.argsort(first)
    number = np.empty_like(appearance)
    number[appearance] = np.arange(len(appearance))
    group = np.empty_like(order)
    group[order] = number[np.cumsum(opens) - 1]
    return group, first[appearance]
