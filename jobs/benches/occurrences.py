"""The occurrences stage against the bare model, and the driver's memory as the corpus grows.

In: a corpus; out: ratios. Holds a unit's passages in each process of the bare model.
"""

import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benches.shared import Bench, Figures
from msense import storage
from msense.build import THREADS
from msense.config import DEMO_TEACHER, BuildConfig
from msense.occurrences import Duplicates, cut_units, select_unit, unit_passages
from msense.run_folder import RunFolder
from msense.teacher import TOKEN_BUDGET, describe, pad_batch, resolve_dtype, token_batches
from msense.teacher_folder import locate


def gather(bench: Bench) -> Figures:
    """Occurrences stage in its steady state over the bare forward pass: same model, dtype, batches and cores."""
    bench.start_afresh("gather")
    bench.build(dry_run=True)
    before = _bare_rate(bench)
    bench.build()
    after = _bare_rate(bench)
    units = [storage.facts_of(bench.run.unit_file(u.number)) or {} for u in cut_units(bench.run.blocks, bench.dim)]
    rate = 0.0  # on both sides: the sum over processes of tokens over the time from its first batch to its last
    for actor in {u["actor"] for u in units}:
        mine = [u for u in units if u["actor"] == actor]
        seconds = max(u["ended"] for u in mine) - min(u["began"] for u in mine)
        rate += sum(u["tokens"] for u in mine) / seconds
    bare = (before + after) / 2
    return {
        "gather.ratio": rate / bare,
        "gather.tokens_per_s": rate,
        "gather.bare_tokens_per_s": bare,
        "gather.bare_spread": abs(before - after) / bare,
        "gather.start_s": max(u["start_seconds"] for u in units),
    }


def _bare_rate(bench: Bench) -> float:
    """Return tokens/s of the plain transformers model over the stage's own batches, a process a worker."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(bench.workers), context.Queue()
    processes = [
        context.Process(target=_bare_forward, args=(bench.run, bench.config, i, bench.workers, start, results))
        for i in range(bench.workers)
    ]
    for process in processes:
        process.start()
    told = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return float(sum(tokens / (ended - began) for tokens, began, ended in told))


def _bare_forward(run: RunFolder, config: BuildConfig, number: int, of: int, start: Any, results: Any) -> None:  # noqa: ANN401 - multiprocessing's
    """Run every of-th unit's batches through the bare model and tell (tokens, began, ended)."""
    import torch
    from transformers import AutoModel

    torch.set_num_threads(THREADS)
    info, _ = describe(DEMO_TEACHER, config)
    spec, threshold = info.passage_spec(config), storage.load_arrays(run.thresholds)["threshold"]
    dtype = getattr(torch, resolve_dtype(config.dtype, "cpu"))
    model = AutoModel.from_pretrained(locate(DEMO_TEACHER), dtype=dtype, trust_remote_code=False).eval()
    batches = []
    for unit in cut_units(run.blocks, info.dim)[number::of]:
        passages = unit_passages(run, unit, Duplicates(run))
        selection = select_unit(passages, threshold, spec, config.per_passage)
        rows = np.unique(selection.rows)
        for batch in token_batches(selection.lengths[rows], TOKEN_BUDGET["cpu"]):
            ids, mask = pad_batch([passages.ids[passages.offsets[r] : passages.offsets[r + 1]] for r in rows[batch]])
            batches.append((torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))))
    start.wait()
    began = time.time()
    with torch.inference_mode():
        for ids, mask in batches:
            model(input_ids=ids, attention_mask=mask)
    results.put((sum(int(mask.sum()) for _, mask in batches), began, time.time()))


def driver(bench: Bench) -> Figures:
    """The driver's peak memory for a corpus ten times larger over that for the corpus, with a tiny random teacher."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    peaks = []
    with tempfile.TemporaryDirectory() as scratch:
        teacher, text = Path(scratch, "teacher"), Path(scratch, "text")
        BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        ).save_pretrained(teacher)
        AutoTokenizer.from_pretrained(locate(DEMO_TEACHER), trust_remote_code=False).save_pretrained(teacher)
        text.mkdir()
        words = np.array(
            [
                f"{a}{b}"
                for a in ("re", "un", "in", "de")
                for b in ("port", "form", "act", "test", "light", "side", "turn")
            ]
        )
        rng = np.random.default_rng(0)
        lines = [" ".join(words[rng.integers(0, len(words), 40)]) for _ in range(2000)]
        for number in range(100):
            (text / f"{number:03d}.txt").write_text("\n".join(lines[number:] + lines[:number]) + "\n")
            if number in (9, 99):
                output = Path(scratch, f"run-{number}")
                command = [sys.executable, str(Path(__file__).parents[1] / "build_dict.py")]
                command += [
                    "--corpus",
                    str(text),
                    "--teacher",
                    str(teacher),
                    "--output",
                    str(output),
                    "--max-occurrences",
                    "2000",
                ]
                subprocess.run([*command, "--senses", "4"], check=True, stdout=subprocess.DEVNULL)
                peaks.append(json.loads((output / "summary.json").read_text())["driver_peak"])
    return {"driver.growth": peaks[1] / peaks[0], "driver.peak_mb": peaks[1] / 1e6}
