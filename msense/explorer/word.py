"""The page of a word: its tokens, their senses with examples, groups of near-identical senses, a map, and neighbours."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msense.dictionary import SenseDictionary
from msense.dictionary.contexts import Exemplar
from msense.dictionary.neighbours import Neighbour
from msense.errors import InputError

DEFAULT_LEVEL = 0.3
MOST_GROUPED = 2_000  # senses of a token; more are not grouped, as the distances of all pairs are compared

_SENSES_PER_TOKEN = 20  # neighbours that are searched for each token that is shown


@dataclass(frozen=True)
class SenseView:
    """A sense of a token."""

    token: int
    sense: int
    count: int  # points clustered into it
    share: float  # of the token's points
    rms_distance: float
    group: int  # number of its group of near-identical senses, 0 for that of the largest sense
    x: float  # place on the map, in the unit square; the axes have no meaning
    y: float
    examples: tuple[Exemplar, ...]  # nearest first


@dataclass(frozen=True)
class TokenView:
    """A token with its senses, largest first."""

    token: int
    text: str
    occurrences: int  # in the whole corpus
    senses: tuple[SenseView, ...]

    @property
    def groups(self) -> tuple[tuple[SenseView, ...], ...]:
        """The senses by group, both largest first."""
        numbers = dict.fromkeys(sense.group for sense in self.senses)
        return tuple(tuple(sense for sense in self.senses if sense.group == number) for number in numbers)


@dataclass(frozen=True)
class WordPage:
    """A word and its tokens: its spellings, or the parts of a word of several tokens."""

    word: str
    tokens: tuple[TokenView, ...]
    explanation: str  # why there is no token; empty if there is one
    in_parts: bool  # whether the tokens are parts of the word


@dataclass(frozen=True)
class NeighbourView:
    """A sense of another token that is near to one."""

    token: int
    text: str
    sense: int
    similarity: float


def word_page(dictionary: SenseDictionary, word: str, *, level: float = DEFAULT_LEVEL, examples: int = 3) -> WordPage:
    """Return the page of a word; `level` as in `token_view`.

    Raises:
        InputError: the dictionary has no tokenizer, or the level is invalid.
        DictionaryError: it is damaged.
    """
    match = dictionary.lookup(word)
    tokens = [token.token_id for token in match.tokens if token.senses]
    in_parts = not match.tokens
    if in_parts:
        own = dict.fromkeys(dictionary.pieces(word))
        tokens = [token for token in own if dictionary.offsets[token + 1] > dictionary.offsets[token]]
    views = tuple(token_view(dictionary, token, level=level, examples=examples) for token in tokens)
    return WordPage(word, views, "" if views else match.explain(), in_parts and bool(views))


def token_view(
    dictionary: SenseDictionary, token: int, *, level: float = DEFAULT_LEVEL, examples: int = 3
) -> TokenView:
    """Return a token with its senses.

    Args:
        dictionary: of any size; the centroids and examples of this token are read.
        token: its id.
        level: senses are one group if average linkage joins them below this share, 0 to 1, of the last joint's height;
            0: every sense is a group of its own.
        examples: maximum per sense.

    Raises:
        InputError: the token or level is invalid.
        DictionaryError: a sense or the file of examples is damaged.
    """
    if not 0 <= level <= 1:
        raise InputError(f"level is {level}, but must be between 0 and 1")
    own = dictionary.senses(token)
    centroids = own.centroids.cpu().double().numpy()
    order = np.argsort(-own.counts, kind="stable")
    groups, places = _groups(centroids[order], level), _map(centroids[order])
    contexts = _examples(dictionary, token, examples)
    total = max(1, int(own.counts.sum()))
    senses = tuple(
        SenseView(
            token=token,
            sense=sense,
            count=int(own.counts[sense]),
            share=int(own.counts[sense]) / total,
            rms_distance=float(own.rms_distance[sense]),
            group=group,
            x=x,
            y=y,
            examples=tuple(contexts.get(sense, ())),
        )
        for sense, group, (x, y) in zip(order.tolist(), groups, places.tolist(), strict=True)
    )
    return TokenView(token, text_of(dictionary, token), int(dictionary.token_counts[token]), senses)


def neighbour_views(dictionary: SenseDictionary, token: int, sense: int, top: int = 10) -> list[NeighbourView]:
    """Return the nearest sense of each of the nearest other tokens; errors as of `SenseDictionary.neighbours`."""
    near: dict[int, Neighbour] = {}
    for n in dictionary.neighbours(token, sense, _SENSES_PER_TOKEN * top):
        near.setdefault(n.token, n)
    return [NeighbourView(t, text_of(dictionary, t), n.sense, n.similarity) for t, n in near.items()][:top]


def text_of(dictionary: SenseDictionary, token: int) -> str:
    """Return the text of a token, or its id if the dictionary has no tokenizer."""
    return dictionary.token_texts[token] if dictionary.tokenizer_file else f"token {token}"


def _examples(dictionary: SenseDictionary, token: int, most: int) -> dict[int, list[Exemplar]]:
    """Return at most `most` examples of each sense of a token."""
    found: dict[int, list[Exemplar]] = {}
    for exemplar in dictionary.exemplars(token) if most else ():
        own = found.setdefault(exemplar.sense, [])
        if len(own) < most:
            own.append(exemplar)
    return found


def _groups(centroids: NDArray[np.float64], level: float) -> list[int]:
    """Return the group of each sense, numbered by its first; see `token_view`."""
    if not level or not 2 <= len(centroids) <= MOST_GROUPED:
        return list(range(len(centroids)))
    from scipy.cluster.hierarchy import fcluster, linkage

    tree = linkage(centroids, "average")
    labels = fcluster(tree, level * tree[-1, 2], "distance").tolist()
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return [numbers[label] for label in labels]


def _map(centroids: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the places [K, 2] of senses in the unit square: classical scaling, that is, the first two components."""
    centred = centroids - centroids.mean(0, keepdims=True) if len(centroids) else centroids
    values, vectors = np.linalg.eigh(centred @ centred.T)
    places = np.zeros((len(centroids), 2))
    own = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0))
    places[:, : own.shape[1]] = own * np.where(own.sum(0) < 0, -1, 1)  # the signs of eigenvectors are arbitrary
    low, high = (end(places, 0, initial=0) for end in (np.min, np.max))
    extent = (high - low).max()
    return (places - (low + high) / 2) / extent + 0.5 if extent > 0 else places + 0.5
