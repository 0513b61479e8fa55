"""The page that compares two dictionaries of one teacher: words whose use differs most between their corpora."""

from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from msense.dictionary import SenseDictionary, assignment
from msense.dictionary.assignment import RaggedSenses
from msense.errors import InputError
from msense.explorer.word import text_of

MOST_COMPARED = 1_000  # tokens: the most frequent ones of both
_FEWEST = 20  # occurrences of a compared token in each corpus
_MOST_SENSES = 8  # of a token that are compared: the largest
_LEAST_SQUARE = 1e-3  # of the mean squared distance of the dictionary: tokens whose senses are single points


@dataclass(frozen=True)
class Difference:
    """How differently two corpora use a token."""

    token: int
    text: str
    distance: float  # mean squared distance to the nearest sense in the other dictionary over that to the own; 1: alike
    occurrences: tuple[int, int]
    senses: tuple[int, int]


def check_comparable(a: SenseDictionary, b: SenseDictionary) -> None:
    """Raise InputError unless both dictionaries are of one teacher, layer and vocabulary."""
    for name in ("teacher", "layer", "dim", "vocab_size", "tokenizer_fingerprint"):
        one, other = getattr(a.config, name), getattr(b.config, name)
        if one != other:
            raise InputError(
                f"{name} is {one!r} in one dictionary and {other!r} in the other: compare two of one teacher"
            )


def differences(a: SenseDictionary, b: SenseDictionary, most: int = MOST_COMPARED) -> list[Difference]:
    """Return the `most` tokens that are most frequent in both corpora, those whose use differs most first.

    The largest senses of a token are compared with all of the other dictionary's. Memory: `_MOST_SENSES` senses of 2 · `most`
    tokens in float32.

    Raises:
        InputError: the dictionaries are not of one teacher.
    """
    check_comparable(a, b)
    tokens = _common(a, b, most)
    one, other = _largest(a, tokens), _largest(b, tokens)
    distance = (
        _distances(one, tokens, b.ragged, a.config.temperature_unit)
        + _distances(other, tokens, a.ragged, b.config.temperature_unit)
    ) / 2
    order = np.argsort(-distance, kind="stable")
    sizes = np.diff(a.offsets), np.diff(b.offsets)
    return [
        Difference(
            token,
            text_of(a, token),
            float(distance[place]),
            (int(a.token_counts[token]), int(b.token_counts[token])),
            (int(sizes[0][token]), int(sizes[1][token])),
        )
        for place, token in zip(order.tolist(), tokens[order].tolist(), strict=True)
    ]


def _common(a: SenseDictionary, b: SenseDictionary, most: int) -> NDArray[np.int64]:
    """Return tokens with letters and with senses in both, the most frequent by the rarer of both counts."""
    counts = np.minimum(a.token_counts, b.token_counts)
    known = (np.diff(a.offsets) > 0) & (np.diff(b.offsets) > 0) & (counts >= _FEWEST)
    tokens = np.flatnonzero(known)
    ordered = tokens[np.argsort(-counts[tokens], kind="stable")].tolist()
    words = (token for token in ordered if any(map(str.isalpha, text_of(a, token))))
    return np.array(list(islice(words, most)), np.int64)


class _Largest(NamedTuple):
    """The largest senses of the compared tokens: those of token i are rows offsets[i] to offsets[i + 1]."""

    senses: RaggedSenses
    counts: NDArray[np.float64]
    squares: NDArray[np.float64]  # mean squared distance of the points of each to it


def _largest(d: SenseDictionary, tokens: NDArray[np.int64]) -> _Largest:
    sizes = np.diff(d.offsets)[tokens]
    place = np.repeat(np.arange(len(tokens)), sizes)
    first = np.cumsum(sizes) - sizes
    rows = d.offsets[tokens][place] + np.arange(len(place)) - first[place]
    order = np.lexsort((-d.counts[rows], place))
    rows = rows[order[np.arange(len(place)) - first[place] < _MOST_SENSES]]
    offsets = np.concatenate([[0], np.cumsum(np.minimum(sizes, _MOST_SENSES))])
    centroids = d.ragged.rows(torch.from_numpy(rows)).float().cpu()
    squares = d.rms_distance[rows].astype(np.float64) ** 2
    return _Largest(RaggedSenses(offsets, (centroids,)), d.counts[rows].astype(np.float64), squares)


def _distances(a: _Largest, ids: NDArray[np.int64], b: RaggedSenses, unit: float) -> NDArray[np.float64]:
    """Return how far the points of each token in `a` are from its senses in `b`, relative to those in `a`; at least 1."""
    tokens = len(ids)
    place = np.repeat(np.arange(tokens), np.diff(a.senses.offsets))
    (senses,) = a.senses.parts
    moved = senses - assignment.replace(ids[place], senses, b, "l2")
    between = (moved**2).sum(1, dtype=torch.float64).numpy()  # of points, it adds to the square around their centroid
    means = [
        np.bincount(place, weights=a.counts * values, minlength=tokens)
        / np.bincount(place, weights=a.counts, minlength=tokens)
        for values in (a.squares, between)
    ]
    return 1 + means[1] / np.maximum(means[0], max(_LEAST_SQUARE * unit, 1e-30))
