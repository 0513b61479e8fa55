"""The clustering stage and its kernel against other libraries and bare matrix products.

Ratios are another library's time over msense's unless stated otherwise. Holds the points as float16 and float32, and once
more in the other libraries' processes.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.peers import available, faiss_loop, faiss_settings, inertias, sklearn_loop, superkmeans_loop
from benchmarks.shared import Bench, Figures, Tokens
from benchmarks.turns import Processes, Turns, in_turn
from msense.clustering.kmeans import Clusters, KMeansConfig, cluster_tokens
from msense.io import storage
from msense.io.arrays import load_arrays
from msense.runtime.ray_executor import connect
from msense.stages import cluster

logger = logging.getLogger("msense.bench")
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
        own.give(shared(tokens, bench.workers))
        first, second = (
            inertias(arrays, processes.run(partial(sklearn_loop, k=k, threads=1, state=state))) for state in (0, 1)
        )
        ways: Ways = {
            "stage": _stage(bench),
            "kernel.threads": kernel(tokens, k, bench.workers),
            "kernel.one_thread_a_core": partial(own.run, partial(kernel_loop, k=k)),
            "sklearn.default": partial(sklearn_loop, arrays, k),
            "sklearn.one_thread": partial(sklearn_loop, arrays, k, 1),
            "sklearn.one_thread_a_core": partial(processes.run, partial(sklearn_loop, k=k, threads=1)),
        }
        if available("faiss"):
            settings = faiss_settings(arrays, k, GOOD_ENOUGH * float(first.sum()), processes, seconds=60)
            figures |= {f"kmeans.faiss_{name}": float(value) for name, value in settings.items()}
            ways |= {
                "faiss.default": partial(faiss_loop, arrays, k, **settings),
                "faiss.one_thread": partial(faiss_loop, arrays, k, 1, **settings),
                "faiss.one_thread_a_core": partial(processes.run, partial(faiss_loop, k=k, threads=1, **settings)),
            }
        ways["stage"]()  # untimed: Ray's workers import torch
        turns = in_turn(ways, TURNS)
        figures |= _superkmeans(bench, tokens, arrays, first, processes) if available("superkmeans") else {}
    ours: Clusters = turns.results["kernel.threads"]
    figures |= _quality(ours.inertia, first, second) | _speedups(turns, arrays, first)
    del arrays, turns
    return figures | {"kmeans.over_limit": over_limit(tokens.where(tokens.sizes >= LARGE), k, TURNS + 2)}


def _stage(bench: Bench) -> Callable[[], list[str]]:
    settings, shards = bench.cluster_settings(), load_arrays(bench.run.thresholds)["shards"]
    resources = connect(bench.workers)

    def stage() -> list[str]:
        storage.remove(bench.run.centroids)
        return cluster.cluster(settings, shards, resources)

    return stage


def shared(tokens: Tokens, count: int) -> list[Tokens]:
    """Distribute tokens round-robin."""
    return [tokens.where(np.arange(len(tokens.ids)) % count == number) for number in range(count)]


def kernel(tokens: Tokens, k: int, threads: int) -> Callable[[], Clusters]:
    """Return a call of msense's kernel."""
    return partial(cluster_tokens, tokens.points, tokens.sizes, tokens.ids, KMeansConfig(k=k), threads=threads)


def kernel_loop(shares: list[Tokens], k: int) -> list[None]:
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


def _speedups(turns: Turns, arrays: list[np.ndarray], first: np.ndarray) -> Figures:
    """Compare with the fastest way of each library, and FAISS's total inertia with scikit-learn's."""
    ours, best = turns.best("kernel") or "", turns.best("sklearn") or ""
    figures = {
        "kmeans.kernel_speedup": turns.ratio(best, ours),
        "kmeans.kernel_speedup_default": turns.ratio("sklearn.default", ours),
        "kmeans.kernel_s": turns.median(ours),
        "kmeans.speedup": turns.ratio(best, "stage"),
        "kmeans.speedup_default": turns.ratio("sklearn.default", "stage"),
        "kmeans.stage_s": turns.median("stage"),
    }
    if way := turns.best("faiss"):
        total = inertias(arrays, turns.results[way]).sum()
        figures |= {"kmeans.vs_faiss": turns.ratio(way, ours), "kmeans.faiss_inertia": float(total / first.sum())}
    show(turns, ours, best, way)
    return figures


def show(turns: Turns, *counted: str | None) -> None:
    """Log all timings, marking the ways that enter the figures with an asterisk."""
    for name, seconds in turns.seconds.items():
        logger.info("  %-30s %s s%s", name, " ".join(f"{s:.2f}" for s in seconds), " *" if name in counted else "")


def _superkmeans(
    bench: Bench, tokens: Tokens, arrays: list[np.ndarray], first: np.ndarray, processes: Processes
) -> Figures:
    some, k = slice(None, None, SUPERKMEANS_EVERY), bench.senses
    processes.give(arrays[some])
    ways: Ways = {
        "kernel": kernel(tokens.where(np.arange(len(arrays)) % SUPERKMEANS_EVERY == 0), k, bench.workers),
        "superkmeans.default": partial(superkmeans_loop, arrays[some], k),
        "superkmeans.one_thread_a_core": partial(processes.run, partial(superkmeans_loop, k=k, threads=1)),
    }
    turns = in_turn(ways, TURNS)
    way = turns.best("superkmeans") or ""
    show(turns, way)
    total = inertias(arrays[some], turns.results[way]).sum()
    return {
        "kmeans.vs_superkmeans": turns.ratio(way, "kernel"),
        "kmeans.superkmeans_inertia": float(total / first[some].sum()),
    }


def over_limit(tokens: Tokens, k: int, turns: int, budget: float = np.inf) -> float:
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
    turns_taken = in_turn({"kernel": ours, "products": products}, turns, budget)
    torch.set_num_threads(before)
    return turns_taken.ratio("kernel", "products")
