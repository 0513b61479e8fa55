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


def pool(hidden: Tensor, mask: Tensor, how: str, normalize: bool) -> Tensor:
    """Return the vector of every passage, differentiable.

    Args:
        hidden: floating point [B, L, D].
        mask: bool [B, L], at least one true a row.
        how: one of `POOLINGS`.
        normalize: give it the length 1.

    Returns:
        float32 [B, D].

    Raises:
        BadInput: another pooling.
    """
    check_pooling(how)
    if how == "mean":
        part = mask.to(torch.float32)
        vectors = torch.bmm(part[:, None], hidden.masked_fill(~mask[..., None], 0).float())[:, 0]
        vectors = vectors / part.sum(dim=1, keepdim=True)
    else:
        place = torch.arange(mask.shape[1], device=mask.device)
        far = mask.shape[1] if how == "cls" else -1
        places = torch.where(mask, place, far)
        chosen = places.amin(1) if how == "cls" else places.amax(1)
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), chosen].float()
    return torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors
