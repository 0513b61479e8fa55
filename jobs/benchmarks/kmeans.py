"""The clustering stage and its kernel against scikit-learn, FAISS and bare matrix products.

Each library clusters the points of one token, float32 [n, D], after another and returns their assignments, int [n]; all
points are used (FAISS subsamples by default). Holds the points as float16 and float32, and once more in the libraries'
processes.
"""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from benchmarks.shared import Bench, Figures
from benchmarks.timing import in_turn, processes
from msense.clustering.kmeans import Clusters, KMeansConfig, cluster_tokens
from msense.clustering.selection import first_by_key
from msense.constants import DEMO_TEACHER
from msense.io import storage
from msense.io.arrays import load_arrays
from msense.pipelines.build import cluster_settings
from msense.runtime import open_executor
from msense.stages.cluster import ClusterStage
from msense.stages.embedding_store import ClusterSettings, Range, read_ranges, stored
from msense.teacher.spec import load_teacher_info

FAISS = {"niter": 8, "nredo": 8}  # the cheapest with scikit-learn's inertia on WikiText-2
LARGE = 200  # least points per token in `over_limit`
TURNS = 5


def kmeans(bench: Bench) -> Figures:
    """Time the stage, input and output included, and its kernel against other libraries on the same points."""
    bench.build()
    torch.set_num_threads(bench.workers)
    settings = cluster_settings(bench.config, bench.run, load_teacher_info(DEMO_TEACHER, bench.config)[0])
    points, k = _points(settings), bench.senses
    points = {token: own for token, own in points.items() if len(own) > k}
    arrays, ours = list(points.values()), kernel(points, k, bench.workers)
    loops: dict[str, Callable[..., Any]] = {"sklearn": sklearn_loop}
    if importlib.util.find_spec("faiss"):
        loops["faiss"] = faiss_loop
    ways: dict[str, Callable[[], Any]] = {"stage": _stage(settings, bench.workers), "kernel": ours}
    with processes(arrays, bench.workers) as run:
        for name, loop in loops.items():
            ways[f"{name}.default"] = partial(loop, arrays, k)
            ways[f"{name}.one_thread_a_core"] = partial(run, partial(loop, k=k, threads=1))
        second = inertias(arrays, run(partial(sklearn_loop, k=k, threads=1, state=1)))
        first, *theirs = (inertias(arrays, ways[f"{name}.one_thread_a_core"]()) for name in loops)
        ways["stage"]()  # untimed: Ray's workers import torch
        turns = in_turn(ways, TURNS)
    inertia, best = ours().inertia, turns.best("sklearn")
    known = first > 1e-6 * first.sum() / len(first)  # smaller: every distinct point is a centroid
    tail, other = (np.percentile(own[known] / first[known], 95) for own in (inertia, second))
    figures = {
        "kmeans.tokens": float(len(arrays)),
        "kmeans.points": float(sum(map(len, arrays))),
        "kmeans.inertia_ratio": float(inertia.sum() / first.sum()),
        "kmeans.token_p95": float(tail / other),
        "kmeans.kernel_speedup": turns.ratio(best, "kernel"),
        "kmeans.kernel_speedup_default": turns.ratio("sklearn.default", "kernel"),
        "kmeans.kernel_s": turns.median("kernel"),
        "kmeans.speedup": turns.ratio(best, "stage"),
        "kmeans.speedup_default": turns.ratio("sklearn.default", "stage"),
        "kmeans.stage_s": turns.median("stage"),
        "kmeans.over_limit": _over_limit({token: own for token, own in points.items() if len(own) >= LARGE}, k),
    }
    if theirs:
        figures |= {f"kmeans.faiss_{name}": float(value) for name, value in FAISS.items()}
        figures["kmeans.faiss_inertia"] = float(theirs[0].sum() / first.sum())
        figures["kmeans.vs_faiss"] = turns.ratio(turns.best("faiss"), "kernel")
    return figures


def _points(settings: ClusterSettings) -> dict[int, np.ndarray]:
    """Return the clustered points by token."""
    offsets = load_arrays(settings.run.offsets)["offsets"]
    whole = [Range(partition, int(row[0]), int(row[-1])) for partition, row in enumerate(offsets)]
    records, _ = read_ranges(settings, whole)
    order, _ = first_by_key(records["key"], records["token"], settings.max_occurrences)
    ids, start = np.unique(records["token"][order], return_index=True)
    points = stored(records["embedding"][order], settings.store_dtype).float().numpy()
    return dict(zip(ids.tolist(), np.split(points, start[1:]), strict=True))


def _stage(settings: ClusterSettings, workers: int) -> Callable[[], None]:
    """Return a call of the clustering stage on Ray, which starts from no centroids."""
    shards = load_arrays(settings.run.thresholds)["shards"]
    stage, executor = ClusterStage(settings, shards), open_executor(workers=workers)

    def run() -> None:
        storage.remove(settings.run.centroids)
        list(stage.process(executor, range(len(shards) - 1)))

    return run


def kernel(points: dict[int, np.ndarray], k: int, threads: int) -> Callable[[], Clusters]:
    """Return a call of msense's kernel on the points of tokens."""
    ids, sizes = np.array(list(points)), np.array([len(own) for own in points.values()])
    together = np.concatenate(list(points.values())).astype(np.float16)
    return partial(cluster_tokens, together, sizes, ids, KMeansConfig(k=k), threads=threads)


def sklearn_loop(points: Sequence[np.ndarray], k: int, threads: int | None = None, state: int = 0) -> list[np.ndarray]:
    """Cluster with scikit-learn's KMeans, as the reference implementation does."""
    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore")  # fewer distinct points than clusters
        return [KMeans(n_clusters=k, n_init="auto", random_state=state).fit(p).labels_ for p in points]


def faiss_loop(points: Sequence[np.ndarray], k: int, threads: int | None = None) -> list[np.ndarray]:
    """Cluster with FAISS from k-means++ seeds, which give a lower inertia than its default of random points."""
    import faiss

    default_threads, labels = faiss.omp_get_max_threads(), []
    settings: dict[str, Any] = {**FAISS, "min_points_per_centroid": 1, "max_points_per_centroid": 1 << 30}
    settings |= {"init_method": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS, "check_input_data_for_NaNs": False}
    with threadpool_limits(threads):
        faiss.omp_set_num_threads(threads or default_threads)
        for p in points:
            model = faiss.Kmeans(p.shape[1], k, **settings)
            model.train(p)
            labels.append(model.assign(p)[1])
        faiss.omp_set_num_threads(default_threads)
    return labels


def inertias(points: Sequence[np.ndarray], assignments: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum of squared distances to the cluster means for each token, float64 [T]."""
    tables = [(pd.DataFrame(p.astype(np.float64)), a) for p, a in zip(points, assignments, strict=True)]
    return np.array([np.square(table - table.groupby(a).transform("mean")).to_numpy().sum() for table, a in tables])


def _over_limit(points: dict[int, np.ndarray], k: int) -> float:
    """Return the kernel's time over that of its rounds' bare products, [K, D] @ [D, n] in float32, on one thread."""
    arrays, ours = [torch.from_numpy(own) for own in points.values()], kernel(points, k, 1)
    rounds, centroids = ours().rounds.tolist(), torch.randn(k, arrays[0].shape[1])

    def products() -> None:
        for own, count in zip(arrays, rounds, strict=True):
            for _ in range(count):
                torch.mm(centroids, own.T)

    torch.set_num_threads(1)
    products()
    return in_turn({"kernel": ours, "products": products}, TURNS + 2).ratio("kernel", "products")
