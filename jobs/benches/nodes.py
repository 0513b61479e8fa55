"""The occurrences stage on two nodes against one, and a whole build on Ray against the same stages without it.

In: a corpus, read by the demo's teacher. Out: ratios, medians of turns. Nodes are Ray's on this machine, a core each, under
a head without CPUs; a bare process calls what an actor calls. Holds counts only.
"""

import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any
from unittest import mock

import numpy as np

from benches.shared import Bench, Figures
from msense import storage
from msense.build import THREADS
from msense.config import DEMO_TEACHER
from msense.occurrences import GatherSettings, OccurrenceActor, cut_units, longest_first
from msense.run_folder import RunFolder
from msense.runtime import Resources, connect, map_actors
from msense.teacher import describe, resolve_dtype

logger = logging.getLogger("msense.bench")

TURNS = 3
SAMPLE = {"nodes": 0.4, "overhead": 0.2}  # of the demo's corpus: two minutes or more a run on a core of 2026
WARM = 0.1  # of that sample, read before the clock runs
STORE_BYTES = 500 << 20


def nodes(bench: Bench) -> Figures:
    """Tokens per second of two nodes over one, and of two bare processes over one: the first over the second."""
    told: dict[str, list[float]] = {name: [] for name in ("one", "two", "bare.one", "bare.two")}
    with _cluster() as cluster:
        bench.start_afresh("nodes")
        sample = bench.sample(SAMPLE["nodes"])
        bench.build(dry_run=True, sample=sample, workers=1)
        run, settings = bench.dry_run if sample < 1 else bench.run, _gather_settings(bench)
        items = [asdict(unit) for unit in longest_first(cut_units(run.blocks, settings.dim))]
        for turn in range(bench.turns(TURNS)):
            ways: dict[str, Callable[[], float]] = {
                "one": lambda: _on_nodes(1, run, settings, items),
                "bare.one": lambda: _bare(1, run, settings, items),
                "bare.two": lambda: _bare(2, run, settings, items),
            }
            for name, way in ways.items():
                told[name].append(way())
            second = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            told["two"].append(_on_nodes(2, run, settings, items))
            cluster.remove_node(second)
            logger.info("turn %d: %s tokens/s", turn + 1, {name: round(rates[-1]) for name, rates in told.items()})
    rates = {name: np.array(found) for name, found in told.items()}
    speedup, ceiling = rates["two"] / rates["one"], rates["bare.two"] / rates["bare.one"]
    tokens = sum((storage.facts_of(run.unit_file(item["number"])) or {})["tokens"] for item in items)
    return {
        "nodes.speedup": float(np.median(speedup)),
        "nodes.ceiling": float(np.median(ceiling)),
        "nodes.of_ceiling": float(np.median(speedup / ceiling)),
        "nodes.over_bare": float(np.median(rates["two"] / rates["bare.two"])),
        "nodes.two_s": tokens / float(np.median(rates["two"])),
    }


@contextmanager
def _cluster() -> Iterator[Any]:
    """Give a cluster of a head without CPUs and a node of one, to which this process is connected."""
    environment = {"RAY_AUTH_MODE": "token", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_USAGE_STATS_ENABLED": "0"}
    with mock.patch.dict(os.environ, environment):  # which Ray reads when it is imported
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


def _gather_settings(bench: Bench) -> GatherSettings:
    config = bench.config
    info, _ = describe(DEMO_TEACHER, config)
    return GatherSettings(
        teacher=DEMO_TEACHER,
        revision=info.revision,
        fingerprint=info.fingerprint,
        layer=config.layer,
        dtype=resolve_dtype(config.dtype, "cpu"),
        device="cpu",
        store_dtype=config.store_dtype,
        per_passage=config.per_passage,
        spec=info.passage_spec(config),
        dim=info.dim,
        threads=THREADS,
    )


def _on_nodes(count: int, run: RunFolder, settings: GatherSettings, items: list[dict[str, Any]]) -> float:
    """Return tokens/s of the stage on so many nodes."""
    arguments = {"run": run, "settings": settings}
    for _ in map_actors("occurrences", OccurrenceActor, arguments, items, Resources(count, count, "cpu")):
        pass
    units = [storage.facts_of(run.unit_file(item["number"])) or {} for item in items]
    actors = len({u["actor"] for u in units})
    if actors < count:
        logger.warning("%d of %d actors did all the work: give a larger --sample", actors, count)
    return rate(units)


def rate(units: list[dict[str, Any]]) -> float:
    """Return tokens/s from the moment when all actors are at work to the end, start-up left out.

    Args:
        units: facts of each: `actor`, `began` and `ended` (seconds of the clock), `tokens`. One that began before that
            moment counts by the share of its time that lies after it.
    """
    began = [min(u["began"] for u in units if u["actor"] == actor) for actor in {u["actor"] for u in units}]
    start, end = max(began), max(u["ended"] for u in units)
    shares = [(u["ended"] - max(u["began"], start)) / (u["ended"] - u["began"]) for u in units]
    tokens = sum(share * u["tokens"] for share, u in zip(shares, units, strict=True) if share > 0)
    return float(tokens / (end - start))


_actor: OccurrenceActor | None = None  # of a bare process


def _bare(count: int, run: RunFolder, settings: GatherSettings, items: list[dict[str, Any]]) -> float:
    """Return tokens/s of the stage in so many plain processes, whose teachers are loaded before the clock runs."""
    with multiprocessing.get_context("spawn").Pool(count, _make_actor, (run, settings)) as pool:
        pool.map(_call_actor, [items[-1]] * count, 1)
        began = time.perf_counter()
        done = pool.map(_call_actor, items, 1)
        return float(sum(done) / (time.perf_counter() - began))


def _make_actor(run: RunFolder, settings: GatherSettings) -> None:
    global _actor
    _actor = OccurrenceActor(run=run, settings=settings)


def _call_actor(item: dict[str, Any]) -> int:
    assert _actor is not None
    return int(_actor(item)["tokens"])


def overhead(bench: Bench) -> Figures:
    """Seconds of a build's stages on Ray with one worker over those in one process without it, start-up left out."""
    seconds: dict[str, list[dict[str, float]]] = {"ray": [], "bare": []}
    for turn in range(bench.turns(TURNS)):
        for name, way in (("bare", _build_bare), ("ray", _build_on_ray)):
            seconds[name].append(_in_process(way, bench))
            logger.info("turn %d: %s %s", turn + 1, name, seconds[name][-1])
    totals = {name: np.array([sum(stages.values()) for stages in told]) for name, told in seconds.items()}
    figures = {"overhead.ratio": float(np.median(totals["ray"] / totals["bare"]))}
    for stage in seconds["ray"][0]:
        pairs = zip(seconds["ray"], seconds["bare"], strict=True)
        figures[f"overhead.{stage}"] = float(np.median([ray[stage] - bare[stage] for ray, bare in pairs]))
    return figures | {"overhead.bare_s": float(np.median(totals["bare"]))}


def _in_process(way: Callable[[Bench], dict[str, float]], bench: Bench) -> dict[str, float]:
    """Call in a process of its own, from which all memory and Ray go."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(way, (bench,))


def _build_on_ray(bench: Bench) -> dict[str, float]:
    connect(1)
    return _timed_build(bench)


def _build_bare(bench: Bench) -> dict[str, float]:
    with without_ray():
        return _timed_build(bench)


def _timed_build(bench: Bench) -> dict[str, float]:
    """Build a part and forget it, so that all is imported and started; build anew, and return the seconds of each stage.

    The occurrences stage is timed from its first unit on: an actor is a process of its own, on Ray alone.
    """
    sample = bench.sample(SAMPLE["overhead"])
    for share in (WARM * sample, sample):
        bench.start_afresh("overhead")
        summary = bench.build(workers=1, sample=share)
    found = {name: float(facts["seconds"]) for name, facts in summary["stages"].items()}
    units = cut_units(bench.run.blocks, bench.dim)
    facts = [storage.facts_of(bench.run.unit_file(unit.number)) or {} for unit in units]
    return found | {"occurrences": max(f["ended"] for f in facts) - min(f["began"] for f in facts)}


@contextmanager
def without_ray() -> Iterator[None]:
    """Have all stages do their work in this process, one piece after the other."""
    from msense import runtime

    def pieces(work: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
        return (runtime.unwrap(runtime.guard(work, item)) for item in items)

    def reduce(name: str, work: Callable[..., Any], slices: list[Any], resources: Resources, *common: Any) -> Any:  # noqa: ANN401
        first, *others = (work(item, *common) for item in slices)
        return runtime._merge(first, *others)

    fakes: dict[str, Any] = {
        "connect": lambda workers=None, gpus_per_actor=1.0: Resources(1, 1, "cpu"),
        "map_data": lambda name, work, items, resources: pieces(work, items),
        "map_actors": lambda name, actor, arguments, items, resources: pieces(actor(**arguments), items),
        "map_tasks": lambda name, work, items, resources, *common, needs=None: pieces(
            lambda item: work(item, *common), items
        ),
        "reduce_tasks": reduce,
        "run_task": lambda work, *arguments, device="cpu": work(*arguments),
        "submit": lambda work, *arguments: work(*arguments),
        "get": lambda value: value,
    }
    with ExitStack() as patches:
        for module in [module for name, module in sys.modules.items() if name.startswith("msense.")]:
            for name, fake in fakes.items():
                if module is not runtime and getattr(module, name, None) is getattr(runtime, name):
                    patches.enter_context(mock.patch.object(module, name, fake))
        yield
