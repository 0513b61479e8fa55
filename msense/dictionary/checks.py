"""Validation of arrays: those passed to a dictionary, and the small ones of an untrusted dictionary.

Untrusted arrays are read in chunks and rejected at the first invalid one: a sparse file of any claimed size costs one page.
Of the arrays passed, only non-contiguous ones and casts to int64 are copied.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from msense.constants import MAX_SENSES, MAX_TOKEN_NUMBERS
from msense.errors import DictionaryError, InputError
from msense.io.arrays import row_blocks

if TYPE_CHECKING:
    from msense.dictionary.layout import Arrays, DictionaryConfig

_MAX_COUNT = 1 << 45  # of one sense or token
_MAX_TOTAL = 1 << 61  # sums stay far below the int64 limit
_REMEDY = "the dictionary is corrupted; copy or build it again"


def as_tensor(array: np.ndarray | Tensor) -> Tensor:
    """Return an array as a tensor without a copy; msense never writes to its inputs."""
    # dlpack accepts read-only memory without torch's warning
    return array if isinstance(array, Tensor) else torch.from_dlpack(np.ascontiguousarray(array))


def validate_inputs(
    token_ids: np.ndarray | Tensor, embeddings: np.ndarray | Tensor, dim: int | None = None
) -> tuple[np.ndarray, Tensor]:
    """Return token ids as an int64 array [N] and embeddings as a tensor [N, D], with D = `dim` if given.

    Raises:
        InputError: a shape or dtype is invalid.
    """
    points = as_tensor(embeddings)
    ids = token_ids.detach().cpu().numpy() if isinstance(token_ids, Tensor) else np.asarray(token_ids)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise InputError(f"token ids are {ids.dtype} {ids.shape}, but must be integers [N]")
    if points.ndim != 2 or not points.is_floating_point():
        raise InputError(f"embeddings are {points.dtype} {tuple(points.shape)}, but must be floating point [N, D]")
    if len(ids) != len(points):
        raise InputError(f"{len(ids)} token ids do not match {len(points)} embeddings: pass one token id per embedding")
    if dim is not None and points.shape[1] != dim:
        raise InputError(f"embeddings have width {points.shape[1]}, but the dictionary {dim}: use the same teacher")
    return ids.astype(np.int64, copy=False), points


def output_tensor(out: np.ndarray | Tensor, embeddings: np.ndarray | Tensor) -> Tensor:
    """Return `out` as a tensor that shares its memory.

    Raises:
        InputError: `out` differs from the embeddings in type, dtype or shape, or is read-only.
    """
    actual, expected = (f"{type(x).__name__} {x.dtype} {tuple(x.shape)}" for x in (out, embeddings))
    if actual != expected:
        raise InputError(f"out is {actual}, but must match the embeddings: {expected}")
    if isinstance(out, Tensor):
        return out
    if not out.flags.writeable:
        raise InputError("out is read-only: pass a writable array, or omit it")
    return torch.from_numpy(out)


def check_arrays(arrays: "Arrays", config: "DictionaryConfig") -> None:
    """Check that the small arrays agree with each other and with the config.

    Raises:
        DictionaryError: names the array and its fault.
    """
    senses, vocabulary = len(arrays.counts), config.vocab_size
    shapes = (("offsets", arrays.offsets, vocabulary + 1), ("spread", arrays.rms_distance, senses))
    for name, array, length in (*shapes, ("token_counts", arrays.token_counts, vocabulary)):
        if array.shape != (length,):
            raise DictionaryError(f"{name} has shape {array.shape}, but config.json and counts require {(length,)}")
    _check_counts("counts", arrays.counts, 1)
    _check_offsets(arrays.offsets, senses, config)
    _check_counts("token_counts", arrays.token_counts, 0)
    check_floats("spread", arrays.rms_distance, 0.0)


def check_floats(name: str, array: np.ndarray, least: float) -> None:
    """Raise DictionaryError for float32 values that are NaN, infinite or below `least`."""
    for chunk in row_blocks(array):
        if not (np.isfinite(chunk) & (chunk >= least)).all():
            raise DictionaryError(f"{name} holds values that are NaN, infinite or below {least:.3g}: {_REMEDY}")


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
    rising = bool(offsets[0] == 0 and offsets[-1] == senses)
    first, limit = 0, min(MAX_SENSES, MAX_TOKEN_NUMBERS // config.dim)
    for chunk in row_blocks(offsets, 1) if rising else ():
        rising = bool((chunk[1:] >= chunk[:-1]).all())
        if not rising:  # differences may overflow
            break
        sizes = np.diff(chunk)
        if (largest := int(sizes.max())) > limit:
            token = f"token {first + int(sizes.argmax())} has {largest} senses of width {config.dim}"
            raise DictionaryError(f"{token}, but the maximum is {limit}: build fewer")
        first += len(sizes)
    if not rising:
        raise DictionaryError(f"offsets must increase from 0 to the number of senses, {senses}: {_REMEDY}")
    for excluded in config.excluded_token_ids:
        if excluded >= (size := config.vocab_size):
            raise DictionaryError(f"excluded_token_ids holds {excluded}, but the vocabulary {size} tokens: {_REMEDY}")
        if own := int(offsets[excluded + 1] - offsets[excluded]):
            raise DictionaryError(f"token {excluded} has {own} senses, but config.json excludes it: {_REMEDY}")
