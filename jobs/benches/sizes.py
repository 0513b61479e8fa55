"""The clustering kernel against other libraries over tokens of many sizes, numbers of senses K and widths D.

In: made-up points, mixtures of twice K normal distributions that overlap, whose variance falls from one component to
the next as that of embeddings does. Out: a table, and each cell's ratios: peers' times over ours, and our inertia over
theirs. FAISS has as many runs and iterations as bring its inertia near ours; all cores for everybody, and what is
fastest for a library counts. A slow library has only some of a cell's tokens, and its time for all is taken to be in
proportion. Holds the points of a cell as float16 and float32 here, and as float32 in other processes.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from benches.clustering import GOOD_ENOUGH, kernel, kernel_loop, over_limit, shared
from benches.peers import available, faiss_loop, faiss_settings, inertias, sklearn_loop, superkmeans_loop
from benches.shared import Bench, Figures, Tokens
from benches.turns import Processes, Turns, in_turn

logger = logging.getLogger("msense.bench")

SIZES, SENSES, WIDTHS = (21, 200, 1_000, 10_000, 100_000), (5, 20, 200), (384, 4096)
CELL_BYTES = 2e9  # of float16 and float32 points
CELL_SECONDS = 0.5  # of our work
PROBE_VALUES = 4e6  # what is clustered to see how long a cell takes
MOST_VALUES, MOST_TOKENS = 3e7, 1000
PEER_SECONDS = 0.3  # of a library's loop; a slower library has fewer of the tokens, at least one
SLOW = 1.5  # seconds of one token that are taken once
TURNS, TURN_SECONDS = 3, 2.5
SEPARATION = 2.0  # of the distributions' means, in their own deviations
Loop = Callable[..., list[np.ndarray]]
Shape = tuple[int, int, int]  # points of a token, K, D


def sizes(bench: Bench) -> Figures:
    """Every cell that fits."""
    loops: dict[str, Loop] = {"sklearn": sklearn_loop}
    loops |= {
        name: loop for name, loop in (("faiss", faiss_loop), ("superkmeans", superkmeans_loop)) if available(name)
    }
    figures: Figures = {}
    warm = [np.random.default_rng(0).standard_normal((64, 8), dtype=np.float32)] * bench.workers
    logger.info(
        "cell (tokens): peers' seconds over ours; our inertia over theirs; over the bare products of the rounds"
    )
    with Processes(bench.workers) as processes, Processes(bench.workers) as own:
        processes.give(warm)
        for loop in loops.values():
            loop(warm, 4)
            processes.run(partial(loop, k=4, threads=1))
        for n, k, dim in product(SIZES, SENSES, WIDTHS):
            if k < n and 6 * n * dim <= CELL_BYTES:
                found = cell((n, k, dim), loops, processes, own, bench.workers)
                figures |= {f"kmeans.n{n}_k{k}_d{dim}.{name}": value for name, value in found.items()}
    return figures


def mixture(tokens: int, n: int, k: int, dim: int) -> Tokens:
    """Make tokens of n points each."""
    rng = np.random.default_rng([n, k, dim])
    scale = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    points = np.empty((tokens, n, dim), np.float16)
    for own in points:
        means = rng.standard_normal((2 * k, dim), dtype=np.float32) * SEPARATION
        own[:] = (means[rng.integers(0, 2 * k, n)] + rng.standard_normal((n, dim), dtype=np.float32)) * scale
    return Tokens(np.arange(tokens), np.full(tokens, n), points.reshape(-1, dim))


def cell(shape: Shape, loops: dict[str, Loop], processes: Processes, own: Processes, workers: int) -> Figures:
    """Time tokens of one size; other libraries in `processes`, we in our `own`."""
    tokens, k = _fitting(shape, workers), shape[1]
    arrays, threads = tokens.arrays(), kernel(tokens, k, workers)
    inertia = threads().inertia
    processes.give(arrays)
    own.give(shared(tokens, workers))
    ways: dict[str, Callable[[], Any]] = {"kernel.threads": threads}
    if len(arrays) >= workers:
        ways["kernel.processes"] = partial(own.run, partial(kernel_loop, k=k))
    had: dict[str, int] = {}  # tokens of each way
    once: dict[str, tuple[float, list[np.ndarray]]] = {}
    for name, loop in loops.items():
        settings = _settings(name, arrays, k, inertia)
        began = time.perf_counter()
        found = loop(arrays[:1], k, **settings)
        seconds = time.perf_counter() - began
        if seconds > SLOW:
            once[name] = seconds, found
            continue
        each = int(np.clip(PEER_SECONDS / seconds, 1, max(1, len(arrays) // workers)))
        ways[f"{name}.default"] = partial(loop, arrays[:each], k, **settings)
        had[f"{name}.default"] = each
        if each * workers <= len(arrays):
            ways[f"{name}.processes"] = partial(processes.run, partial(_first, loop, each, k=k, threads=1, **settings))
            had[f"{name}.processes"] = each * workers
    turns = in_turn(ways, TURNS, TURN_SECONDS)
    for way, count in had.items():
        turns.seconds[way] *= len(arrays) / count
    for name, (seconds, found) in once.items():
        turns.seconds[name], turns.results[name] = np.array([seconds * len(arrays)]), found
    figures = _told(turns, loops, arrays, inertia)
    figures["over_limit"] = over_limit(tokens, k, TURNS, TURN_SECONDS / 2)
    told = ", ".join(f"{key} {value:.3g}" for key, value in figures.items())
    logger.info("n %d, K %d, D %d (%d): %s", *shape, len(arrays), told)
    return figures


def _first(loop: Loop, count: int, points: list[np.ndarray], **options: Any) -> list[np.ndarray]:  # noqa: ANN401 - the loop's
    """Have a process look at the first of its tokens only."""
    return loop(points[:count], **options)


def _fitting(shape: Shape, workers: int) -> Tokens:
    """Make as many tokens as keep us busy for a while."""
    n, k, dim = shape
    probe = mixture(int(np.clip(PROBE_VALUES / (n * dim), 1, MOST_TOKENS)), *shape)
    timed = in_turn({"kernel": kernel(probe, k, workers)}, 2)
    wanted = len(probe.ids) * CELL_SECONDS / float(timed.seconds["kernel"].min())
    return mixture(int(np.clip(wanted, 1, max(1, min(MOST_TOKENS, MOST_VALUES / (n * dim))))), *shape)


def _settings(name: str, arrays: list[np.ndarray], k: int, ours: np.ndarray) -> dict[str, Any]:
    """Options of a library's loop; FAISS's are tuned on a few of the tokens."""
    if name != "faiss":
        return {}
    some = slice(None, None, max(1, len(arrays) // 16))
    return faiss_settings(arrays[some], k, GOOD_ENOUGH * float(ours[some].sum()), None, seconds=TURN_SECONDS)


def _told(turns: Turns, loops: dict[str, Loop], arrays: list[np.ndarray], ours: np.ndarray) -> Figures:
    figures: Figures = {}
    kernel = turns.seconds[turns.best("kernel") or ""]
    for name in loops:
        best = turns.best(name) or ""
        found = turns.results[best]  # of the first tokens: processes have them dealt out by turns
        theirs = inertias(arrays[: len(found)], found).sum()
        figures[f"vs_{name}"] = float(np.median(turns.seconds[best]) / np.median(kernel))
        figures[f"inertia_vs_{name}"] = float(ours[: len(found)].sum() / theirs)
    return figures
