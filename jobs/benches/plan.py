"""The planning pass on a made-up stream of tokens. Holds the stream."""

import math
import time

import numpy as np

from benches.shared import Bench, Figures
from msense.sampling import Histogram, select, thresholds
from msense.tokens import Passages, PassageSpec

VOCABULARY, CAP, LENGTH = 5000, 200, 100  # tokens, occurrences wanted of each, tokens of a passage


def plan(bench: Bench) -> Figures:
    """The planning pass on a Zipf stream of N = 6 cap V ln V token ids in passages of 100."""
    vocab, cap, length = VOCABULARY, CAP, LENGTH
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
