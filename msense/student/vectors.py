"""What sentence vectors are stored and compared as: precisions and similarities, equal to those of sentence-transformers."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from msense.errors import InputError
from msense.text import first_line

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
Vectors: TypeAlias = np.ndarray | Tensor | Sequence[np.ndarray] | Sequence[Tensor]


def check_precision(precision: str) -> None:
    """Raise InputError for a precision that is not one of `Precision`."""
    if precision not in get_args(Precision):
        raise InputError(f"invalid precision {precision!r}: use one of {get_args(Precision)}")


def quantize(vectors: np.ndarray, precision: str) -> np.ndarray:
    """Return vectors, float32 [n, D], in a precision.

    int8 and uint8, [n, D], divide the range of each column into 255 steps; binary (int8) and ubinary (uint8), [n, D/8],
    pack the signs of eight columns.

    Raises:
        InputError: unknown precision, or one vector alone, which has no range.

    Example:
        >>> quantize(np.array([[1.0, -2.0, 3.0], [2.0, 0.0, 4.0]]), "ubinary").tolist()
        [[160], [160]]
    """
    check_precision(precision)
    if precision == "float32":
        return vectors
    if precision in ("binary", "ubinary"):
        packed = np.packbits(vectors > 0, axis=-1)
        return packed if precision == "ubinary" else (packed - 128).astype(np.int8)
    if len(vectors) == 1:
        raise InputError(f"one vector has no range for {precision}: encode several texts, or use binary or float32")
    low = vectors.min(0, initial=np.inf)
    steps = (vectors.max(0, initial=-np.inf) - low) / 255
    levels = np.clip(np.floor((vectors - low) / np.where(steps == 0, 1, steps)), 0, 255)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)


def similarity(a: Vectors, b: Vectors, kind: Similarity = "cosine") -> Tensor:
    """Return the similarity of every vector of a [n, D] with every vector of b [m, D], float32 [n, m]; larger is closer.

    Raises:
        InputError: unknown kind, or no vectors of one size.

    Example:
        >>> similarity(np.eye(2), np.array([[0.0, 3.0]])).tolist()
        [[0.0], [1.0]]
    """
    left, right = _both(a, b, kind)
    if kind in ("euclidean", "manhattan"):
        return -torch.cdist(left, right, p=2.0 if kind == "euclidean" else 1.0)
    return _scaled(left, kind) @ _scaled(right, kind).T


def similarity_pairwise(a: Vectors, b: Vectors, kind: Similarity = "cosine") -> Tensor:
    """Return the similarity of each vector of a [n, D] with the same row of b [n, D], float32 [n]; errors as `similarity`."""
    left, right = _both(a, b, kind)
    if len(left) != len(right):
        raise InputError(f"{len(left)} and {len(right)} vectors are no pairs: give as many of each, or use similarity")
    if kind in ("euclidean", "manhattan"):
        return -torch.linalg.vector_norm(left - right, ord=2 if kind == "euclidean" else 1, dim=1)
    return (_scaled(left, kind) * _scaled(right, kind)).sum(1)


def _both(a: Vectors, b: Vectors, kind: str) -> tuple[Tensor, Tensor]:
    """Return what is compared, float32 [n, D] and [m, D]."""
    if kind not in get_args(Similarity):
        raise InputError(f"invalid similarity {kind!r}: use one of {get_args(Similarity)}")
    left, right = _rows(a), _rows(b)
    if left.shape[1] != right.shape[1] and len(left) and len(right):
        raise InputError(f"vectors have {left.shape[1]} and {right.shape[1]} numbers: compare vectors of one size")
    width = max(left.shape[1], right.shape[1])
    return (left if len(left) else left.new_empty(0, width)), (right if len(right) else right.new_empty(0, width))


def _rows(vectors: Vectors) -> Tensor:
    """Return one vector [D] or several as float32 [n, D]."""
    try:
        several = isinstance(vectors, list | tuple) and len(vectors) > 0
        tensor = torch.stack([_tensor(v) for v in vectors]) if several else _tensor(vectors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no vectors to compare ({first_line(error)}): give arrays [n, D], as encode returns"
        ) from error
    if tensor.numel() == 0 and tensor.ndim == 1:
        return tensor.float().reshape(0, 0)
    if tensor.ndim not in (1, 2):
        raise InputError(f"vectors have shape {tuple(tensor.shape)}: give [D] or [n, D], as encode returns")
    return tensor.float() if tensor.ndim == 2 else tensor.float()[None]


def _tensor(vectors: Any) -> Tensor:
    """Return a tensor; of an array with negative strides, as reversed ones have, a copy, since torch refuses them."""
    return torch.as_tensor(np.ascontiguousarray(vectors) if isinstance(vectors, np.ndarray) else vectors)


def _scaled(vectors: Tensor, kind: str) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=1) if kind == "cosine" else vectors
