"""Validation of NumPy or torch arrays passed to a dictionary; only non-contiguous arrays and casts to int64 copy."""

import warnings
from operator import index

import numpy as np
import torch
from torch import Tensor

from msense.errors import InputError


def as_tensor(array: np.ndarray | Tensor) -> Tensor:
    """Return an array as a tensor without a copy, read-only arrays included: msense never writes to its inputs."""
    if isinstance(array, Tensor):
        return array
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def validate_inputs(token_ids: np.ndarray | Tensor, embeddings: np.ndarray | Tensor) -> tuple[np.ndarray, Tensor]:
    """Return token ids as an int64 array [N] and embeddings as a tensor [N, D].

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
    return ids.astype(np.int64, copy=False), points


def as_integer(k: object) -> int:
    """Return a number of senses of any integer type as `int`.

    Raises:
        InputError: `k` is not an integer.
    """
    try:
        return index(k)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(f"k is {k!r}, but must be an integer, a SenseBudget or an MclConfig") from error


def output_tensor(out: np.ndarray | Tensor, embeddings: np.ndarray | Tensor) -> Tensor:
    """Return `out` as a tensor that shares its memory.

    Raises:
        InputError: `out` differs from the embeddings in type, dtype or shape, or is read-only.
    """
    wanted = f"{embeddings.dtype} {tuple(embeddings.shape)}"
    if isinstance(out, Tensor) != isinstance(embeddings, Tensor) or f"{out.dtype} {tuple(out.shape)}" != wanted:
        raise InputError(
            f"out is {type(out).__name__} {out.dtype} {tuple(out.shape)}, but must match the embeddings: {wanted}"
        )
    if isinstance(out, Tensor):
        return out
    if not out.flags.writeable:
        raise InputError("out is read-only: pass a writable array, or omit it")
    return torch.from_numpy(out)
