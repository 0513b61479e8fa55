"""Training losses of a student against senses, sentence vectors and hidden states, and accuracy metrics.

Losses are sums with counts, so that the trainer can divide by the count of the whole global batch. They are
differentiable in the student's embeddings only. For memory see `sense_losses`.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from msense.constants import NO_SENSE, Metric
from msense.dictionary import SenseDictionary
from msense.errors import InputError
from msense.student.student import StudentOutput
from msense.training.sense_losses import LossSum, SenseLabels, SenseScorer, sense_losses

_LABEL_KINDS = {"sense": "sense numbers", "pooled": "sentence vectors", "replaced": "sentence vectors"}


@dataclass(frozen=True)
class LabeledBatch:
    """A batch of B passages of up to L tokens, N tokens in total, with the labels that the objective needs."""

    ids: Tensor  # int64 [B, L], on the CPU
    mask: Tensor  # bool [B, L], on the student's device
    senses: SenseLabels | None = None  # of all B·L positions, row by row; padding has none
    sentences: Tensor | None = None  # [B, D], the teacher's sentence vectors
    hidden: Tensor | None = None  # [N, D], the teacher's hidden states where the mask is true


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses, each of which is a mean over tokens or passages.

    Example:
        >>> LossWeights(sense=1.0, pooled=50.0).weights()
        {'sense': 1.0, 'pooled': 50.0}
    """

    sense: float = 0.0  # cross-entropy over the token's own senses
    pooled: float = 0.0  # 1 - cosine between the student's and the teacher's sentence vector
    replaced: float = 0.0  # as `pooled`, after soft replacement of the tokens by their senses
    mse: float = 0.0  # mean squared difference of the hidden states
    cosine: float = 0.0  # 1 - cosine of the hidden states
    metric: Metric | None = None  # of sense scores; None: the dictionary's
    temperature: float | None = 1 / 3  # divides sense scores, in units of the mean squared distance; None: raw scores

    def weights(self) -> dict[str, float]:
        """Return the non-zero weights by loss name."""
        weights = asdict(self)
        return {name: weights[name] for name in ("sense", "pooled", "replaced", "mse", "cosine") if weights[name]}

    def space(self, dictionary: SenseDictionary) -> SenseScorer:
        """Return the dictionary's senses prepared for scoring many batches."""
        config = dictionary.config
        # a dictionary whose senses are single points has the unit 0
        scale = 1.0 if self.temperature is None else self.temperature * config.temperature_unit or 1.0
        return SenseScorer(dictionary.ragged, self.metric or config.metric, scale, kept=True)


def compute_losses(
    mix: LossWeights,
    output: StudentOutput,
    batch: LabeledBatch,
    space: SenseScorer,
    sentence: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, LossSum]:
    """Return the losses that have a weight in `mix` by name, unweighted; `combine_losses` combines them.

    Args:
        mix: the losses to compute.
        output: the student's output for the batch.
        batch: the labels.
        space: `mix.space(dictionary)`.
        sentence: the student's pooling of embeddings [B, L, D] and mask [B, L].

    Raises:
        InputError: a label is missing, or names a sense that does not exist.
    """
    mask = batch.mask
    names = mix.weights()
    losses: dict[str, LossSum] = {}
    if "sense" in names or "replaced" in names:
        labels = _require(batch.senses, "sense") if "sense" in names else None
        ids = batch.ids.masked_fill(~mask.cpu(), -1).view(-1).numpy()  # -1 has no senses: padding is left out
        loss, means = sense_losses(output.senses.flatten(0, 1), ids, labels, space, replaced="replaced" in names)
        if loss is not None:
            losses["sense"] = loss
        if means is not None:
            vectors = sentence(means.view_as(output.senses), mask)
            losses["replaced"] = cosine_loss(vectors, _require(batch.sentences, "replaced"))
    if "pooled" in names:
        losses["pooled"] = cosine_loss(sentence(output.hidden, mask), _require(batch.sentences, "pooled"))
    for name, compute in (("mse", mse_loss), ("cosine", cosine_loss)):
        if name in names:
            losses[name] = compute(output.hidden[mask], _require(batch.hidden, name))
    return losses


def combine_losses(
    mix: LossWeights, sums: Mapping[str, LossSum], counts: Mapping[str, int], workers: int = 1
) -> Tensor:
    """Combine loss sums into one scalar; the only place where losses are normalized.

    `counts` are those of the whole global batch, so gradients of its slices add up to its gradient. Data-parallel
    training averages gradients over workers, hence the factor `workers`.
    """
    weights = mix.weights()
    parts = [weights[name] * workers / max(1, counts[name]) * loss.total for name, loss in sums.items()]
    return torch.stack(parts).sum()


def cosine_loss(outputs: Tensor, targets: Tensor) -> LossSum:
    """Return the sum of 1 - cosine over the rows of [M, D] and [M, D]."""
    return LossSum((1 - cosine_similarity(outputs.float(), targets.float(), dim=1)).sum(), len(outputs))


def mse_loss(outputs: Tensor, targets: Tensor) -> LossSum:
    """Return the sum over rows of the mean squared difference of [M, D] and [M, D]."""
    return LossSum((outputs.float() - targets.float()).square().mean(1).sum(), len(outputs))


def sense_accuracy(
    embeddings: Tensor, ids: np.ndarray, labels: np.ndarray, dictionary: SenseDictionary, metric: Metric | None = None
) -> LossSum:
    """Count labelled tokens whose nearest sense is the teacher's: embeddings [N, D], ids [N], labels uint16 [N]."""
    rows = np.flatnonzero(labels != NO_SENSE)
    chosen = embeddings.detach().index_select(0, torch.from_numpy(rows).to(embeddings.device))
    nearest = dictionary.assign(torch.from_numpy(ids[rows]), chosen, metric=metric).cpu().numpy()
    return LossSum(torch.tensor(float((nearest == labels[rows]).sum())), len(rows))


def frequent_sense_accuracy(ids: np.ndarray, labels: np.ndarray, dictionary: SenseDictionary) -> LossSum:
    """Count labelled tokens whose most frequent sense is the teacher's: the baseline without context.

    Takes ids [N] and labels uint16 [N]. Ties go to the lowest sense number.
    """
    sizes = np.diff(dictionary.offsets)
    token = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((-np.asarray(dictionary.counts), token))  # stable, so ties keep their order
    frequent = np.full(len(sizes), NO_SENSE)
    starts = dictionary.offsets[:-1][sizes > 0]
    frequent[sizes > 0] = order[starts] - starts
    rows = np.flatnonzero(labels != NO_SENSE)
    return LossSum(torch.tensor(float((frequent[ids[rows]] == labels[rows]).sum())), len(rows))


def _require(label: Any, name: str) -> Any:
    """Return the label of a loss; raise InputError if the batch has none."""
    if label is None:
        raise InputError(
            f"cannot compute the loss {name!r}: the labels hold no {_LABEL_KINDS.get(name, 'hidden states')}; "
            "regenerate the labels with them, or choose another --objective"
        )
    return label
