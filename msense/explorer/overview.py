"""The page of a dictionary: what it was made of, and its tokens by ambiguity, by count and by distortion."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msense.dictionary import SenseDictionary
from msense.dictionary.layout import Arrays, DictionaryConfig, corpus_distortion
from msense.errors import InputError
from msense.explorer.charts import Chart, Series
from msense.explorer.word import text_of

_LEAST_POINTS = 20  # of a token ranked by ambiguity: fewer say little


@dataclass(frozen=True)
class TokenRow:
    """A token in a list."""

    token: int
    text: str
    senses: int
    occurrences: int  # in the corpus
    ambiguity: float  # effective number of senses: exp of the entropy of their shares
    distortion: float  # mean squared distance of its points to their senses


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram: tokens with `first` to `last` senses."""

    first: int
    last: int
    tokens: int

    @property
    def name(self) -> str:
        """The range in words."""
        return f"{self.first}" if self.first == self.last else f"{self.first} to {self.last}"


@dataclass(frozen=True)
class Overview:
    """A dictionary in numbers."""

    config: DictionaryConfig
    tokens: int  # with senses
    senses: int
    occurrences: int  # of all tokens in the corpus
    distortion: float  # see `corpus_distortion`
    histogram: tuple[Bar, ...]  # of the number of senses, in powers of two

    @property
    def chart(self) -> Chart:
        """The histogram."""
        bars = tuple(Series(bar.name, ((0.0, float(bar.tokens)),)) for bar in self.histogram)
        return Chart("bars", "Senses per token", "tokens", "senses", bars)


class TokenStatistics:
    """Statistics of every token, computed once: 40 bytes per token, a pass over the counts of all senses."""

    def __init__(self, dictionary: SenseDictionary) -> None:
        self._dictionary = dictionary
        self.senses: NDArray[np.int64] = np.diff(dictionary.offsets)
        token = np.repeat(np.arange(len(self.senses)), self.senses)
        sums = {"minlength": len(self.senses)}
        self.points = np.bincount(token, weights=dictionary.counts, **sums)
        squares = dictionary.counts * dictionary.rms_distance.astype(np.float64) ** 2
        self.distortion = np.bincount(token, weights=squares, **sums) / np.maximum(self.points, 1)
        shares = dictionary.counts / np.maximum(self.points[token], 1)
        logs = shares * np.log(np.where(shares > 0, shares, 1))
        self.ambiguity = np.where(self.senses > 0, np.exp(-np.bincount(token, weights=logs, **sums)), 0)

    def overview(self) -> Overview:
        """Return the dictionary in numbers."""
        d = self._dictionary
        arrays = Arrays(d.offsets, d.counts, d.rms_distance, d.token_counts)
        return Overview(
            config=d.config,
            tokens=int(np.count_nonzero(self.senses)),
            senses=len(d),
            occurrences=int(d.token_counts.sum()),
            distortion=corpus_distortion(arrays),
            histogram=_histogram(self.senses),
        )

    def ranked(self, by: str, limit: int = 50, first: int = 0) -> list[TokenRow]:
        """Return tokens with senses in decreasing order of one of `RANKINGS`, from place `first`.

        Raises:
            InputError: the ranking is unknown, or the dictionary has a damaged tokenizer.
        """
        if by not in RANKINGS:
            raise InputError(f"no ranking {by!r}: use one of {', '.join(RANKINGS)}")
        values = np.where(self.senses > 0, RANKINGS[by](self), -1)
        order = np.argsort(-values, kind="stable")[: int(np.count_nonzero(self.senses))]
        return [self._row(token) for token in order[first : first + limit].tolist()]

    def _row(self, token: int) -> TokenRow:
        return TokenRow(
            token=token,
            text=text_of(self._dictionary, token),
            senses=int(self.senses[token]),
            occurrences=int(self._dictionary.token_counts[token]),
            ambiguity=float(self.ambiguity[token]),
            distortion=float(self.distortion[token]),
        )

    def _by_ambiguity(self) -> NDArray[np.float64]:
        return np.where(self.points >= min(_LEAST_POINTS, self.points.max(initial=0)), self.ambiguity, 0)

    def _by_count(self) -> NDArray[np.int64]:
        return self._dictionary.token_counts

    def _by_distortion(self) -> NDArray[np.float64]:
        return self.distortion


RANKINGS: dict[str, Callable[[TokenStatistics], NDArray[np.float64] | NDArray[np.int64]]] = {
    "ambiguity": TokenStatistics._by_ambiguity,
    "count": TokenStatistics._by_count,
    "distortion": TokenStatistics._by_distortion,
}


def _histogram(senses: NDArray[np.int64]) -> tuple[Bar, ...]:
    """Return the tokens with 1, 2, 3 to 4, 5 to 8, ... senses."""
    bars, first = [], 1
    while first <= senses.max(initial=0):
        last = 1 if first == 1 else 2 * (first - 1)
        bars.append(Bar(first, last, int(np.count_nonzero((senses >= first) & (senses <= last)))))
        first = last + 1
    return tuple(bars)
