"""The clustering kernel against other libraries over tokens of many sizes, numbers of senses K and widths D.

In: made-up points, mixtures of twice K normal distributions that overlap, whose variance falls from one component to
the next as that of embeddings does. Out: a table, and each cell's ratios: peers' times over ours, and our inertia over
theirs. FAISS has as many runs and iterations as bring its inertia near ours; all cores for everybody, and what is
fastest for a library counts. Holds the points of a cell as float16 and float32 here, and as float32 in other processes.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from benches.clustering import GOOD_ENOUGH, over_limit
from benches.peers import available, faiss_loop, faiss_settings, inertias, sklearn_loop, superkmeans_loop
from benches.shared import Bench, Figures, Tokens
from benches.turns import Processes, Turns, in_turn
from msense.kmeans import KMeansConfig, cluster_tokens

logger = logging.getLogger("msense.bench")

SIZES, SENSES, WIDTHS = (21, 200, 1_000, 10_000, 100_000), (5, 20, 200), (384, 4096)
CELL_BYTES = 2e9  # of float16 and float32 points
CELL_SECONDS = 0.5  # of our work
PROBE_VALUES = 4e6  # what is clustered to see how long a cell takes
MOST_VALUES, MOST_TOKENS = 6e7, 1000
TURNS, TURN_SECONDS = 3, 3.0
SEPARATION = 2.0  # of the distributions' means, in their own deviations
Loop = Callable[..., list[np.ndarray]]


def sizes(bench: Bench) -> Figures:
    """Every cell that fits."""
    loops: dict[str, Loop] = {"sklearn": sklearn_loop}
    loops |= {
        name: loop for name, loop in (("faiss", faiss_loop), ("superkmeans", superkmeans_loop)) if available(name)
    }
    figures: Figures = {}
    logger.info(
        "cell (tokens): peers' seconds over ours; our inertia over theirs; over the bare products of the rounds"
    )
    with Processes(bench.workers) as processes:
        for n, k, dim in product(SIZES, SENSES, WIDTHS):
            if k < n and 6 * n * dim <= CELL_BYTES:
                found = cell((n, k, dim), loops, processes, bench.workers)
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


def cell(shape: tuple[int, int, int], loops: dict[str, Loop], processes: Processes, workers: int) -> Figures:
    """Time one size of tokens: points, senses, width."""
    n, k, dim = shape

    def ours(tokens: Tokens, threads: int = workers) -> Any:  # noqa: ANN401 - Clusters
        return cluster_tokens(tokens.points, tokens.sizes, tokens.ids, KMeansConfig(k=k), threads=threads)

    probe = mixture(int(np.clip(PROBE_VALUES / (n * dim), 1, MOST_TOKENS)), n, k, dim)
    ours(probe)
    began = time.perf_counter()
    ours(probe)
    wanted = len(probe.ids) * CELL_SECONDS / (time.perf_counter() - began)
    count = int(np.clip(wanted, 1, max(1, min(MOST_TOKENS, MOST_VALUES / (n * dim)))))
    tokens = mixture(count, n, k, dim)
    arrays, clusters = tokens.arrays(), ours(tokens)
    processes.give(arrays if count > 1 else [])
    ways: dict[str, Callable[[], Any]] = {"kernel": partial(ours, tokens)}
    for name, loop in loops.items():
        settings = _settings(name, arrays, k, clusters.inertia)
        ways[f"{name}.default"] = partial(loop, arrays, k, **settings)
        if count > 1:
            ways[f"{name}.processes"] = partial(processes.run, partial(loop, k=k, threads=1, **settings))
    turns = in_turn(ways, TURNS, TURN_SECONDS)
    figures = _told(turns, loops, arrays, clusters.inertia.sum())
    figures["over_limit"] = over_limit(tokens, k, TURNS, TURN_SECONDS)
    logger.info("n %d, K %d, D %d (%d): %s", n, k, dim, count, ", ".join(f"{a} {b:.3g}" for a, b in figures.items()))
    return figures


def _settings(name: str, arrays: list[np.ndarray], k: int, ours: np.ndarray) -> dict[str, Any]:
    """Options of a library's loop; FAISS's are tuned on a few of the tokens."""
    if name != "faiss":
        return {}
    some = slice(None, None, max(1, len(arrays) // 16))
    return faiss_settings(arrays[some], k, GOOD_ENOUGH * float(ours[some].sum()), None, seconds=TURN_SECONDS)


def _told(turns: Turns, loops: dict[str, Loop], arrays: list[np.ndarray], ours: float) -> Figures:
    figures: Figures = {}
    for name in loops:
        best = turns.best(name) or ""
        figures[f"vs_{name}"] = turns.ratio(best, "kernel")
        figures[f"inertia_vs_{name}"] = ours / float(inertias(arrays, turns.results[best]).sum())
    return figures
