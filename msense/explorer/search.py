"""Search as you type over the tokens of a dictionary."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, islice

import numpy as np

from msense.dictionary import SenseDictionary

LONGEST_QUERY = 200  # characters


@dataclass(frozen=True)
class Hit:
    """A word that was found."""

    text: str
    tokens: tuple[int, ...]  # several for a word that is not a token itself
    senses: int  # of all its tokens
    occurrences: int  # in the corpus; of a word of several tokens, those of its rarest token


class TokenSearch:
    """The texts of all tokens with senses, in one string, the most frequent first: a scan stops at the last hit needed.

    Example:
        >>> [hit.text for hit in TokenSearch(dictionary).find("ban", limit=3)]
        ['bank', 'band', 'urban']
    """

    def __init__(self, dictionary: SenseDictionary) -> None:
        """Raise InputError if the dictionary has no tokenizer, DictionaryError if that is damaged."""
        self._dictionary = dictionary
        self._sizes = np.diff(dictionary.offsets)
        known = np.flatnonzero(self._sizes)
        self._order = known[np.argsort(-dictionary.token_counts[known], kind="stable")].tolist()
        texts = [_searched(dictionary.token_texts[token]) for token in self._order]
        self._text = "\n" + "".join(f"{text}\n" for text in texts)
        self._starts = list(accumulate((len(text) + 1 for text in texts), initial=1))

    def find(self, query: str, limit: int = 20) -> list[Hit]:
        """Return words for a query, at most `limit`: itself, those that start with it, then those that contain it.

        Upper and lower case are one. A query that is no token but a word of several is found as such.
        """
        wanted = _searched(query.strip()[:LONGEST_QUERY])
        if not wanted:
            return []
        places = chain(self._places(f"\n{wanted}\n"), self._places(f"\n{wanted}"), self._places(wanted))
        tokens = islice(dict.fromkeys(islice(places, 4 * limit)), limit)
        hits = [self._hit(self._dictionary.token_texts[token], (token,)) for token in tokens]
        if not any(_searched(hit.text) == wanted for hit in hits):
            hits = [*self._several(query.strip()[:LONGEST_QUERY]), *hits][:limit]
        return hits

    def _places(self, wanted: str) -> Iterator[int]:
        """Yield the token of each line that contains a text."""
        place = self._text.find(wanted)
        while place >= 0:
            first = place + wanted.startswith("\n")
            line = bisect_right(self._starts, first) - 1
            yield self._order[line]
            place = self._text.find(wanted, self._starts[line + 1] - 1)

    def _several(self, word: str) -> list[Hit]:
        """Return a word of several tokens, if all are known."""
        tokens = tuple(self._dictionary.pieces(word))
        return [self._hit(word, tokens)] if len(tokens) > 1 and any(self._sizes[list(tokens)]) else []

    def _hit(self, text: str, tokens: tuple[int, ...]) -> Hit:
        own = list(tokens)
        return Hit(text, tokens, int(self._sizes[own].sum()), int(self._dictionary.token_counts[own].min()))


def _searched(text: str) -> str:
    """Return what is compared: one line in one case."""
    return text.casefold().replace("\n", " ")
