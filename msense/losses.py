"""What a student is trained towards: senses of its tokens, sentence vectors, hidden states; and how well it does.

Comes in: a student's output, and labels. Goes out: sums and counts, apart from each other, so that a trainer divides by
the count of the whole global batch. Every loss is differentiable in the student's embeddings only. Losses over senses hold
N·D numbers and one batch of `assignment.BATCH_ELEMENTS` a few times, never [N, K, D]: their gradient is found batch by
batch and known in closed form.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from msense.config import NO_SENSE, Metric
from msense.dictionary import SenseDictionary
from msense.dictionary.assignment import Batch, RaggedSenses, batch_elements, ragged_batches, real, scores
from msense.errors import BadInput
from msense.student.student import StudentOutput


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


@dataclass(frozen=True)
class Labelled:
    """A batch of B passages, N tokens in all, with what the teacher said of it, as far as an objective asks for it.

    Attributes:
        ids: int64 [B, L], on the CPU.
        mask: bool [B, L], on the student's device.
        senses: of the N tokens where the mask is true, in its order.
        sentences: [B, D], the teacher's sentence vectors.
        hidden: [N, D], its hidden states.
    """

    ids: Tensor
    mask: Tensor
    senses: SenseLabels | None = None
    sentences: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Mix:
    """Weights of the losses, each a mean over tokens or passages.

    Attributes:
        sense: cross-entropy over the token's own senses.
        pooled: 1 - cosine of the sentence vector and the teacher's.
        replaced: the same of the sentence vector after soft replacement of the tokens, through which it is trained.
        mse: mean squared difference of the hidden states.
        cosine: 1 - cosine of the hidden states.
        metric: of senses; None: the dictionary's.
        temperature: divides scores of senses, in units of the dictionary's mean squared spread; None: bare scores.
    """

    sense: float = 0.0
    pooled: float = 0.0
    replaced: float = 0.0
    mse: float = 0.0
    cosine: float = 0.0
    metric: Metric | None = None
    temperature: float | None = 1 / 3

    def weights(self) -> dict[str, float]:
        """Return the losses that count, by name."""
        every = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("metric", "temperature")}
        return {name: weight for name, weight in every.items() if weight}

    def scale(self, unit: float) -> float:
        """Return what divides scores; 1 where every sense is a single point and no spread tells how far is far."""
        return 1.0 if self.temperature is None else self.temperature * unit or 1.0


def loss_sums(
    mix: Mix,
    output: StudentOutput,
    batch: Labelled,
    dictionary: SenseDictionary,
    sentence: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, LossSum]:
    """Compute the losses of a mix that have a weight, unweighted.

    Args:
        mix: what to compute.
        output: of the student for the batch.
        batch: its labels.
        dictionary: on the student's device.
        sentence: the student's pooling, of embeddings [B, L, D] and mask.

    Returns:
        By name; `weighted` makes one loss of them.

    Raises:
        BadInput: a label is missing, or names a sense that is not there.
    """
    mask, ids = batch.mask, batch.ids[batch.mask.cpu()].numpy()
    space = (dictionary.ragged, mix.metric or dictionary.config.metric, mix.scale(dictionary.config.temperature_unit))
    found = {}
    for name in mix.weights():
        if name == "sense":
            labels = _needed(batch.senses, name)
            found[name] = sense_cross_entropy(output.senses[mask], ids, labels, *space)
        elif name in ("pooled", "replaced"):
            embeddings = output.hidden
            if name == "replaced":
                replaced = soft_replace(output.senses[mask], ids, *space)
                embeddings = torch.zeros_like(output.senses).masked_scatter(mask[..., None], replaced)
            found[name] = cosine_loss(sentence(embeddings, mask), _needed(batch.sentences, name))
        else:
            loss = mse_loss if name == "mse" else cosine_loss
            found[name] = loss(output.hidden[mask], _needed(batch.hidden, name))
    return found


def weighted(mix: Mix, sums: Mapping[str, LossSum], counts: Mapping[str, int], workers: int = 1) -> Tensor:
    """Make one loss of sums: the only place where losses are normalised.

    Gradients of several calls (accumulated batches) add up to that of the whole batch; where gradients are averaged over
    workers, as data-parallel training does, their number makes up for it.

    Args:
        mix: the weights.
        sums: of this call.
        counts: of the whole global batch: of all calls and workers together.
        workers: over which gradients are averaged.
    """
    weights = mix.weights()
    parts = [weights[name] * workers / max(1, counts[name]) * loss.total for name, loss in sums.items()]
    return torch.stack(parts).sum()


def sense_cross_entropy(
    embeddings: Tensor, ids: np.ndarray, labels: SenseLabels, senses: RaggedSenses, metric: Metric, scale: float
) -> LossSum:
    """Cross-entropy of softmax(scores / scale) over each token's own senses; tokens without a label are left out.

    Args:
        embeddings: floating point [N, D].
        ids: integers [N].
        labels: of these N tokens.
        senses: of the dictionary, best on the embeddings' device.
        metric: scores are minus the squared distance, the dot product or the cosine.
        scale: divides the scores.

    Raises:
        BadInput: shapes do not fit, or a label names a sense that its token does not have.
    """
    rows, numbers, weights = _checked_labels(labels, ids, senses.offsets)
    chosen = embeddings.index_select(0, torch.from_numpy(rows).to(embeddings.device))
    space = _Space(ids[rows], senses, metric, scale)
    total = _CrossEntropy.apply(chosen, space, numbers.to(chosen.device), weights.to(chosen.device))
    return LossSum(total, len(rows))


def soft_replace(embeddings: Tensor, ids: np.ndarray, senses: RaggedSenses, metric: Metric, scale: float) -> Tensor:
    """Replace embeddings by the softmax(scores / scale)-weighted mean of their token's senses, differentiably.

    Args:
        embeddings: floating point [N, D].
        ids: integers [N].
        senses: of the dictionary.
        metric: l2, dot or cosine.
        scale: divides the scores.

    Returns:
        [N, D] in the embeddings' dtype; those of tokens without senses as they are.
    """
    return _SoftReplace.apply(embeddings, _Space(ids, senses, metric, scale))


def cosine_loss(found: Tensor, wanted: Tensor) -> LossSum:
    """Sum of 1 - cosine over rows, of [M, D] and [M, D]."""
    return LossSum((1 - cosine_similarity(found.float(), wanted.float(), dim=1)).sum(), len(found))


def mse_loss(found: Tensor, wanted: Tensor) -> LossSum:
    """Sum over rows of the mean squared difference, of [M, D] and [M, D]."""
    return LossSum((found.float() - wanted.float()).square().mean(1).sum(), len(found))


def sense_accuracy(
    embeddings: Tensor, ids: np.ndarray, labels: np.ndarray, dictionary: SenseDictionary, metric: Metric | None = None
) -> LossSum:
    """Count tokens whose nearest sense is the teacher's, of those that have a label.

    Args:
        embeddings: [N, D].
        ids: integers [N].
        labels: uint16 [N].
        dictionary: of the senses.
        metric: says what is near; default: the dictionary's.
    """
    rows = np.flatnonzero(labels != NO_SENSE)
    chosen = embeddings.detach().index_select(0, torch.from_numpy(rows).to(embeddings.device))
    found = dictionary.assign(torch.from_numpy(ids[rows]), chosen, metric=metric).cpu().numpy()
    return LossSum(torch.tensor(float((found == labels[rows]).sum())), len(rows))


def frequent_sense_accuracy(ids: np.ndarray, labels: np.ndarray, dictionary: SenseDictionary) -> LossSum:
    """Count tokens for which the sense of the most points is the teacher's: what a student without context can reach.

    Args:
        ids: integers [N].
        labels: uint16 [N].
        dictionary: its counts say what is frequent.
    """
    sizes = np.diff(dictionary.offsets)
    token = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((-np.asarray(dictionary.counts), token))  # stable: ties go to the lowest
    frequent = np.full(len(sizes), NO_SENSE)
    frequent[sizes > 0] = order[dictionary.offsets[:-1][sizes > 0]] - dictionary.offsets[:-1][sizes > 0]
    rows = np.flatnonzero(labels != NO_SENSE)
    return LossSum(torch.tensor(float((frequent[ids[rows]] == labels[rows]).sum())), len(rows))


class _Space(NamedTuple):
    """Tokens among their senses."""

    ids: np.ndarray  # integers [N]
    senses: RaggedSenses
    metric: Metric
    scale: float

    def batches(self, embeddings: Tensor) -> "Iterator[tuple[Batch, Tensor, Tensor, Tensor]]":
        """Yield batches with embeddings [T, n, D], senses [T, K, D] and logits [T, n, K] in the working dtype."""
        dim, dtype = embeddings.shape[1], _working(embeddings)
        for batch in ragged_batches(self.ids, self.senses.offsets, dim, batch_elements(embeddings.device)):
            rows = batch.rows.to(embeddings.device)
            points = embeddings.index_select(0, rows.view(-1)).to(dtype).view(*rows.shape, dim)
            own = self.senses.rows(batch.senses.view(-1)).to(embeddings.device, dtype).view(*batch.senses.shape, dim)
            found = scores(points, own, self.metric)
            if batch.present is not None:
                found = found.masked_fill(~batch.present[:, None].to(found.device), -torch.inf)
            found = (found - found.amax(2, keepdim=True)) / self.scale  # in this order a tiny scale does not overflow
            yield batch, points, own, found

    def pull(self, weights: Tensor, points: Tensor, own: Tensor) -> Tensor:
        """Return the gradient in the embeddings [T, n, D] of Σ weights · logits, the weights of each summing to 0.

        Args:
            weights: [T, n, K].
            points: embeddings [T, n, D].
            own: senses [T, K, D].
        """
        if self.metric == "l2":  # 2 (sense - x) each; x and the first sense fall out
            return torch.bmm(weights, own - own[:, :1]) * (2 / self.scale)
        if self.metric == "dot":
            return torch.bmm(weights, own) / self.scale
        length = points.norm(dim=2, keepdim=True).clamp(min=1e-12)
        towards = torch.bmm(weights, torch.nn.functional.normalize(own, dim=2))
        unit = points / length
        return (towards - unit * (unit * towards).sum(2, keepdim=True)) / (length * self.scale)


class _CrossEntropy(torch.autograd.Function):
    """Keeps the gradient [N, D] from the forward pass on: scores are computed once."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, space: _Space, numbers: Tensor, weights: Tensor) -> Tensor:  # noqa: ANN401 - autograd's
        grad = torch.zeros_like(embeddings, dtype=_working(embeddings)) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=embeddings.device)
        with torch.autocast(embeddings.device.type, enabled=False):
            for batch, points, own, logits in space.batches(embeddings):
                rows = batch.rows.to(embeddings.device)
                wanted, weight = numbers[rows], weights[rows].to(logits.dtype)  # [T, n, m]
                chances = logits.log_softmax(2)
                total -= real((chances.gather(2, wanted) * weight).sum(2), batch).sum(dtype=torch.float64)
                if grad is not None:
                    off = chances.exp_().scatter_add_(2, wanted, -weight)
                    grad[real(rows, batch)] = real(space.pull(off, points, own), batch)
        ctx.save_for_backward(grad)
        return total.to(_working(embeddings))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401 - autograd's
        return ctx.saved_tensors[0] * upstream, None, None, None


class _SoftReplace(torch.autograd.Function):
    """Computes the scores twice, rather than to keep every token's weights and senses."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, space: _Space) -> Tensor:  # noqa: ANN401 - autograd's
        ctx.space = space
        ctx.save_for_backward(embeddings)
        out = embeddings.clone()
        with torch.autocast(embeddings.device.type, enabled=False):
            for batch, _, own, logits in space.batches(embeddings):
                means = torch.bmm(logits.softmax(2), own)
                out[real(batch.rows.to(out.device), batch)] = real(means, batch).to(out.dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - autograd's
        (embeddings,) = ctx.saved_tensors
        grad = upstream.clone()
        with torch.autocast(embeddings.device.type, enabled=False):
            for batch, points, own, logits in ctx.space.batches(embeddings):
                rows, chances = batch.rows.to(grad.device), logits.softmax(2)
                above = torch.bmm(upstream[rows].to(own.dtype), own.transpose(1, 2))
                weights = chances * (above - (chances * above).sum(2, keepdim=True))
                pulled = ctx.space.pull(weights, points, own)
                grad[real(rows, batch)] = real(pulled, batch).to(grad.dtype)
        return grad, None


def _working(embeddings: Tensor) -> torch.dtype:
    return torch.float64 if embeddings.dtype == torch.float64 else torch.float32


def _checked_labels(labels: SenseLabels, ids: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor]:
    """Return the rows with a label, int64 [R], their sense numbers int64 [R, m] and weights float64 [R, m] of sum 1."""
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
    rows = np.flatnonzero(weights.sum(1) > 0)
    numbers, weights = numbers[rows], weights[rows]
    inside = (ids[rows] >= 0) & (ids[rows] < len(offsets) - 1)
    known = np.where(inside, ids[rows], 0)
    sizes = np.where(inside, offsets[known + 1] - offsets[known], 0)
    wrong = np.flatnonzero(((numbers >= sizes[:, None]) & (weights > 0)).any(1))
    if len(wrong):
        first = wrong[0]
        raise BadInput(
            f"token {ids[rows[first]]} has {sizes[first]} senses, but is labelled {numbers[first].tolist()}: these labels are "
            "of another dictionary; make them again"
        )
    numbers = np.where(weights > 0, numbers, 0)
    return rows, torch.from_numpy(numbers), torch.from_numpy(weights / weights.sum(1, keepdims=True))


def _needed(label: Any, name: str) -> Any:  # noqa: ANN401 - whatever the label is
    """Return a label that an objective asks for."""
    if label is None:
        kind = {"sense": "sense numbers", "pooled": "sentence vectors", "replaced": "sentence vectors"}
        raise BadInput(
            f"the objective asks for {name}, but the labels hold no {kind.get(name, 'hidden states')}: make labels that do, "
            "or choose another objective"
        )
    return label
