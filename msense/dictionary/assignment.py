"""Scoring, assignment and replacement of embeddings against the senses of their own token, on any device.

Memory beyond inputs and outputs: a few integers per occurrence and one padded float32 batch of about `BATCH_ELEMENTS`
numbers, in which each sense is converted from its stored dtype once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from msense.constants import Metric
from msense.dictionary.layout import dequantize
from msense.errors import DictionaryError, InputError

BATCH_ELEMENTS = {"cpu": 1 << 19}  # float32 numbers that fit the L2 cache of a core
_BATCH_ELEMENTS_ELSEWHERE = 1 << 24  # accelerators need few large kernels
_OCCURRENCE_STEP, _SENSE_STEP = 2, 3  # tokens whose sizes are within this factor share a batch


def batch_elements(device: torch.device) -> int:
    """Return the approximate limit of numbers per batch on a device."""
    return BATCH_ELEMENTS.get(device.type, _BATCH_ELEMENTS_ELSEWHERE)


@dataclass(frozen=True)
class RaggedSenses:
    """The senses of all tokens: rows offsets[t] to offsets[t + 1] of the concatenated parts belong to token t.

    Example:
        >>> senses = RaggedSenses(np.array([0, 2]), (torch.tensor([[0.0, 0.0], [4.0, 4.0]]),))  # two senses of token 0
        >>> assign(np.array([0]), torch.tensor([[3.0, 3.0]]), senses, "l2")
        tensor([1])
    """

    offsets: np.ndarray  # int64 [V+1], on the CPU
    parts: tuple[Tensor, ...]  # [S_i, D] of one dtype, one per file
    scales: Tensor | None = None  # float32 [S], the factor of each row if the parts are int8

    def rows(self, index: Tensor) -> Tensor:
        """Return rows [M, D] at an int64 index [M] on the parts' device, in the stored dtype (int8 as float32)."""
        index = index.to(self.parts[0].device)
        stored = self._stored(index)
        return stored if self.scales is None else dequantize(stored, self.scales.index_select(0, index))

    def floats(self) -> tuple[Tensor, ...]:
        """Return the parts; int8 parts are dequantized to a single float32 tensor."""
        return self.parts if self.scales is None else (self.rows(torch.arange(len(self.scales))),)

    def _stored(self, index: Tensor) -> Tensor:
        if len(self.parts) == 1:
            return self.parts[0].index_select(0, index)
        out = self.parts[0].new_empty(len(index), self.parts[0].shape[1])
        start = 0
        for part in self.parts:
            inside = torch.nonzero((index >= start) & (index < start + len(part)))[:, 0]
            out[inside] = part.index_select(0, index[inside] - start)
            start += len(part)
        return out


class Batch(NamedTuple):
    """T tokens with similar numbers of occurrences and senses, padded to the largest of each."""

    rows: Tensor  # int64 [T, n], rows of the occurrences, padded with the token's last
    filled: Tensor | None  # bool [T, n], False on padding; None without padding
    senses: Tensor  # int64 [T, K], rows of the senses, padded with the token's last
    present: Tensor | None  # bool [T, K], False on padding; None without padding


def with_senses(token_ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return bool [N], whether each token has senses; ids outside the vocabulary have none."""
    inside = (token_ids >= 0) & (token_ids < len(offsets) - 1)
    known = np.where(inside, token_ids, 0)
    return inside & (offsets[known + 1] > offsets[known])


def ragged_batches(token_ids: np.ndarray, offsets: np.ndarray, dim: int, elements: int) -> Iterator[Batch]:
    """Yield batches that contain each occurrence, of token ids [N], of a token with senses exactly once.

    A token with many occurrences gets batches of its own, without padding. The others are sorted by their numbers of
    occurrences and senses and split where either grows by a step. `elements` is the approximate limit of numbers per
    batch, which the senses of a single token may exceed.
    """
    known = np.flatnonzero(with_senses(token_ids, offsets))
    ids = token_ids[known]
    # NumPy has a radix sort for 16 bits
    order = np.argsort(ids.astype(np.uint16) if len(offsets) <= 1 << 16 else ids, kind="stable")
    ids, order = ids[order], known[order]
    start = np.flatnonzero(np.diff(ids, prepend=-1))
    n = np.diff(start, append=len(ids))
    first = offsets[ids[start]]
    k = offsets[ids[start] + 1] - first

    block = max(2, elements // dim)
    alone = (n >= block // 2) | (n > elements // k)  # the scores [n, k] count too
    for token in np.flatnonzero(alone):
        senses = torch.arange(first[token], first[token] + k[token])[None]
        step = max(1, elements // max(dim, int(k[token])))
        rows = torch.from_numpy(order[start[token] : start[token] + n[token]])
        yield from (Batch(chunk[None], None, senses, None) for chunk in rows.split(step))

    few = np.flatnonzero(~alone)
    n_step, k_step = (np.ceil(np.log(x[few]) / math.log(step)) for x, step in ((n, _OCCURRENCE_STEP), (k, _SENSE_STEP)))
    by_size = np.lexsort((k[few], n[few], k_step, n_step))
    few, n_step, k_step = few[by_size], n_step[by_size], k_step[by_size]
    borders = np.flatnonzero((np.diff(n_step) != 0) | (np.diff(k_step) != 0)) + 1
    for group in np.split(few, borders) if len(few) else ():
        step = max(1, elements // (dim * int(n[group].max() + k[group].max())))
        for tokens in (group[i : i + step] for i in range(0, len(group), step)):
            row, filled = _padded(start[tokens], n[tokens])
            sense, present = _padded(first[tokens], k[tokens])
            yield Batch(torch.from_numpy(order[row]), filled, torch.from_numpy(sense), present)


def _padded(start: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, Tensor | None]:
    """Return start + 0, 1, ... as int64 [T, longest], padded with each row's last, and the mask of real entries."""
    place = np.arange(size.max())
    mask = place < size[:, None]
    index = start[:, None] + np.minimum(place, size[:, None] - 1)
    return index, None if mask.all() else torch.from_numpy(mask)


def scores(points: Tensor, senses: Tensor, metric: Metric) -> Tensor:
    """Return scores, higher for nearer senses, float32 [T, n, K], of points [T, n, D] and senses [T, K, D].

    l2: minus the squared distance, up to a constant per occurrence that cancels in a softmax or argmax over its senses;
    dot: the dot product; cosine: the cosine, 0 for a zero vector.
    """
    if metric == "dot":
        return torch.bmm(points, senses.transpose(1, 2))
    if metric == "cosine":
        normalize = torch.nn.functional.normalize
        return torch.bmm(normalize(points, dim=2), normalize(senses, dim=2).transpose(1, 2))
    origin = senses[:, :1]  # relative to the first sense: avoids cancellation for embeddings far from zero
    step = senses - origin
    squares = (senses + origin).mul_(step).sum(2)  # squared norms of the senses minus that of the first
    return torch.baddbmm(-squares[:, None], points, step.transpose(1, 2), alpha=2)


@torch.no_grad()
def assign(token_ids: np.ndarray, embeddings: Tensor, senses: RaggedSenses, metric: Metric) -> Tensor:
    """Return the index of the nearest sense among those of each embedding's token; ties go to the lowest index.

    The result for token ids [N] and embeddings [N, D], floating point on any device, is int64 [N] on that device, counted
    from the token's first sense; -1 for a token without senses.

    Raises:
        InputError: an embedding is NaN or infinite.
        DictionaryError: a sense in use is NaN or infinite.
    """
    rows = _nearest_rows(token_ids, embeddings, senses, metric)
    known = with_senses(token_ids, senses.offsets)
    first = np.where(known, senses.offsets[np.where(known, token_ids, 0)], 0)  # -1 stays -1
    return rows - torch.from_numpy(first).to(rows.device)


@torch.no_grad()
def replace(
    token_ids: np.ndarray, embeddings: Tensor, senses: RaggedSenses, metric: Metric, scale: float | None = None
) -> Tensor:
    """Return embeddings replaced by their nearest sense, or by a weighted mean of their token's senses.

    Arguments and errors are those of `assign`. With `scale`, the mean is weighted by softmax(scores / scale). Embeddings
    of tokens without senses are unchanged.
    """
    out = _new_output(embeddings)
    if scale is None:
        _write_nearest(_nearest_rows(token_ids, embeddings, senses, metric), embeddings, senses, out)
        return out
    missing = torch.from_numpy(np.flatnonzero(~with_senses(token_ids, senses.offsets))).to(embeddings.device)
    out[missing] = embeddings[missing]
    for batch, own, score in _scored(token_ids, embeddings, senses, metric):
        relative = score - score.amax(2, keepdim=True)  # before the division: a tiny scale must not overflow
        means = torch.bmm(torch.softmax(relative / scale, dim=2), own).to(out.dtype)
        out[drop_padding(batch.rows.to(out.device), batch)] = drop_padding(means, batch)
    return out


@torch.no_grad()
def top_k(
    token_ids: np.ndarray, embeddings: Tensor, senses: RaggedSenses, metric: Metric, scale: float, top: int
) -> tuple[Tensor, Tensor]:
    """Return the `top` nearest senses of each embedding and their weights, softmax(scores / scale) over these only.

    Arguments and errors are those of `assign`; `scale` must be above 0. Indices are int64 [N, top], nearest first (ties: the
    lowest index), -1 beyond the token's senses; weights float32 [N, top] sum to 1, or to 0 for a token without senses.
    """
    indices = torch.full((len(embeddings), top), -1, dtype=torch.int64, device=embeddings.device)
    weights = torch.zeros((len(embeddings), top), dtype=torch.float32, device=embeddings.device)
    for batch, _, score in _scored(token_ids, embeddings, senses, metric):
        best = score.sort(dim=2, descending=True, stable=True)
        values, order = best.values[..., :top], best.indices[..., :top]
        own = torch.softmax((values - values[..., :1]) / scale, dim=2)
        order = order.masked_fill(values == -math.inf, -1)  # padding
        rows = drop_padding(batch.rows.to(embeddings.device), batch)
        indices[rows, : order.shape[2]] = drop_padding(order, batch)
        weights[rows, : order.shape[2]] = drop_padding(own, batch)
    return indices, weights


def _new_output(embeddings: Tensor) -> Tensor:
    """Allocate the output; on the CPU with NumPy, whose huge pages make the first write several times faster."""
    if embeddings.device.type != "cpu" or not embeddings.numel():
        return torch.empty_like(embeddings, memory_format=torch.contiguous_format)
    return torch.from_numpy(np.empty(embeddings.nbytes, np.uint8)).view(embeddings.dtype).view(embeddings.shape)


def _nearest_rows(token_ids: np.ndarray, embeddings: Tensor, senses: RaggedSenses, metric: Metric) -> Tensor:
    """Return the row of each embedding's nearest sense in the whole dictionary, int64 [N], or -1."""
    nearest = torch.full((len(embeddings),), -1, dtype=torch.int64, device=embeddings.device)
    for batch, _, score in _scored(token_ids, embeddings, senses, metric):
        rows = batch.senses[:, :1].to(embeddings.device) + score.max(2).indices
        nearest[drop_padding(batch.rows.to(embeddings.device), batch)] = drop_padding(rows, batch)
    return nearest


def _write_nearest(nearest: Tensor, embeddings: Tensor, senses: RaggedSenses, out: Tensor) -> None:
    """Write the sense rows to `out` in order: sequential writes take half the time of scattered ones."""
    if not sum(len(part) for part in senses.parts):
        out.copy_(embeddings)
        return
    step = max(1, batch_elements(embeddings.device) // embeddings.shape[1])
    for start in range(0, len(out), step):
        rows, block = nearest[start : start + step], out[start : start + step]
        missing = torch.nonzero(rows < 0)[:, 0]
        block.copy_(senses.rows(rows.clamp(min=0)))
        block[missing] = embeddings[start : start + step][missing]


def _scored(
    token_ids: np.ndarray, embeddings: Tensor, senses: RaggedSenses, metric: Metric
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Yield each batch with its senses [T, K, D] and scores [T, n, K], minus infinity for padded senses."""
    dim = embeddings.shape[1]
    for batch in ragged_batches(token_ids, senses.offsets, dim, batch_elements(embeddings.device)):
        points = embeddings.index_select(0, batch.rows.view(-1).to(embeddings.device)).float()
        points = points.view(*batch.rows.shape, dim)
        own = senses.rows(batch.senses.view(-1)).to(embeddings.device).float().view(*batch.senses.shape, dim)
        score = scores(points, own, metric)
        if not math.isfinite(score.sum()):
            _raise_not_finite(batch, points, own)
        if batch.present is not None:
            score = score.masked_fill(~batch.present[:, None].to(score.device), -math.inf)
        yield batch, own, score


def drop_padding(values: Tensor, batch: Batch) -> Tensor:
    """Return values [T, n, ...] without those of padded occurrences, [number of real ones, ...]."""
    return values.flatten(0, 1) if batch.filled is None else values[batch.filled.to(values.device)]


def _raise_not_finite(batch: Batch, points: Tensor, own: Tensor) -> None:
    """Raise the error that names the embedding or sense whose scores are not finite."""
    wrong = torch.nonzero(~torch.isfinite(points).all(2))
    if len(wrong):
        row = int(batch.rows[tuple(wrong[0].tolist())])
        raise InputError(f"embedding {row} holds NaN or infinite values: check which layer or dtype overflowed")
    wrong = torch.nonzero(~torch.isfinite(own).all(2))
    if len(wrong):
        row = int(batch.senses[tuple(wrong[0].tolist())])
        raise DictionaryError(f"sense row {row} of the dictionary holds NaN or infinite values: build it again")
    raise InputError("scores overflow float32: scale the embeddings and the dictionary down")
