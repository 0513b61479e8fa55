"""A static student made fast: two tables of tokens, a depthwise convolution, sums of passages.

Comes in: a static student; then passages of any lengths as arrays of token ids, without padding. Goes out: sentence
vectors [P, D], or embeddings [N, D]. The MLP's first layer is a table of tokens here, and what comes after its activation
is linear, so that for sentences the second layer is multiplied once a passage: no token costs a matrix product. Holds
(V + 1)·(D + U) numbers of the tables' type, and about 4·(D + U)·`CHUNK_TOKENS` of float32.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from msense.errors import BadInput, StudentError
from msense.student.static import StaticBody
from msense.student.student import Student

CHUNK_TOKENS = 1024  # what a core works on stays in its caches
TableType = Literal["float32", "bfloat16", "int8"]


class _Table(NamedTuple):
    """Rows of numbers, the last one zero: what a border looks up."""

    values: Tensor  # [V + 1, W] float32, bfloat16 or int8
    scale: Tensor | None  # float32 [V + 1, 1], of int8

    @classmethod
    def of(cls, rows: Tensor, kind: TableType) -> "_Table":
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        if kind != "int8":
            return cls(rows.to(getattr(torch, kind)), None)
        scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        return cls((rows / scale).round().to(torch.int8), scale)

    def rows(self, ids: Tensor) -> Tensor:
        """Look rows up: float32 [N, W]."""
        found = self.values.index_select(0, ids).float()
        return found if self.scale is None else found.mul_(self.scale.index_select(0, ids))

    def sums(self, ids: Tensor, starts: Tensor) -> Tensor:
        """Sum the rows of each passage: float32 [P, W]."""
        if self.scale is None:
            return embedding_bag(ids, self.values, starts, mode="sum").float()
        return embedding_bag(torch.arange(len(ids)), self.rows(ids), starts, mode="sum")


class _Chunk(NamedTuple):
    """Passages one after the other; in the stream, rows of borders stand before, between and after them."""

    ids: Tensor  # int64 [N]
    lengths: Tensor  # int64 [P]
    starts: Tensor  # int64 [P], in ids
    stream: Tensor  # int64 [N + (P + 1)·half], V on borders
    places: (
        Tensor  # int64 [N], of tokens in the convolved stream, which begins half rows later and ends so much earlier
    )
    passage: Tensor  # int64 [N + (P - 1)·half], of each row of the convolved stream


class StaticEncoder:
    """A static student on the CPU, for inference only; equal to the module but for rounding."""

    def __init__(self, student: Student, dtype: TableType = "float32") -> None:
        """Make the tables.

        Args:
            student: a static one; copied, not kept.
            dtype: of the tables.

        Raises:
            StudentError: the student is a transformer.
        """
        body = student.body
        if not isinstance(body, StaticBody):
            raise StudentError(
                f"student {student.config.kind!r} is a transformer: only a static one has tables of tokens"
            )
        with torch.no_grad():
            table = body.table().float().cpu()
            self._tokens = _Table.of(table, dtype)
            self._units = _Table.of(table @ body.project.weight.T.float().cpu(), dtype)
            self._confidence = torch.cat([body.confidence.float().cpu(), torch.zeros(1)])
            taps = body.taps.detach().float().cpu().T[:, None, None]  # as weights [U, 1, 1, window] of U groups
            self._taps = taps.contiguous(memory_format=torch.channels_last)
            self._passage, self._back = _copied(body.passage), _copied(body.back)
            self._head = None if student.head is None else _copied(student.head)
        self.config = student.config

    @torch.inference_mode()
    def sentences(self, passages: Sequence[np.ndarray]) -> np.ndarray:
        """Return sentence vectors, float32 [P, D].

        Args:
            passages: integers [n_i], token ids; an empty one gives the same as a passage of nothing but padding.

        Raises:
            BadInput: a token is not in the vocabulary.
        """
        found = torch.empty(len(passages), self.config.dim)
        done = 0
        for chunk in self._chunks(passages):
            mean = self._mean(chunk)
            tokens, active, confidence = self._pooled(chunk, mean, self._active(chunk, mean))
            sentences = torch.addmm(tokens, active, self._back.weight.T).addcmul_(confidence[:, None], self._back.bias)
            if self.config.normalize:
                sentences = torch.nn.functional.normalize(sentences, dim=1)
            found[done : done + len(sentences)] = sentences
            done += len(sentences)
        return found.numpy()

    @torch.inference_mode()
    def tokens(self, passages: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return all tokens' hidden states and what is compared with their senses, float32 [N, D] each.

        Raises:
            BadInput: a token is not in the vocabulary.
        """
        hidden = [torch.empty(0, self.config.dim)]
        for chunk in self._chunks(passages):
            active = self._active(chunk, self._mean(chunk)).index_select(0, chunk.places)
            moved = torch.addmm(self._back.bias, active, self._back.weight.T)
            hidden.append(self._tokens.rows(chunk.ids).addcmul_(self._confidence[chunk.ids, None], moved))
        every = torch.cat(hidden)
        senses = every if self._head is None else torch.addmm(self._head.bias, every, self._head.weight.T)
        return every.numpy(), senses.numpy()

    def _chunks(self, passages: Sequence[np.ndarray]) -> Iterator[_Chunk]:
        """Cut passages into chunks of about CHUNK_TOKENS; one passage is never cut."""
        half, border = self._taps.shape[3] // 2, self.config.vocab_size
        lengths = np.array([len(passage) for passage in passages], np.int64)
        groups = np.cumsum(lengths) // CHUNK_TOKENS
        for group in np.split(np.arange(len(passages)), np.flatnonzero(np.diff(groups)) + 1) if len(passages) else ():
            size = lengths[group]
            ids = np.concatenate([passages[i] for i in group]).astype(np.int64, copy=False)
            if len(ids) and not 0 <= ids.min() <= ids.max() < border:
                raise BadInput(
                    f"token ids go from {ids.min()} to {ids.max()}, but this student has the tokens 0 to {border - 1}: "
                    "take its own tokenizer"
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
        """Return the means of the passages' token embeddings, float32 [P, D]; 0 of an empty passage."""
        return self._tokens.sums(chunk.ids, chunk.starts).div_(chunk.lengths.clamp(min=1)[:, None])

    def _active(self, chunk: _Chunk, mean: Tensor) -> Tensor:
        """Return the MLP's units after activation on the convolved stream, float32 [N + (P - 1)·half, U]."""
        of_passages = torch.addmm(self._passage.bias, mean, self._passage.weight.T)
        rows, stream = len(chunk.passage), self._units.rows(chunk.stream)
        length, width = stream.shape
        if not rows:
            return stream.new_empty(0, width)
        # rows of units are channels that lie last: so a core multiplies and adds all taps in its registers
        image = stream.as_strided((1, width, 1, length), (length * width, 1, length * width, width))
        units = torch.nn.functional.conv2d(image, self._taps, groups=width).reshape(width, rows).T.contiguous()
        return units.add_(of_passages.index_select(0, chunk.passage)).relu_()

    def _pooled(self, chunk: _Chunk, mean: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pool token embeddings [P, D], active units times confidence [P, U], and confidence [P]."""
        confidence = self._confidence[chunk.ids]
        if self.config.pooling == "mean":
            share = 1 / chunk.lengths.clamp(min=1)
            units = embedding_bag(chunk.places, active, chunk.starts, mode="sum", per_sample_weights=confidence)
            known = embedding_bag(chunk.ids, self._confidence[:, None], chunk.starts, mode="sum")[:, 0]
            return mean, units * share[:, None], known * share
        ends = chunk.starts if self.config.pooling == "cls" else chunk.starts + chunk.lengths - 1
        known = (chunk.lengths > 0).float()
        ends = ends.clamp(min=0, max=max(0, len(chunk.ids) - 1))
        ids = chunk.ids[ends] if len(chunk.ids) else torch.full_like(ends, self.config.vocab_size)
        own = self._confidence[ids] * known
        units = active[chunk.places[ends]] if len(chunk.ids) else active.new_zeros(len(ends), active.shape[1])
        return self._tokens.rows(ids) * known[:, None], units * own[:, None], own


class _Linear(NamedTuple):
    weight: Tensor  # float32 [out, in]
    bias: Tensor  # float32 [out]


def _copied(layer: torch.nn.Linear) -> _Linear:
    return _Linear(layer.weight.detach().float().cpu().clone(), layer.bias.detach().float().cpu().clone())
