"""Pooling of token embeddings into one vector per passage; padding on either side is ignored."""

from typing import Literal, get_args

import torch
from torch import Tensor

from msense.errors import InputError

Pooling = Literal["mean", "cls", "lasttoken"]
POOLINGS = get_args(Pooling)


def check_pooling(how: str) -> None:
    """Raise `InputError` for a pooling that is not one of `POOLINGS`."""
    if how not in POOLINGS:
        raise InputError(f"unsupported teacher pooling {how!r} (supported: {', '.join(POOLINGS)}): give --no-pooled")


def pool(hidden: Tensor, mask: Tensor, how: str, *, normalize: bool) -> Tensor:
    """Return the vector of every passage, differentiable.

    Args:
        hidden: floating point [B, L, D], arbitrary where the mask is false.
        mask: bool [B, L]. A passage of padding only gives zeros.
        how: `mean` of all tokens including special ones, `cls` (first token) or `lasttoken`.
        normalize: scale vectors to unit length.

    Returns:
        [B, D], float64 for float64 input, else float32.

    Raises:
        InputError: unsupported pooling.
    """
    check_pooling(how)
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    if how == "mean":
        vectors = hidden.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    else:
        columns = torch.arange(mask.shape[1], device=mask.device)
        ends = columns.masked_fill(~mask, len(columns)).amin(1) if how == "cls" else (columns * mask).amax(1)
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), ends.clamp(max=len(columns) - 1)]
        vectors = vectors.masked_fill(~mask.any(1)[:, None], 0)
    return torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors


def pool_rows(embeddings: Tensor, lengths: Tensor, how: str, *, normalize: bool) -> Tensor:
    """Return the vector of every passage, float32 [P, D], like `pool`, from embeddings without padding.

    Args:
        embeddings: float32 [N, D], passages concatenated.
        lengths: int64 [P], tokens of each; one of 0 gives zeros.
        how: see `pool`.
        normalize: scale vectors to unit length.
    """
    check_pooling(how)
    ends = lengths.cumsum(0)
    if how == "mean":
        rows = torch.arange(len(embeddings), device=embeddings.device)
        vectors = torch.nn.functional.embedding_bag(rows, embeddings, ends - lengths, mode="mean")
    else:
        vectors = embeddings.new_zeros(len(lengths), embeddings.shape[1])
        nonempty = lengths > 0
        vectors[nonempty] = embeddings[(ends - lengths if how == "cls" else ends - 1)[nonempty]]
    return torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors
