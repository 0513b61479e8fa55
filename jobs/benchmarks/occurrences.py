"""The embed stage over the bare forward pass, and the driver's memory as the corpus grows."""

import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shared import Bench, Figures
from msense.config.build import BuildConfig
from msense.constants import DEMO_TEACHER
from msense.io import storage
from msense.io.arrays import load_arrays
from msense.pipelines.build import THREADS
from msense.run.folder import RunFolder
from msense.stages.embed import select_occurrences
from msense.stages.embedding_store import Duplicates, cut_partitions, partition_passages
from msense.teacher.batching import TOKEN_BUDGET, pad_batch, token_batches
from msense.teacher.body import resolve_dtype
from msense.teacher.files import locate
from msense.teacher.spec import load_teacher_info


def gather(bench: Bench) -> Figures:
    """Compare the stage in its steady state with the bare forward pass: same model, dtype, batches and cores."""
    bench.start_afresh("gather")
    bench.build(dry_run=True)
    before = _bare_rate(bench)
    bench.build()
    after = _bare_rate(bench)
    partitions = [
        storage.stats_of(bench.run.partition_file(u.number)) or {} for u in cut_partitions(bench.run.blocks, bench.dim)
    ]
    rate = 0.0  # on both sides: sum over processes of tokens over the time from the first batch to the last
    for actor in {u["actor"] for u in partitions}:
        own = [u for u in partitions if u["actor"] == actor]
        rate += sum(u["tokens"] for u in own) / (max(u["ended"] for u in own) - min(u["began"] for u in own))
    bare = (before + after) / 2
    return {
        "gather.ratio": rate / bare,
        "gather.tokens_per_s": rate,
        "gather.bare_tokens_per_s": bare,
        "gather.bare_spread": abs(before - after) / bare,
        "gather.start_s": max(u["start_seconds"] for u in partitions),
    }


def _bare_rate(bench: Bench) -> float:
    """Return tokens/s of the plain transformers model over the stage's own batches, one process per worker."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(bench.workers), context.Queue()
    processes = [
        context.Process(target=_bare_forward, args=(bench.run, bench.config, i, bench.workers, start, results))
        for i in range(bench.workers)
    ]
    for process in processes:
        process.start()
    rates = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return float(sum(rates))


def _bare_forward(run: RunFolder, config: BuildConfig, number: int, of: int, start: Any, results: Any) -> None:
    """Run the batches of every of-th partition and report tokens/s."""
    import torch
    from transformers import AutoModel

    torch.set_num_threads(THREADS)
    info, _ = load_teacher_info(DEMO_TEACHER, config)
    spec, threshold = info.passage_spec(config), load_arrays(run.thresholds)["threshold"]
    dtype = getattr(torch, resolve_dtype(config.dtype, "cpu"))
    model = AutoModel.from_pretrained(locate(DEMO_TEACHER), dtype=dtype, trust_remote_code=False).eval()
    batches = []
    for partition in cut_partitions(run.blocks, info.dim)[number::of]:
        passages = partition_passages(run, partition, Duplicates(run))
        selection = select_occurrences(passages, threshold, spec, config.per_passage)
        rows = np.unique(selection.rows)
        for batch in token_batches(selection.lengths[rows], TOKEN_BUDGET["cpu"]):
            ids, mask = pad_batch([passages.ids[passages.offsets[r] : passages.offsets[r + 1]] for r in rows[batch]])
            batches.append((torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))))
    start.wait()
    began = time.time()
    with torch.inference_mode():
        for ids, mask in batches:
            model(input_ids=ids, attention_mask=mask)
    results.put(sum(int(mask.sum()) for _, mask in batches) / (time.time() - began))


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
        command += ["--teacher", str(teacher), "--max-occurrences", "2000", "--senses", "4", "--output"]
        for number in range(100):
            (text / f"{number:03d}.txt").write_text("\n".join(lines[number:] + lines[:number]) + "\n")
            if number in (9, 99):
                output = Path(scratch, f"run-{number}")
                subprocess.run([*command, str(output)], check=True, stdout=subprocess.DEVNULL)
                peaks.append(json.loads((output / "summary.json").read_text())["driver_peak"])
    return {"driver.growth": peaks[1] / peaks[0], "driver.peak_mb": peaks[1] / 1e6}
