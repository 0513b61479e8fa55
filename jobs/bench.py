"""Measure what the README claims: `python jobs/bench.py gather plan kmeans replace driver --corpus FILES`.

Every figure that matters is a ratio of two things measured side by side in this run. The last line of the output is one
JSON object.
"""

import argparse
import json
import logging
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from msense import clustering, storage
from msense.build import THREADS, build_dictionary, cluster_settings
from msense.cli import run_job
from msense.config import DEMO_CORPUS, DEMO_TEACHER, BuildConfig
from msense.occurrences import Duplicates, cut_units, select_unit, unit_passages
from msense.run_folder import RunFolder
from msense.runtime import connect
from msense.sampling import Histogram, select, thresholds
from msense.teacher import TOKEN_BUDGET, describe, pad_batch, resolve_dtype, token_batches
from msense.teacher_folder import locate
from msense.tokens import Passages, PassageSpec
from msense.units import ClusterSettings, Range, read_ranges, sample

logger = logging.getLogger("msense.bench")
Figures = dict[str, float]


class Bench:
    """One real run that several measurements share: its occurrences and centroids are kept."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.workers: int = given.workers
        self.senses: int = given.senses
        self.config = BuildConfig(
            corpus=tuple(given.corpus),
            teacher=DEMO_TEACHER,
            workers=given.workers,
            senses=given.senses,
            max_occurrences=given.max_occurrences,
            output=given.output,
            keep=("passages", "occurrences", "centroids"),
        )
        self.run = RunFolder(storage.absolute(given.output))

    def build(self, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - settings
        """Build the dictionary of the shared run, or take it as it is."""
        return build_dictionary(self.config.model_copy(update=changes))

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Read the clustered points: token ids int32 [N], grouped, and embeddings float16 [N, D]."""
        settings = self.cluster_settings()
        offsets = storage.load_arrays(self.run.offsets)["offsets"]
        whole = [Range(unit, int(row[0]), int(row[-1])) for unit, row in enumerate(offsets)]
        records, _ = read_ranges(settings, whole)
        order, _ = sample(records["key"], records["token"], settings.max_occurrences)
        return records["token"][order], records["embedding"][order].view(np.float16)

    def cluster_settings(self) -> ClusterSettings:
        """Return the settings of the clustering stage."""
        return cluster_settings(self.config, self.run, describe(DEMO_TEACHER, self.config)[0])


def gather(bench: Bench) -> Figures:
    """Occurrences stage in its steady state over the bare forward pass: same model, dtype, batches and cores."""
    storage.remove(bench.run.root)
    bench.build(dry_run=True)
    before = _bare_rate(bench)
    bench.build()
    after = _bare_rate(bench)
    units = [storage.facts_of(bench.run.unit_file(u.number)) or {} for u in cut_units(bench.run.blocks, _dim(bench))]
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


def _dim(bench: Bench) -> int:
    return describe(DEMO_TEACHER, bench.config)[0].dim


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
    model = AutoModel.from_pretrained(locate(DEMO_TEACHER), dtype=dtype).eval()
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


def plan(bench: Bench) -> Figures:
    """The planning pass on a Zipf stream of N = 6 cap V ln V token ids in passages of 100."""
    vocab, cap, length = 5000, 200, 100
    total = int(6 * cap * vocab * math.log(vocab))
    rng = np.random.default_rng(0)
    cumulative = np.cumsum(1 / np.arange(1, vocab + 1))
    spec, block = PassageSpec(max_length=length), 65_536 // length
    histogram, seconds = Histogram.empty(vocab), 0.0
    blocks = []
    for start in range(0, total // length, block):
        count = min(block, total // length - start)
        ids = np.searchsorted(cumulative, rng.random(count * length) * cumulative[-1]).astype(np.int32)
        keys = rng.integers(0, 2**64, count, dtype=np.uint64)
        blocks.append(Passages(keys, np.zeros(count, np.int32), ids, np.arange(count + 1, dtype=np.int64) * length))
    per_passage = cap // 20
    began = time.process_time()
    for passages in blocks:
        histogram.add(passages, spec, per_passage)
    threshold = thresholds(histogram, cap)
    read = sum(len(np.unique(p.rows()[select(p, threshold, spec, per_passage)])) for p in blocks)
    seconds = time.process_time() - began
    covered = thresholds(histogram, cap, 0.95)
    read_covered = sum(len(np.unique(p.rows()[select(p, covered, spec, per_passage)])) for p in blocks)
    passages_in_all = sum(len(p.keys) for p in blocks)
    return {
        "plan.read_fraction": read / passages_in_all,
        "plan.coverage_fraction": read_covered / passages_in_all,
        "plan.tokens_per_s_core": passages_in_all * length / seconds,
    }


def kmeans(bench: Bench) -> Figures:
    """The clustering stage, reading and writing included, over scikit-learn loops on the same points in memory."""
    summary = bench.build()
    settings, shards = bench.cluster_settings(), storage.load_arrays(bench.run.thresholds)["shards"]
    resources = connect(bench.workers)
    del summary
    seconds = []
    for _ in range(3):  # the first has the workers import torch
        storage.remove(bench.run.centroids)
        began = time.perf_counter()
        files = clustering.cluster(settings, shards, resources)
        seconds.append(time.perf_counter() - began)
    stage = min(seconds[1:])
    found = [storage.load_arrays(file, ("tokens", "inertia")) for file in files]
    ours = dict(zip(*(np.concatenate([f[n] for f in found]).tolist() for n in ("tokens", "inertia")), strict=True))
    tokens, points = bench.points()
    token, start, count = np.unique(tokens, return_index=True, return_counts=True)
    more = count > bench.senses
    chosen = [points[a : a + n].astype(np.float32) for a, n in zip(start[more], count[more], strict=True)]
    peers = {
        "default": min(_sklearn(chosen, bench.senses, None) for _ in range(2)),
        "one_thread": min(_sklearn(chosen, bench.senses, 1) for _ in range(2)),
        "one_thread_a_core": min(_sklearn_processes(chosen, bench.senses, bench.workers) for _ in range(2)),
    }
    best = min(peers, key=lambda name: peers[name][0])
    theirs = peers[best][1]
    return {
        "kmeans.speedup": peers[best][0] / stage,
        **{f"kmeans.speedup_{name}": seconds / stage for name, (seconds, _) in peers.items()},
        "kmeans.stage_s": stage,
        "kmeans.inertia_ratio": sum(ours[t] for t in token[more].tolist()) / sum(theirs),
        "kmeans.tokens": float(more.sum()),
        "kmeans.points": float(count[more].sum()),
    }


def _sklearn(points: list[np.ndarray], k: int, threads: int | None) -> tuple[float, list[float]]:
    """Return seconds and inertias of a loop over tokens."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore")  # fewer distinct points than clusters
        KMeans(2, n_init="auto", random_state=0).fit(points[0])
        began = time.perf_counter()
        inertia = [float(KMeans(n_clusters=k, n_init="auto", random_state=0).fit(p).inertia_) for p in points]
        return time.perf_counter() - began, inertia


def _sklearn_processes(points: list[np.ndarray], k: int, processes: int) -> tuple[float, list[float]]:
    """The same loop on one thread a core, tokens dealt out by turns; processes and data are ready before the clock."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=_sklearn_share, args=(points[i::processes], k, i, start, results))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    told = sorted(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    seconds = max(ended for _, _, ended, _ in told) - min(began for _, began, _, _ in told)
    return seconds, [value for _, _, _, inertia in told for value in inertia]


def _sklearn_share(points: list[np.ndarray], k: int, number: int, start: Any, results: Any) -> None:  # noqa: ANN401 - multiprocessing's
    _sklearn(points[:1], k, 1)
    start.wait()
    began = time.time()
    _, inertia = _sklearn(points, k, 1)
    results.put((number, began, time.time(), inertia))


def replace(bench: Bench) -> Figures:
    """Replacing 500k embeddings by their nearest senses over one product with 20 vectors, both on one thread."""
    import torch

    from msense import SenseDictionary

    bench.build()
    dictionary = SenseDictionary.load(bench.run.dictionary)
    tokens, points = bench.points()
    ids, embeddings = _stream(bench, tokens, points, 500_000)
    torch.set_num_threads(1)
    other = torch.randn(embeddings.shape[1], 20)
    given, out = torch.from_numpy(embeddings), np.empty_like(embeddings)
    dictionary.replace(ids[:1000], embeddings[:1000])
    ratios, seconds = [], []
    for _ in range(5):
        began = time.perf_counter()
        given @ other
        middle = time.perf_counter()
        dictionary.replace(ids, embeddings, out=out)
        seconds.append(time.perf_counter() - middle)
        ratios.append(seconds[-1] / (middle - began))
    soft = time.perf_counter()
    dictionary.replace(ids, embeddings, temperature=1 / 3, out=out)
    soft = time.perf_counter() - soft
    median = int(np.argsort(ratios)[2])
    return {
        "replace.ratio": ratios[median],
        "replace.embeddings_per_s": len(ids) / seconds[median],
        "replace.soft_over_hard": soft / seconds[median],
    }


def _stream(bench: Bench, tokens: np.ndarray, points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the corpus's first `count` tokens, each with the embedding of some occurrence of that token."""
    units = cut_units(bench.run.blocks, points.shape[1])
    ids = np.concatenate([unit_passages(bench.run, unit, Duplicates(bench.run)).ids for unit in units])
    token, start, number = np.unique(tokens, return_index=True, return_counts=True)
    ids = np.resize(ids[np.isin(ids, token)], count)
    place = np.searchsorted(token, ids)
    chosen = start[place] + np.random.default_rng(0).integers(0, 2**31, count) % number[place]
    return ids, points[chosen].astype(np.float32)


def driver(bench: Bench) -> Figures:
    """The driver's peak memory for a corpus ten times larger over that for the corpus, with a tiny random teacher."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    peaks = []
    with tempfile.TemporaryDirectory() as scratch:
        teacher, text = Path(scratch, "teacher"), Path(scratch, "text")
        BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        ).save_pretrained(teacher)
        AutoTokenizer.from_pretrained(locate(DEMO_TEACHER)).save_pretrained(teacher)
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
                command = [sys.executable, str(Path(__file__).with_name("build_dict.py"))]
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


BENCHES: dict[str, Callable[[Bench], Figures]] = {f.__name__: f for f in (gather, plan, kmeans, replace, driver)}


def main() -> None:
    """Run the measurements asked for and print one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=BENCHES, metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument(
        "--corpus", nargs="+", default=[DEMO_CORPUS], metavar="URI", help="text for gather, kmeans and replace"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes of each side (default: one a core)",
    )
    parser.add_argument("--senses", type=int, default=20, metavar="K", help="senses a token (default: 20)")
    parser.add_argument("--max-occurrences", type=int, default=1000, metavar="N", help="cap a token (default: 1000)")
    parser.add_argument(
        "--output", default="runs/bench", help="run folder that the measurements share (default: runs/bench)"
    )
    given = parser.parse_args()
    bench = Bench(given)
    figures: Figures = {}
    for name in given.names:
        found = BENCHES[name](bench)
        for key, value in found.items():
            logger.info("%s %.4g", key, value)
        figures |= found
    sys.stdout.write(json.dumps({key: float(f"{value:.4g}") for key, value in figures.items()}) + "\n")


if __name__ == "__main__":
    sys.exit(run_job(main))
