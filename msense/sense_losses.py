"""Losses over the senses of tokens: cross-entropy with the teacher's sense, and soft replacement that gradients flow through.

Comes in: embeddings [N, D], token ids, a dictionary's senses. Goes out: a sum and [N, D], differentiable in the embeddings
only. Scores are computed once for both. Holds N·D numbers, for the way back N·K chances and `HELD_NUMBERS` of senses, one
batch of `assignment.BATCH_ELEMENTS` a few times, never [N, K, D]; and the senses in float32 where they are kept ready.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from msense.config import NO_SENSE, Metric
from msense.dictionary.assignment import Batch, RaggedSenses, batch_elements, ragged_batches, real
from msense.errors import BadInput

HELD_NUMBERS = 1 << 24  # of a batch's senses between the two ways; the others are fetched again
KEPT_BYTES = 1 << 30  # of senses kept ready in float32; of a larger dictionary they are made ready batch by batch
_ROWS = 1 << 16  # made ready at a time


@dataclass(frozen=True)
class LossSum:
    """A loss summed over what it counts; the mean of several is the sum of totals by the sum of counts."""

    total: Tensor  # scalar
    count: int  # tokens or passages


@dataclass(frozen=True)
class SenseLabels:
    """The senses that the teacher picked, hard or soft.

    Attributes:
        numbers: uint16 [N], or [N, m]: of the m nearest; 65535 for none.
        weights: float [N, m], from 0 on; a token's are brought to the sum 1. None: all equal.
    """

    numbers: np.ndarray
    weights: np.ndarray | None = None


class SenseSpace:
    """A dictionary's senses, to be scored: minus the squared distance, the dot product or the cosine, by a scale.

    For l2 senses are taken against the first of their token, so that embeddings far from zero keep the digits that tell
    senses apart; no softmax over a token's senses sees the difference.
    """

    def __init__(self, senses: RaggedSenses, metric: Metric, scale: float, *, kept: bool = False) -> None:
        """Take senses as they are.

        Args:
            senses: of the dictionary, best on the embeddings' device.
            metric: l2, dot or cosine.
            scale: divides the scores.
            kept: keep them ready in float32, for many calls (up to KEPT_BYTES).
        """
        self.senses, self.metric, self.scale = senses, metric, scale
        self._kept: tuple[Tensor, Tensor] | None = None
        if kept and sum(part.numel() for part in senses.parts) * 4 <= KEPT_BYTES:
            first = torch.from_numpy(np.repeat(senses.offsets[:-1], np.diff(senses.offsets)))
            parts = [self._made(rows, first[rows], torch.float32) for rows in torch.arange(len(first)).split(_ROWS)]
            if parts:
                self._kept = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def batches(self, embeddings: Tensor, ids: np.ndarray) -> "Iterator[_Scored]":
        """Yield batches of embeddings [N, D] of tokens [N] with their logits, in the working dtype."""
        dim, device = embeddings.shape[1], embeddings.device
        for batch in ragged_batches(ids, self.senses.offsets, dim, batch_elements(device)):
            rows = batch.rows.to(device)
            points = self.points(embeddings, rows)
            ready, bias = self.ready(batch, points)
            if self.metric == "l2":
                found = torch.baddbmm(bias[:, None], points, ready.transpose(1, 2), beta=-1, alpha=2)
            else:
                asked = torch.nn.functional.normalize(points, dim=2) if self.metric == "cosine" else points
                found = torch.bmm(asked, ready.transpose(1, 2))
            if batch.present is not None:
                found.masked_fill_(~batch.present[:, None].to(device), -torch.inf)
            logits = found.sub_(found.amax(2, keepdim=True)).div_(self.scale)  # so a tiny scale does not overflow
            yield _Scored(batch, rows, ready, logits)

    def points(self, embeddings: Tensor, rows: Tensor) -> Tensor:
        """Return rows [T, n] of embeddings [N, D] as [T, n, D], in the working dtype."""
        found = embeddings.index_select(0, rows.view(-1))
        return found.to(torch.promote_types(found.dtype, torch.float32)).view(*rows.shape, -1)

    def ready(self, batch: Batch, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a batch's senses as they are multiplied [T, K, D], and what l2 takes off their scores [T, K].

        Both have the dtype and device of `like`.
        """
        rows, shape = batch.senses.view(-1), batch.senses.shape
        if self._kept is not None and like.dtype == torch.float32:
            rows = rows.to(like.device)
            ready, bias = self._kept[0].index_select(0, rows), self._kept[1].index_select(0, rows)
        else:
            first = batch.senses[:, :1].expand(shape).reshape(-1)
            ready, bias = (part.to(like.device) for part in self._made(rows, first, like.dtype))
        return ready.view(*shape, -1), bias.view(shape)

    def mean(self, chances: Tensor, batch: Batch, ready: Tensor) -> Tensor:
        """Return the mean of each token's senses [T, n, D], weighted by chances [T, n, K] of sum 1."""
        if self.metric == "dot":
            return torch.bmm(chances, ready)
        if self.metric == "l2":
            origin = self.senses.rows(batch.senses[:, 0]).to(ready.device, ready.dtype)
            return torch.baddbmm(origin[:, None], chances, ready)
        own = self.senses.rows(batch.senses.view(-1)).to(ready.device, ready.dtype)
        return torch.bmm(chances, own.view(ready.shape))

    def above(self, upstream: Tensor, batch: Batch, ready: Tensor) -> Tensor:
        """Return the products [T, n, K] of gradients [T, n, D] with senses, but for a constant of each embedding."""
        if self.metric == "cosine":
            ready = self.senses.rows(batch.senses.view(-1)).to(ready.device, ready.dtype).view(ready.shape)
        return torch.bmm(upstream, ready.transpose(1, 2))

    def pull(self, weights: Tensor, embeddings: Tensor, rows: Tensor, ready: Tensor) -> Tensor:
        """Return the gradient in rows of embeddings [T, n, D] of Σ weights · logits, the weights of each summing to 0."""
        towards = torch.bmm(weights, ready)
        if self.metric != "cosine":
            return towards.mul_((2 if self.metric == "l2" else 1) / self.scale)
        points = self.points(embeddings, rows)
        length = points.norm(dim=2, keepdim=True).clamp(min=1e-12)
        unit = points / length
        return (towards - unit * (unit * towards).sum(2, keepdim=True)) / (length * self.scale)

    def _made(self, rows: Tensor, first: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Make senses ready: int64 [M] and the first rows of their tokens in, [M, D] and [M] out."""
        own = self.senses.rows(rows).to(dtype)
        if self.metric == "l2":
            origin = self.senses.rows(first).to(dtype)
            step = own - origin
            return step, origin.add_(own).mul_(step).sum(1)
        ready = torch.nn.functional.normalize(own, dim=1) if self.metric == "cosine" else own
        return ready, ready.new_zeros(len(rows))


def sense_losses(
    embeddings: Tensor, ids: np.ndarray, labels: SenseLabels | None, space: SenseSpace, *, replaced: bool
) -> tuple[LossSum | None, Tensor | None]:
    """Cross-entropy over each token's own senses, and the embeddings replaced softly by them, of one look at them.

    Args:
        embeddings: floating point [N, D].
        ids: integers [N].
        labels: of these N tokens, for the cross-entropy of softmax(scores / scale); tokens without a label are left out.
        space: the senses.
        replaced: also return the softmax(scores / scale)-weighted means of the senses, [N, D] in the embeddings' dtype;
            embeddings of tokens without senses as they are.

    Raises:
        BadInput: shapes do not fit, or a label names a sense that its token does not have.
    """
    target = None if labels is None else _target(labels, ids, space.senses.offsets, embeddings.device)
    total, means = _SenseLosses.apply(embeddings, ids, space, target, replaced)
    loss = None if target is None else LossSum(total, target.labelled)
    return loss, means if replaced else None


class _Scored(NamedTuple):
    """A batch among its senses."""

    batch: Batch
    rows: Tensor  # int64 [T, n]
    ready: Tensor  # [T, K, D]
    logits: Tensor  # [T, n, K]


class _Target(NamedTuple):
    """What the teacher picked; rows of tokens without a label are zero."""

    numbers: Tensor  # int64 [N, m]
    weights: Tensor  # float [N, m]
    told: Tensor  # float [N]: 1 where there is a label
    labelled: int


class _SenseLosses(torch.autograd.Function):
    """Keeps the chances of senses for the way back, and of the senses themselves as many as `HELD_NUMBERS` allow."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        embeddings: Tensor,
        ids: np.ndarray,
        space: SenseSpace,
        target: _Target | None,
        replaced: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total = torch.zeros((), dtype=torch.float64, device=embeddings.device)
        out = embeddings.clone() if replaced else embeddings.new_empty(0)
        ctx.space, ctx.target, ctx.kept, held = space, target, [], 0
        with torch.autocast(embeddings.device.type, enabled=False):
            for batch, rows, ready, logits in space.batches(embeddings, ids):
                chances = logits.log_softmax(2)
                if target is not None:
                    wanted, weight = target.numbers[rows], target.weights[rows].to(logits.dtype)  # [T, n, m]
                    total -= real((chances.gather(2, wanted) * weight).sum(2), batch).sum(dtype=torch.float64)
                chances = chances.exp_()
                if replaced:
                    _put(out, rows, space.mean(chances, batch, ready))
                if ctx.needs_input_grad[0]:
                    held += ready.numel()
                    ctx.kept.append((batch, rows, chances, ready if held <= HELD_NUMBERS else None))
        ctx.save_for_backward(embeddings)
        return total.to(torch.promote_types(embeddings.dtype, torch.float32)), out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_total: Tensor | None, of_means: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
        (embeddings,), space, target = ctx.saved_tensors, ctx.space, ctx.target
        found = torch.zeros_like(embeddings) if of_means is None else of_means.clone()
        with torch.autocast(embeddings.device.type, enabled=False):
            for batch, rows, chances, ready in ctx.kept:
                ready = space.ready(batch, chances)[0] if ready is None else ready
                weights = torch.zeros_like(chances)
                if of_total is not None and target is not None:
                    weights.addcmul_(chances, target.told[rows].to(chances.dtype)[..., None])
                    weights.scatter_add_(2, target.numbers[rows], -target.weights[rows].to(chances.dtype)).mul_(
                        of_total
                    )
                if of_means is not None:
                    above = space.above(space.points(of_means, rows), batch, ready)
                    weights.addcmul_(above.sub_((chances * above).sum(2, keepdim=True)), chances)
                _put(found, rows, space.pull(weights, embeddings, rows, ready))
        return found, None, None, None, None


def _put(out: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write a batch's values [T, n, D] to their rows; padding writes once more what its row is given anyway."""
    out.index_copy_(0, rows.view(-1), values.flatten(0, 1).to(out.dtype))


def _target(labels: SenseLabels, ids: np.ndarray, offsets: np.ndarray, device: torch.device) -> _Target:
    """Check labels, and bring each token's weights to the sum 1."""
    numbers = labels.numbers.astype(np.int64)
    numbers = numbers[:, None] if numbers.ndim == 1 else numbers
    given = np.ones(numbers.shape) if labels.weights is None else labels.weights.astype(np.float64)
    if len(numbers) != len(ids) or given.shape != numbers.shape:
        raise BadInput(
            f"{len(ids)} tokens came with sense numbers {labels.numbers.shape} and weights {given.shape}: each token needs "
            "its numbers, each number its weight"
        )
    if not (np.isfinite(given).all() and (given >= 0).all()):
        raise BadInput("a weight of a label is negative, infinite or NaN: make the labels again")
    weights = np.where(numbers == NO_SENSE, 0.0, given)
    sums = weights.sum(1, keepdims=True)
    inside = (ids >= 0) & (ids < len(offsets) - 1)
    known = np.where(inside, ids, 0)
    sizes = np.where(inside, offsets[known + 1] - offsets[known], 0)
    wrong = np.flatnonzero(((numbers >= sizes[:, None]) & (weights > 0)).any(1))
    if len(wrong):
        first = wrong[0]
        raise BadInput(
            f"token {ids[first]} has {sizes[first]} senses, but is labelled {numbers[first].tolist()}: these labels are "
            "of another dictionary; make them again"
        )
    told = sums[:, 0] > 0
    arrays = np.where(weights > 0, numbers, 0), weights / np.where(sums > 0, sums, 1), told.astype(np.float64)
    first, second, third = (torch.from_numpy(array).to(device) for array in arrays)
    return _Target(first, second, third, int(told.sum()))
