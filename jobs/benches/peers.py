"""Loops over tokens with other libraries' k-means, and what a clustering is worth.

In: each token's points, float32 [n, D]. Out: each token's assignment, int [n]. All of a token's points are clustered
(FAISS and SuperKMeans would by default look at a sample), and every loop ends with the assignment, which ours has too.
"""

import importlib.util
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from benches.turns import Processes

logger = logging.getLogger("msense.bench")

PEERS = {
    "faiss": "faiss-cpu",
    "superkmeans": "superkmeans",
    "markov_clustering": "markov-clustering",
}
FAISS_NITER = (8, 25)
FAISS_NREDO = (1, 2, 4, 6, 8, 12, 20)
EVERYTHING = 1 << 30


def available(module: str) -> bool:
    """Tell whether a library is installed, and if not, how to install it."""
    there = importlib.util.find_spec(module) is not None
    if not there:
        logger.info("%s is not installed, its figures are left out: pip install msense[bench]", PEERS[module])
    return there


@contextmanager
def at_most(threads: int | None) -> Iterator[None]:
    """Bound the threads of all numerical libraries; None leaves them as they are."""
    if threads is None:
        yield
        return
    with threadpool_limits(threads):
        yield


def sklearn_loop(points: Sequence[np.ndarray], k: int, threads: int | None = None, state: int = 0) -> list[np.ndarray]:
    """Cluster token by token with scikit-learn's KMeans, as the reference does."""
    from sklearn.cluster import KMeans

    with warnings.catch_warnings(), at_most(threads):
        warnings.simplefilter("ignore")  # fewer distinct points than clusters
        return [KMeans(n_clusters=k, n_init="auto", random_state=state).fit(p).labels_ for p in points]


def faiss_loop(
    points: Sequence[np.ndarray], k: int, threads: int | None = None, niter: int = 25, nredo: int = 1
) -> list[np.ndarray]:
    """Cluster token by token with FAISS from k-means++ seeds, which its default, random points, is no match for."""
    import faiss

    usual = faiss.omp_get_max_threads()
    found = []
    with at_most(threads):
        faiss.omp_set_num_threads(threads or usual)
        for p in points:
            settings: dict[str, Any] = {
                "niter": niter,
                "nredo": nredo,
                "init_method": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
            }
            settings |= {"min_points_per_centroid": 1, "max_points_per_centroid": EVERYTHING}
            kmeans = faiss.Kmeans(p.shape[1], k, check_input_data_for_NaNs=False, **settings)
            kmeans.train(p)
            found.append(kmeans.assign(p)[1])
        faiss.omp_set_num_threads(usual)
    return found


def superkmeans_loop(points: Sequence[np.ndarray], k: int, threads: int | None = None) -> list[np.ndarray]:
    """Cluster token by token with SuperKMeans."""
    from superkmeans import SuperKMeans

    found = []
    for p in points:
        settings: dict[str, Any] = {
            "hierarchical": False,
            "sampling_fraction": 1.0,
            "max_points_per_cluster": EVERYTHING // k,
        }
        kmeans = SuperKMeans(k, p.shape[1], iters=25, n_threads=threads or 0, **settings)
        found.append(kmeans.assign(p, kmeans.train(p)))
    return found


def inertia(points: np.ndarray, assignment: np.ndarray) -> float:
    """Sum of squared distances to the means of the points of each cluster."""
    values = points - points.mean(0)
    order = np.argsort(assignment, kind="stable")
    _, start, count = np.unique(assignment[order], return_index=True, return_counts=True)
    sums = np.add.reduceat(values[order], start, axis=0, dtype=np.float64)
    total = np.einsum("nd,nd->", values, values, dtype=np.float64)
    return float(total - (np.square(sums).sum(1) / count).sum())


def inertias(points: Sequence[np.ndarray], assignments: Sequence[np.ndarray]) -> np.ndarray:
    """Inertia of every token, float64 [T]."""
    return np.array([max(0.0, inertia(p, a)) for p, a in zip(points, assignments, strict=True)])


def faiss_settings(
    points: Sequence[np.ndarray], k: int, target: float, processes: Processes | None, seconds: float = 30.0
) -> dict[str, Any]:
    """Find FAISS's cheapest number of iterations and of runs that brings the total inertia to a target.

    Args:
        points: of each token.
        k: clusters.
        target: total inertia that is good enough.
        processes: hold these points and try for us; None: tried here.
        seconds: after so many, or when nothing is good enough, the best so far is taken.
    """
    began, lowest = time.perf_counter(), np.inf
    best: dict[str, Any] = {}
    for nredo in FAISS_NREDO:
        for niter in FAISS_NITER:
            settings: dict[str, Any] = {"niter": niter, "nredo": nredo}
            if processes is None:
                found = faiss_loop(points, k, **settings)
            else:
                found = processes.run(partial(faiss_loop, k=k, threads=1, **settings))
            total = float(inertias(points, found).sum())
            if total < lowest:
                best, lowest = settings, total
            if total <= target or time.perf_counter() - began > seconds:
                return best
    return best
