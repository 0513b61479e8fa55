"""Tables of the tokens that a training can meet: what it never meets is neither moved nor held by the optimizer.

Comes in: a student as it begins, and token ids. Goes out: the same student with smaller tables in training, and afterwards
the whole ones with what was learnt. Holds both tables; gradients and AdamW hold the smaller only.
"""

import torch
from torch import Tensor, nn

from msense.student.static import StaticBody
from msense.student.student import Student
from msense.student.transformer import TransformerBody


class NarrowTable(nn.Module):
    """Looks token ids up in a table of some of them; the others get the first row."""

    places: Tensor  # int64 [V]
    whole: Tensor  # [V, D], as it began

    def __init__(self, weight: Tensor, tokens: Tensor) -> None:
        """Take the rows of some tokens, int64 [T], of a table [V, D]."""
        super().__init__()
        places = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        places[tokens] = torch.arange(len(tokens), device=weight.device)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("whole", weight.detach(), persistent=False)
        self.register_buffer("tokens", tokens, persistent=False)
        self.weight = nn.Parameter(weight.detach()[tokens].clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: int64 [...] in, [..., D] out."""
        return nn.functional.embedding(self.places[ids], self.weight)

    def widened(self) -> nn.Embedding:
        """Return the whole table with what was learnt."""
        whole = self.whole.clone()
        whole[self.tokens] = self.weight.detach()
        return nn.Embedding.from_pretrained(whole, freeze=False)


def narrow(student: Student, tokens: Tensor) -> None:
    """Leave of a student's table of tokens, in place, only the rows of some; tables of other kinds stay as they are.

    Args:
        student: on its device.
        tokens: int64 [T], all that it will be given.
    """
    body = student.body
    table = body.shift if isinstance(body, StaticBody) else body.model.get_input_embeddings()
    if type(table) is nn.Embedding and len(tokens):
        _put(body, NarrowTable(table.weight, tokens.to(table.weight.device)))


def widen(student: Student) -> None:
    """Take `narrow` back, and keep what was learnt."""
    body = student.body
    table = body.shift if isinstance(body, StaticBody) else body.model.get_input_embeddings()
    if isinstance(table, NarrowTable):
        _put(body, table.widened())


def _put(body: StaticBody | TransformerBody, table: nn.Module) -> None:
    if isinstance(body, StaticBody):
        body.shift = table
    else:
        body.model.set_input_embeddings(table)
