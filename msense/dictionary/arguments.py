"""What callers of a dictionary hand over: arrays of NumPy or torch in, arrays that fit together out.

Nothing is copied, but arrays that are not contiguous, and integers of other types than int64.
"""

import warnings
from operator import index

import numpy as np
import torch
from torch import Tensor

from msense.errors import BadInput


def as_tensor(array: np.ndarray | Tensor) -> Tensor:
    """Wrap an array as a tensor without a copy; a read-only one too, as nothing in msense writes to its input."""
    if isinstance(array, Tensor):
        return array
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def checked(token_ids: np.ndarray | Tensor, embeddings: np.ndarray | Tensor) -> tuple[np.ndarray, Tensor]:
    """Return token ids as int64 [N] and embeddings as a tensor [N, D].

    Raises:
        BadInput: shapes or types do not fit.
    """
    points = as_tensor(embeddings)
    ids = token_ids.detach().cpu().numpy() if isinstance(token_ids, Tensor) else np.asarray(token_ids)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise BadInput(f"token ids are {ids.dtype} {ids.shape}, but must be integers [N]")
    if points.ndim != 2 or not points.is_floating_point():
        raise BadInput(f"embeddings are {points.dtype} {tuple(points.shape)}, but must be floating point [N, D]")
    if len(ids) != len(points):
        raise BadInput(f"{len(ids)} token ids came with {len(points)} embeddings; each embedding needs its token")
    return ids.astype(np.int64, copy=False), points


def whole_number(k: object) -> int:
    """Return a number of senses, of any integer type, as Python's own.

    Raises:
        BadInput: it is none.
    """
    try:
        return index(k)  # type: ignore[arg-type]
    except TypeError as error:
        raise BadInput(f"k is {k!r}, but must be a whole number, a SenseBudget or an MclConfig") from error


def target_of(out: np.ndarray | Tensor, embeddings: np.ndarray | Tensor) -> Tensor:
    """Return `out` as a tensor that writes through to it.

    Raises:
        BadInput: it is not like the embeddings, or read-only.
    """
    wanted = f"{embeddings.dtype} {tuple(embeddings.shape)}"
    if isinstance(out, Tensor) != isinstance(embeddings, Tensor) or f"{out.dtype} {tuple(out.shape)}" != wanted:
        raise BadInput(
            f"out is {type(out).__name__} {out.dtype} {tuple(out.shape)}, but must be like the embeddings: {wanted}"
        )
    if isinstance(out, Tensor):
        return out
    if not out.flags.writeable:
        raise BadInput("out is read-only: give an array that may be written to, or none")
    return torch.from_numpy(out)
