"""Stage 2, the plan: which passages must the teacher read, and which of their occurrences are stored?

In the random order of the passages' keys, each token needs the first `max_occurrences` of its occurrences. One additive
histogram a token over 160 key bins (V x 160 x 4 bytes: 80 MB at V = 128k) gives a threshold key a token; a passage is
needed if it holds a token at or under that token's threshold. Holds one histogram and one block of passages.
"""

from dataclasses import dataclass

import numpy as np

from msense.corpus.passages import Passages, PassageSpec

BINS = 160
BINS_PER_OCTAVE = 4
_LOWEST_EXPONENT = 53 - BINS // BINS_PER_OCTAVE  # keys are taken at 53 bits; bin 0 also holds all smaller ones
_FULL = np.uint32(2**32 - 1)
ALL_KEYS = np.uint64(2**64 - 1)


def key_bins(keys: np.ndarray) -> np.ndarray:
    """Return the log-spaced bin of each key: four to an octave, the lowest bin takes all that is smaller.

    Args:
        keys: uint64 [P].

    Returns:
        int64 [P] in [0, BINS).
    """
    fraction, exponent = np.frexp((keys >> np.uint64(11)).astype(np.float64))  # 53 bits are exact in a float64
    quarter = ((fraction - 0.5) * (2 * BINS_PER_OCTAVE)).astype(np.int64)
    return np.maximum((exponent.astype(np.int64) - 1 - _LOWEST_EXPONENT) * BINS_PER_OCTAVE + quarter, 0)


def bin_tops() -> np.ndarray:
    """Return the largest key of each bin, uint64 [BINS]."""
    bins = np.arange(1, BINS + 1)
    octave, quarter = np.divmod(bins, BINS_PER_OCTAVE)
    next_start = [
        (BINS_PER_OCTAVE + int(q)) << (int(o) + _LOWEST_EXPONENT - 2) for o, q in zip(octave, quarter, strict=True)
    ]
    return np.array([((start << 11) - 1) & (2**64 - 1) for start in next_start], dtype=np.uint64)


@dataclass
class Histogram:
    """What a part of the corpus holds; adding two is associative and in any order the same."""

    counts: np.ndarray  # uint32 [V, BINS], occurrences wanted at most (per-passage limit applied), saturating
    token_counts: np.ndarray  # int64 [V], all eligible occurrences

    @classmethod
    def empty(cls, vocab_size: int) -> "Histogram":
        """Start counting."""
        return cls(np.zeros((vocab_size, BINS), dtype=np.uint32), np.zeros(vocab_size, dtype=np.int64))

    def add(self, passages: Passages, spec: PassageSpec, per_passage: int) -> None:
        """Count the eligible occurrences of a block.

        Args:
            passages: the block.
            spec: how passages are laid out.
            per_passage: most occurrences of one token that count in one passage, 0 = no limit.
        """
        vocab = len(self.token_counts)
        flat = np.flatnonzero(passages.eligible(spec))
        ids = passages.ids[flat]
        self.token_counts += np.bincount(ids, minlength=vocab)
        if per_passage:
            flat = flat[first_in_passage(passages, flat, per_passage)]
            ids = passages.ids[flat]
        cells = ids.astype(np.int64) * BINS + np.repeat(key_bins(passages.keys), passages.lengths)[flat]
        cell, count = np.unique(cells, return_counts=True)
        self._add_cells(cell, count)

    def merge(self, other: "Histogram") -> None:
        """Add another part of the corpus."""
        self.counts = _saturating_add(self.counts, other.counts)
        self.token_counts = self.token_counts + other.token_counts

    def _add_cells(self, cell: np.ndarray, count: np.ndarray) -> None:
        flat = self.counts.reshape(-1)
        flat[cell] = _saturating_add(flat[cell], np.minimum(count, int(_FULL)).astype(np.uint32))


def _saturating_add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Add uint32 counts; sums past the largest value stay there (still associative)."""
    total = a + b
    total[total < a] = _FULL
    return total


def first_in_passage(passages: Passages, flat: np.ndarray, limit: int) -> np.ndarray:
    """Tell which tokens are among the first `limit` of their kind in their passage.

    Args:
        passages: a block.
        flat: int64 [n], increasing places in `passages.ids`.
        limit: at least 1.

    Returns:
        bool [n].
    """
    row, position, token = passages.rows()[flat], passages.positions()[flat], passages.ids[flat].astype(np.int64)
    bits_token, bits_position = int(token.max(initial=1)).bit_length(), int(position.max(initial=1)).bit_length()
    code = np.sort(
        ((row << bits_token) | token) << bits_position | position
    )  # one sort of plain integers beats argsort
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

    A token's threshold is the top of the first bin at which its count reaches `max_occurrences` (all keys if it never
    does), but no higher than the smallest bin top whose keys together reach `coverage` of the wanted occurrences.

    Args:
        histogram: the whole corpus.
        max_occurrences: cap a token; 0 = all occurrences. A fraction is allowed (estimates from a sample).
        coverage: share of sum(min(cap, n)) to reach, in (0, 1].
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
    """Return the places in `passages.ids` of the occurrences to store, increasing int64 [n].

    A passage is needed if one of these lies in it.

    Args:
        passages: a block.
        threshold: uint64 [V].
        spec: how passages are laid out.
        per_passage: most occurrences of one token to take from one passage, 0 = no limit.
    """
    wanted = np.repeat(passages.keys, passages.lengths) <= threshold[passages.ids]
    flat = np.flatnonzero(wanted & passages.eligible(spec))
    return flat[first_in_passage(passages, flat, per_passage)] if per_passage else flat


def duplicate_rows(keys: np.ndarray) -> np.ndarray:
    """Return the places of keys that an earlier place already holds, increasing int64 [n]."""
    order = np.argsort(keys, kind="stable")
    return np.sort(order[1:][keys[order][1:] == keys[order][:-1]])
