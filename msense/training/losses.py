"""Training losses of a student against senses, sentence vectors and hidden states, and accuracy metrics.

Losses are sums with counts, so that the trainer can divide by the count of the whole global batch. They are
differentiable in the student's embeddings only. For memory see `sense_losses`.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from msense.constants import NO_SENSE, Metric
from msense.dictionary import SenseDictionary
from msense.student.student import StudentOutput
from msense.training.label_dataset import LabelBatch
from msense.training.sense_losses import LossSum, SenseLabels, SenseScorer, sense_losses


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
        names = ("sense", "pooled", "replaced", "mse", "cosine")
        return {name: weight for name in names if (weight := getattr(self, name))}

    def space(self, dictionary: SenseDictionary) -> SenseScorer:
        """Return the dictionary's senses prepared for scoring many batches."""
        config = dictionary.config
        # a dictionary whose senses are single points has the unit 0
        scale = 1.0 if self.temperature is None else self.temperature * config.temperature_unit or 1.0
        return SenseScorer(dictionary.ragged, self.metric or config.metric, scale)


def compute_losses(
    mix: LossWeights,
    output: StudentOutput,
    batch: LabelBatch,
    space: SenseScorer,
    sentence: Callable[..., Tensor],
    hidden: Tensor | None = None,
) -> dict[str, LossSum]:
    """Return the losses that have a weight in `mix` by name, unweighted; `normalized_loss` combines them.

    `output` has the senses of the texts that are no spans. `space` is `mix.space(dictionary)`, `sentence` the student's
    pooling of embeddings [B, L, D], mask [B, L] and, if the batch has it, `skip`; `hidden` [N, D] are the teacher's hidden
    states where the mask is true, for the losses `mse` and `cosine`.
    """
    names, device = mix.weights(), output.hidden.device
    mask, sentences = (None if part is None else part.to(device) for part in (batch.mask, batch.pooled))
    losses: dict[str, LossSum] = {}
    if "sense" in names or "replaced" in names:
        losses = _token_losses(names, output, batch, space, sentence)
    if "pooled" in names:
        losses["pooled"] = cosine_loss(pooled_vectors(output.hidden, batch, sentence), sentences)
    for name, compute in (("mse", mse_loss), ("cosine", cosine_loss)):
        if name in names:
            losses[name] = compute(output.hidden[mask], hidden)
    return losses


def _token_losses(
    names: Container[str],
    output: StudentOutput,
    batch: LabelBatch,
    space: SenseScorer,
    sentence: Callable[..., Tensor],
) -> dict[str, LossSum]:
    """Return the losses `sense` and `replaced`, of the texts that are no spans."""
    senses, batch = output.senses, batch.without_spans()[1]
    labels = _sense_labels(batch) if "sense" in names else None
    ids = batch.ids.masked_fill(~batch.mask, -1).view(-1).numpy()  # -1 has no senses: padding is left out
    loss, means = sense_losses(senses.flatten(0, 1), ids, labels, space, replaced="replaced" in names)
    losses = {} if loss is None else {"sense": loss}
    if means is not None:
        sentences = None if batch.pooled is None else batch.pooled.to(means.device)
        losses["replaced"] = cosine_loss(pooled_vectors(means.view_as(senses), batch, sentence), sentences)
    return losses


def pooled_vectors(embeddings: Tensor, batch: LabelBatch, sentence: Callable[..., Tensor]) -> Tensor:
    """Return the vectors, [B, D'], of the embeddings [B, L, D] of a batch by a student's pooling, each without its prompt."""
    mask = batch.mask.to(embeddings.device)
    return sentence(embeddings, mask) if batch.skip is None else sentence(embeddings, mask, batch.skip.to(mask.device))


def hard_labels(batch: LabelBatch) -> np.ndarray:
    """Return the teacher's senses of all positions as labels store them, uint16 [B·L]; 65535 where there is none."""
    return np.asarray(batch.senses.flatten().numpy().astype(np.uint16))


def _sense_labels(batch: LabelBatch) -> SenseLabels:
    if batch.soft_senses is None or batch.soft_weights is None:
        return SenseLabels(hard_labels(batch))
    numbers = batch.soft_senses.flatten(0, 1).numpy().astype(np.uint16)  # -1 (none) becomes 65535
    return SenseLabels(numbers, batch.soft_weights.flatten(0, 1).numpy())


def normalized_loss(mix: LossWeights, sums: dict[str, LossSum], counts: dict[str, int], workers: int = 1) -> Tensor:
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
    """Count labelled tokens, ids [N], whose most frequent sense (the lowest of ties) is the teacher's, labels uint16 [N]."""
    sizes = np.diff(dictionary.offsets)
    token = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((-np.asarray(dictionary.counts), token))  # stable, so ties keep their order
    frequent = np.full(len(sizes), NO_SENSE)
    starts = dictionary.offsets[:-1][sizes > 0]
    frequent[sizes > 0] = order[starts] - starts
    rows = np.flatnonzero(labels != NO_SENSE)
    return LossSum(torch.tensor(float((frequent[ids[rows]] == labels[rows]).sum())), len(rows))
