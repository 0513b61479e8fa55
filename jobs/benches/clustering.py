"""k-means per token: the kernel and the stage against other libraries, against the bare products, and over workers."""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benches import peers
from benches.shared import Bench, Figures, in_turn, timed
from msense import clustering, storage
from msense.kmeans import Clusters, KMeansConfig, cluster_tokens
from msense.runtime import Resources, connect
from msense.units import ClusterSettings

logger = logging.getLogger("msense.bench")
CORES = os.cpu_count() or 1
# settings of FAISS from the cheapest on: initialisation, rounds, redos
FAISS = [(0, 10, 1), (1, 5, 1), (1, 8, 1), (1, 10, 1), (1, 15, 1), (1, 25, 1), (0, 25, 5), (1, 25, 2), (1, 25, 3)]


class Sample:
    """Points of tokens that are to be clustered: grouped float16 [N, D], and float32 a token for other libraries."""

    def __init__(self, points: np.ndarray, sizes: np.ndarray, k: int) -> None:
        self.points, self.sizes, self.k = points, sizes.astype(np.int64), k
        self.ids = np.arange(len(sizes))
        self.tokens = [p.astype(np.float32) for p in np.split(points, np.cumsum(sizes)[:-1])]

    def ours(self, threads: int) -> Clusters:
        """Cluster them with the kernel."""
        return cluster_tokens(self.points, self.sizes, self.ids, KMeansConfig(k=self.k), threads=threads)

    def products(self, rounds: np.ndarray) -> None:
        """The products of centroids and points that the rounds of each token need, and nothing else."""
        every = torch.from_numpy(np.concatenate(self.tokens))
        centroids = torch.randn(self.k, every.shape[1])
        for points, times in zip(every.split(self.sizes.tolist()), rounds.tolist(), strict=True):
            for _ in range(times):
                torch.mm(centroids, points.T)


def of_run(bench: Bench, least: int) -> Sample:
    """Return the shared run's points of tokens of at least so many, cut at the cap."""
    tokens, points = bench.points()
    _, start, count = np.unique(tokens, return_index=True, return_counts=True)
    rows = [np.arange(a, a + n) for a, n in zip(start[count >= least], count[count >= least], strict=True)]
    return Sample(points[np.concatenate(rows)], count[count >= least], bench.senses)


def kmeans(bench: Bench) -> Figures:
    """Kernel on all cores against scikit-learn, FAISS and SuperKMeans on the same points, and against bare products."""
    bench.build()
    sample = of_run(bench, bench.senses + 1)
    found = sample.ours(CORES)  # warm
    own = [lambda: timed(lambda: sample.ours(CORES))]
    against = {
        "default": partial(peers.sklearn, sample.tokens, sample.k, None),
        "one_thread": partial(peers.sklearn, sample.tokens, sample.k, 1),
        "one_thread_a_core": partial(peers.on_each_core, peers.sklearn, sample.tokens, sample.k, CORES),
    }
    results: dict[str, list[float]] = {}

    def clocked(name: str, loop: Callable[[], tuple[float, list[float]]]) -> float:
        seconds, results[name] = loop()
        return seconds

    ours, *theirs = in_turn(own + [partial(clocked, name, loop) for name, loop in against.items()], 3)
    ratios = dict(zip(against, (seconds / ours for seconds in theirs), strict=True))
    inertia = np.array(results["one_thread"])
    again = np.array(peers.sklearn(sample.tokens, sample.k, None, seed=1)[1])
    figures = {
        "kmeans.kernel_speedup": min(ratios.values()),
        **{f"kmeans.kernel_speedup_{name}": ratio for name, ratio in ratios.items()},
        "kmeans.kernel_s": ours,
        "kmeans.tokens": float(len(sample.sizes)),
        "kmeans.points": float(sample.sizes.sum()),
        "kmeans.inertia_ratio": found.inertia.sum() / inertia.sum(),
        "kmeans.token_p95": np.percentile(found.inertia / inertia, 95) / np.percentile(again / inertia, 95),
    }
    return figures | _against_faiss(sample, inertia) | _against_superkmeans(sample, inertia) | _over_limit(bench)


def _against_faiss(sample: Sample, inertia: np.ndarray) -> Figures:
    """The cheapest setting of FAISS that comes within 1 % of scikit-learn's inertia, over the kernel."""
    if not peers.installed("faiss", "FAISS"):
        return {}
    tried = []
    for init, niter, nredo in FAISS:
        loop = partial(peers.faiss_clustering, init=init, niter=niter, nredo=nredo)
        seconds, theirs = loop(sample.tokens, sample.k, CORES)
        logger.info(
            "FAISS init %d niter %d nredo %d: %.2f s, inertia %.4f",
            init,
            niter,
            nredo,
            seconds,
            sum(theirs) / inertia.sum(),
        )
        tried.append((sum(theirs) / inertia.sum() > 1.01, seconds, loop, sum(theirs)))
    poor, _, loop, reached = min(tried, key=lambda one: one[:2])
    sides = [
        lambda: timed(lambda: sample.ours(CORES)),
        lambda: loop(sample.tokens, sample.k, CORES)[0],
        lambda: peers.on_each_core(loop, sample.tokens, sample.k, CORES)[0],
    ]
    ours, together, apart = in_turn(sides, 3)
    return {
        "kmeans.vs_faiss": min(together, apart) / ours,
        "kmeans.faiss_inertia": reached / inertia.sum(),
        "kmeans.faiss_within_1_percent": float(not poor),
    }


def _against_superkmeans(sample: Sample, inertia: np.ndarray) -> Figures:
    """SuperKMeans over the kernel, with the inertia that it reaches."""
    if not peers.installed("superkmeans", "SuperKMeans"):
        return {}
    try:
        reached = sum(peers.superkmeans(sample.tokens, sample.k, CORES)[1])
    except (RuntimeError, ValueError) as error:
        logger.info("SuperKMeans does not take these sizes: %s", error)
        return {}
    sides = [
        lambda: timed(lambda: sample.ours(CORES)),
        lambda: peers.superkmeans(sample.tokens, sample.k, CORES)[0],
        lambda: peers.on_each_core(peers.superkmeans, sample.tokens, sample.k, CORES)[0],
    ]
    ours, together, apart = in_turn(sides, 3)
    return {"kmeans.vs_superkmeans": min(together, apart) / ours, "kmeans.superkmeans_inertia": reached / inertia.sum()}


def _over_limit(bench: Bench) -> Figures:
    """One thread, tokens of 200 points or more: the kernel over the bare products of the rounds that it made."""
    sample = of_run(bench, 200)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rounds = sample.ours(1).rounds
    ours, bare = in_turn([lambda: timed(lambda: sample.ours(1)), lambda: timed(lambda: sample.products(rounds))], 5)
    torch.set_num_threads(before)
    return {"kmeans.over_limit": ours / bare}


def stage(bench: Bench) -> Figures:
    """The whole clustering stage on Ray, reading and writing included, against scikit-learn on one thread a core."""
    bench.build()
    settings, shards = bench.cluster_settings(), storage.load_arrays(bench.run.thresholds)["shards"]
    resources = connect(bench.workers)
    sample = of_run(bench, bench.senses + 1)
    _pass(settings, shards, resources)  # has the workers import torch
    sides = [
        lambda: _pass(settings, shards, resources),
        lambda: peers.on_each_core(peers.sklearn, sample.tokens, sample.k, bench.workers)[0],
    ]
    ours, theirs = in_turn(sides, 3)
    return {"kmeans.speedup": theirs / ours, "kmeans.stage_s": ours}


def _pass(settings: ClusterSettings, shards: np.ndarray, resources: Resources) -> float:
    """Cluster every shard once; return the seconds."""
    storage.remove(settings.run.centroids)
    return timed(lambda: clustering.cluster(settings, shards, resources))


def scaling(bench: Bench) -> Figures:
    """Two workers over one, on Ray and as bare processes that do the same shards."""
    bench.build()
    settings, shards = bench.cluster_settings(), storage.load_arrays(bench.run.thresholds)["shards"]
    connect(2)
    passes = 12  # so that a side takes a while

    def on_ray(workers: int) -> float:
        resources = Resources(actors=workers, tasks=workers, device="cpu")
        return sum(_pass(settings, shards, resources) for _ in range(passes))

    on_ray(2)
    sides = [partial(on_ray, 1), partial(on_ray, 2)]
    sides += [partial(_bare, settings, len(shards) - 1, workers, passes) for workers in (1, 2)]
    one, two, bare_one, bare_two = in_turn(sides, 3)
    return {
        "kmeans.scaling": one / two,
        "kmeans.ceiling": bare_one / bare_two,
        "kmeans.scaling_of_ceiling": (one / two) / (bare_one / bare_two),
        "kmeans.ray_over_bare": two / bare_two,
    }


def _bare(settings: ClusterSettings, shards: int, processes: int, passes: int) -> float:
    """Do every shard so often in bare processes that draw from one queue; return the seconds."""
    context = multiprocessing.get_context("spawn")
    todo, start, ended = context.Queue(), context.Barrier(processes + 1), context.Queue()
    workers = [context.Process(target=_draw, args=(settings, todo, start, ended)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for number in [*range(shards)] * passes:
        todo.put(number)
    for _ in workers:
        todo.put(None)
    start.wait()
    began = time.time()
    seconds = max(ended.get() for _ in workers) - began
    for worker in workers:
        worker.join()
    return seconds


def _draw(settings: ClusterSettings, todo: Any, start: Any, ended: Any) -> None:  # noqa: ANN401 - multiprocessing's
    torch.set_num_threads(1)
    shards = storage.load_arrays(settings.run.thresholds)["shards"].tolist()
    start.wait()
    while (number := todo.get()) is not None:
        item = {"shard": number, "first": shards[number], "last": shards[number + 1]}
        clustering.cluster_shard(item, settings)
    ended.put(time.time())


def _seconds(loop: peers.Loop, sample: Sample) -> float:
    return loop(sample.tokens, sample.k, CORES)[0]


def sizes(bench: Bench) -> Figures:
    """Few and many points, senses and dimensions (synthetic mixtures): over bare products, FAISS and SuperKMeans."""
    figures: Figures = {}
    for dim in (384, 4096):
        for n in (21, 200, 1000, 10_000, 100_000):
            for k in (5, 20, 200):
                if k < n and n * dim * 8 < 2e9:
                    for name, value in _cell(n, k, dim).items():
                        figures[f"sizes.n{n}_k{k}_d{dim}.{name}"] = value
    return figures


def _cell(n: int, k: int, dim: int) -> Figures:
    """One size, all on all cores; as many tokens as make about 4 GFLOP a round."""
    rng = np.random.default_rng(0)
    count = max(1, min(2000, int(2e9 // (2 * n * k * dim))), int(2e7 // (n * dim)))
    count = min(count, int(4e8 // (n * dim)) or 1)
    centers = rng.normal(size=(4 * k, dim)).astype(np.float32)
    points = np.empty((count * n, dim), np.float16)
    for at in range(0, len(points), 4096):
        rows = points[at : at + 4096]
        rows[:] = centers[rng.integers(0, len(centers), len(rows))] + rng.standard_normal(rows.shape, np.float32)
    sample = Sample(points, np.full(count, n), k)
    found = sample.ours(CORES)
    names, sides = ["ours"], [lambda: timed(lambda: sample.ours(CORES))]
    names, sides = [*names, "over_limit"], [*sides, lambda: timed(lambda: sample.products(found.rounds))]
    figures: Figures = {}
    loops: dict[str, peers.Loop] = {}
    if peers.installed("faiss", "FAISS"):
        loops["faiss"] = partial(peers.faiss_clustering, init=1, niter=10)
    if peers.installed("superkmeans", "SuperKMeans"):
        loops["superkmeans"] = peers.superkmeans
    for name, loop in loops.items():
        try:
            _, reached = loop(sample.tokens, k, CORES)
        except (RuntimeError, ValueError) as error:
            logger.info("%s does not take %d points in %d senses: %s", name, n, k, error)
            continue
        figures[f"inertia_over_{name}"] = found.inertia.sum() / sum(reached)
        names, sides = [*names, f"vs_{name}"], [*sides, partial(_seconds, loop, sample)]
    seconds = dict(zip(names, in_turn(sides, 2), strict=True))
    ours = seconds.pop("ours")
    figures["over_limit"] = ours / seconds.pop("over_limit")
    figures |= {name: value / ours for name, value in seconds.items()}
    logger.info("%d tokens of n %d, K %d, D %d: %.3f s, %s", count, n, k, dim, ours, figures)
    return figures
