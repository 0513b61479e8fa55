"""A student without attention: token embeddings, a depthwise convolution over nearby tokens, the passage's mean, one MLP.

Comes in: padded token ids [B, L]. Goes out: embeddings [B, L, D], at first each token's mean teacher embedding. The MLP's
first layer comes before the convolution, so that for inference it can be made a table of tokens, and nothing but its
second layer is ever multiplied (see `static_inference`). Holds 2·V·D numbers, and 11·B·L·U in training.
"""

import numpy as np
import torch
from torch import Tensor, nn

from msense.dictionary import SenseDictionary
from msense.student.config import StaticSizes

_ROWS = 1 << 16  # senses widened at a time
_RIDGE = 0.3  # of the inputs' mean variance: best for tokens held out of 1,290 of MiniLM's on Banking77 (R² 0.44)


class StaticBody(nn.Module):
    """Embeddings that start at the token means; how far a token may leave its own depends on how often it was seen.

    The embedding of token t is means[t] + confidence[t] · (shift[t] + MLP): weight decay of the shift and of `back` pulls
    towards the mean, and a token of confidence 0 never leaves it.
    """

    means: Tensor  # float32 [V, D]
    confidence: Tensor  # float32 [V], 0 to 1

    def __init__(self, vocab_size: int, dim: int, sizes: StaticSizes) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(vocab_size, dim))
        self.register_buffer("confidence", torch.ones(vocab_size))
        self.shift: nn.Module = nn.Embedding.from_pretrained(torch.zeros(vocab_size, dim), freeze=False)
        self.project = nn.Linear(dim, sizes.units, bias=False)
        self.taps = nn.Parameter(torch.randn(sizes.window, sizes.units) / sizes.window**0.5)
        self.passage = nn.Linear(dim, sizes.units)
        self.back = nn.Linear(sizes.units, dim)
        nn.init.zeros_(self.back.weight)
        nn.init.zeros_(self.back.bias)
        self.width = dim

    def table(self) -> Tensor:
        """Return the token embeddings before the MLP, [V, D]."""
        return self.means + self.confidence[:, None] * self.shift.weight

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed passages.

        Args:
            ids: int64 [B, L], anything where the mask is false.
            mask: bool [B, L].

        Returns:
            [B, L, D]; zero on padding.
        """
        ids, inside = ids.masked_fill(~mask, 0), mask[..., None]
        confidence = self.confidence[ids][..., None] * inside
        tokens = nn.functional.embedding(ids, self.means) + confidence * self.shift(ids)
        tokens = tokens * inside
        mean = tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        window, length = len(self.taps), ids.shape[1]
        padded = nn.functional.pad(self.project(tokens), (0, 0, window // 2, window // 2))
        units = self.passage(mean)[:, None]
        for place in range(window):
            units = units + padded[:, place : place + length] * self.taps[place]
        return tokens + confidence * self.back(torch.relu(units))


def token_means(dictionary: SenseDictionary, inputs: Tensor) -> Tensor:
    """Return where a static student's token embeddings begin, float32 [V, D].

    A token with senses begins at their mean weighted by counts, its mean teacher embedding. One without begins at its
    *input* embedding in the teacher, mapped by the ridge regression that best gives the means of the tokens with
    senses: nearer to what the teacher would say than the mean of all tokens, and different for every token.

    Args:
        dictionary: of any device; its senses are read chunk by chunk.
        inputs: floating point [V, D_in], the teacher's input embeddings.
    """
    means = torch.zeros(dictionary.vocab_size, dictionary.dim)
    sizes = np.diff(dictionary.offsets)
    token = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
    points = torch.from_numpy(np.bincount(token.numpy(), weights=dictionary.counts, minlength=len(sizes)))
    share = (torch.from_numpy(np.array(dictionary.counts)) / points[token]).float()
    for rows in torch.arange(len(token)).split(_ROWS):
        means.index_add_(0, token[rows], dictionary.ragged.rows(rows).cpu().float() * share[rows, None])
    known = points > 0
    if known.any() and not known.all():
        means[~known] = _mapped(inputs[known], means[known], points[known], inputs[~known])
    return means


def _mapped(inputs: Tensor, outputs: Tensor, points: Tensor, asked: Tensor) -> Tensor:
    """Map `asked` [M, D_in] as ridge regression maps inputs [T, D_in] to outputs [T, D] of so many points [T] each."""
    weight = (points / (points + 1))[:, None].double()  # the mean of few points is a poor example
    x, y = inputs.double(), outputs.double()
    x_mean, y_mean = (x * weight).sum(0) / weight.sum(), (y * weight).sum(0) / weight.sum()
    x, y = x - x_mean, y - y_mean
    gram = x.T @ (x * weight)
    ridge = _RIDGE * gram.diagonal().mean() + 1e-9
    solution = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), x.T @ (y * weight))
    return ((asked.double() - x_mean) @ solution + y_mean).float()


def confidence(dictionary: SenseDictionary, seen: np.ndarray, stay: float) -> Tensor:
    """Return how far each token may leave its mean, n / (n + stay), float32 [V].

    Tokens that the dictionary leaves out by rule stand in every passage: they are free.

    Args:
        dictionary: its rule for special tokens.
        seen: integers [V], occurrences n of each token in the training passages.
        stay: from 0 on; 0 lets every token go that was seen at all.
    """
    counts = torch.from_numpy(seen.astype(np.float64))
    found = torch.where(counts > 0, counts / (counts + stay), 0.0)
    found[list(dictionary.config.excluded_token_ids)] = 1.0
    return found.float()
