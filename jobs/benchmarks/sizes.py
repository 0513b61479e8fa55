"""The clustering kernel against other libraries by points per token, number of senses K and width D.

Points are synthetic: overlapping mixtures of 2K normal distributions whose variance decays over components like that of
embeddings. FAISS gets the restarts and iterations that bring its inertia near msense's; every library uses all cores in
its fastest way. A slow library clusters a few of a cell's tokens, and its time is extrapolated.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from benchmarks.clustering import GOOD_ENOUGH, Ways, kernel, kernel_loop, over_limit, shared
from benchmarks.peers import available, faiss_loop, faiss_settings, inertias, sklearn_loop, superkmeans_loop
from benchmarks.shared import Bench, Figures, Tokens
from benchmarks.turns import Processes, Turns, in_turn

logger = logging.getLogger("msense.bench")
SIZES, SENSES, WIDTHS = (21, 200, 1_000, 10_000, 100_000), (5, 20, 200), (384, 4096)
CELL_BYTES = 2e9  # of float16 and float32 points
CELL_SECONDS = 0.5  # of msense's work per cell
PROBE_VALUES = 4e6  # size of the probe that estimates the time of a cell
MOST_VALUES, MOST_TOKENS = 3e7, 1000
PEER_SECONDS = 0.3  # of another library's work per cell; at least one token
TURNS, TURN_SECONDS = 3, 2.5
SEPARATION = 2.0  # of the distributions' means, in standard deviations
Loop = Callable[..., list[np.ndarray]]
Shape = tuple[int, int, int]  # points per token, K, D


def sizes(bench: Bench) -> Figures:
    """Measure every cell that fits into memory."""
    loops: dict[str, Loop] = {"sklearn": sklearn_loop}
    others: dict[str, Loop] = {"faiss": faiss_loop, "superkmeans": superkmeans_loop}
    loops |= {name: loop for name, loop in others.items() if available(name)}
    figures: Figures = {}
    warm = [np.random.default_rng(0).standard_normal((64, 8), dtype=np.float32)] * bench.workers
    with Processes(bench.workers) as processes, Processes(bench.workers) as own:
        processes.give(warm)
        for loop in loops.values():
            loop(warm, 4)
            processes.run(partial(loop, k=4, threads=1))
        for n, k, dim in product(SIZES, SENSES, WIDTHS):
            if k < n and 6 * n * dim <= CELL_BYTES:
                measured = cell((n, k, dim), loops, processes, own, bench.workers)
                figures |= {f"kmeans.n{n}_k{k}_d{dim}.{name}": value for name, value in measured.items()}
    return figures


def mixture(tokens: int, n: int, k: int, dim: int) -> Tokens:
    """Return tokens of n synthetic points each."""
    rng = np.random.default_rng([n, k, dim])
    scale = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    points = np.empty((tokens, n, dim), np.float16)
    for own in points:
        means = rng.standard_normal((2 * k, dim), dtype=np.float32) * SEPARATION
        own[:] = (means[rng.integers(0, 2 * k, n)] + rng.standard_normal((n, dim), dtype=np.float32)) * scale
    return Tokens(np.arange(tokens), np.full(tokens, n), points.reshape(-1, dim))


def cell(shape: Shape, loops: dict[str, Loop], processes: Processes, own: Processes, workers: int) -> Figures:
    """Time tokens of one shape: other libraries in `processes`, msense in `own`."""
    tokens, k = _fitting(shape, workers), shape[1]
    arrays, threads = tokens.arrays(), kernel(tokens, k, workers)
    inertia = threads().inertia
    processes.give(arrays)
    own.give(shared(tokens, workers))
    ways: Ways = {"kernel.threads": threads}
    if len(arrays) >= workers:
        ways["kernel.processes"] = partial(own.run, partial(kernel_loop, k=k))
    clustered: dict[str, int] = {}  # number of tokens per way
    for name, loop in loops.items():
        settings = _settings(name, arrays, k, inertia)
        began = time.perf_counter()
        loop(arrays[:1], k, **settings)
        each = int(np.clip(PEER_SECONDS / (time.perf_counter() - began), 1, max(1, len(arrays) // workers)))
        ways[f"{name}.default"] = partial(loop, arrays[:each], k, **settings)
        clustered[f"{name}.default"] = each
        if each * workers <= len(arrays):
            ways[f"{name}.processes"] = partial(processes.run, partial(_first, loop, each, k=k, threads=1, **settings))
            clustered[f"{name}.processes"] = each * workers
    turns = in_turn(ways, TURNS, TURN_SECONDS)
    for way, count in clustered.items():
        turns.seconds[way] *= len(arrays) / count
    figures = _compare(turns, loops, arrays, inertia)
    figures["over_limit"] = over_limit(tokens, k, TURNS, TURN_SECONDS / 2)
    shown = ", ".join(f"{key} {value:.3g}" for key, value in figures.items())
    logger.info("n %d, K %d, D %d (%d tokens): %s", *shape, len(arrays), shown)
    return figures


def _first(loop: Loop, count: int, points: list[np.ndarray], **options: Any) -> list[np.ndarray]:
    return loop(points[:count], **options)


def _fitting(shape: Shape, workers: int) -> Tokens:
    """Return as many tokens as take msense about `CELL_SECONDS`."""
    n, k, dim = shape
    probe = mixture(int(np.clip(PROBE_VALUES / (n * dim), 1, MOST_TOKENS)), *shape)
    seconds = in_turn({"kernel": kernel(probe, k, workers)}, 2).seconds["kernel"].min()
    wanted = len(probe.ids) * CELL_SECONDS / float(seconds)
    return mixture(int(np.clip(wanted, 1, max(1, min(MOST_TOKENS, MOST_VALUES / (n * dim))))), *shape)


def _settings(name: str, arrays: list[np.ndarray], k: int, ours: np.ndarray) -> dict[str, Any]:
    """Return the options of a library's loop; FAISS's are tuned on a few of the tokens."""
    if name != "faiss":
        return {}
    some = slice(None, None, max(1, len(arrays) // 16))
    return faiss_settings(arrays[some], k, GOOD_ENOUGH * float(ours[some].sum()), None, seconds=TURN_SECONDS)


def _compare(turns: Turns, loops: dict[str, Loop], arrays: list[np.ndarray], ours: np.ndarray) -> Figures:
    figures: Figures = {}
    kernel_seconds = turns.median(turns.best("kernel") or "")
    for name in loops:
        best = turns.best(name) or ""
        labels = turns.results[best]  # of the first tokens, also from processes, which get them round-robin
        theirs = inertias(arrays[: len(labels)], labels).sum()
        figures[f"vs_{name}"] = turns.median(best) / kernel_seconds
        figures[f"inertia_vs_{name}"] = float(ours[: len(labels)].sum() / theirs)
    return figures
