"""What sentence vectors are stored and compared as: precisions and similarities, equal to those of sentence-transformers."""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from msense.errors import InputError

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

    Example:
        >>> similarity(np.eye(2), np.array([[0.0, 3.0]])).tolist()
        [[0.0], [1.0]]
    """
    left, right = _rows(a), _rows(b)
    if kind in ("euclidean", "manhattan"):
        return -torch.cdist(left, right, p=2.0 if kind == "euclidean" else 1.0)
    return _scaled(left, kind) @ _scaled(right, kind).T


def similarity_pairwise(a: Vectors, b: Vectors, kind: Similarity = "cosine") -> Tensor:
    """Return the similarity of each vector of a [n, D] with the same row of b [n, D], float32 [n]."""
    left, right = _rows(a), _rows(b)
    if kind in ("euclidean", "manhattan"):
        return -torch.linalg.vector_norm(left - right, ord=2 if kind == "euclidean" else 1, dim=1)
    return (_scaled(left, kind) * _scaled(right, kind)).sum(1)


def _rows(vectors: Vectors) -> Tensor:
    """Return one vector [D] or several as float32 [n, D]."""
    several = isinstance(vectors, list | tuple) and len(vectors) > 0
    tensor = torch.stack([torch.as_tensor(v) for v in vectors]) if several else torch.as_tensor(vectors)
    return tensor.float() if tensor.ndim > 1 else tensor.float()[None]


def _scaled(vectors: Tensor, kind: str) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=1) if kind == "cosine" else vectors
