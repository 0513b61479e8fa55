"""The embed stage on two nodes over one, beside bare processes that call what an actor calls.

Nodes are Ray nodes of one core each on this machine, under a head without CPUs; the teacher is the demo's.
"""

import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.shared import Bench, Figures
from msense.constants import DEMO_TEACHER
from msense.io import storage
from msense.pipelines.build import gather_settings
from msense.run.folder import RunFolder
from msense.runtime.ray_executor import connect, map_actors
from msense.runtime.resources import Resources
from msense.stages.embed import EmbedActor, EmbedSettings
from msense.stages.embedding_store import cut_partitions, longest_first
from msense.teacher.body import resolve_dtype
from msense.teacher.spec import load_teacher_info

logger = logging.getLogger("msense.bench")
SAMPLE = 0.4  # of the demo's corpus: two minutes or more per run on a core of 2026
STORE_BYTES = 500 << 20


def nodes(bench: Bench) -> Figures:
    """Compare the tokens per second of two nodes over one with those of two bare processes over one."""
    measured: dict[str, list[float]] = {name: [] for name in ("one", "two", "bare.one", "bare.two")}
    with _cluster() as cluster:
        bench.start_afresh("nodes")
        sample = bench.sample(SAMPLE)
        bench.build(dry_run=True, sample=sample, workers=1)
        run, settings = bench.dry_run if sample < 1 else bench.run, _gather_settings(bench)
        items = [asdict(partition) for partition in longest_first(cut_partitions(run.blocks, settings.dim))]
        for turn in range(bench.turns):
            measured["one"].append(_on_nodes(1, run, settings, items))
            for count, name in ((1, "bare.one"), (2, "bare.two")):
                measured[name].append(_bare(count, run, settings, items))
            second = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            measured["two"].append(_on_nodes(2, run, settings, items))
            cluster.remove_node(second)
            logger.info("turn %d: %s tokens/s", turn + 1, {name: round(rates[-1]) for name, rates in measured.items()})
    rates = {name: np.array(values) for name, values in measured.items()}
    speedup, ceiling = rates["two"] / rates["one"], rates["bare.two"] / rates["bare.one"]
    tokens = sum(partition["tokens"] for partition in _facts(run, items))
    return {
        "nodes.speedup": float(np.median(speedup)),
        "nodes.ceiling": float(np.median(ceiling)),
        "nodes.of_ceiling": float(np.median(speedup / ceiling)),
        "nodes.over_bare": float(np.median(rates["two"] / rates["bare.two"])),
        "nodes.two_s": tokens / float(np.median(rates["two"])),
    }


@contextmanager
def _cluster() -> Iterator[Any]:
    """Start a head without CPUs and a node of one, and connect this process."""
    environment = {"RAY_AUTH_MODE": "token", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_USAGE_STATS_ENABLED": "0"}
    with mock.patch.dict(os.environ, environment):  # read when Ray is imported
        import ray
        from ray.cluster_utils import Cluster

        ray.shutdown()
        command = [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token", "--generate"]
        subprocess.run(command, check=True, capture_output=True)
        quiet = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **quiet})
        try:
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            os.environ["RAY_ADDRESS"] = cluster.address
            connect()
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def _gather_settings(bench: Bench) -> EmbedSettings:
    info, dtype = load_teacher_info(DEMO_TEACHER, bench.config)[0], resolve_dtype(bench.config.dtype, "cpu")
    resources = Resources(1, 1, "cpu")
    build: Any = SimpleNamespace(teacher=DEMO_TEACHER, config=bench.config, info=info, dtype=dtype, resources=resources)
    return gather_settings(build)


def _facts(run: RunFolder, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [storage.stats_of(run.partition_file(item["number"])) or {} for item in items]


def _on_nodes(count: int, run: RunFolder, settings: EmbedSettings, items: list[dict[str, Any]]) -> float:
    """Return tokens/s of the stage on `count` nodes."""
    arguments = {"run": run, "settings": settings}
    for _ in map_actors("occurrences", EmbedActor, arguments, items, Resources(count, count, "cpu")):
        pass
    partitions = _facts(run, items)
    actors = len({u["actor"] for u in partitions})
    if actors < count:
        logger.warning("only %d of %d actors did any work: give a larger --sample", actors, count)
    return rate(partitions)


def rate(partitions: list[dict[str, Any]]) -> float:
    """Return tokens/s from the moment when all actors are at work, which excludes start-up.

    Args:
        partitions: stats per partition: `actor`, `began` and `ended` (seconds), `tokens`. A partition that began before that
            moment counts in proportion to its time after it.
    """
    began = [min(u["began"] for u in partitions if u["actor"] == actor) for actor in {u["actor"] for u in partitions}]
    start, end = max(began), max(u["ended"] for u in partitions)
    shares = [(u["ended"] - max(u["began"], start)) / (u["ended"] - u["began"]) for u in partitions]
    tokens = sum(share * u["tokens"] for share, u in zip(shares, partitions, strict=True) if share > 0)
    return float(tokens / (end - start))


_actor: EmbedActor | None = None  # of a bare process


def _bare(count: int, run: RunFolder, settings: EmbedSettings, items: list[dict[str, Any]]) -> float:
    """Return tokens/s of the stage in `count` plain processes, whose teachers are loaded before the clock starts."""
    with multiprocessing.get_context("spawn").Pool(count, _make_actor, (run, settings)) as pool:
        pool.map(_call_actor, [items[-1]] * count, 1)
        began = time.perf_counter()
        done = pool.map(_call_actor, items, 1)
        return float(sum(done) / (time.perf_counter() - began))


def _make_actor(run: RunFolder, settings: EmbedSettings) -> None:
    global _actor
    _actor = EmbedActor(run=run, settings=settings)


def _call_actor(item: dict[str, Any]) -> int:
    assert _actor is not None
    return int(_actor(item)["tokens"])
