"""Sampling of the plan: choose the passages that the teacher reads and the occurrences that are stored.

Passages are visited in the random order of their keys until every token has `max_occurrences` occurrences or a few more:
the exact cut is `clustering.selection.first_by_key`. An additive
histogram per token over 160 key bins (V x 160 x 4 bytes: 80 MB at V = 128k) gives a threshold key per token; a passage is
needed if it has a token at or below that token's threshold. Memory: one histogram and one block of passages.
"""

from dataclasses import dataclass

import numpy as np

from msense.corpus.passages import Passages, PassageSpec

BINS = 160
BINS_PER_OCTAVE = 4
_LOWEST_EXPONENT = 53 - BINS // BINS_PER_OCTAVE  # keys are taken at 53 bits; bin 0 also holds all smaller ones
_FULL = np.uint32(2**32 - 1)


def key_bins(keys: np.ndarray) -> np.ndarray:
    """Return the log-spaced bin of each key, int64 [P] in [0, BINS), given uint64 [P]; bin 0 takes all smaller keys."""
    fraction, exponent = np.frexp((keys >> np.uint64(11)).astype(np.float64))  # 53 bits are exact in a float64
    quarter = ((fraction - 0.5) * (2 * BINS_PER_OCTAVE)).astype(np.int64)
    return np.maximum((exponent.astype(np.int64) - 1 - _LOWEST_EXPONENT) * BINS_PER_OCTAVE + quarter, 0)


def bin_tops() -> np.ndarray:
    """Return the largest key of each bin, uint64 [BINS]."""
    bins = np.arange(1, BINS + 1)
    octave, quarter = np.divmod(bins, BINS_PER_OCTAVE)
    pairs = zip(octave.tolist(), quarter.tolist(), strict=True)
    next_start = [(BINS_PER_OCTAVE + q) << (o + _LOWEST_EXPONENT - 2) for o, q in pairs]
    return np.array([((start << 11) - 1) & (2**64 - 1) for start in next_start], dtype=np.uint64)


@dataclass
class Histogram:
    """Counts of a part of the corpus; merging is associative and commutative."""

    counts: np.ndarray  # uint32 [V, BINS], eligible occurrences after the per-passage limit; saturating
    token_counts: np.ndarray  # int64 [V], all eligible occurrences

    @classmethod
    def empty(cls, vocab_size: int) -> "Histogram":
        """Return a histogram of nothing."""
        return cls(np.zeros((vocab_size, BINS), dtype=np.uint32), np.zeros(vocab_size, dtype=np.int64))

    def add(self, passages: Passages, spec: PassageSpec, per_passage: int) -> None:
        """Count the eligible occurrences of a block, at most `per_passage` per token and passage (0 = no limit)."""
        flat = np.flatnonzero(passages.eligible(spec))
        ids = passages.ids[flat]
        self.token_counts += np.bincount(ids, minlength=len(self.token_counts))
        if per_passage:
            flat = flat[first_in_passage(passages, flat, per_passage)]
            ids = passages.ids[flat]
        cells = ids.astype(np.int64) * BINS + np.repeat(key_bins(passages.keys), passages.lengths)[flat]
        cell, count = np.unique(cells, return_counts=True)
        flat_counts = self.counts.reshape(-1)
        flat_counts[cell] = _saturating_add(flat_counts[cell], np.minimum(count, int(_FULL)).astype(np.uint32))

    def merge(self, other: "Histogram") -> None:
        """Add the counts of another part of the corpus."""
        self.counts = _saturating_add(self.counts, other.counts)
        self.token_counts = self.token_counts + other.token_counts


def _saturating_add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the sum of uint32 counts, limited to the largest value, which keeps it associative."""
    total = a + b
    total[total < a] = _FULL
    return total


def first_in_passage(passages: Passages, flat: np.ndarray, limit: int) -> np.ndarray:
    """Return which tokens are among the first `limit` of their kind in their passage, bool [n].

    `flat` int64 [n] are increasing places in `passages.ids`; `limit` is at least 1.
    """
    row, position, token = passages.rows()[flat], passages.positions()[flat], passages.ids[flat].astype(np.int64)
    bits_token, bits_position = int(token.max(initial=1)).bit_length(), int(position.max(initial=1)).bit_length()
    # sorting plain integers is faster than argsort
    code = np.sort(((row << bits_token) | token) << bits_position | position)
    group = code >> bits_position
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else np.zeros(0, dtype=np.int64)
    rank = np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))
    kept = code[rank < limit]
    places = passages.offsets[kept >> (bits_token + bits_position)] + (kept & ((1 << bits_position) - 1))
    chosen = np.zeros(len(passages.ids), dtype=bool)
    chosen[places] = True
    return chosen[flat]


def thresholds(histogram: Histogram, max_occurrences: float, coverage: float = 1.0) -> np.ndarray:
    """Return the threshold key of every token, uint64 [V].

    A token's threshold is the top of the first bin at which its count reaches `max_occurrences` (0, or never reached: all
    keys), but no higher than the smallest bin top whose keys together reach `coverage`, in (0, 1], of the wanted
    occurrences, sum(min(max_occurrences, n)).
    """
    tops = bin_tops()
    cap = max_occurrences or float(np.iinfo(np.int64).max)
    reached = np.full(len(histogram.token_counts), BINS - 1)
    done = np.zeros(BINS)  # sum over tokens of min(cap, occurrences up to the bin)
    for start in range(0, len(reached), 4096):
        cumulative = histogram.counts[start : start + 4096].cumsum(axis=1, dtype=np.int64)
        full = cumulative >= cap
        reached[start : start + 4096] = np.where(full[:, -1], full.argmax(axis=1), BINS - 1)
        done += np.minimum(cumulative, cap).sum(axis=0, dtype=np.float64)
    last = int(np.argmax(done >= coverage * done[-1])) if coverage < 1 else BINS - 1
    return np.asarray(tops[np.minimum(reached, last)])


def select(passages: Passages, threshold: np.ndarray, spec: PassageSpec, per_passage: int) -> np.ndarray:
    """Return the places in `passages.ids` of the occurrences to store, increasing int64 [n]; a passage is needed if it has one.

    `threshold` is uint64 [V]; `per_passage` limits the occurrences of a token in a passage, 0 = no limit.
    """
    wanted = np.repeat(passages.keys, passages.lengths) <= threshold[passages.ids]
    flat = np.flatnonzero(wanted & passages.eligible(spec))
    return flat[first_in_passage(passages, flat, per_passage)] if per_passage else flat


def duplicate_rows(keys: np.ndarray) -> np.ndarray:
    """Return the places of keys that repeat an earlier one, increasing int64 [n]."""
    order = np.argsort(keys, kind="stable")
    return np.sort(order[1:][keys[order][1:] == keys[order][:-1]])
