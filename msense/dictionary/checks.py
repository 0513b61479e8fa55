"""The small arrays of a dictionary that nobody vouches for: whether they can be what they say.

Comes in: mapped or plain arrays and their config. Goes out: nothing, or the error. Holds one piece of an array at a
time, and stops at the first that is wrong: a file of holes as large as its header says is refused at its first page.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from msense.config import MAX_SENSES, MAX_TOKEN_NUMBERS
from msense.errors import DictionaryError

if TYPE_CHECKING:
    from msense.dictionary.format import Arrays, DictionaryConfig

_CHUNK = 1 << 16  # numbers checked at a time
_MAX_COUNT = 1 << 45  # of one sense or token
_MAX_TOTAL = 1 << 61  # of all: sums stay far from the end of int64


def check_arrays(arrays: "Arrays", config: "DictionaryConfig") -> None:
    """Refuse small arrays that contradict each other or the config.

    Raises:
        DictionaryError: naming the array and what is wrong with it.
    """
    senses = len(arrays.counts)
    shapes = {"offsets": (config.vocab_size + 1,), "spread": (senses,), "token_counts": (config.vocab_size,)}
    for name, shape in shapes.items():
        if (array := getattr(arrays, name)).shape != shape:
            raise DictionaryError(f"{name} has shape {array.shape}, but config.json and counts ask for {shape}")
    _check_counts("counts", arrays.counts, 1)
    _check_offsets(arrays.offsets, senses, config)
    _check_counts("token_counts", arrays.token_counts, 0)
    for part in pieces(arrays.spread):
        if not (np.isfinite(part).all() and (part >= 0).all()):
            raise DictionaryError("spread holds negative, infinite or NaN values: the dictionary is damaged")


def check_scales(scales: np.ndarray) -> None:
    """Refuse what float32 [S] cannot be multiplied by.

    Raises:
        DictionaryError: a scale is 0, negative, infinite or NaN.
    """
    for part in pieces(scales):
        if not (np.isfinite(part).all() and (part > 0).all()):
            raise DictionaryError(
                "scales holds numbers that are not above 0 and finite: the dictionary is damaged; copy or build it again"
            )


def pieces(array: np.ndarray, overlap: int = 0) -> Iterator[np.ndarray]:
    """Cut a mapped array so that a fault near its start is found before the rest is read."""
    for start in range(0, len(array) - overlap, _CHUNK):
        yield array[start : start + _CHUNK + overlap]


def _check_counts(name: str, array: np.ndarray, least: int) -> None:
    """Refuse counts below `least` or too large to be added up."""
    total = 0
    for part in pieces(array):
        low, high = int(part.min()), int(part.max())
        if low < least:
            wrong = f"the negative number {low}" if low < 0 else "0, but no sense is of no points"
            raise DictionaryError(f"{name} holds {wrong}: the dictionary is damaged; copy or build it again")
        total += int(part.sum()) if high <= _MAX_COUNT else high  # no sum of a piece overflows
        if high > _MAX_COUNT or total > _MAX_TOTAL:
            raise DictionaryError(
                f"{name} holds numbers up to {high}, too many for any corpus: the dictionary is damaged; "
                "copy or build it again"
            )


def _check_offsets(offsets: np.ndarray, senses: int, config: "DictionaryConfig") -> None:
    """Refuse offsets that are not the borders of each token's senses, or give senses to an excluded token."""
    rising = offsets[0] == 0 and offsets[-1] == senses
    first = 0
    for part in pieces(offsets, 1) if rising else ():
        sizes = np.diff(part)
        if not (rising := bool((part[1:] >= part[:-1]).all())):
            break
        largest = int(sizes.max())
        token = first + int(sizes.argmax())
        if largest > MAX_SENSES:
            raise DictionaryError(
                f"token {token} has {largest} senses; at most {MAX_SENSES} are possible: build with fewer"
            )
        if largest * config.dim > MAX_TOKEN_NUMBERS:
            raise DictionaryError(
                f"token {token} has {largest} senses of width {config.dim}, over 1 GiB in all: build with fewer senses"
            )
        first += len(sizes)
    if not rising:
        raise DictionaryError(f"offsets must rise from 0 to the {senses} senses without ever falling: they are damaged")
    for excluded in config.excluded_token_ids:
        if excluded >= config.vocab_size:
            raise DictionaryError(
                f"excluded_token_ids holds {excluded}, but the vocabulary has the tokens 0 to {config.vocab_size - 1}: "
                "the dictionary is damaged"
            )
        if own := int(offsets[excluded + 1] - offsets[excluded]):
            raise DictionaryError(
                f"token {excluded} has {own} senses, but config.json excludes it: they are not of one dictionary"
            )
