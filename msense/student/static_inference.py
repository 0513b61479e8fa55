"""Fast CPU inference of a static student.

The MLP's first layer becomes a table of tokens. Everything after its activation is linear, so sentence vectors need one
product with the second layer per passage instead of one per token. Passages of similar length are padded together: the
table's row of padding is zero, as the convolution's border is, and padding has no weight in a sentence vector. Memory:
(V + 1)·(D + U) numbers of the tables, about 3·U·`CHUNK_TOKENS` per thread, and 4·(D + U) per passage of a group.
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
from msense.teacher.batching import token_batches
from msense.teacher.pooling import Pooling

CHUNK_TOKENS = 512  # padded tokens per thread whose activations are held: they fit the caches of a core
GROUP_TOKENS = 1 << 15  # whose passages are multiplied at once


class _Group(NamedTuple):
    """Concatenated passages, shortest first, each padded to the width of its batch."""

    rows: np.ndarray  # int64 [P], their indices
    lengths: np.ndarray  # int64 [P], without padding
    widths: np.ndarray  # int64 [P], with padding
    batches: list[np.ndarray]  # int64 [B] each, consecutive indices of passages of one width
    ids: Tensor  # int64 [N], V on padding

    @property
    def starts(self) -> np.ndarray:
        """The place of each passage in `ids`, int64 [P]."""
        return np.asarray(np.cumsum(self.widths) - self.widths)

    def parts(self) -> Iterator[tuple[slice, slice, int]]:
        """Yield of each batch its passages, its tokens and its width."""
        stop = 0
        for batch in self.batches:
            width = int(self.widths[batch[0]])
            start, stop = stop, stop + len(batch) * width
            yield slice(batch[0], batch[-1] + 1), slice(start, stop), width


class _MixerTables:
    """A `ContextMixer` whose first layer is a table of tokens."""

    def __init__(self, table: Tensor, mixer: ContextMixer) -> None:
        self.units = table @ mixer.project.weight.T
        self.passage, self.back = mixer.passage, mixer.back
        taps = mixer.taps.T[:, None, None]  # as weights [U, 1, 1, window] of U groups
        self.taps = taps.contiguous(memory_format=torch.channels_last)

    def of_passages(self, means: Tensor) -> Tensor:
        """Return the part of the units that all tokens of a passage share, float32 [P, U], of their means [P, D]."""
        return torch.addmm(self.passage.bias, means, self.passage.weight.T)

    def active(self, ids: Tensor, of_passages: Tensor) -> Tensor:
        """Return activations, float32 [B, L, U], of ids [B·L] of padded passages, and [B, U] of these."""
        units = self.units.index_select(0, ids).view(len(of_passages), 1, -1, of_passages.shape[1])
        # a channels-last view: the convolution then accumulates all taps in registers
        nearby = torch.nn.functional.conv2d(
            units.permute(0, 3, 1, 2), self.taps, padding=(0, self.taps.shape[3] // 2), groups=len(self.taps)
        )
        return nearby[:, :, 0].transpose(1, 2).contiguous().add_(of_passages[:, None]).relu_()


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
        self.sentence_head, self._head = student.sentence_head, student.head
        self._tokens, self._confidence = _with_padding(body.table()), _with_padding(body.confidence)
        mixers = (body.mixer, body.sense_mixer) if isinstance(body, StaticBody) else (None, None)
        self._mixer, self._sense_mixer = (
            None if mixer is None else _MixerTables(self._tokens, mixer) for mixer in mixers
        )

    @torch.inference_mode()
    def sentences(self, passages: Sequence[np.ndarray], skip: int | None = None) -> np.ndarray:
        """Return sentence vectors, float32 [P, D'], of token ids, integers [n_i]; for `skip` see `pool`.

        Raises:
            InputError: a token id is not in the vocabulary.
        """
        skip = self.config.skip if skip is None else skip
        vectors = torch.zeros(len(passages), self.config.dim, dtype=torch.float32)
        for group in self._groups(passages):
            vectors[torch.from_numpy(group.rows)] = self._pooled(group, skip)
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
        found = [torch.empty(0, self.config.dim, dtype=torch.float32)] * (len(passages) + 1)
        for group in self._groups(passages):
            embeddings = self._tokens.index_select(0, group.ids)
            if mixer is not None:
                of_passages = mixer.of_passages(self._sums(group, self._shares(group, "mean", 0)))
                confidence = self._confidence[group.ids, None]
                for batch, part, _ in group.parts():
                    active = mixer.active(group.ids[part], of_passages[batch]).flatten(0, 1)
                    moved = torch.addmm(mixer.back.bias, active, mixer.back.weight.T)
                    embeddings[part].addcmul_(confidence[part], moved)
            for row, length, own in zip(
                group.rows, group.lengths, embeddings.split(group.widths.tolist()), strict=True
            ):
                found[row + 1] = own[:length]
        return torch.cat(found)

    def _groups(self, passages: Sequence[np.ndarray]) -> Iterator[_Group]:
        """Yield all passages in groups of about GROUP_TOKENS tokens."""
        lengths = np.array([len(passage) for passage in passages], np.int64)
        for rows in split_by_size(lengths, GROUP_TOKENS):
            rows = rows[np.argsort(lengths[rows], kind="stable")]
            size = lengths[rows]
            ids = np.concatenate([passages[i] for i in rows])
            if len(ids) and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
                raise InputError(
                    f"token ids from {ids.min()} to {ids.max()} exceed the student's vocabulary, 0 to "
                    f"{self.config.vocab_size - 1}: use the student's tokenizer"
                )
            batches = list(token_batches(size, CHUNK_TOKENS * torch.get_num_threads()))
            widths = np.repeat([max(1, size[batch[-1]]) for batch in batches], [len(batch) for batch in batches])
            padded = np.full(widths.sum(), self.config.vocab_size)
            padded[_places(size, widths)] = ids
            yield _Group(rows, size, widths, batches, torch.from_numpy(padded))

    def _pooled(self, group: _Group, skip: int) -> Tensor:
        """Return pooled embeddings, float32 [P, D]."""
        shares = self._shares(group, self.config.pooling, skip)
        tokens = self._sums(group, shares)
        if (mixer := self._mixer) is None:
            return tokens
        all_tokens = self.config.pooling == "mean" and skip == 0
        means = tokens if all_tokens else self._sums(group, self._shares(group, "mean", 0))
        of_passages = mixer.of_passages(means)
        shares = shares * self._confidence[group.ids]
        units = torch.empty_like(of_passages)
        for batch, part, width in group.parts():
            weights = shares[part].view(-1, 1, width)
            torch.bmm(weights, mixer.active(group.ids[part], of_passages[batch]), out=units[batch][:, None])
        total = embedding_bag(torch.arange(len(shares)), shares[:, None], torch.from_numpy(group.starts), mode="sum")
        return torch.addmm(tokens, units, mixer.back.weight.T).addcmul_(total, mixer.back.bias)

    def _sums(self, group: _Group, shares: Tensor) -> Tensor:
        """Return the sum of each passage's token embeddings times their shares, float32 [P, D]."""
        starts = torch.from_numpy(group.starts)
        return embedding_bag(group.ids, self._tokens, starts, mode="sum", per_sample_weights=shares)

    @staticmethod
    def _shares(group: _Group, pooling: Pooling, skip: int) -> Tensor:
        """Return the share of each token in the vector of its passage, float32 [N], 0 on padding."""
        first = np.maximum(group.lengths - 1, skip) if pooling == "lasttoken" else np.full_like(group.lengths, skip)
        stop = np.minimum(group.lengths, skip + 1) if pooling == "cls" else group.lengths
        column = np.arange(len(group.ids)) - np.repeat(group.starts, group.widths)
        pooled = (column >= np.repeat(first, group.widths)) & (column < np.repeat(stop, group.widths))
        share = (1 / np.maximum(stop - first, 1)).astype(np.float32)
        return torch.from_numpy(np.repeat(share, group.widths) * pooled)


def split_by_size(sizes: np.ndarray, limit: int) -> list[np.ndarray]:
    """Return the indices of sizes [n] in consecutive groups, int64 [m], each of about `limit` in total."""
    borders = np.flatnonzero(np.diff(np.cumsum(sizes) // limit)) + 1
    return np.split(np.arange(len(sizes)), borders) if len(sizes) else []


def _places(lengths: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return the places, int64 [N], of concatenated rows of these lengths [P] that are padded to these widths [P]."""
    padding = np.cumsum(widths - lengths) - (widths - lengths)
    return np.asarray(np.arange(lengths.sum()) + np.repeat(padding, lengths))


def _with_padding(rows: Tensor) -> Tensor:
    """Return rows [V, ...] and one of zeros, which padding looks up."""
    return torch.cat([rows, torch.zeros_like(rows[:1])])
