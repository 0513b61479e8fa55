"""Key bins, thresholds and coverage of the plan; `tests/pipelines/test_properties.py` compares samples with a walk."""

import numpy as np
import pytest

from msense.corpus.passages import Passages, PassageSpec
from msense.stages.sampling import (
    BINS,
    Histogram,
    bin_tops,
    duplicate_rows,
    key_bins,
    select,
    thresholds,
)

SPEC = PassageSpec(max_length=64)
VOCAB, ALL_KEYS = 8, np.uint64(2**64 - 1)


def passages_of(rows: list[list[int]], seed: int = 0) -> Passages:
    keys = np.random.default_rng(seed).integers(0, 2**64, len(rows), dtype=np.uint64)
    ids = np.array([t for row in rows for t in row], dtype=np.int32)
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    return Passages(keys, np.zeros(len(rows), np.int32), ids, offsets)


def test_bins_are_quarter_octaves_that_cover_all_keys() -> None:
    tops = bin_tops()
    assert len(tops) == BINS
    assert (np.diff(tops.astype(np.float64)) > 0).all()
    assert tops[-1] == ALL_KEYS
    assert key_bins(tops).tolist() == list(range(BINS))  # a top belongs to its bin ...
    assert key_bins(tops[:-1] + np.uint64(1)).tolist() == list(range(1, BINS))  # ... and the next key to the next
    assert key_bins(np.array([0, 1, ALL_KEYS], np.uint64)).tolist() == [0, 0, BINS - 1]
    assert tops[-5] == np.uint64(2**63 - 1)


@pytest.mark.parametrize("coverage", [0.3, 0.8, 0.95])
def test_coverage_is_reached_by_the_smallest_prefix(coverage: float) -> None:
    rng = np.random.default_rng(0)
    chances = [0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.04, 0.01]
    passages = passages_of([rng.choice(VOCAB, 6, p=chances).tolist() for _ in range(3000)])
    histogram = Histogram.empty(VOCAB)
    histogram.add(passages, SPEC, 0)
    full, part = thresholds(histogram, 500), thresholds(histogram, 500, coverage)
    assert (part <= full).all()
    keys = passages.keys[passages.rows()]

    def reached(bound: np.uint64) -> int:
        return int(np.minimum(np.bincount(passages.ids[keys <= bound], minlength=VOCAB), 500).sum())

    bound, tops = part.max(), bin_tops()
    assert reached(bound) >= coverage * reached(ALL_KEYS)
    assert reached(tops[np.searchsorted(tops, bound) - 1]) < coverage * reached(ALL_KEYS)
    few, many = (len(np.unique(passages.rows()[select(passages, t, SPEC, 0)])) for t in (part, full))
    assert few < many


def test_counts_saturate_instead_of_wrapping() -> None:
    a, b = Histogram.empty(1), Histogram.empty(1)
    a.counts[0, 3], b.counts[0, 3] = 2**32 - 2, 5
    a.merge(b)
    assert a.counts[0, 3] == 2**32 - 1
    assert thresholds(a, 1000)[0] == bin_tops()[3]


def test_duplicate_rows_keep_the_first() -> None:
    assert duplicate_rows(np.array([7, 5, 7, 7, 5, 1], np.uint64)).tolist() == [2, 3, 4]
    assert duplicate_rows(np.array([], np.uint64)).tolist() == []
