"""The nearest senses of other tokens, for dictionaries of any size.

The similarity of two senses is the cosine of their centroids after the mean of all centroids is subtracted: embeddings of many
teachers share a large common part, beside which every plain cosine is near 1.

A small dictionary is searched exactly. In a large one, a pass over `BITS` bits per sense (the signs of random projections, as in
SimHash, Charikar 2002) selects the `CANDIDATES` senses with the fewest different bits, and only their centroids are read and
compared exactly. Memory: one block of centroids, and the candidates in float32; 128 bytes per sense while the index is made,
which is memory-mapped when it comes from its file.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msense.dictionary.assignment import RaggedSenses, batch_elements
from msense.errors import DictionaryError, InputError
from msense.io.arrays import save_arrays
from msense.io.scratch import atomic_path

BITS = 1024  # per sense
CANDIDATES = 1 << 14  # senses that are compared exactly
EXACT_NUMBERS = 1 << 24  # a dictionary of so many numbers (senses x width) is searched exactly
_WORD = 64
_SCAN_ROWS = 1 << 16  # compared at once: their bits fit the L2 cache of a core
_SEED = 0
_OF_MEAN = 0.2  # part of the time
Progress = Callable[[float], None]
_VERSION = "1"  # of the index file: change it with anything that changes the bits


class Neighbour(NamedTuple):
    """A sense of another token."""

    token: int
    sense: int
    similarity: float  # cosine of the centred centroids


class NeighbourIndex:
    """What a search needs besides the centroids: their mean, and the bits of each unless there are few.

    Example:
        >>> index = NeighbourIndex.of(dictionary.ragged)
        >>> index.nearest(token=7, sense=0, top=3)
        [Neighbour(token=9, sense=1, similarity=0.93), ...]
    """

    def __init__(self, senses: RaggedSenses, mean: Tensor, bits: NDArray[np.uint64] | None) -> None:
        """Use the mean float32 [D] of all centroids and their bits uint64 [BITS / 64, S]; None: search exactly."""
        self._senses, self._mean, self._bits = senses, mean, bits

    @classmethod
    def of(
        cls, senses: RaggedSenses, *, exact: bool | None = None, progress: Progress | None = None
    ) -> "NeighbourIndex":
        """Make the index: one pass over the centroids, or two unless the search is exact; None: exact for few senses.

        `progress` receives the finished part, 0 to 1.
        """
        report = progress or (lambda _: None)
        if _is_small(senses) if exact is None else exact:
            return cls(senses, _mean(senses, report), None)
        mean = _mean(senses, lambda part: report(_OF_MEAN * part))
        return cls(senses, mean, _all_bits(senses, mean, lambda part: report(_OF_MEAN + (1 - _OF_MEAN) * part)))

    @classmethod
    def cached(
        cls, senses: RaggedSenses, fingerprint: Callable[[], str], folder: Path, progress: Progress | None = None
    ) -> "NeighbourIndex":
        """Load the index of a large dictionary from a folder of such files, or make and keep it there.

        `fingerprint` returns the dictionary's, and is not called for a small one, as it reads all files.
        A file that is damaged, or that cannot be written, only costs the time of making it again.
        """
        if _is_small(senses):
            return cls.of(senses, progress=progress)
        file = folder / f"{hashlib.sha256(f'{_VERSION} {fingerprint()}'.encode()).hexdigest()[:32]}.safetensors"
        if (loaded := _load(file, senses)) is not None:
            return cls(senses, *loaded)
        made = cls.of(senses, exact=False, progress=progress)
        assert made._bits is not None
        with suppress(OSError):  # a full or read-only cache
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(file, sync=False) as scratch:
                save_arrays(scratch, {"mean": made._mean.numpy(), "bits": made._bits})
        loaded = _load(file, senses)  # mapped, in place of the one in memory
        return made if loaded is None else cls(senses, *loaded)

    @property
    def nbytes(self) -> int:
        """The size of mean and bits in memory and on disk."""
        return self._mean.nbytes + (0 if self._bits is None else self._bits.nbytes)

    def nearest(self, token: int, sense: int, top: int = 10) -> list[Neighbour]:
        """Return the `top` senses of other tokens that are most similar, nearest first.

        Raises:
            InputError: the token has no such sense, or `top` is not positive.
            DictionaryError: the centroid is NaN or infinite.
        """
        if top < 1:
            raise InputError(f"top is {top}, but must be positive")
        start, end = self._place(token)
        if start == end:
            raise InputError(f"token {token} has no senses: it does not occur in the corpus, or is excluded")
        if not 0 <= sense < end - start:
            raise InputError(f"token {token} has no sense {sense}: its senses are 0 to {end - start - 1}")
        query = self._senses.rows(torch.tensor([start + sense])).float().cpu()
        if not torch.isfinite(query).all():
            raise DictionaryError(f"sense {sense} of token {token} is NaN or infinite: build the dictionary again")
        rows = self._candidates(start + sense, start, end, max(CANDIDATES, top))
        scores = self._similarities(rows, torch.nn.functional.normalize(query - self._mean)[0])
        best = torch.topk(scores, min(top, len(rows)))
        return [self._named(int(rows[i]), score) for score, i in zip(*(b.tolist() for b in best), strict=True)]

    def _place(self, token: int) -> tuple[int, int]:
        offsets = self._senses.offsets
        if not 0 <= token < len(offsets) - 1:
            raise InputError(f"token {token} is not in the vocabulary: the token ids are 0 to {len(offsets) - 2}")
        return int(offsets[token]), int(offsets[token + 1])

    def _named(self, row: int, similarity: float) -> Neighbour:
        offsets = self._senses.offsets
        token = int(np.searchsorted(offsets, row, side="right")) - 1
        return Neighbour(token, row - int(offsets[token]), similarity)

    def _candidates(self, row: int, start: int, end: int, most: int) -> NDArray[np.int64]:
        """Return the rows, increasing, of about `most` senses outside [start, end) with the fewest other bits than a row."""
        if self._bits is None:
            every = np.arange(int(self._senses.offsets[-1]))
            return np.concatenate((every[:start], every[end:]))
        different = _differences(self._bits, row)
        different[start:end] = BITS + 1
        below = np.cumsum(np.bincount(different, minlength=BITS + 2)[: BITS + 1])
        limit = int(np.searchsorted(below, min(most, below[-1])))
        return np.flatnonzero(different <= limit)

    def _similarities(self, rows: NDArray[np.int64], query: Tensor) -> Tensor:
        """Return the cosine of each row's centred centroid with a unit vector [D]; -1 for one that is not finite."""
        scores = torch.empty(len(rows))
        step = max(1, batch_elements(query.device) // len(query))
        for first in range(0, len(rows), step):
            block = self._senses.rows(torch.from_numpy(rows[first : first + step])).float().cpu() - self._mean
            scores[first : first + step] = torch.nn.functional.normalize(block) @ query
        return scores.nan_to_num_(nan=-1.0)


def _is_small(senses: RaggedSenses) -> bool:
    return sum(part.numel() for part in senses.parts) <= EXACT_NUMBERS


def _blocks(senses: RaggedSenses, report: Progress) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the centroids, float32 [n, D], of each block; numbers that are not finite are 0."""
    total, dim = int(senses.offsets[-1]), senses.parts[0].shape[1]
    step = max(1, batch_elements(torch.device("cpu")) // dim)
    for first in range(0, total, step):
        rows = senses.rows(torch.arange(first, min(first + step, total))).float().cpu()
        yield first, torch.nan_to_num(rows, posinf=0.0, neginf=0.0)
        report((first + len(rows)) / total)


def _mean(senses: RaggedSenses, report: Progress) -> Tensor:
    total = torch.zeros(senses.parts[0].shape[1], dtype=torch.float64)
    for _, rows in _blocks(senses, report):
        total += rows.sum(0, dtype=torch.float64)
    return (total / max(1, int(senses.offsets[-1]))).float()


def _all_bits(senses: RaggedSenses, mean: Tensor, report: Progress) -> NDArray[np.uint64]:
    """Return the signs of random projections of the centred centroids, uint64 [BITS / 64, S]."""
    directions = _directions(len(mean))
    bits = np.empty((BITS // _WORD, int(senses.offsets[-1])), np.uint64)
    for first, rows in _blocks(senses, report):
        signs = ((rows - mean) @ directions > 0).numpy()
        bits[:, first : first + len(signs)] = np.packbits(signs, axis=1, bitorder="little").view(np.uint64).T
    return bits


def _directions(dim: int) -> Tensor:
    """Return random directions, float32 [D, BITS], orthogonal in groups of at most D: fewer errors than independent ones."""
    generator = torch.Generator().manual_seed(_SEED)
    groups = [min(dim, BITS - first) for first in range(0, BITS, dim)]
    draw = partial(torch.randn, generator=generator)
    return torch.cat([torch.linalg.qr(draw(dim, columns))[0] for columns in groups], 1)


def _differences(bits: NDArray[np.uint64], row: int) -> NDArray[np.uint16]:
    """Return the number of bits of each sense that differ from those of a row, uint16 [S]."""
    own = bits[:, row].copy()
    different = np.zeros(bits.shape[1], np.uint16)
    for first in range(0, len(different), _SCAN_ROWS):
        block = different[first : first + _SCAN_ROWS]
        for word, value in zip(bits[:, first : first + _SCAN_ROWS], own, strict=True):
            block += np.bitwise_count(word ^ value)
    return different


def _load(file: Path, senses: RaggedSenses) -> tuple[Tensor, NDArray[np.uint64]] | None:
    """Return mean and bits of a file, memory-mapped; None if it is missing, damaged or of other senses."""
    try:
        with safe_open(file, "pt") as arrays:
            mean, bits = (arrays.get_tensor(name).numpy() for name in ("mean", "bits"))
    except (OSError, SafetensorError):
        return None
    shapes = (senses.parts[0].shape[1],), (BITS // _WORD, int(senses.offsets[-1]))
    if (mean.shape, bits.shape) != shapes or (mean.dtype.name, bits.dtype.name) != ("float32", "uint64"):
        return None
    return torch.from_numpy(mean), bits
