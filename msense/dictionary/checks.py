"""Validation of arrays: those passed to a dictionary, and the small ones of an untrusted dictionary.

Untrusted arrays are read in chunks and rejected at the first invalid one: a sparse file of any claimed size costs one page.
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

_MAX_COUNT = 1 << 45  # of one sense or token; more than any corpus has
_MAX_FLOAT = float(np.finfo(np.float32).max)
_REMEDY = "the dictionary is corrupted; copy or build it again"


def as_tensor(array: np.ndarray | Tensor) -> Tensor:
    """Return an array as a tensor without a copy; msense never writes to its inputs."""
    # dlpack accepts read-only memory without torch's warning
    return array if isinstance(array, Tensor) else torch.from_dlpack(np.ascontiguousarray(array))


def validate_inputs(
    token_ids: np.ndarray | Tensor, embeddings: np.ndarray | Tensor, dim: int | None = None
) -> tuple[np.ndarray, Tensor]:
    """Return token ids int64 [N] and embeddings [N, D], D = `dim` if given; raise InputError for other shapes or dtypes."""
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


def check_arrays(arrays: "Arrays", config: "DictionaryConfig") -> None:
    """Raise DictionaryError unless the small arrays agree with each other and with the config."""
    senses, vocabulary = len(arrays.counts), config.vocab_size
    shapes = (("offsets", arrays.offsets, vocabulary + 1), ("spread", arrays.rms_distance, senses))
    for name, array, length in (*shapes, ("token_counts", arrays.token_counts, vocabulary)):
        if array.shape != (length,):
            raise DictionaryError(f"{name} has shape {array.shape}, but config.json and counts require {(length,)}")
    check_range("counts", arrays.counts, 1, _MAX_COUNT)
    _check_offsets(arrays.offsets, senses, config)
    check_range("token_counts", arrays.token_counts, 0, _MAX_COUNT)
    check_range("spread", arrays.rms_distance, 0, _MAX_FLOAT)


def check_range(name: str, array: np.ndarray, least: float, most: float = _MAX_FLOAT) -> None:
    """Raise DictionaryError for numbers that are NaN, below `least` or above `most`."""
    for chunk in row_blocks(array):
        if not ((chunk >= least) & (chunk <= most)).all():  # also false for NaN
            found = f"{name} holds values from {chunk.min()} to {chunk.max()}"
            raise DictionaryError(f"{found}, but they must be from {least} to {most}: {_REMEDY}")


def _check_offsets(offsets: np.ndarray, senses: int, config: "DictionaryConfig") -> None:
    """Raise DictionaryError for offsets that decrease, miss the ends, or give senses to an excluded token."""
    wrong = f"offsets must increase from 0 to the number of senses, {senses}: {_REMEDY}"
    if offsets[0] != 0 or offsets[-1] != senses:
        raise DictionaryError(wrong)
    first, limit = 0, min(MAX_SENSES, MAX_TOKEN_NUMBERS // config.dim)
    for chunk in row_blocks(offsets, 1):
        if (chunk[1:] < chunk[:-1]).any():  # differences may overflow
            raise DictionaryError(wrong)
        sizes = np.diff(chunk)
        if (largest := int(sizes.max())) > limit:
            token = f"token {first + int(sizes.argmax())} has {largest} senses of width {config.dim}"
            raise DictionaryError(f"{token}, but the maximum is {limit}: build fewer")
        first += len(sizes)
    for excluded in config.excluded_token_ids:
        if excluded >= (size := config.vocab_size):
            raise DictionaryError(f"excluded_token_ids holds {excluded}, but the vocabulary {size} tokens: {_REMEDY}")
        if own := int(offsets[excluded + 1] - offsets[excluded]):
            raise DictionaryError(f"token {excluded} has {own} senses, but config.json excludes it: {_REMEDY}")
