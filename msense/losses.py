"""What a student is trained towards: senses of its tokens, sentence vectors, hidden states; and how well it does.

Comes in: a student's output, and labels. Goes out: sums and counts, apart from each other, so that a trainer divides by
the count of the whole global batch. Every loss is differentiable in the student's embeddings only. Holds what
`sense_losses` holds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from msense.config import NO_SENSE, Metric
from msense.dictionary import SenseDictionary
from msense.errors import BadInput
from msense.sense_losses import LossSum, SenseLabels, SenseSpace, sense_losses
from msense.student.student import StudentOutput


@dataclass(frozen=True)
class Labelled:
    """A batch of B passages of up to L tokens, N in all, with what the teacher said of it, as far as an objective asks for it.

    Attributes:
        ids: int64 [B, L], on the CPU.
        mask: bool [B, L], on the student's device.
        senses: of all B·L places, row by row; padding has none.
        sentences: [B, D], the teacher's sentence vectors.
        hidden: [N, D], its hidden states where the mask is true.
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

    def space(self, dictionary: SenseDictionary) -> SenseSpace:
        """Return a dictionary's senses, kept ready for many batches.

        Scores are divided by 1 where every sense is a single point and no spread tells how far is far.
        """
        of = dictionary.config
        scale = 1.0 if self.temperature is None else self.temperature * of.temperature_unit or 1.0
        return SenseSpace(dictionary.ragged, self.metric or of.metric, scale, kept=True)


def loss_sums(
    mix: Mix,
    output: StudentOutput,
    batch: Labelled,
    space: SenseSpace,
    sentence: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, LossSum]:
    """Compute the losses of a mix that have a weight, unweighted.

    Args:
        mix: what to compute.
        output: of the student for the batch.
        batch: its labels.
        space: of the mix, for the dictionary.
        sentence: the student's pooling, of embeddings [B, L, D] and mask.

    Returns:
        By name; `weighted` makes one loss of them.

    Raises:
        BadInput: a label is missing, or names a sense that is not there.
    """
    mask = batch.mask
    names = mix.weights()
    found: dict[str, LossSum] = {}
    if "sense" in names or "replaced" in names:
        labels = _needed(batch.senses, "sense") if "sense" in names else None
        ids = batch.ids.masked_fill(~mask.cpu(), -1).view(-1).numpy()  # padding is of no token: it has no senses
        loss, means = sense_losses(output.senses.flatten(0, 1), ids, labels, space, replaced="replaced" in names)
        if loss is not None:
            found["sense"] = loss
        if means is not None:
            vectors = sentence(means.view_as(output.senses), mask)
            found["replaced"] = cosine_loss(vectors, _needed(batch.sentences, "replaced"))
    if "pooled" in names:
        found["pooled"] = cosine_loss(sentence(output.hidden, mask), _needed(batch.sentences, "pooled"))
    for name, loss_of in (("mse", mse_loss), ("cosine", cosine_loss)):
        if name in names:
            found[name] = loss_of(output.hidden[mask], _needed(batch.hidden, name))
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


def _needed(label: Any, name: str) -> Any:  # noqa: ANN401 - whatever the label is
    """Return a label that an objective asks for."""
    if label is None:
        kind = {"sense": "sense numbers", "pooled": "sentence vectors", "replaced": "sentence vectors"}
        raise BadInput(
            f"the objective asks for {name}, but the labels hold no {kind.get(name, 'hidden states')}: make labels that do, "
            "or choose another objective"
        )
    return label
