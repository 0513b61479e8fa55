"""Batches of similar length: how rows of token ids are grouped and padded, for every forward pass."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

TOKEN_BUDGET = {"cpu": 1024, "cuda": 16384}  # padded tokens per batch; constant, as results depend on it


class Batch(NamedTuple):
    """Rows of similar length, padded together."""

    rows: np.ndarray  # int64 [B], their indices
    ids: np.ndarray  # int32 [B, L]
    mask: np.ndarray  # bool [B, L], false on padding


def iter_batches(rows: Sequence[np.ndarray], budget: int) -> Iterator[Batch]:
    """Yield all rows of token ids in padded batches of at most `budget` tokens (at least one row), shortest rows first.

    Example:
        >>> [batch.ids.shape for batch in iter_batches([np.arange(3), np.arange(9), np.arange(4)], budget=16)]
        [(2, 4), (1, 9)]
    """
    for indices in token_batches(np.array([len(row) for row in rows], dtype=np.int64), budget):
        yield Batch(indices, *pad_batch([rows[i] for i in indices]))


def token_batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Yield indices, int64 [B], of rows with these lengths, int64 [P], in batches as `iter_batches` makes them."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        candidates = order[start : start + budget]
        padded_tokens = np.maximum(lengths[candidates], 1) * np.arange(1, len(candidates) + 1)
        stop = start + max(1, int(np.searchsorted(padded_tokens, budget, side="right")))
        yield order[start:stop]
        start = stop


def pad_batch(rows: Sequence[np.ndarray], pad: int = 0, side: str = "right") -> tuple[np.ndarray, np.ndarray]:
    """Return rows padded on the right (or left): token ids int32 [B, L] and mask bool [B, L], L at least 1."""
    lengths = np.array([len(r) for r in rows], dtype=np.int64)[:, None]
    longest = max(1, lengths.max(initial=0))
    columns = np.arange(longest)
    mask = columns < lengths if side == "right" else columns >= longest - lengths
    ids = np.full(mask.shape, pad, dtype=np.int32)
    ids[mask] = np.concatenate([np.empty(0, np.int32), *rows])
    return ids, mask
