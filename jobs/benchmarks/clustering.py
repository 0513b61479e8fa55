"""The clustering stage and its kernel against other libraries and bare matrix products.

Ratios are another library's time over msense's unless stated otherwise. Holds the points as float16 and float32, and once
more in the other libraries' processes.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.libraries import available, faiss_loop, faiss_settings, inertias, sklearn_loop, superkmeans_loop
from benchmarks.shared import Bench, Figures, Tokens
from benchmarks.timing import Processes, Turns, in_turn
from msense.clustering.kmeans import Clusters, KMeansConfig, cluster_tokens
from msense.io import storage
from msense.io.arrays import load_arrays
from msense.runtime import open_executor
from msense.runtime.executor import Row
from msense.stages.cluster import ClusterStage

logger = logging.getLogger("msense.benchmark")
GOOD_ENOUGH = 1.01  # FAISS is tuned to reach this multiple of scikit-learn's total inertia
LARGE = 200  # least points per token in `over_limit`
TURNS = 5
SUPERKMEANS_EVERY = 8  # SuperKMeans takes milliseconds to set up for each token
Ways = dict[str, Callable[[], Any]]


def kmeans(bench: Bench) -> Figures:
    """Time the stage, input and output included, and its kernel against other libraries on the same points."""
    bench.build()
    tokens = bench.tokens()
    tokens = tokens.where(tokens.sizes > bench.senses)
    arrays, k = tokens.arrays(), bench.senses
    figures = {"kmeans.tokens": float(len(arrays)), "kmeans.points": float(tokens.sizes.sum())}
    with Processes(bench.workers) as processes, Processes(bench.workers) as own:
        processes.give(arrays)
        own.give([tokens.where(np.arange(len(arrays)) % bench.workers == n) for n in range(bench.workers)])
        one_thread = partial(sklearn_loop, k=k, threads=1)
        first, second = (inertias(arrays, processes.run(partial(one_thread, state=state))) for state in (0, 1))
        ways: Ways = {"stage": _stage(bench), "kernel.threads": kernel(tokens, k, bench.workers)}
        ways["kernel.one_thread_a_core"] = partial(own.run, partial(_kernel_loop, k=k))
        ways |= _ways("sklearn", sklearn_loop, arrays, k, processes)
        if available("faiss"):
            settings = faiss_settings(arrays, k, GOOD_ENOUGH * float(first.sum()), processes)
            figures |= {f"kmeans.faiss_{name}": float(value) for name, value in settings.items()}
            ways |= _ways("faiss", partial(faiss_loop, **settings), arrays, k, processes)
        ways["stage"]()  # untimed: Ray's workers import torch
        turns = in_turn(ways, TURNS)
        if available("superkmeans"):
            figures |= _superkmeans(bench, tokens, arrays, first, processes)
    ours: Clusters = turns.results["kernel.threads"]
    figures |= _quality(ours.inertia, first, second) | _speedups(turns)
    if available("faiss"):
        figures |= _against("faiss", turns, arrays, first, turns.best("kernel"))
    return figures | {"kmeans.over_limit": over_limit(tokens.where(tokens.sizes >= LARGE), k)}


def _ways(name: str, loop: Callable[..., Any], arrays: list[np.ndarray], k: int, processes: Processes) -> Ways:
    """Return the ways to run a library: its default threads, one thread, and one thread in each process."""
    return {
        f"{name}.default": partial(loop, arrays, k),
        f"{name}.one_thread": partial(loop, arrays, k, 1),
        f"{name}.one_thread_a_core": partial(processes.run, partial(loop, k=k, threads=1)),
    }


def _stage(bench: Bench) -> Callable[[], list[Row]]:
    """Return a call of the clustering stage on Ray, which starts from no centroids."""
    shards = load_arrays(bench.run.thresholds)["shards"]
    stage, executor = ClusterStage(bench.cluster_settings(), shards), open_executor(workers=bench.workers)

    def run() -> list[Row]:
        storage.remove(bench.run.centroids)
        return list(stage.process(executor, range(len(shards) - 1)))

    return run


def kernel(tokens: Tokens, k: int, threads: int) -> Callable[[], Clusters]:
    """Return a call of msense's kernel."""
    return partial(cluster_tokens, tokens.points, tokens.sizes, tokens.ids, KMeansConfig(k=k), threads=threads)


def _kernel_loop(shares: list[Tokens], k: int) -> list[None]:
    """Run the kernel on one core and return nothing, like a worker, which writes its own results."""
    for tokens in shares:
        kernel(tokens, k, 1)()
    return [None] * len(shares)


def _quality(ours: np.ndarray, first: np.ndarray, second: np.ndarray) -> Figures:
    """Compare inertias [T] with those of scikit-learn's first and second random state."""
    known = first > 1e-6 * first.sum() / len(first)  # smaller: every distinct point is a centroid
    tail = np.percentile(ours[known] / first[known], 95)
    return {
        "kmeans.inertia_ratio": float(ours.sum() / first.sum()),
        "kmeans.token_p95": float(tail / np.percentile(second[known] / first[known], 95)),
    }


def _speedups(turns: Turns) -> Figures:
    """Compare stage and kernel with scikit-learn's default and its fastest way."""
    for name, seconds in turns.seconds.items():
        logger.info("  %-30s %s s", name, " ".join(f"{s:.2f}" for s in seconds))
    ours, best = turns.best("kernel"), turns.best("sklearn")
    return {
        "kmeans.kernel_speedup": turns.ratio(best, ours),
        "kmeans.kernel_speedup_default": turns.ratio("sklearn.default", ours),
        "kmeans.kernel_s": turns.median(ours),
        "kmeans.speedup": turns.ratio(best, "stage"),
        "kmeans.speedup_default": turns.ratio("sklearn.default", "stage"),
        "kmeans.stage_s": turns.median("stage"),
    }


def _against(name: str, turns: Turns, arrays: Sequence[np.ndarray], first: np.ndarray, ours: str) -> Figures:
    """Compare with the fastest way of a library, and its total inertia with scikit-learn's, float64 [T]."""
    best = turns.best(name)
    inertia = float(inertias(arrays, turns.results[best]).sum() / first.sum())
    return {f"kmeans.vs_{name}": turns.ratio(best, ours), f"kmeans.{name}_inertia": inertia}


def _superkmeans(
    bench: Bench, tokens: Tokens, arrays: list[np.ndarray], first: np.ndarray, processes: Processes
) -> Figures:
    """Compare with SuperKMeans on some of the tokens."""
    some = slice(None, None, SUPERKMEANS_EVERY)
    processes.give(arrays[some])
    ways = _ways("superkmeans", superkmeans_loop, arrays[some], bench.senses, processes)
    own = tokens.where(np.arange(len(arrays)) % SUPERKMEANS_EVERY == 0)
    turns = in_turn(ways | {"kernel": kernel(own, bench.senses, bench.workers)}, TURNS)
    return _against("superkmeans", turns, arrays[some], first[some], "kernel")


def over_limit(tokens: Tokens, k: int) -> float:
    """Return the kernel's time over that of its rounds' bare products, [K, D] @ [D, n] in float32, on one thread."""
    arrays = [torch.from_numpy(p) for p in tokens.arrays()]
    ours = kernel(tokens, k, 1)
    rounds, centroids = ours().rounds.tolist(), torch.randn(k, tokens.points.shape[1])

    def products() -> None:
        for points, count in zip(arrays, rounds, strict=True):
            for _ in range(count):
                torch.mm(centroids, points.T)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    products()
    turns = in_turn({"kernel": ours, "products": products}, TURNS + 2)
    torch.set_num_threads(before)
    return turns.ratio("kernel", "products")
