"""K-means of other libraries, token by token, and the inertia of a clustering.

Each loop takes the points of every token, float32 [n, D], and returns their assignments, int [n]. All points are used
(FAISS and SuperKMeans subsample by default).
"""

import importlib.util
import logging
import time
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.timing import Processes

logger = logging.getLogger("msense.benchmark")
FAISS_NREDO = (1, 2, 4, 6, 8, 12, 20)
FAISS_NITER = (8, 25)
FAISS_SECONDS = 60.0  # for the choice of its settings
ALL_POINTS = 1 << 30


def available(module: str) -> bool:
    """Return whether a library is installed; log how to install it otherwise."""
    installed = importlib.util.find_spec(module) is not None
    if not installed:
        logger.info("%s is not installed, its figures are omitted: pip install msense[bench]", module)
    return installed


def sklearn_loop(points: Sequence[np.ndarray], k: int, threads: int | None = None, state: int = 0) -> list[np.ndarray]:
    """Cluster with scikit-learn's KMeans, as the reference implementation does."""
    from sklearn.cluster import KMeans

    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore")  # fewer distinct points than clusters
        return [KMeans(n_clusters=k, n_init="auto", random_state=state).fit(p).labels_ for p in points]


def faiss_loop(
    points: Sequence[np.ndarray], k: int, threads: int | None = None, niter: int = 25, nredo: int = 1
) -> list[np.ndarray]:
    """Cluster with FAISS from k-means++ seeds, which give a lower inertia than its default of random points."""
    import faiss

    default_threads, labels = faiss.omp_get_max_threads(), []
    settings: dict[str, Any] = {"niter": niter, "nredo": nredo, "check_input_data_for_NaNs": False}
    settings |= {"init_method": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS}
    settings |= {"min_points_per_centroid": 1, "max_points_per_centroid": ALL_POINTS}
    with threadpool_limits(threads):
        faiss.omp_set_num_threads(threads or default_threads)
        for p in points:
            kmeans = faiss.Kmeans(p.shape[1], k, **settings)
            kmeans.train(p)
            labels.append(kmeans.assign(p)[1])
        faiss.omp_set_num_threads(default_threads)
    return labels


def superkmeans_loop(points: Sequence[np.ndarray], k: int, threads: int | None = None) -> list[np.ndarray]:
    """Cluster with SuperKMeans."""
    from superkmeans import SuperKMeans

    settings: dict[str, Any] = {"hierarchical": False, "sampling_fraction": 1.0}
    settings |= {"max_points_per_cluster": ALL_POINTS // k, "iters": 25, "n_threads": threads or 0}
    models = (SuperKMeans(k, p.shape[1], **settings) for p in points)
    return [model.assign(p, model.train(p)) for model, p in zip(models, points, strict=True)]


def inertias(points: Sequence[np.ndarray], assignments: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum of squared distances to the cluster means for each token, float64 [T]."""
    return np.array([max(0.0, _inertia(p, a)) for p, a in zip(points, assignments, strict=True)])


def _inertia(points: np.ndarray, assignment: np.ndarray) -> float:
    values = points - points.mean(0)
    order = np.argsort(assignment, kind="stable")
    _, start, count = np.unique(assignment[order], return_index=True, return_counts=True)
    sums = np.add.reduceat(values[order], start, axis=0, dtype=np.float64)
    total = np.einsum("nd,nd->", values, values, dtype=np.float64)
    return float(total - (np.square(sums).sum(1) / count).sum())


def faiss_settings(points: Sequence[np.ndarray], k: int, target: float, processes: Processes) -> dict[str, Any]:
    """Return FAISS's cheapest numbers of iterations and restarts that reach a total inertia of `target`.

    `processes` hold the points; after `FAISS_SECONDS` the best settings so far are returned.
    """
    began, lowest = time.perf_counter(), np.inf
    best: dict[str, Any] = {}
    for nredo, niter in product(FAISS_NREDO, FAISS_NITER):
        settings: dict[str, Any] = {"niter": niter, "nredo": nredo}
        total = float(inertias(points, processes.run(partial(faiss_loop, k=k, threads=1, **settings))).sum())
        if total < lowest:
            best, lowest = settings, total
        if total <= target or time.perf_counter() - began > FAISS_SECONDS:
            break
    return best
