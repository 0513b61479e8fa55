"""The embed stage on two nodes over one, beside bare processes that run the same actors without Ray.

Nodes are Ray nodes of one core each on this machine, under a head without CPUs; the teacher is the demo's.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.shared import Bench, Figures
from msense.constants import DEMO_TEACHER
from msense.pipelines.job import THREADS
from msense.runtime import Executor, LocalExecutor
from msense.runtime.executor import Row
from msense.runtime.ray_executor import RayExecutor
from msense.runtime.resources import Resources
from msense.stages.embed import EmbedActor, EmbedSettings
from msense.stages.embedding_store import cut_partitions, longest_first
from msense.stages.passages import passage_spec
from msense.teacher.body import resolve_dtype
from msense.teacher.spec import load_teacher_info

logger = logging.getLogger("msense.benchmark")
SAMPLE = 0.4  # of the demo's corpus: two minutes or more per run on a core of 2026
STORE_BYTES = 500 << 20


def nodes(bench: Bench) -> Figures:
    """Compare the tokens per second of two nodes over one with those of two bare processes over one."""
    measured: dict[str, list[float]] = {name: [] for name in ("one", "two", "bare.one", "bare.two")}
    with _cluster() as cluster:
        bench.start_afresh("nodes")
        sample = bench.sample(SAMPLE)
        bench.build(dry_run=True, sample=sample, workers=1)
        run, settings = bench.dry_run if sample < 1 else bench.run, _embed_settings(bench)
        items = [asdict(partition) for partition in longest_first(cut_partitions(run.blocks, settings.info.dim))]
        arguments = {"run": run, "settings": settings}

        def measure(name: str, executor: Executor) -> int:
            rows = list(executor.map_actors("embed", EmbedActor, arguments, items))
            if len({row["actor"] for row in rows}) < executor.resources.actors:
                logger.warning("an actor of %s had no work: give a larger --sample", name)
            measured[name].append(rate(rows))
            return sum(row["tokens"] for row in rows)

        for turn in range(bench.turns):
            measure("one", RayExecutor(Resources(1, 1, "cpu")))
            measure("bare.one", LocalExecutor(1, "cpu"))
            measure("bare.two", LocalExecutor(2, "cpu"))
            second = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            tokens = measure("two", RayExecutor(Resources(2, 2, "cpu")))
            cluster.remove_node(second)
            logger.info("turn %d: %s tokens/s", turn + 1, {name: round(rates[-1]) for name, rates in measured.items()})
    rates = {name: np.array(values) for name, values in measured.items()}
    speedup, ceiling = rates["two"] / rates["one"], rates["bare.two"] / rates["bare.one"]
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
            RayExecutor.connect()
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def _embed_settings(bench: Bench) -> EmbedSettings:
    """Return the settings of the teacher actors, as a build has them."""
    config, (info, _) = bench.config, load_teacher_info(DEMO_TEACHER, bench.config)
    return EmbedSettings(
        teacher=DEMO_TEACHER,
        info=info,
        dtype=resolve_dtype(config.dtype, "cpu"),
        device="cpu",
        store_dtype=config.store_dtype,
        per_passage=config.per_passage,
        spec=passage_spec(info, config),
        threads=THREADS,
    )


def rate(partitions: Sequence[Row]) -> float:
    """Return tokens/s from the moment when all actors are at work, which excludes start-up.

    Args:
        partitions: stats per partition: `actor`, `began` and `ended` (seconds), `tokens`. A partition that began before that
            moment counts in proportion to its time after it.
    """
    began = [min(row["began"] for row in partitions if row["actor"] == a) for a in {row["actor"] for row in partitions}]
    start, end = max(began), max(row["ended"] for row in partitions)
    shares = [(row["ended"] - max(row["began"], start)) / (row["ended"] - row["began"]) for row in partitions]
    tokens = sum(share * row["tokens"] for share, row in zip(shares, partitions, strict=True) if share > 0)
    return float(tokens / (end - start))
