"""The same work by other libraries: loops over tokens that tell their seconds and the inertia of every token.

Points are float32 [n, D] a token, ready in memory; one that is not installed is skipped with a word.
"""

import importlib.util
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

logger = logging.getLogger("msense.bench")

Tokens = Sequence[np.ndarray]  # points [n, D] of each token
Loop = Callable[[Tokens, int, int | None], tuple[float, list[float]]]  # tokens, K, threads -> seconds, inertia


def installed(module: str, package: str) -> bool:
    """Tell whether a peer is there; say so if not."""
    there = importlib.util.find_spec(module) is not None
    if not there:
        logger.info('%s is not installed: left out (pip install "msense[bench]")', package)
    return there


def inertia_of(points: np.ndarray, centroids: np.ndarray) -> float:
    """Sum of squared distances to the nearest centroid, in float64."""
    x, c = points.astype(np.float64), centroids.astype(np.float64)
    away = (x * x).sum(1) + ((c * c).sum(1) - 2 * x @ c.T).min(1)
    return float(np.maximum(away, 0).sum())


def sklearn(tokens: Tokens, k: int, threads: int | None, seed: int = 0) -> tuple[float, list[float]]:
    """scikit-learn's KMeans as the paper's code calls it; `threads` None: its own default."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore")  # fewer distinct points than clusters
        KMeans(2, n_init="auto", random_state=0).fit(tokens[0])
        began = time.perf_counter()
        inertia = [float(KMeans(k, n_init="auto", random_state=seed).fit(p).inertia_) for p in tokens]
        return time.perf_counter() - began, inertia


def faiss_clustering(
    tokens: Tokens, k: int, threads: int | None, init: int = 0, niter: int = 25, nredo: int = 1
) -> tuple[float, list[float]]:
    """FAISS's Clustering over a flat index; `init` 0 is random points, 1 k-means++, 2 AFK-MC2."""
    import faiss

    if threads:
        faiss.omp_set_num_threads(threads)
    found, began = [], time.perf_counter()
    for points in tokens:
        clustering = faiss.Clustering(points.shape[1], k)
        clustering.init_method, clustering.niter, clustering.nredo = init, niter, nredo
        clustering.seed, clustering.min_points_per_centroid = 1234, 1
        clustering.max_points_per_centroid = len(points)
        clustering.train(points, faiss.IndexFlatL2(points.shape[1]))
        found.append(faiss.vector_to_array(clustering.centroids).reshape(k, -1))
    seconds = time.perf_counter() - began
    return seconds, [inertia_of(p, c) for p, c in zip(tokens, found, strict=True)]


def superkmeans(tokens: Tokens, k: int, threads: int | None) -> tuple[float, list[float]]:
    """SuperKMeans without sampling, flat, 25 rounds at most."""
    from superkmeans import SuperKMeans

    options = {"iters": 25, "hierarchical": False, "sampling_fraction": 1.0, "max_points_per_cluster": 1 << 30}
    began = time.perf_counter()
    found = [SuperKMeans(k, p.shape[1], n_threads=threads or 0, **options).train(p) for p in tokens]
    seconds = time.perf_counter() - began
    return seconds, [inertia_of(p, c) for p, c in zip(tokens, found, strict=True)]


def on_each_core(loop: Loop, tokens: Tokens, k: int, processes: int) -> tuple[float, list[float]]:
    """Run a loop in one process of one thread a core, tokens dealt out by turns; all is ready before the clock starts.

    Returns:
        Seconds from the first start to the last end, and the inertia of each token.
    """
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=_share, args=(loop, tokens[i::processes], k, i, start, results))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    told = sorted(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    seconds = max(ended for _, _, ended, _ in told) - min(began for _, began, _, _ in told)
    inertia = np.empty(len(tokens))
    for number, _, _, share in told:
        inertia[number::processes] = share
    return seconds, inertia.tolist()


def _share(loop: Loop, tokens: Tokens, k: int, number: int, start: Any, results: Any) -> None:  # noqa: ANN401 - multiprocessing's
    import torch

    torch.set_num_threads(1)
    loop(tokens[:1], k, 1)
    start.wait()
    began = time.time()
    seconds, inertia = loop(tokens, k, 1)
    results.put((number, began, began + seconds, inertia))
