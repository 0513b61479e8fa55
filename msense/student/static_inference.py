"""Fast CPU inference of a static student, without padding.

The MLP's first layer becomes a table of tokens. Everything after its activation is linear, so sentence vectors need one
product with the second layer per passage instead of one per token. Memory: (V + 1)·(D + U) numbers of the tables, and
about 4·(D + U)·`CHUNK_TOKENS`.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from msense.errors import InputError, StudentError
from msense.student.static import ContextMixer, StaticBody, TokenTable
from msense.student.student import Student

CHUNK_TOKENS = 1024  # fits the caches of a core
TABLE_TOKENS = 1 << 16  # of a table, which makes no intermediate rows


class _Chunk(NamedTuple):
    """Concatenated passages; the stream has `half` border rows before, between and after them."""

    ids: Tensor  # int64 [N]
    lengths: Tensor  # int64 [P]
    starts: Tensor  # int64 [P], in ids
    stream: Tensor  # int64 [N + (P + 1)·half], V on borders
    places: Tensor  # int64 [N], of tokens in the convolved stream, which is `half` rows shorter at either end
    passage: Tensor  # int64 [N + (P - 1)·half], of each row of the convolved stream


class _MixerTables:
    """A `ContextMixer` whose first layer is a table of tokens."""

    def __init__(self, table: Tensor, mixer: ContextMixer) -> None:
        self.units = _with_border(table @ mixer.project.weight.T)
        self.passage, self.back = mixer.passage, mixer.back
        taps = mixer.taps.T[:, None, None]  # as weights [U, 1, 1, window] of U groups
        self.taps = taps.contiguous(memory_format=torch.channels_last)

    def active(self, chunk: _Chunk, mean: Tensor) -> Tensor:
        """Return the activations on the convolved stream, float32 [N + (P - 1)·half, U], given passage means [P, D]."""
        of_passages = torch.addmm(self.passage.bias, mean, self.passage.weight.T)
        rows, stream = len(chunk.passage), self.units.index_select(0, chunk.stream)
        length, width = stream.shape
        # a channels-last view: the convolution then accumulates all taps in registers
        image = stream.as_strided((1, width, 1, length), (length * width, 1, length * width, width))
        units = torch.nn.functional.conv2d(image, self.taps, groups=width).reshape(width, rows).T.contiguous()
        return units.add_(of_passages.index_select(0, chunk.passage)).relu_()


class StaticEncoder:
    """A static student or a table on the CPU, for inference only; equal to the module up to rounding.

    Example:
        >>> encoder = StaticEncoder(load_student("runs/static/student"))  # doctest: +SKIP
        >>> encoder.sentences([np.array([101, 2314, 102])]).shape  # doctest: +SKIP
        (1, 384)
    """

    def __init__(self, student: Student) -> None:
        """Copy a student into tables; raise StudentError if it is a transformer."""
        self.config = student.config
        student = copy.deepcopy(student).float().cpu().requires_grad_(False)
        body = student.body
        if not isinstance(body, TokenTable):
            raise StudentError(f"student {self.config.kind!r} is a transformer: give a static student")
        self.sentence_head, self._head, self._confidence = student.sentence_head, student.head, body.confidence
        table = body.table()
        self._tokens = _with_border(table)
        mixers = (body.mixer, body.sense_mixer) if isinstance(body, StaticBody) else (None, None)
        self._mixer, self._sense_mixer = (None if mixer is None else _MixerTables(table, mixer) for mixer in mixers)

    @torch.inference_mode()
    def sentences(self, passages: Sequence[np.ndarray], skip: int | None = None) -> np.ndarray:
        """Return sentence vectors, float32 [P, D'], of token ids, integers [n_i]; for `skip` see `pool`.

        Raises:
            InputError: a token id is not in the vocabulary.
        """
        skip = self.config.skip if skip is None else skip
        vectors = torch.zeros(len(passages), self.config.dim, dtype=torch.float32)
        nonempty = [i for i, passage in enumerate(passages) if len(passage)]
        done = 0
        for chunk in self._chunks([passages[i] for i in nonempty]):
            sentences = mean = self._mean(chunk)
            if (mixer := self._mixer) is not None:
                tokens, active, confidence = self._pooled(chunk, mean, mixer.active(chunk, mean), skip)
                sentences = torch.addmm(tokens, active, mixer.back.weight.T)
                sentences.addcmul_(confidence[:, None], mixer.back.bias)
            vectors[nonempty[done : done + len(sentences)]] = sentences
            done += len(sentences)
        return np.asarray(self.sentence_head.finish(vectors).numpy())

    def hidden(self, passages: Sequence[np.ndarray]) -> np.ndarray:
        """Return the embeddings of all tokens that are pooled, float32 [N, D]; errors as `sentences`."""
        return np.asarray(self._mixed(passages, self._mixer).numpy())

    def sense_embeddings(self, passages: Sequence[np.ndarray]) -> np.ndarray:
        """Return the embeddings of all tokens that are compared with senses, float32 [N, D]; errors as `sentences`."""
        embeddings = self._mixed(passages, self._sense_mixer or self._mixer)
        if self._head is not None:
            embeddings = torch.addmm(self._head.bias, embeddings, self._head.weight.T)
        return np.asarray(embeddings.numpy())

    @torch.inference_mode()
    def _mixed(self, passages: Sequence[np.ndarray], mixer: _MixerTables | None) -> Tensor:
        """Return token embeddings with what a mixer adds, float32 [N, D]."""
        chunks = [torch.empty(0, self.config.dim, dtype=torch.float32)]
        for chunk in self._chunks([passage for passage in passages if len(passage)]):
            chunks.append(self._tokens.index_select(0, chunk.ids))
            if mixer is not None:
                active = mixer.active(chunk, self._mean(chunk)).index_select(0, chunk.places)
                moved = torch.addmm(mixer.back.bias, active, mixer.back.weight.T)
                chunks[-1].addcmul_(self._confidence[chunk.ids, None], moved)
        return torch.cat(chunks)

    def _chunks(self, passages: Sequence[np.ndarray]) -> Iterator[_Chunk]:
        """Yield groups of whole passages, none of them empty, of about CHUNK_TOKENS tokens."""
        half = 0 if self._mixer is None else self._mixer.taps.shape[3] // 2
        border = self.config.vocab_size
        lengths = np.array([len(passage) for passage in passages], np.int64)
        for group in split_by_size(lengths, TABLE_TOKENS if self._mixer is None else CHUNK_TOKENS):
            size = lengths[group]
            ids = np.concatenate([passages[i] for i in group]).astype(np.int64, copy=False)
            if not 0 <= ids.min() <= ids.max() < border:
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
        """Return the mean token embedding of each passage, float32 [P, D]."""
        sums = embedding_bag(chunk.ids, self._tokens, chunk.starts, mode="sum")
        return sums.div_(chunk.lengths[:, None])

    def _pooled(self, chunk: _Chunk, mean: Tensor, active: Tensor, skip: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return pooled token embeddings [P, D], activations times confidence [P, U], and confidence [P]."""
        confidence = self._confidence[chunk.ids]
        counts = (chunk.lengths - skip).clamp(min=0)
        if skip:
            position = torch.arange(len(chunk.ids)) - chunk.starts.repeat_interleave(chunk.lengths)
            pooled = (position >= skip).float()
            confidence = confidence * pooled
            mean = embedding_bag(chunk.ids, self._tokens, chunk.starts, mode="sum", per_sample_weights=pooled)
            mean = mean / counts.clamp(min=1)[:, None]
        if self.config.pooling == "mean":
            share = 1 / counts.clamp(min=1).float()
            units = embedding_bag(chunk.places, active, chunk.starts, mode="sum", per_sample_weights=confidence)
            total = embedding_bag(torch.arange(len(chunk.ids)), confidence[:, None], chunk.starts, mode="sum")[:, 0]
            return mean, units * share[:, None], total * share
        ends = chunk.starts + (chunk.lengths - counts if self.config.pooling == "cls" else chunk.lengths - 1)
        ends = ends.clamp(max=len(chunk.ids) - 1)
        own, known = confidence[ends] * (counts > 0), (counts > 0)[:, None]
        return self._tokens.index_select(0, chunk.ids[ends]) * known, active[chunk.places[ends]] * own[:, None], own


def split_by_size(sizes: np.ndarray, limit: int) -> list[np.ndarray]:
    """Return the indices of sizes [n] in consecutive groups, int64 [m], each of about `limit` in total."""
    borders = np.flatnonzero(np.diff(np.cumsum(sizes) // limit)) + 1
    return np.split(np.arange(len(sizes)), borders) if len(sizes) else []


def _with_border(rows: Tensor) -> Tensor:
    """Return rows [V, W] and a row of zeros, which the borders between passages look up."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
