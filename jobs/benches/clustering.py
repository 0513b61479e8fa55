"""The clustering stage and its kernel: against other libraries, against bare products, and with more workers.

In: the points of the shared run. Out: ratios; a peer's time over ours where nothing else is said. Holds the points as
stored, as float32, and once more in the peers' processes.
"""

import logging
import multiprocessing
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benches.peers import available, faiss_loop, faiss_settings, inertias, sklearn_loop, superkmeans_loop
from benches.shared import Bench, Figures, Tokens
from benches.turns import Processes, Turns, in_turn
from msense import clustering, storage
from msense.kmeans import Clusters, KMeansConfig, cluster_tokens
from msense.runtime import Resources, connect, map_tasks
from msense.units import ClusterSettings

logger = logging.getLogger("msense.bench")

GOOD_ENOUGH = 1.01  # of scikit-learn's total inertia: what FAISS is tuned to reach
LARGE = 200  # points of a token that `over_limit` looks at
TURNS = 5
SUPERKMEANS_EVERY = 8
SCALING_TURNS, SCALING_SECONDS = 3, 20.0  # seconds of work for one worker, at least

Ways = dict[str, Callable[[], Any]]


def kmeans(bench: Bench) -> Figures:
    """The stage, reading and writing included, and its kernel over loops of other libraries on the same points."""
    bench.build()
    tokens = bench.tokens()
    tokens = tokens.where(tokens.sizes > bench.senses)
    arrays, k = tokens.arrays(), bench.senses
    figures = {"kmeans.tokens": float(len(arrays)), "kmeans.points": float(tokens.sizes.sum())}
    with Processes(bench.workers) as processes, Processes(bench.workers) as own:
        processes.give(arrays)
        own.give(shared(tokens, bench.workers))
        first = inertias(arrays, processes.run(partial(sklearn_loop, k=k, threads=1)))
        second = inertias(arrays, processes.run(partial(sklearn_loop, k=k, threads=1, state=1)))
        ways: Ways = {
            "stage": _stage(bench),
            "kernel.threads": kernel(tokens, k, bench.workers),
            "kernel.one_thread_a_core": partial(own.run, partial(kernel_loop, k=k)),
            "sklearn.default": partial(sklearn_loop, arrays, k),
            "sklearn.one_thread": partial(sklearn_loop, arrays, k, 1),
            "sklearn.one_thread_a_core": partial(processes.run, partial(sklearn_loop, k=k, threads=1)),
        }
        if available("faiss"):
            settings = _tuned(arrays, k, processes, float(first.sum()))
            figures |= {f"kmeans.faiss_{name}": float(value) for name, value in settings.items()}
            ways |= {
                "faiss.default": partial(faiss_loop, arrays, k, **settings),
                "faiss.one_thread": partial(faiss_loop, arrays, k, 1, **settings),
                "faiss.one_thread_a_core": partial(processes.run, partial(faiss_loop, k=k, threads=1, **settings)),
            }
        ways["stage"]()  # once before the clock: Ray's workers import torch
        turns = in_turn(ways, TURNS)
        figures |= _superkmeans(bench, tokens, arrays, first, processes) if available("superkmeans") else {}
    ours: Clusters = turns.results["kernel.threads"]
    figures |= _quality(ours.inertia, first, second) | _against(turns, arrays, first)
    del arrays, turns
    return figures | {"kmeans.over_limit": over_limit(tokens.where(tokens.sizes >= LARGE), k, TURNS + 2)}


def _stage(bench: Bench) -> Callable[[], list[str]]:
    settings, shards = bench.cluster_settings(), storage.load_arrays(bench.run.thresholds)["shards"]
    resources = connect(bench.workers)

    def stage() -> list[str]:
        storage.remove(bench.run.centroids)
        return clustering.cluster(settings, shards, resources)

    return stage


def shared(tokens: Tokens, count: int) -> list[Tokens]:
    """Deal tokens out by turns."""
    return [tokens.where(np.arange(len(tokens.ids)) % count == number) for number in range(count)]


def kernel(tokens: Tokens, k: int, threads: int) -> Callable[[], Clusters]:
    """Our way."""
    return partial(cluster_tokens, tokens.points, tokens.sizes, tokens.ids, KMeansConfig(k=k), threads=threads)


def kernel_loop(shares: list[Tokens], k: int) -> list[None]:
    """What a worker on one core does; nothing goes back, as it writes what it finds itself."""
    for tokens in shares:
        kernel(tokens, k, 1)()
    return [None] * len(shares)


def _tuned(arrays: list[np.ndarray], k: int, processes: Processes, target: float) -> dict[str, Any]:
    """FAISS's settings, tuned on all tokens, which the processes hold."""
    return faiss_settings(arrays, k, GOOD_ENOUGH * target, processes, seconds=60)


def _quality(ours: np.ndarray, first: np.ndarray, second: np.ndarray) -> Figures:
    """Inertias [T]: ours, and scikit-learn's from its first and second random state."""
    known = first > 1e-6 * first.sum() / len(first)  # else all distinct points are centroids
    tail = np.percentile(ours[known] / first[known], 95)
    return {
        "kmeans.inertia_ratio": float(ours.sum() / first.sum()),
        "kmeans.token_p95": float(tail / np.percentile(second[known] / first[known], 95)),
    }


def _against(turns: Turns, arrays: list[np.ndarray], first: np.ndarray) -> Figures:
    """Speedups over each library's best way, and its total inertia over scikit-learn's."""
    ours, best = turns.best("kernel") or "", turns.best("sklearn") or ""
    figures = {
        "kmeans.kernel_speedup": turns.ratio(best, ours),
        "kmeans.kernel_speedup_default": turns.ratio("sklearn.default", ours),
        "kmeans.kernel_s": float(np.median(turns.seconds[ours])),
        "kmeans.speedup": turns.ratio(best, "stage"),
        "kmeans.speedup_default": turns.ratio("sklearn.default", "stage"),
        "kmeans.stage_s": float(np.median(turns.seconds["stage"])),
    }
    if way := turns.best("faiss"):
        total = inertias(arrays, turns.results[way]).sum()
        figures |= {"kmeans.vs_faiss": turns.ratio(way, ours), "kmeans.faiss_inertia": float(total / first.sum())}
    show(turns, ours, best, way)
    return figures


def show(turns: Turns, *counted: str | None) -> None:
    """Log what was timed; an asterisk marks the ways that count."""
    for name, seconds in turns.seconds.items():
        logger.info("  %-30s %s s%s", name, " ".join(f"{s:.2f}" for s in seconds), " *" if name in counted else "")


def _superkmeans(
    bench: Bench, tokens: Tokens, arrays: list[np.ndarray], first: np.ndarray, processes: Processes
) -> Figures:
    """Every so manieth token only, as SuperKMeans takes milliseconds to prepare for each."""
    some, k = slice(None, None, SUPERKMEANS_EVERY), bench.senses
    chosen = np.isin(np.arange(len(arrays)), np.arange(len(arrays))[some])
    processes.give(arrays[some])
    ways: Ways = {
        "kernel": kernel(tokens.where(chosen), k, bench.workers),
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
    """Time of the kernel over that of the bare products of its rounds, [K, D] @ [D, n] in float32; one thread."""
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
    timed = in_turn({"kernel": ours, "products": products}, turns, budget)
    torch.set_num_threads(before)
    return timed.ratio("kernel", "products")


def scaling(bench: Bench) -> Figures:
    """Throughput of the clustering stage's tasks with all workers over one: on Ray, and in bare processes."""
    bench.build()
    settings, shards = bench.cluster_settings(), storage.load_arrays(bench.run.thresholds)["shards"]
    once = [{"shard": n, "first": int(a), "last": int(b)} for n, (a, b) in enumerate(pairwise(shards))]
    connect(bench.workers)
    one, every = (Resources(n, n, "cpu") for n in (1, bench.workers))

    def on_ray(resources: Resources, items: list[dict[str, int]]) -> int:
        work = map_tasks("clustering", clustering.cluster_shard, items, resources, settings, needs=resources.clustering)
        return sum(1 for _ in work)

    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as single, context.Pool(bench.workers) as pool:
        work = partial(_shard, settings=settings)
        for warm in (
            lambda: on_ray(every, once * 2),
            lambda: single.map(work, once),
            lambda: pool.map(work, once * 2, 1),
        ):
            warm()
        alone = in_turn({"pass": lambda: single.map(work, once, 1)}, 2).seconds["pass"].min()
        items = once * max(1, int(np.ceil(SCALING_SECONDS / alone)))
        timed = in_turn(
            {
                "ray.one": partial(on_ray, one, items),
                "ray.every": partial(on_ray, every, items),
                "bare.one": partial(single.map, work, items, 1),
                "bare.every": partial(pool.map, work, items, 1),
            },
            SCALING_TURNS,
        )
    show(timed)
    return {
        "kmeans.scaling": timed.ratio("ray.one", "ray.every"),
        "kmeans.ceiling": timed.ratio("bare.one", "bare.every"),
        "kmeans.ray_over_bare": timed.ratio("ray.every", "bare.every"),
        "kmeans.scaling_s": float(np.median(timed.seconds["ray.one"])),
    }


def _shard(item: dict[str, int], settings: ClusterSettings) -> None:
    torch.set_num_threads(1)
    clustering.cluster_shard(item, settings)
