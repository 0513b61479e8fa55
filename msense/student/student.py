"""The student: a body, an adaptor to the teacher's width where it is needed, and a head for senses.

Comes in: padded token ids [B, L]. Goes out: two embeddings a token [B, L, D] and a sentence vector [B, D]. The head is
linear and begins as identity, so that neither output pays for the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from msense.pooling import pool
from msense.student.config import StudentConfig
from msense.student.static import StaticBody
from msense.student.transformer import TransformerBody


class StudentOutput(NamedTuple):
    """Embeddings of a batch; rows of padding are meaningless."""

    hidden: Tensor  # [B, L, D], of which the sentence vector is made
    senses: Tensor  # [B, L, D], compared with the senses of each token; the same tensor if there is one head


class Student(nn.Module):
    """A student with random weights, but for a sense head that is the identity; `make_student` gives it better ones."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.body: StaticBody | TransformerBody
        if config.static is not None:
            self.body = StaticBody(config.vocab_size, config.dim, config.static)
        else:
            self.body = TransformerBody(config.body or {})
        self.adaptor = nn.Linear(self.body.width, config.dim) if self.body.width != config.dim else None
        self.head = nn.Linear(config.dim, config.dim) if config.heads == "two" else None
        if self.head is not None:
            nn.init.eye_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> StudentOutput:
        """Embed passages.

        Args:
            ids: int64 [B, L], anything where the mask is false.
            mask: bool [B, L], padding on either side.
        """
        hidden = self.body(ids, mask)
        hidden = hidden if self.adaptor is None else self.adaptor(hidden)
        return StudentOutput(hidden, hidden if self.head is None else self.head(hidden))

    def sentence(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return sentence vectors [B, D] as the teacher makes them of its embeddings [B, L, D]."""
        return pool(hidden, mask, self.config.pooling, normalize=self.config.normalize)

    def weights(self) -> dict[str, Tensor]:
        """Return what is saved: all tensors, a static student's shift added to its means."""
        state = self.state_dict()
        if isinstance(self.body, StaticBody):
            state["body.means"] = self.body.table().detach()
            del state["body.shift.weight"]
        return state

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take over what `weights` gave.

        Raises:
            RuntimeError: names or shapes differ.
        """
        if isinstance(self.body, StaticBody):
            weights = {**weights, "body.shift.weight": torch.zeros_like(self.body.means)}
        self.load_state_dict(weights)
