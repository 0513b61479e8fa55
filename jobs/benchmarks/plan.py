"""The planning pass on a synthetic token stream, which is held in memory."""

import math
import time

import numpy as np

from benchmarks.shared import Bench, Figures
from msense.corpus.passages import Passages, PassageSpec
from msense.stages.sampling import Histogram, select, thresholds

VOCABULARY, CAP, LENGTH = 5000, 200, 100  # tokens, occurrences per token, tokens per passage


def plan(bench: Bench) -> Figures:
    """Plan a Zipf stream of N = 6 cap V ln V token ids."""
    vocab, cap, length = VOCABULARY, CAP, LENGTH
    total = int(6 * cap * vocab * math.log(vocab))
    rng = np.random.default_rng(0)
    cumulative = np.cumsum(1 / np.arange(1, vocab + 1))
    spec, block, blocks = PassageSpec(max_length=length), 65_536 // length, []
    for start in range(0, total // length, block):
        count = min(block, total // length - start)
        ids = np.searchsorted(cumulative, rng.random(count * length) * cumulative[-1]).astype(np.int32)
        keys = rng.integers(0, 2**64, count, dtype=np.uint64)
        blocks.append(Passages(keys, np.zeros(count, np.int32), ids, np.arange(count + 1, dtype=np.int64) * length))
    per_passage, histogram = cap // 20, Histogram.empty(vocab)

    def read(threshold: np.ndarray) -> int:
        return sum(len(np.unique(p.rows()[select(p, threshold, spec, per_passage)])) for p in blocks)

    began = time.process_time()
    for passages in blocks:
        histogram.add(passages, spec, per_passage)
    needed = read(thresholds(histogram, cap))
    seconds = time.process_time() - began
    count = sum(len(p.keys) for p in blocks)
    return {
        "plan.read_fraction": needed / count,
        "plan.coverage_fraction": read(thresholds(histogram, cap, 0.95)) / count,
        "plan.tokens_per_s_core": count * length / seconds,
    }
