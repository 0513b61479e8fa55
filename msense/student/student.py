"""The student model: a body, an adaptor to the teacher's dimension where they differ, and a linear head for senses."""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from msense.student.config import StudentConfig
from msense.student.static import StaticBody, TokenTable
from msense.student.transformer import TransformerBody
from msense.teacher.pooling import Projection, SentenceHead


class StudentOutput(NamedTuple):
    """Embeddings of a batch; rows of padding are undefined."""

    hidden: Tensor  # [B, L, D], pooled to sentence vectors
    senses: Tensor  # [B', L, D], of the rows wanted, compared with sense centroids; with heads="one" those of `hidden`


class Student(nn.Module):
    """A student with a random body and an identity sense head; see `init_student` for a better initialization.

    Example:
        >>> config = StudentConfig(
        ...     kind="static", teacher={"name": "t"}, tokenizer_fingerprint="", dim=4, vocab_size=9,
        ...     static={"units": 6, "kernel_size": 3},
        ... )
        >>> Student(config)(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)).hidden.shape
        torch.Size([1, 2, 4])
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.body: TokenTable | TransformerBody
        if config.is_table:
            self.body = TokenTable(config.vocab_size, config.dim)
        elif config.static is not None:
            separate = config.heads == "separate"
            self.body = StaticBody(config.vocab_size, config.dim, config.static, separate=separate)
        else:
            self.body = TransformerBody(config.body or {})
        self.adaptor = nn.Linear(self.body.width, config.dim) if self.body.width != config.dim else None
        self.head = nn.Linear(config.dim, config.dim) if config.heads != "one" else None
        if self.head is not None:
            nn.init.eye_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.sentence_head = SentenceHead(
            config.pooling,
            normalize=config.normalize,
            skip=config.skip,
            projections=[Projection(projection) for projection in config.projections],
            truncate_dim=config.truncate_dim,
        ).requires_grad_(requires_grad=False)  # the teacher's own

    def forward(self, ids: Tensor, mask: Tensor, sense_rows: Tensor | None = None) -> StudentOutput:
        """Embed token ids int64 [B, L] with a mask bool [B, L], padded on either side.

        `sense_rows`, int64 [B'], are the texts whose senses are wanted; default: all.
        """
        hidden = self.body(ids, mask)
        hidden = hidden if self.adaptor is None else self.adaptor(hidden)
        rows = slice(None) if sense_rows is None else sense_rows
        if self.config.heads == "separate":
            assert isinstance(self.body, StaticBody)
            senses = self.body.sense_embeddings(ids[rows], mask[rows])
        else:
            senses = hidden if sense_rows is None else hidden[rows]
        return StudentOutput(hidden, senses if self.head is None else self.head(senses))

    def train(self, mode: bool = True) -> Self:
        """Set the mode of training, in which a transformer's dropout stays off: targets without noise are learnt faster."""
        super().train(mode)
        self.body.eval()
        return self

    def separate_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that only the senses depend on, and that depend on nothing else."""
        if self.config.heads != "separate":
            return []
        assert self.head is not None
        assert isinstance(self.body, StaticBody)
        assert self.body.sense_mixer is not None
        return [*self.body.sense_mixer.parameters(), *self.head.parameters()]

    def sentence(self, hidden: Tensor, mask: Tensor, skip: int | Tensor | None = None) -> Tensor:
        """Return sentence vectors [B, D'], made of `hidden` [B, L, D] like the teacher's; for `skip` see `pool`."""
        vectors: Tensor = self.sentence_head(hidden, mask, skip)
        return vectors

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors to save; a static student's shift is merged into its means."""
        state = {_stored_name(name): value for name, value in self.state_dict().items()}
        if isinstance(self.body, TokenTable):
            state["body.means"] = self.body.table().detach()
            del state["body.shift.weight"]
        return state

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Load the tensors returned by `weights`; raise RuntimeError if names or shapes differ."""
        if isinstance(self.body, TokenTable):
            fixed = {"body.confidence": torch.ones_like(self.body.confidence)}  # without influence on a table
            fixed["body.shift.weight"] = torch.zeros_like(self.body.means)
            weights = fixed | weights
        names = {_stored_name(name): name for name in self.state_dict()}
        self.load_state_dict({names.get(name, name): value for name, value in weights.items()})


def _stored_name(name: str) -> str:
    """Return a tensor's name in a saved student, where a static body has no separate part for its mixer."""
    return name.replace("body.mixer.", "body.", 1) if name.startswith("body.mixer.") else name
