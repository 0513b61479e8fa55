"""Losses over the senses of tokens: cross-entropy with the teacher's sense, and differentiable soft replacement.

Both use the same scores, computed once. Memory: N·D numbers, N·K probabilities and `MAX_HELD_ELEMENTS` of senses kept for
the backward pass, a few times `assignment.BATCH_ELEMENTS`, and optionally the senses in float32; never [N, K, D].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from msense.constants import NO_SENSE, Metric
from msense.dictionary.assignment import Batch, RaggedSenses, batch_elements, drop_padding, ragged_batches

MAX_HELD_ELEMENTS = 1 << 24  # gathered sense elements kept between forward and backward; the rest is gathered again
MAX_CACHE_BYTES = 1 << 30  # largest float32 cache of prepared senses; larger dictionaries are prepared batch by batch
_ROWS = 1 << 16  # senses prepared at a time


@dataclass(frozen=True)
class LossSum:
    """A loss summed over `count` items; the mean over several is the sum of totals divided by the sum of counts."""

    total: Tensor  # scalar
    count: int  # tokens or passages


@dataclass(frozen=True)
class SenseLabels:
    """The teacher's senses of N tokens, hard or soft."""

    numbers: np.ndarray  # uint16 [N], or [N, m] for the m nearest; 65535 = none
    weights: np.ndarray | None = None  # float [N, m], non-negative, normalized per token; None: all equal


class SenseScorer:
    """A dictionary's senses with a score: negative squared distance, dot product or cosine, divided by a scale.

    For l2, senses are taken relative to the first sense of their token, which keeps precision for embeddings far from
    zero and does not change the softmax over a token's senses.

    Example:
        >>> senses = RaggedSenses(np.array([0, 2]), (torch.tensor([[0.0, 0], [2, 0]]),))
        >>> space = SenseScorer(senses, "l2", scale=1.0)
        >>> loss, _ = sense_losses(torch.zeros(1, 2), np.array([0]), SenseLabels(np.array([0])), space, replaced=False)
        >>> round(loss.total.item(), 4)  # log(1 + exp(-4))
        0.0181
    """

    def __init__(self, senses: RaggedSenses, metric: Metric, scale: float) -> None:
        """Store the senses, best on the embeddings' device, and cache them prepared, up to MAX_CACHE_BYTES."""
        self.senses, self.metric, self.scale = senses, metric, scale
        self._cache: tuple[Tensor, Tensor] | None = None
        if sum(part.numel() for part in senses.parts) * 4 <= MAX_CACHE_BYTES:
            first = torch.from_numpy(np.repeat(senses.offsets[:-1], np.diff(senses.offsets)))
            parts = [self._prepare(rows, first[rows], torch.float32) for rows in torch.arange(len(first)).split(_ROWS)]
            self._cache = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def batches(self, embeddings: Tensor, ids: np.ndarray) -> Iterator[tuple[Batch, Tensor, Tensor, Tensor]]:
        """Yield batches of embeddings [N, D] of tokens [N]: batch, rows [T, n], `ready` senses, logits [T, n, K]."""
        dim, device = embeddings.shape[1], embeddings.device
        for batch in ragged_batches(ids, self.senses.offsets, dim, batch_elements(device)):
            rows = batch.rows.to(device)
            points = self.points(embeddings, rows)
            ready, bias = self.ready(batch, points)
            if self.metric == "l2":
                scores = torch.baddbmm(bias[:, None], points, ready.transpose(1, 2), beta=-1, alpha=2)
            else:
                points = torch.nn.functional.normalize(points, dim=2) if self.metric == "cosine" else points
                scores = torch.bmm(points, ready.transpose(1, 2))
            if batch.present is not None:
                scores.masked_fill_(~batch.present[:, None].to(device), -torch.inf)
            logits = scores.sub_(scores.amax(2, keepdim=True)).div_(self.scale)  # maximum first: no overflow
            yield batch, rows, ready, logits

    def points(self, embeddings: Tensor, rows: Tensor) -> Tensor:
        """Return rows [T, n] of embeddings [N, D] as [T, n, D], in the working dtype."""
        chosen = embeddings.index_select(0, rows.view(-1))
        return chosen.to(torch.promote_types(chosen.dtype, torch.float32)).view(*rows.shape, -1)

    def ready(self, batch: Batch, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return prepared senses [T, K, D] and the l2 bias of their scores [T, K], in `like`'s dtype and device."""
        rows, shape = batch.senses.view(-1), batch.senses.shape
        if self._cache is not None and like.dtype == torch.float32:
            rows = rows.to(like.device)
            ready, bias = self._cache[0].index_select(0, rows), self._cache[1].index_select(0, rows)
        else:
            first = batch.senses[:, :1].expand(shape).reshape(-1)
            ready, bias = (part.to(like.device) for part in self._prepare(rows, first, like.dtype))
        return ready.view(*shape, -1), bias.view(shape)

    def mean(self, shares: Tensor, batch: Batch, ready: Tensor) -> Tensor:
        """Return the mean of each token's senses [T, n, D], weighted by probabilities [T, n, K]."""
        if self.metric == "dot":
            return torch.bmm(shares, ready)
        if self.metric == "l2":
            origin = self.senses.rows(batch.senses[:, 0]).to(ready.device, ready.dtype)
            return torch.baddbmm(origin[:, None], shares, ready)
        return torch.bmm(shares, self._raw(batch, ready))

    def products(self, upstream: Tensor, batch: Batch, ready: Tensor) -> Tensor:
        """Return products [T, n, K] of upstream gradients [T, n, D] with senses, up to a constant per embedding."""
        if self.metric == "cosine":
            ready = self._raw(batch, ready)
        return torch.bmm(upstream, ready.transpose(1, 2))

    def pull(self, weights: Tensor, embeddings: Tensor, rows: Tensor, ready: Tensor) -> Tensor:
        """Return the gradient [T, n, D] of Σ weights · logits in rows of embeddings; weights [T, n, K] sum to 0."""
        towards = torch.bmm(weights, ready)
        if self.metric != "cosine":
            return towards.mul_((2 if self.metric == "l2" else 1) / self.scale)
        points = self.points(embeddings, rows)
        length = points.norm(dim=2, keepdim=True).clamp(min=1e-12)
        unit = points / length
        return (towards - unit * (unit * towards).sum(2, keepdim=True)) / (length * self.scale)

    def _raw(self, batch: Batch, like: Tensor) -> Tensor:
        """Return a batch's unprepared senses [T, K, D]."""
        return self.senses.rows(batch.senses.view(-1)).to(like.device, like.dtype).view(like.shape)

    def _prepare(self, rows: Tensor, first: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return prepared senses [M, D] and biases [M] of rows int64 [M], given the first rows of their tokens."""
        own = self.senses.rows(rows).to(dtype)
        if self.metric == "l2":
            origin = self.senses.rows(first).to(dtype)
            step = own - origin
            return step, origin.add_(own).mul_(step).sum(1)
        ready = torch.nn.functional.normalize(own, dim=1) if self.metric == "cosine" else own
        return ready, ready.new_zeros(len(rows))


def sense_losses(
    embeddings: Tensor, ids: np.ndarray, labels: SenseLabels | None, space: SenseScorer, *, replaced: bool
) -> tuple[LossSum | None, Tensor | None]:
    """Return the cross-entropy over each token's own senses, and the softly replaced embeddings.

    Args:
        embeddings: floating point [N, D].
        ids: integers [N].
        labels: targets of softmax(scores / scale) for these N tokens; unlabelled tokens are ignored. None: no loss.
        space: the senses.
        replaced: also return the softmax(scores / scale)-weighted means of the senses, [N, D] in the embeddings' dtype;
            embeddings of tokens without senses are returned unchanged.
    """
    target = None if labels is None else _target(labels, embeddings.device)
    total, means = _SenseLosses.apply(embeddings, ids, space, target, replaced)
    loss = None if target is None else LossSum(total, target.tokens)
    return loss, means if replaced else None


class _Target(NamedTuple):
    """The teacher's senses with weights of sum 1; rows of unlabelled tokens are zero."""

    numbers: Tensor  # int64 [N, m]
    weights: Tensor  # float [N, m]
    labelled: Tensor  # float [N]: 1 where there is a label
    tokens: int  # labelled ones


class _SenseLosses(torch.autograd.Function):
    """Keeps the sense probabilities for the backward pass, and up to `MAX_HELD_ELEMENTS` of the senses themselves."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, ids: np.ndarray, space: SenseScorer, target: _Target | None, replaced: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total = torch.zeros((), dtype=torch.float64, device=embeddings.device)
        out = embeddings.clone() if replaced else embeddings.new_empty(0)
        ctx.space, ctx.target, ctx.kept, held = space, target, [], 0
        with torch.autocast(embeddings.device.type, enabled=False):
            for batch, rows, ready, logits in space.batches(embeddings, ids):
                shares = logits.log_softmax(2)
                if target is not None:
                    numbers, weight = target.numbers[rows], target.weights[rows].to(logits.dtype)  # [T, n, m]
                    total -= drop_padding((shares.gather(2, numbers) * weight).sum(2), batch).sum(dtype=torch.float64)
                shares = shares.exp_()
                if replaced:
                    _put(out, rows, space.mean(shares, batch, ready))
                if ctx.needs_input_grad[0]:
                    held += ready.numel()
                    ctx.kept.append((batch, rows, shares, ready if held <= MAX_HELD_ELEMENTS else None))
        ctx.save_for_backward(embeddings)
        return total.to(torch.promote_types(embeddings.dtype, torch.float32)), out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_total: Tensor | None, of_means: Tensor | None) -> tuple[Tensor | None, ...]:
        (embeddings,), space, target = ctx.saved_tensors, ctx.space, ctx.target
        gradient = torch.zeros_like(embeddings) if of_means is None else of_means.clone()
        with torch.autocast(embeddings.device.type, enabled=False):
            for batch, rows, shares, ready in ctx.kept:
                ready = space.ready(batch, shares)[0] if ready is None else ready
                weights = torch.zeros_like(shares)
                if of_total is not None and target is not None:
                    weights.addcmul_(shares, target.labelled[rows].to(shares.dtype)[..., None])
                    given = -target.weights[rows].to(shares.dtype)
                    weights.scatter_add_(2, target.numbers[rows], given).mul_(of_total)
                if of_means is not None:
                    products = space.products(space.points(of_means, rows), batch, ready)
                    weights.addcmul_(products.sub_((shares * products).sum(2, keepdim=True)), shares)
                _put(gradient, rows, space.pull(weights, embeddings, rows, ready))
        return gradient, None, None, None, None


def _put(out: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write a batch's values [T, n, D] to their rows; padding repeats a row together with its value."""
    out.index_copy_(0, rows.view(-1), values.flatten(0, 1).to(out.dtype))


def _target(labels: SenseLabels, device: torch.device) -> _Target:
    numbers = labels.numbers.astype(np.int64)
    numbers = numbers[:, None] if numbers.ndim == 1 else numbers
    weights = np.ones(numbers.shape) if labels.weights is None else labels.weights.astype(np.float64)
    weights = np.where(numbers == NO_SENSE, 0.0, weights)
    sums = weights.sum(1, keepdims=True)
    labelled = sums[:, 0] > 0
    return _Target(
        torch.from_numpy(np.where(weights > 0, numbers, 0)).to(device),
        torch.from_numpy(weights / np.where(sums > 0, sums, 1)).to(device),
        torch.from_numpy(labelled.astype(np.float64)).to(device),
        int(labelled.sum()),
    )
