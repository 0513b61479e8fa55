"""Hidden states in, one vector a passage out, as the teacher pools them: mean, first or last token.

Padding, on either side, never counts.
"""

import torch
from torch import Tensor

from msense.errors import BadInput

POOLINGS = ("mean", "cls", "lasttoken")


def check_pooling(how: str) -> None:
    """Refuse a pooling that msense does not know.

    Raises:
        BadInput: it is none of `POOLINGS`.
    """
    if how not in POOLINGS:
        raise BadInput(f"the teacher pools by {how!r}, msense only by {', '.join(POOLINGS)}: give --no-pooled")


def pool(hidden: Tensor, mask: Tensor, how: str, *, normalize: bool) -> Tensor:
    """Return the vector of every passage, differentiable.

    Args:
        hidden: floating point [B, L, D], anything where the mask is false.
        mask: bool [B, L]. A passage of padding only gives zeros.
        how: the mean of all tokens, special ones too; the first token (`cls`); or the last.
        normalize: give it the length 1.

    Returns:
        [B, D], float64 or else float32.

    Raises:
        BadInput: another pooling.
    """
    check_pooling(how)
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    if how == "mean":
        vectors = hidden.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    else:
        places = torch.arange(mask.shape[1], device=mask.device)
        ends = places.masked_fill(~mask, len(places)).amin(1) if how == "cls" else (places * mask).amax(1)
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), ends.clamp(max=len(places) - 1)]
        vectors = vectors.masked_fill(~mask.any(1)[:, None], 0)
    return torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors


def pool_rows(embeddings: Tensor, lengths: Tensor, how: str, *, normalize: bool) -> Tensor:
    """Return the vector of every passage, of embeddings without padding; as `pool` gives it.

    Args:
        embeddings: float32 [N, D], passage after passage.
        lengths: int64 [P], tokens of each; one of 0 gives zeros.
        how: as of `pool`.
        normalize: give it the length 1.

    Returns:
        float32 [P, D].

    Raises:
        BadInput: another pooling.
    """
    check_pooling(how)
    ends = lengths.cumsum(0)
    if how == "mean":
        rows = torch.arange(len(embeddings), device=embeddings.device)
        vectors = torch.nn.functional.embedding_bag(rows, embeddings, ends - lengths, mode="mean")
    else:
        vectors = embeddings.new_zeros(len(lengths), embeddings.shape[1])
        real = lengths > 0
        vectors[real] = embeddings[(ends - lengths if how == "cls" else ends - 1)[real]]
    return torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors
