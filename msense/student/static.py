"""Students without attention: a token table, and one with a small MLP over nearby tokens and the passage mean.

The MLP's first layer is applied before the convolution, so that inference can precompute it per token and multiplies by
the second layer only (see `static_inference`). Memory: 2·V·D numbers, and 11·B·L·U per mixer in training.
"""

import numpy as np
import torch
from torch import Tensor, nn

from msense.dictionary import SenseDictionary
from msense.student.config import StaticSizes

_ROWS = 1 << 12  # centroids or token embeddings converted at a time
_RIDGE = 0.3  # times the inputs' mean variance: best R² (0.44) on held-out tokens of 1,290 (MiniLM, Banking77)


class TokenTable(nn.Module):
    """Token embeddings without context, initialized to token means: a `table` student, or the start of a static one.

    The embedding of token t is means[t] + confidence[t] · shift[t]: weight decay of the shift pulls it towards the mean,
    and a token of confidence 0 stays there.

    Example:
        >>> body = TokenTable(9, 4)
        >>> body(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)).shape
        torch.Size([1, 2, 4])
    """

    means: Tensor  # float32 [V, D]
    confidence: Tensor  # float32 [V], 0 to 1

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(vocab_size, dim))
        self.register_buffer("confidence", torch.ones(vocab_size))
        self.shift: nn.Module = nn.Embedding.from_pretrained(torch.zeros(vocab_size, dim), freeze=False)
        self.width = dim

    def get_input_embeddings(self) -> nn.Module:
        """Return the trained embedding table."""
        return self.shift

    def set_input_embeddings(self, table: nn.Module) -> None:
        """Replace the trained embedding table."""
        self.shift = table

    def table(self) -> Tensor:
        """Return the token embeddings, [V, D]."""
        return self.means + self.confidence[:, None] * self.shift.weight

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return token embeddings [B, L, D], zero on padding, of token ids int64 [B, L] with a mask bool [B, L]."""
        ids = ids.masked_fill(~mask, 0)
        tokens = nn.functional.embedding(ids, self.means) + self.confidence[ids][..., None] * self.shift(ids)
        return tokens * mask[..., None]


class ContextMixer(nn.Module):
    """What context adds to every token: an MLP over a depthwise convolution of nearby tokens and the passage mean."""

    def __init__(self, dim: int, sizes: StaticSizes) -> None:
        super().__init__()
        self.project = nn.Linear(dim, sizes.units, bias=False)
        self.taps = nn.Parameter(torch.randn(sizes.kernel_size, sizes.units) / sizes.kernel_size**0.5)
        self.passage = nn.Linear(dim, sizes.units)
        self.back = nn.Linear(sizes.units, dim)
        nn.init.zeros_(self.back.weight)
        nn.init.zeros_(self.back.bias)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return [B, L, D] of token embeddings [B, L, D] that are zero on padding."""
        mean = tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        # channels-last, in which a depthwise convolution is five times as fast
        image = self.project(tokens).transpose(1, 2)[:, :, None].contiguous(memory_format=torch.channels_last)
        taps = self.taps.T[:, None, None].contiguous(memory_format=torch.channels_last)
        nearby = nn.functional.conv2d(image, taps, padding=(0, len(self.taps) // 2), groups=self.taps.shape[1])
        units = self.passage(mean)[:, None] + nearby[:, :, 0].transpose(1, 2)
        mixed: Tensor = self.back(torch.relu(units))
        return mixed


class StaticBody(TokenTable):
    """A token table whose embeddings depend on context: plus confidence[t] times what a `ContextMixer` adds.

    Example:
        >>> body = StaticBody(9, 4, StaticSizes(units=6, kernel_size=3))
        >>> body(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)).shape
        torch.Size([1, 2, 4])
    """

    def __init__(self, vocab_size: int, dim: int, sizes: StaticSizes, *, separate: bool = False) -> None:
        """Initialize a body; with `separate`, senses have a mixer of their own."""
        super().__init__(vocab_size, dim)
        self.mixer = ContextMixer(dim, sizes)
        self.sense_mixer = ContextMixer(dim, sizes) if separate else None

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return embeddings [B, L, D], zero on padding, of token ids int64 [B, L] with a mask bool [B, L]."""
        return self._mixed(super().forward(ids, mask), ids, mask, self.mixer)

    def sense_embeddings(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return what a separate sense head reads, [B, L, D]; its losses do not change the token table."""
        assert self.sense_mixer is not None
        return self._mixed(super().forward(ids, mask).detach(), ids, mask, self.sense_mixer)

    def _mixed(self, tokens: Tensor, ids: Tensor, mask: Tensor, mixer: ContextMixer) -> Tensor:
        confidence = self.confidence[ids.masked_fill(~mask, 0)] * mask
        return tokens + confidence[..., None] * mixer(tokens, mask)


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
        _predict_unknown(means, inputs, points, known)
    return means


def _predict_unknown(outputs: Tensor, inputs: Tensor, points: Tensor, known: Tensor) -> None:
    """Fit a ridge regression of inputs [V, D_in] on outputs [V, D] of the known tokens; predict the others' in place.

    Examples are weighted by the number of points [V] behind each mean, n / (n + 1): the mean of few points is noisy.
    """
    chunks, weight = known.nonzero()[:, 0].split(_ROWS), (points / (points + 1))[:, None].double()
    total = weight[known].sum()
    x_mean, y_mean = (
        torch.stack([(of[rows].double() * weight[rows]).sum(0) for rows in chunks]).sum(0) / total
        for of in (inputs, outputs)
    )
    gram = torch.zeros(len(x_mean), len(x_mean), dtype=torch.float64)
    product = torch.zeros(len(x_mean), len(y_mean), dtype=torch.float64)
    for rows in chunks:
        x = inputs[rows].double() - x_mean
        weighted = (x * weight[rows]).T
        gram += weighted @ x
        product += weighted @ (outputs[rows].double() - y_mean)
    ridge = _RIDGE * gram.diagonal().mean() + 1e-9
    solution = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), product)
    for rows in (~known).nonzero()[:, 0].split(_ROWS):
        outputs[rows] = ((inputs[rows].double() - x_mean) @ solution + y_mean).float()


def confidence(dictionary: SenseDictionary, seen: np.ndarray, prior_count: float) -> Tensor:
    """Return the confidence n / (n + prior_count) of each token, float32 [V], from its occurrences n, integers [V].

    Special tokens excluded by the dictionary are part of every passage: their confidence is 1.
    """
    counts = torch.from_numpy(seen.astype(np.float64))
    shares = torch.where(counts > 0, counts / (counts + prior_count), 0.0)
    shares[list(dictionary.config.excluded_token_ids)] = 1.0
    return shares.float()
