"""A student without attention: token embeddings, a depthwise convolution over nearby tokens, the passage mean, one MLP.

The MLP's first layer is applied before the convolution, so that inference can precompute it per token and multiplies by
the second layer only (see `static_inference`). Memory: 2·V·D numbers, and 11·B·L·U in training.
"""

import numpy as np
import torch
from torch import Tensor, nn

from msense.dictionary import SenseDictionary
from msense.student.config import StaticSizes

_ROWS = 1 << 16  # centroids converted to float32 at a time
_RIDGE = 0.3  # times the inputs' mean variance: best R² (0.44) on held-out tokens of 1,290 (MiniLM, Banking77)


class StaticBody(nn.Module):
    """Embeddings initialized to token means; each token may depart from its mean in proportion to its confidence.

    The embedding of token t is means[t] + confidence[t] · (shift[t] + MLP): weight decay of the shift and of `back`
    pulls it towards the mean, and a token of confidence 0 stays there.

    Example:
        >>> body = StaticBody(9, 4, StaticSizes(units=6, kernel_size=3))
        >>> body(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)).shape
        torch.Size([1, 2, 4])
    """

    means: Tensor  # float32 [V, D]
    confidence: Tensor  # float32 [V], 0 to 1

    def __init__(self, vocab_size: int, dim: int, sizes: StaticSizes) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(vocab_size, dim))
        self.register_buffer("confidence", torch.ones(vocab_size))
        self.shift: nn.Module = nn.Embedding.from_pretrained(torch.zeros(vocab_size, dim), freeze=False)
        self.project = nn.Linear(dim, sizes.units, bias=False)
        self.taps = nn.Parameter(torch.randn(sizes.kernel_size, sizes.units) / sizes.kernel_size**0.5)
        self.passage = nn.Linear(dim, sizes.units)
        self.back = nn.Linear(sizes.units, dim)
        nn.init.zeros_(self.back.weight)
        nn.init.zeros_(self.back.bias)
        self.width = dim

    def get_input_embeddings(self) -> nn.Module:
        """Return the trained embedding table."""
        return self.shift

    def set_input_embeddings(self, table: nn.Module) -> None:
        """Replace the trained embedding table."""
        self.shift = table

    def table(self) -> Tensor:
        """Return the token embeddings before the MLP, [V, D]."""
        return self.means + self.confidence[:, None] * self.shift.weight

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return embeddings [B, L, D], zero on padding, of token ids int64 [B, L] with a mask bool [B, L]."""
        ids, inside = ids.masked_fill(~mask, 0), mask[..., None]
        confidence = self.confidence[ids][..., None] * inside
        tokens = nn.functional.embedding(ids, self.means) + confidence * self.shift(ids)
        tokens = tokens * inside
        mean = tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        kernel_size, length = len(self.taps), ids.shape[1]
        padded = nn.functional.pad(self.project(tokens), (0, 0, kernel_size // 2, kernel_size // 2))
        units = self.passage(mean)[:, None]
        for place in range(kernel_size):
            units = units + padded[:, place : place + length] * self.taps[place]
        return tokens + confidence * self.back(torch.relu(units))


def token_means(dictionary: SenseDictionary, inputs: Tensor) -> Tensor:
    """Return the initial token embeddings of a static student, float32 [V, D].

    A token with senses gets their mean weighted by counts, which is its mean teacher embedding. For the others it is
    predicted from the teacher's *input* embeddings, floating point [V, D_in], by a ridge regression fitted on the
    tokens with senses: closer to the teacher than the mean of all tokens, and different for every token.
    """
    means = torch.zeros(dictionary.vocab_size, dictionary.dim, dtype=torch.float32)
    sizes = np.diff(dictionary.offsets)
    token = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
    points = torch.from_numpy(np.bincount(token.numpy(), weights=dictionary.counts, minlength=len(sizes)))
    share = (torch.from_numpy(np.array(dictionary.counts)) / points[token]).float()
    for rows in torch.arange(len(token)).split(_ROWS):
        means.index_add_(0, token[rows], dictionary.ragged.rows(rows).cpu().float() * share[rows, None])
    known = points > 0
    if known.any() and not known.all():
        means[~known] = _ridge_predict(inputs[known], means[known], points[known], inputs[~known])
    return means


def _ridge_predict(inputs: Tensor, outputs: Tensor, points: Tensor, new_inputs: Tensor) -> Tensor:
    """Fit a ridge regression of inputs [T, D_in] on outputs [T, D]; return its outputs [M, D] for new inputs [M, D_in].

    Examples are weighted by the number of points [T] behind each mean, n / (n + 1): the mean of few points is noisy.
    """
    weight = (points / (points + 1))[:, None].double()
    x, y = inputs.double(), outputs.double()
    x_mean, y_mean = (x * weight).sum(0) / weight.sum(), (y * weight).sum(0) / weight.sum()
    x, y = x - x_mean, y - y_mean
    gram = x.T @ (x * weight)
    ridge = _RIDGE * gram.diagonal().mean() + 1e-9
    solution = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), x.T @ (y * weight))
    return ((new_inputs.double() - x_mean) @ solution + y_mean).float()


def confidence(dictionary: SenseDictionary, seen: np.ndarray, prior_count: float) -> Tensor:
    """Return the confidence n / (n + prior_count) of each token, float32 [V], from its occurrences n, integers [V].

    Special tokens excluded by the dictionary are part of every passage: their confidence is 1.
    """
    counts = torch.from_numpy(seen.astype(np.float64))
    shares = torch.where(counts > 0, counts / (counts + prior_count), 0.0)
    shares[list(dictionary.config.excluded_token_ids)] = 1.0
    return shares.float()
