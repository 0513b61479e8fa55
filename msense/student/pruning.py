"""Reduce a student's token embeddings to the tokens of the training passages, and restore them after training.

The whole table stays in memory, but gradients and optimizer state cover the reduced table only.
"""

import torch
from torch import Tensor, nn

from msense.student.student import Student


class PrunedEmbedding(nn.Module):
    """An embedding [V, D] of a subset of the token ids, int64 [T]; all other ids map to the subset's first row."""

    places: Tensor  # int64 [V], row of each token id in `weight`
    whole: Tensor  # [V, D], initial values
    tokens: Tensor  # int64 [T]

    def __init__(self, whole: Tensor, tokens: Tensor) -> None:
        super().__init__()
        places = torch.zeros(len(whole), dtype=torch.int64, device=whole.device)
        places[tokens] = torch.arange(len(tokens), device=whole.device)
        for name, buffer in (("places", places), ("whole", whole), ("tokens", tokens)):
            self.register_buffer(name, buffer, persistent=False)
        self.weight = nn.Parameter(whole[tokens].clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Return embeddings [..., D] of int64 [...]."""
        return nn.functional.embedding(self.places[ids], self.weight)


def prune_embeddings(student: Student, tokens: Tensor) -> None:
    """Replace a student's nn.Embedding in place by one of `tokens`, int64 [T]; other embeddings are left unchanged."""
    table = student.body.get_input_embeddings()
    if type(table) is nn.Embedding and len(tokens):
        student.body.set_input_embeddings(PrunedEmbedding(table.weight.detach(), tokens.to(table.weight.device)))


def restore_embeddings(student: Student) -> None:
    """Undo `prune_embeddings` in place, keeping the trained rows."""
    if isinstance(table := student.body.get_input_embeddings(), PrunedEmbedding):
        whole = table.whole.clone()
        whole[table.tokens] = table.weight.detach()
        student.body.set_input_embeddings(nn.Embedding.from_pretrained(whole, freeze=False))
