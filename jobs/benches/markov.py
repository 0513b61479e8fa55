"""Markov clustering against the package `markov-clustering`, on similarity graphs of the shared run's tokens.

In: 200 times 500 points of a token. Out: the package's time over ours, all cores for both, and how far the clusters
agree. The package is given dense matrices, which are faster for it, and works with all threads (`mcl.speedup`) or as a
process of one thread a core (`mcl.speedup_processes`), for which its user has to write more; and sparse ones. Of these,
which take many times longer, only a few graphs are timed, and their time for all is taken to be in proportion. Holds
all graphs in float64 (0.4 GB) here and once more in other processes.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.sparse import csc_matrix
from scipy.spatial.distance import pdist, squareform
from sklearn.metrics import adjusted_rand_score

from benches.peers import at_most, available
from benches.shared import Bench, Figures, Tokens
from benches.turns import Processes, in_turn
from msense.mcl import Cluster, MclConfig, markov_clusters

logger = logging.getLogger("msense.bench")

GRAPHS, POINTS = 200, 500
CHUNK = 40  # graphs of a turn: together they are all graphs, each once
SPARSE = 2  # graphs of a turn that the package has as sparse matrices


def mcl(bench: Bench) -> Figures:
    """Speed and agreement."""
    if not available("markov_clustering"):
        return {}
    bench.build()
    config = MclConfig()
    graphs = [_similarity(points, config.offset) for points in choose(bench.tokens())]
    ours: list[list[Cluster]] = []
    theirs: list[list[Cluster]] = []
    rows = []
    with Processes(bench.workers) as processes:
        processes.give(graphs[:2])
        processes.run(partial(package, threads=1))
        processes.run(partial(markov_clusters, config=config))
        for at in range(0, len(graphs), CHUNK):
            chunk = graphs[at : at + CHUNK]
            processes.give(chunk)
            ways: dict[str, Callable[[], Any]] = {
                "ours.threads": partial(markov_clusters, chunk, config, threads=bench.workers),
                "ours.one_thread_a_core": partial(processes.run, partial(markov_clusters, config=config)),
                "dense.all_threads": partial(package, chunk),
                "dense.one_thread_a_core": partial(processes.run, partial(package, threads=1)),
                "sparse": partial(package, [csc_matrix(graph) for graph in chunk[:SPARSE]]),
            }
            turn = in_turn(ways, 1)
            turn.seconds["sparse"] *= len(chunk) / min(SPARSE, len(chunk))
            rows.append({name: seconds[0] for name, seconds in turn.seconds.items()})
            logger.info("  graphs %d: %s s", at, ", ".join(f"{name} {s:.2f}" for name, s in rows[-1].items()))
            ours += turn.results["ours.threads"]
            theirs += turn.results["dense.all_threads"]
    total = {name: sum(row[name] for row in rows) for name in rows[0]}
    way = min((name for name in total if name.startswith("ours")), key=total.__getitem__)
    logger.info("we count as %s", way)
    agreement = [_agreement(a, b) for a, b in zip(ours, theirs, strict=True)]
    return {
        "mcl.speedup": float(np.median([row["dense.all_threads"] / row[way] for row in rows])),
        "mcl.speedup_processes": float(np.median([row["dense.one_thread_a_core"] / row[way] for row in rows])),
        "mcl.speedup_sparse": total["sparse"] / total[way],
        "mcl.agreement": float(np.mean(agreement)),
        "mcl.agreement_least": float(min(agreement)),
        "mcl.equal_counts": float(np.mean([len(a) == len(b) for a, b in zip(ours, theirs, strict=True)])),
        "mcl.ms_a_graph": 1000 * total[way] / len(graphs),
        "mcl.graphs": float(len(graphs)),
    }


def choose(tokens: Tokens) -> list[np.ndarray]:
    """Take the first points of tokens that have enough, then other points of those that have twice as many."""
    starts = np.cumsum(tokens.sizes) - tokens.sizes
    found = [tokens.points[s : s + POINTS] for s, n in zip(starts, tokens.sizes, strict=True) if n >= POINTS][:GRAPHS]
    twice = np.flatnonzero(tokens.sizes >= 2 * POINTS)
    rng = np.random.default_rng(0)
    for token in np.resize(twice, GRAPHS - len(found) if len(twice) else 0):
        rows = np.sort(rng.choice(tokens.sizes[token], POINTS, replace=False))
        found.append(tokens.points[starts[token] + rows])
    return found


def _similarity(points: np.ndarray, offset: float) -> np.ndarray:
    """1 / (offset + Euclidean distance), float64 [n, n]."""
    return np.asarray(1 / (offset + squareform(pdist(points.astype(np.float64)))))


def package(graphs: Sequence[Any], threads: int | None = None) -> list[list[Cluster]]:
    """Cluster graphs one by one with the package, set as the paper has it."""
    from markov_clustering import get_clusters, run_mcl

    with at_most(threads):
        return [get_clusters(run_mcl(graph, expansion=2, inflation=1.65)) for graph in graphs]


def _agreement(ours: list[Cluster], theirs: list[Cluster]) -> float:
    """Adjusted Rand index; a node in several clusters counts for the first."""
    return float(adjusted_rand_score(_labels(ours), _labels(theirs)))


def _labels(clusters: list[Cluster]) -> np.ndarray:
    labels = np.full(POINTS, -1)
    for number, cluster in reversed(list(enumerate(sorted(clusters)))):
        labels[list(cluster)] = number
    return labels
