"""The embed stage in its steady state over the bare forward pass: same model, dtype, batches and cores."""

import time
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModel

from benchmarks.shared import Bench, Figures
from benchmarks.timing import processes
from msense.constants import DEMO_TEACHER
from msense.errors import InputError
from msense.io import storage
from msense.io.arrays import load_arrays
from msense.pipelines.job import THREADS
from msense.stages.embed import select_occurrences
from msense.stages.embedding_store import Duplicates, cut_partitions, partition_passages
from msense.stages.passages import passage_spec
from msense.teacher.batching import TOKEN_BUDGET, Batch, iter_batches
from msense.teacher.body import resolve_dtype
from msense.teacher.files import locate
from msense.teacher.spec import load_teacher_info

_model: Any = None  # of a process that runs the bare forward pass


def gather(bench: Bench) -> Figures:
    """Build the shared run afresh, with the bare forward pass before and after it."""
    if storage.names(bench.run.root) and not storage.exists(bench.run.manifest):
        raise InputError(f"{bench.run.root} is not a run folder, and gather would delete it: give another --output")
    storage.remove(bench.run.root)
    bench.build(dry_run=True)
    before = _bare_rate(bench)
    bench.build()
    after = _bare_rate(bench)
    files = [name for name in storage.markers(bench.run.occurrences) if name.endswith(".records")]
    partitions = pd.DataFrame([storage.stats_of(storage.join(bench.run.occurrences, name)) for name in files])
    actors = partitions.groupby("actor")
    # on both sides: sum over processes of tokens over the time from the first batch to the last
    rate = float((actors["tokens"].sum() / (actors["ended"].max() - actors["began"].min())).sum())
    bare = (before + after) / 2
    return {
        "gather.ratio": rate / bare,
        "gather.tokens_per_s": rate,
        "gather.bare_tokens_per_s": bare,
        "gather.bare_spread": abs(before - after) / bare,
        "gather.start_s": float(partitions["start_seconds"].max()),
    }


def _bare_rate(bench: Bench) -> float:
    """Return tokens/s of the plain transformers model over the stage's own batches, one process per worker."""
    info, _ = load_teacher_info(DEMO_TEACHER, bench.config)
    spec, threshold = passage_spec(info, bench.config), load_arrays(bench.run.thresholds)["threshold"]
    batches: list[Batch] = []
    for partition in cut_partitions(bench.run.blocks, info.dim):
        passages = partition_passages(bench.run, partition, Duplicates(bench.run))
        needed = np.unique(select_occurrences(passages, threshold, spec, bench.config.per_passage)["row"])
        batches += iter_batches([passages.row(row) for row in needed], TOKEN_BUDGET["cpu"])
    with processes(batches, bench.workers) as run:
        run(partial(_load, dtype=resolve_dtype(bench.config.dtype, "cpu")))
        return sum(run(_forward))


def _load(_: list[Batch], dtype: str) -> list[None]:
    """Load the model."""
    global _model
    torch.set_num_threads(THREADS)
    kind = getattr(torch, dtype)
    _model = AutoModel.from_pretrained(locate(DEMO_TEACHER), dtype=kind, trust_remote_code=False).eval()
    return []


def _forward(batches: list[Batch]) -> list[float]:
    """Run batches and return tokens/s."""
    given = [(torch.from_numpy(b.ids.astype(np.int64)), torch.from_numpy(b.mask.astype(np.int64))) for b in batches]
    began = time.perf_counter()
    with torch.inference_mode():
        for ids, mask in given:
            _model(input_ids=ids, attention_mask=mask)
    return [sum(int(b.mask.sum()) for b in batches) / (time.perf_counter() - began)]
