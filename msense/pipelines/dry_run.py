"""Dry runs: estimate from a finished plan what the whole run would read, write and need.

For a sample of the documents, everything that grows with the corpus is scaled up by the sample's share. Tokens that do not
occur in the sample are missing, so that the size of the dictionary is then a lower bound.
"""

import math
import time
from dataclasses import asdict

import numpy as np
import torch

from msense.clustering.allocation import POINTS_PER_SENSE
from msense.clustering.budget import SenseBudget, sense_bytes
from msense.clustering.mcl import MclConfig
from msense.config.build import BuildConfig
from msense.errors import InputError
from msense.io import filesystems
from msense.io.arrays import load_arrays
from msense.run.folder import RunFolder
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.runtime.resources import Node, Resources
from msense.stages.cluster import clustered_points, clustering_memory
from msense.stages.embedding_store import Duplicates, Partition, longest_first, partition_passages, record_type
from msense.stages.passages import PassageStats
from msense.stages.plan import PlanStats
from msense.stages.reading import EmbedSettings, TeacherReader, batches_of
from msense.teacher.memory import item_size, teacher_size
from msense.teacher.spec import TeacherInfo
from msense.text import size as shown_size

TIMED_SECONDS = 10.0


def estimate_run(
    run: RunFolder, info: TeacherInfo, config: BuildConfig, passages: PassageStats, plan: PlanStats, share: float
) -> Row:
    """Return what a whole run would read, write and need, in counts and bytes, from a plan of a share of it."""
    scale = 1 / share
    stored = load_arrays(run.thresholds, ("stored",))["stored"] * scale
    points = clustered_points(stored, config)
    seen = points[points > 0]
    senses = float(_most_senses(seen, config, info.dim))
    fs, folder = filesystems.filesystem(run.passages)
    return {
        "sample": share,
        "documents": passages.documents * scale,
        "bad_documents": sum(passages.bad_documents.values()) * scale,
        **{name: getattr(plan, name) * scale for name in ("passages", "tokens", "needed", "needed_tokens", "stored")},
        "saved": 1 - plan.needed_tokens / max(1, plan.tokens),
        "kinds": len(seen),
        "points_median": float(np.median(seen)) if len(seen) else 0.0,
        "points_mean": float(seen.mean()) if len(seen) else 0.0,
        "at_cap": int((seen >= config.max_occurrences).sum()) if config.max_occurrences else 0,
        "senses": senses,
        "passages_bytes": fs.du(folder) * scale,
        "occurrences_bytes": plan.stored * scale * record_type(info.dim).itemsize,
        "dictionary_bytes": senses * sense_bytes(info.dim),
        "clustering_memory": float(clustering_memory(run, config, info.dim, scale)),
    }


def _most_senses(points: np.ndarray, config: BuildConfig, dim: int) -> float:
    """Return the most senses that tokens of so many points can have in all."""
    if config.senses == "mcl":  # what the points cannot exceed, as every point may be a cluster
        mcl = MclConfig(**config.mcl)  # type: ignore[arg-type]
        share = np.where(points > mcl.large, mcl.large_share, mcl.share)
        return float(np.minimum(points, np.maximum(mcl.least, share * points)).sum())
    if config.senses == "auto":
        half = float(np.maximum(1, points // POINTS_PER_SENSE).sum())
        return min(half, SenseBudget.parse(config.sense_budget).senses(len(points), dim))
    return float(np.minimum(points, config.senses).sum())


def estimate_embeddings(partitions: list[Partition], settings: EmbedSettings, budget: float, share: float) -> Row:
    """Return what keeping the embeddings of all tokens would take and spare, from the partitions of a share of the corpus."""
    size = sum(partition.kept_bytes(*settings.kept_sizes) for partition in partitions) / share
    tokens = sum(partition.tokens for partition in partitions) / share
    whole = sum(partition.tokens for partition in partitions if partition.kept)
    kept = whole if share == 1 else tokens * min(1.0, budget / max(1, size))  # the budget is that of the whole
    limit = None if math.isinf(budget) else budget
    return {"embeddings_bytes": size, "budget_bytes": limit, "kept_tokens": kept, "reread_tokens": tokens - kept}


def estimate_resources(
    executor: Executor, run: RunFolder, settings: EmbedSettings, partitions: list[Partition], *, timed: bool
) -> Row:
    """Return the resources that the partitions of a run's passages would use; with `timed`, also the teacher's speed.

    The speed is in tokens per second of all actors together, each timed on one of the largest partitions; it is 0.0 if the
    corpus is too small.
    """
    resources = executor.resources
    estimate: Row = {"workers": resources.actors, "device": resources.device, "units": len(partitions)}
    estimate["teacher"] = estimate_teacher(executor, settings)
    if timed:
        items = [asdict(partition) for partition in longest_first(partitions)[: resources.actors]]
        arguments = {"run": run, "settings": settings}
        rows = list(executor.map_actors("timing the teacher", TeacherTimer, arguments, items))
        rates = [row["tokens"] / row["seconds"] for row in rows if row["seconds"]]
        estimate["tokens_per_second"] = sum(rates) / len(rates) * resources.actors if rates else 0.0
    return estimate | resources.described()


def estimate_teacher(executor: Executor, settings: EmbedSettings) -> Row:
    """Return the teacher's parameters, the bytes of its weights and of each rank on its device, and a GPU's memory.

    Raises:
        InputError: a GPU has less memory than that.
    """
    size, info, dtype = teacher_size(settings.teacher, settings.info.revision), settings.info, settings.dtype
    how: Row = {"ranks": settings.ranks, "offload": settings.offload}
    keeps_layers = info.layer not in (-1, size.layers)
    needed = size.rank_bytes(dtype, settings.token_budget, keeps_layers=keeps_layers, **how)
    memory = executor.run(_gpu_memory, device="cuda") if _has_gpu_now(executor.resources) else None
    if memory is not None and needed > memory * min(1.0, executor.resources.gpus_per_actor):
        raise InputError(_does_not_fit(settings, executor.resources.gpus_per_actor, needed, memory))
    weights = size.parameters * item_size(dtype)
    sizes = {"weights_bytes": weights, "rank_bytes": needed, "gpu_memory": memory}
    return {"parameters": size.parameters, "dtype": dtype, **sizes, **how}


def _has_gpu_now(resources: Resources) -> bool:
    """Return whether there is a GPU without waiting for the autoscaler."""
    return resources.device == "cuda" and any(
        node.count and node.offers.get("GPU") for node in resources.nodes or [Node({"GPU": 1}, 1, 1)]
    )


def _does_not_fit(settings: EmbedSettings, gpus: float, needed: int, memory: int) -> str:
    """Return the error message for a teacher that needs more memory than its share of a GPU has."""
    split = f"give --gpus-per-actor {2 * settings.ranks} to split it, or --offload to keep its weights in host memory"
    remedy = "give --gpus-per-actor 1" if gpus < 1 else "use larger GPUs" if settings.offload else split
    share = f"{gpus:g} of a GPU of" if gpus < 1 else "a GPU of"
    return (
        f"teacher {settings.teacher!r} needs about {shown_size(needed)} per rank in {settings.dtype} (weights and a batch), but "
        f"each has {share} {shown_size(memory)}: {remedy}"
    )


def _gpu_memory() -> int:
    """Return the memory of the GPU of this process in bytes."""
    return int(torch.cuda.mem_get_info()[1])


class TeacherTimer:
    """Times the teacher on one partition without writing anything."""

    def __init__(self, run: RunFolder, settings: EmbedSettings) -> None:
        self.run, self.settings, self.reader = run, settings, TeacherReader(settings)

    def __call__(self, item: Row) -> Row:
        """Return tokens and seconds of a short forward pass over a partition's passages, after one warm-up batch."""
        passages = partition_passages(self.run, Partition(**item), Duplicates(self.run))
        batches = batches_of(passages, np.arange(len(passages.keys)), self.settings)
        tokens, began = 0, 0.0
        for number, reading in enumerate(self.reader(passages, batches)):  # its checks wait for a GPU
            if number == 0:
                began = time.monotonic()
                continue
            tokens += len(reading.tokens)
            if time.monotonic() - began > TIMED_SECONDS:
                break
        return {"tokens": tokens, "seconds": time.monotonic() - began if tokens else 0.0}
