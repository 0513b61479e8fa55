"""The embed stage over the bare forward pass, and the driver's memory as the corpus grows."""

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shared import Bench, Figures
from benchmarks.timing import Processes
from msense.constants import DEMO_TEACHER
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
    """Compare the stage in its steady state with the bare forward pass: same model, dtype, batches and cores."""
    bench.start_afresh("gather")
    bench.build(dry_run=True)
    before = _bare_rate(bench)
    bench.build()
    after = _bare_rate(bench)
    files = [name for name in storage.markers(bench.run.occurrences) if name.endswith(".records")]
    partitions = [storage.stats_of(storage.join(bench.run.occurrences, name)) or {} for name in files]
    rate = 0.0  # on both sides: sum over processes of tokens over the time from the first batch to the last
    for actor in {row["actor"] for row in partitions}:
        own = [row for row in partitions if row["actor"] == actor]
        rate += sum(row["tokens"] for row in own) / (
            max(row["ended"] for row in own) - min(row["began"] for row in own)
        )
    bare = (before + after) / 2
    return {
        "gather.ratio": rate / bare,
        "gather.tokens_per_s": rate,
        "gather.bare_tokens_per_s": bare,
        "gather.bare_spread": abs(before - after) / bare,
        "gather.start_s": max(row["start_seconds"] for row in partitions),
    }


def _bare_rate(bench: Bench) -> float:
    """Return tokens/s of the plain transformers model over the stage's own batches, one process per worker."""
    info, _ = load_teacher_info(DEMO_TEACHER, bench.config)
    spec, threshold = passage_spec(info, bench.config), load_arrays(bench.run.thresholds)["threshold"]
    batches: list[Batch] = []
    for partition in cut_partitions(bench.run.blocks, info.dim):
        passages = partition_passages(bench.run, partition, Duplicates(bench.run))
        needed = np.unique(select_occurrences(passages, threshold, spec, bench.config.per_passage).rows)
        batches += iter_batches([passages.row(row) for row in needed], TOKEN_BUDGET["cpu"])
    with Processes(bench.workers) as processes:
        processes.give(batches)
        processes.run(partial(_load, dtype=resolve_dtype(bench.config.dtype, "cpu")))
        return sum(processes.run(_forward))


def _load(_: list[Batch], dtype: str) -> list[None]:
    """Load the model."""
    global _model
    import torch
    from transformers import AutoModel

    torch.set_num_threads(THREADS)
    folder, kind = locate(DEMO_TEACHER), getattr(torch, dtype)
    _model = AutoModel.from_pretrained(folder, dtype=kind, trust_remote_code=False).eval()
    return [None]


def _forward(batches: list[Batch]) -> list[float]:
    """Run batches and return tokens/s."""
    import torch

    given = [(torch.from_numpy(b.ids.astype(np.int64)), torch.from_numpy(b.mask.astype(np.int64))) for b in batches]
    began = time.perf_counter()
    with torch.inference_mode():
        for ids, mask in given:
            _model(input_ids=ids, attention_mask=mask)
    return [sum(int(b.mask.sum()) for b in batches) / (time.perf_counter() - began)]


def driver(bench: Bench) -> Figures:
    """Compare the driver's peak memory for a corpus and one ten times larger, with a tiny random teacher."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    rng, peaks = np.random.default_rng(0), []
    ends = ("port", "form", "act", "test", "light", "side", "turn")
    words = np.array([f"{a}{b}" for a in ("re", "un", "in", "de") for b in ends])
    lines = [" ".join(words[rng.integers(0, len(words), 40)]) for _ in range(2000)]
    with tempfile.TemporaryDirectory() as scratch:
        teacher, text = Path(scratch, "teacher"), Path(scratch, "text")
        small = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        BertModel(small).save_pretrained(teacher)
        AutoTokenizer.from_pretrained(locate(DEMO_TEACHER), trust_remote_code=False).save_pretrained(teacher)
        text.mkdir()
        command = [sys.executable, str(Path(__file__).parents[1] / "build_dict.py"), "--corpus", str(text)]
        command += ["--teacher", str(teacher), "--max-occurrences", "2000", "--senses", "4"]
        for files in (10, 100):
            for number in range(files):
                (text / f"{number:03d}.txt").write_text("\n".join(lines[number:] + lines[:number]) + "\n")
            output = Path(scratch, f"run-{files}")
            subprocess.run([*command, "--output", str(output)], check=True, stdout=subprocess.DEVNULL)
            peaks.append(json.loads((output / "summary.json").read_text())["driver_peak"])
    return {"driver.growth": peaks[1] / peaks[0], "driver.peak_mb": peaks[1] / 1e6}
