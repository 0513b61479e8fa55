"""Fast CPU inference of a static student, without padding.

The MLP's first layer becomes a table of tokens. Everything after its activation is linear, so sentence vectors need one
product with the second layer per passage instead of one per token. Memory: (V + 1)·(D + U) numbers of the tables'
dtype, and about 4·(D + U)·`CHUNK_TOKENS` of float32.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from msense.errors import InputError, StudentError
from msense.student.static import StaticBody
from msense.student.student import Student

CHUNK_TOKENS = 1024  # fits the caches of a core
TableType = Literal["float32", "bfloat16"]


class _Chunk(NamedTuple):
    """Concatenated passages; the stream has `half` border rows before, between and after them."""

    ids: Tensor  # int64 [N]
    lengths: Tensor  # int64 [P]
    starts: Tensor  # int64 [P], in ids
    stream: Tensor  # int64 [N + (P + 1)·half], V on borders
    places: Tensor  # int64 [N], of tokens in the convolved stream, which is `half` rows shorter at either end
    passage: Tensor  # int64 [N + (P - 1)·half], of each row of the convolved stream


class StaticEncoder:
    """A static student on the CPU, for inference only; equal to the module up to rounding.

    Example:
        >>> encoder = StaticEncoder(load_student("runs/static/student"))  # doctest: +SKIP
        >>> encoder.sentences([np.array([101, 2314, 102])]).shape  # doctest: +SKIP
        (1, 384)
    """

    def __init__(self, student: Student, dtype: TableType = "float32") -> None:
        """Copy a student into tables of a dtype.

        Raises:
            StudentError: the student is a transformer.
        """
        body = student.body
        if not isinstance(body, StaticBody):
            raise StudentError(f"student {student.config.kind!r} is a transformer: give a static student")
        with torch.no_grad():
            table = body.table().float().cpu()
            self._tokens = _table(table, dtype)
            self._units = _table(table @ body.project.weight.T.float().cpu(), dtype)
            self._confidence = torch.cat([body.confidence.float().cpu(), torch.zeros(1)])
            taps = body.taps.detach().float().cpu().T[:, None, None]  # as weights [U, 1, 1, window] of U groups
            self._taps = taps.contiguous(memory_format=torch.channels_last)
        self._passage, self._back = _copy(body.passage), _copy(body.back)
        self._head = None if student.head is None else _copy(student.head)
        self.config = student.config

    @torch.inference_mode()
    def sentences(self, passages: Sequence[np.ndarray]) -> np.ndarray:
        """Return sentence vectors, float32 [P, D], of token ids, integers [n_i]; an empty passage counts as padding.

        Raises:
            InputError: a token id is not in the vocabulary.
        """
        vectors = torch.empty(len(passages), self.config.dim)
        done = 0
        for chunk in self._chunks(passages):
            mean = self._mean(chunk)
            tokens, active, confidence = self._pooled(chunk, mean, self._active(chunk, mean))
            sentences = torch.addmm(tokens, active, self._back.weight.T).addcmul_(confidence[:, None], self._back.bias)
            if self.config.normalize:
                sentences = torch.nn.functional.normalize(sentences, dim=1)
            vectors[done : done + len(sentences)] = sentences
            done += len(sentences)
        return vectors.numpy()

    @torch.inference_mode()
    def tokens(self, passages: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return `hidden` and `senses` of all tokens as in StudentOutput, float32 [N, D] each.

        Raises:
            InputError: a token id is not in the vocabulary.
        """
        chunks = [torch.empty(0, self.config.dim)]
        for chunk in self._chunks(passages):
            active = self._active(chunk, self._mean(chunk)).index_select(0, chunk.places)
            moved = torch.addmm(self._back.bias, active, self._back.weight.T)
            chunks.append(_rows(self._tokens, chunk.ids).addcmul_(self._confidence[chunk.ids, None], moved))
        hidden = torch.cat(chunks)
        senses = hidden if self._head is None else torch.addmm(self._head.bias, hidden, self._head.weight.T)
        return hidden.numpy(), senses.numpy()

    def _chunks(self, passages: Sequence[np.ndarray]) -> Iterator[_Chunk]:
        """Yield groups of whole passages of about CHUNK_TOKENS tokens."""
        half, border = self._taps.shape[3] // 2, self.config.vocab_size
        lengths = np.array([len(passage) for passage in passages], np.int64)
        groups = np.cumsum(lengths) // CHUNK_TOKENS
        for group in np.split(np.arange(len(passages)), np.flatnonzero(np.diff(groups)) + 1) if len(passages) else ():
            size = lengths[group]
            ids = np.concatenate([passages[i] for i in group]).astype(np.int64, copy=False)
            if len(ids) and not 0 <= ids.min() <= ids.max() < border:
                raise InputError(
                    f"token ids from {ids.min()} to {ids.max()} exceed the student's vocabulary, 0 to {border - 1}: "
                    "use the student's tokenizer"
                )
            number = np.arange(len(group))
            places = np.arange(len(ids)) + half * np.repeat(number, size)
            stream = np.full(len(ids) + (len(group) + 1) * half, border)
            stream[places + half] = ids
            rows = size + half
            rows[-1] = size[-1]
            arrays = (ids, size, np.cumsum(size) - size, stream, places, np.repeat(number, rows))
            yield _Chunk(*(torch.from_numpy(array) for array in arrays))

    def _mean(self, chunk: _Chunk) -> Tensor:
        """Return the mean token embedding of each passage, float32 [P, D]; 0 for an empty passage."""
        sums = embedding_bag(chunk.ids, self._tokens, chunk.starts, mode="sum").float()
        return sums.div_(chunk.lengths.clamp(min=1)[:, None])

    def _active(self, chunk: _Chunk, mean: Tensor) -> Tensor:
        """Return the MLP's activations on the convolved stream, float32 [N + (P - 1)·half, U]."""
        of_passages = torch.addmm(self._passage.bias, mean, self._passage.weight.T)
        rows, stream = len(chunk.passage), _rows(self._units, chunk.stream)
        length, width = stream.shape
        if not rows:
            return stream.new_empty(0, width)
        # a channels-last view: the convolution then accumulates all taps in registers
        image = stream.as_strided((1, width, 1, length), (length * width, 1, length * width, width))
        units = torch.nn.functional.conv2d(image, self._taps, groups=width).reshape(width, rows).T.contiguous()
        return units.add_(of_passages.index_select(0, chunk.passage)).relu_()

    def _pooled(self, chunk: _Chunk, mean: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return pooled token embeddings [P, D], activations times confidence [P, U], and confidence [P]."""
        confidence = self._confidence[chunk.ids]
        if self.config.pooling == "mean":
            share = 1 / chunk.lengths.clamp(min=1)
            units = embedding_bag(chunk.places, active, chunk.starts, mode="sum", per_sample_weights=confidence)
            total = embedding_bag(chunk.ids, self._confidence[:, None], chunk.starts, mode="sum")[:, 0]
            return mean, units * share[:, None], total * share
        ends = chunk.starts if self.config.pooling == "cls" else chunk.starts + chunk.lengths - 1
        nonempty = (chunk.lengths > 0).float()
        ends = ends.clamp(min=0, max=max(0, len(chunk.ids) - 1))
        ids = chunk.ids[ends] if len(chunk.ids) else torch.full_like(ends, self.config.vocab_size)
        own = self._confidence[ids] * nonempty
        units = active[chunk.places[ends]] if len(chunk.ids) else active.new_zeros(len(ends), active.shape[1])
        return _rows(self._tokens, ids) * nonempty[:, None], units * own[:, None], own


def _table(rows: Tensor, dtype: TableType) -> Tensor:
    """Return rows [V, W] and a row of zeros, which the borders between passages look up."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).to(getattr(torch, dtype))


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    return table.index_select(0, ids).float()


def _copy(layer: nn.Linear) -> nn.Linear:
    return copy.deepcopy(layer).float().cpu()
