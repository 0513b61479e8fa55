"""Dry runs: estimate from a finished plan what the whole run would read, write and need.

For a sample of the documents, everything that grows with the corpus is scaled up by the sample's share. Tokens that do not
occur in the sample are missing, so that the size of the dictionary is then a lower bound.
"""

import time
from dataclasses import asdict

import numpy as np

from msense.clustering.budget import SenseBudget, sense_bytes
from msense.clustering.kmeans import POINTS_PER_SENSE
from msense.clustering.mcl import MclConfig
from msense.config.build import BuildConfig
from msense.corpus.passages import Passages
from msense.io import filesystems
from msense.io.arrays import load_arrays
from msense.run.folder import RunFolder
from msense.runtime import Executor
from msense.runtime.executor import Row
from msense.stages.cluster import clustered_points, clustering_memory
from msense.stages.embed import EmbedActor, select_occurrences
from msense.stages.embedding_store import Partition, partition_passages, record_type
from msense.stages.label import LabelActor
from msense.stages.passages import PassageStats
from msense.stages.plan import PlanStats
from msense.teacher.batching import TOKEN_BUDGET
from msense.teacher.model import Teacher, embed_tokens
from msense.teacher.spec import TeacherInfo

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
    record = record_type(info.dim).itemsize
    fs, folder = filesystems.filesystem(run.passages)
    return {
        "sample": share,
        "documents": passages.documents * scale,
        "bad_documents": sum(passages.bad_documents.values()) * scale,
        "passages": plan.passages * scale,
        "tokens": plan.tokens * scale,
        "needed": plan.needed * scale,
        "needed_tokens": plan.needed_tokens * scale,
        "saved": 1 - plan.needed_tokens / max(1, plan.tokens),
        "stored": plan.stored * scale,
        "kinds": len(seen),
        "points_median": float(np.median(seen)) if len(seen) else 0.0,
        "points_mean": float(seen.mean()) if len(seen) else 0.0,
        "at_cap": int((seen >= config.max_occurrences).sum()) if config.max_occurrences else 0,
        "senses": senses,
        "passages_bytes": fs.du(folder) * scale,
        "occurrences_bytes": plan.stored * scale * record,
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


class TeacherTimer(EmbedActor):
    """Times the teacher on one partition without writing anything."""

    def __call__(self, item: Row) -> Row:
        """Return tokens and seconds of a short forward pass after one warm-up batch."""
        passages = partition_passages(self.run, Partition(**item), self.duplicates)
        selection = select_occurrences(passages, self.threshold, self.settings.spec, self.settings.per_passage)
        rows = np.unique(selection.rows)
        return time_batches(self.teacher, passages, rows, TOKEN_BUDGET[self.settings.device])


def time_batches(teacher: Teacher, passages: Passages, rows: np.ndarray, budget: int) -> Row:
    """Return tokens and seconds of a short forward pass over passages int64 [R], after one warm-up batch."""
    tokens, began = 0, 0.0
    for number, (batch, hidden) in enumerate(embed_tokens(teacher, [passages.row(row) for row in rows], budget)):
        hidden.sum().item()  # waits for a GPU
        if number == 0:
            began = time.monotonic()
            continue
        tokens += int(batch.mask.sum())
        if time.monotonic() - began > TIMED_SECONDS:
            break
    return {"tokens": tokens, "seconds": time.monotonic() - began if tokens else 0.0}


class LabelTimer(LabelActor):
    """Times the teacher on one partition of labels without writing anything."""

    def __call__(self, item: Row) -> Row:
        """Return tokens and seconds of a short forward pass after one warm-up batch."""
        passages, _ = self.chooser.partition(Partition(**item))
        budget = TOKEN_BUDGET[self.settings.embed.device]
        return time_batches(self.teacher, passages, np.arange(len(passages.keys)), budget)


def time_teacher(timer: type, arguments: Row, partitions: list[Partition], executor: Executor) -> float:
    """Return the tokens per second of all actors together; 0.0 if the corpus is too small to time.

    Each actor, `timer(**arguments)`, reads one of the largest partitions.
    """
    actors = executor.resources.actors
    items = [asdict(partition) for partition in sorted(partitions, key=lambda p: -p.stored)[:actors]]
    timed = list(executor.map_actors("timing the teacher", timer, arguments, items))
    rates = [row["tokens"] / row["seconds"] for row in timed if row["seconds"]]
    return sum(rates) / len(rates) * actors if rates else 0.0
