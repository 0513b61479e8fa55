"""Validation of the small arrays of an untrusted dictionary.

Arrays are read in chunks and rejected at the first invalid one: a sparse file of any claimed size costs one page.
"""

from typing import TYPE_CHECKING

import numpy as np

from msense.constants import MAX_SENSES, MAX_TOKEN_NUMBERS
from msense.errors import DictionaryError
from msense.io.arrays import row_blocks

if TYPE_CHECKING:
    from msense.dictionary.layout import Arrays, DictionaryConfig

_MAX_COUNT = 1 << 45  # of one sense or token
_MAX_TOTAL = 1 << 61  # sums stay far below the int64 limit
_REMEDY = "the dictionary is corrupted; copy or build it again"


def check_arrays(arrays: "Arrays", config: "DictionaryConfig") -> None:
    """Check that the small arrays agree with each other and with the config.

    Raises:
        DictionaryError: names the array and its fault.
    """
    senses = len(arrays.counts)
    shapes = {"offsets": (config.vocab_size + 1,), "spread": (senses,), "token_counts": (config.vocab_size,)}
    stored = {"offsets": arrays.offsets, "spread": arrays.rms_distance, "token_counts": arrays.token_counts}
    for name, shape in shapes.items():
        if (array := stored[name]).shape != shape:
            raise DictionaryError(f"{name} has shape {array.shape}, but config.json and counts require {shape}")
    _check_counts("counts", arrays.counts, 1)
    _check_offsets(arrays.offsets, senses, config)
    _check_counts("token_counts", arrays.token_counts, 0)
    for chunk in row_blocks(arrays.rms_distance):
        if not (np.isfinite(chunk).all() and (chunk >= 0).all()):
            raise DictionaryError(f"spread holds negative, infinite or NaN values: {_REMEDY}")


def check_scales(scales: np.ndarray) -> None:
    """Check that all quantization scales (float32 [S]) are finite and above 0.

    Raises:
        DictionaryError: a scale is not.
    """
    for chunk in row_blocks(scales):
        if not (np.isfinite(chunk).all() and (chunk > 0).all()):
            raise DictionaryError(f"scales holds values that are not finite and above 0: {_REMEDY}")


def _check_counts(name: str, array: np.ndarray, least: int) -> None:
    """Raise DictionaryError for counts that are below `least` or too large to sum in int64."""
    total = 0
    for chunk in row_blocks(array):
        low, high = int(chunk.min()), int(chunk.max())
        if low < least:
            raise DictionaryError(f"{name} holds the value {low}, but the minimum is {least}: {_REMEDY}")
        total += int(chunk.sum()) if high <= _MAX_COUNT else high  # the sum of a valid chunk cannot overflow
        if high > _MAX_COUNT or total > _MAX_TOTAL:
            raise DictionaryError(f"{name} holds values up to {high}, more than any corpus has: {_REMEDY}")


def _check_offsets(offsets: np.ndarray, senses: int, config: "DictionaryConfig") -> None:
    """Raise DictionaryError for offsets that decrease, miss the ends, or give senses to an excluded token."""
    rising = offsets[0] == 0 and offsets[-1] == senses
    first = 0
    for chunk in row_blocks(offsets, 1) if rising else ():
        sizes = np.diff(chunk)
        if not (rising := bool((chunk[1:] >= chunk[:-1]).all())):  # differences may overflow
            break
        largest, token = int(sizes.max()), first + int(sizes.argmax())
        if largest > MAX_SENSES:
            raise DictionaryError(f"token {token} has {largest} senses, but the maximum is {MAX_SENSES}: build fewer")
        if largest * config.dim > MAX_TOKEN_NUMBERS:
            raise DictionaryError(
                f"token {token} has {largest} senses of width {config.dim}, more than 1 GiB in float32: build fewer"
            )
        first += len(sizes)
    if not rising:
        raise DictionaryError(f"offsets must increase from 0 to the number of senses, {senses}: {_REMEDY}")
    for excluded in config.excluded_token_ids:
        if excluded >= config.vocab_size:
            raise DictionaryError(
                f"excluded_token_ids holds {excluded}, but the last token of the vocabulary is "
                f"{config.vocab_size - 1}: {_REMEDY}"
            )
        if own := int(offsets[excluded + 1] - offsets[excluded]):
            raise DictionaryError(f"token {excluded} has {own} senses, but config.json excludes it: {_REMEDY}")
