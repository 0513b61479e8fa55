"""Word similarity: how like two words are, told by their senses, held against what people say.

Comes in: a model with a dictionary, and a folder of sets, `*.txt` of lines `word word score`. Goes out: Spearman's correlation
of each set, by the best pair of senses, by the mean over all pairs, and by one mean embedding a word. Holds the senses of
the words of one pair.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats

from msense.corpus import list_files
from msense.corpus.files import display_uri, filesystem_of, reading
from msense.dictionary import SenseDictionary
from msense.dictionary.lookup import read_vocabulary
from msense.errors import BadInput
from msense.evaluation.models import Model
from msense.evaluation.result import Result

MOST = 512  # senses of a word of several tokens: means of one sense of each, of the most frequent ones
_LARGEST = 64 << 20  # bytes of a set
BEST, MEAN, ONE, TEXT = "best pair", "mean of pairs", "one embedding", "as texts"


class Pair(NamedTuple):
    """Two words and how like they are to people."""

    first: str
    second: str
    score: float


class Word(NamedTuple):
    """A word in the dictionary."""

    senses: np.ndarray  # float32 [K, D], of length 1
    mean: np.ndarray  # float32 [D], of length 1: of all its points


def measure(model: Model, source: str) -> Result:
    """Correlate, set by set; the score is the mean over sets, weighted by their pairs.

    Args:
        model: with a dictionary; one without is asked for vectors of the words as texts.
        source: folder of sets.

    Raises:
        BadInput: there is no set, or one is damaged.
    """
    sets = read_sets(source)
    dictionary: SenseDictionary | None = getattr(model, "dictionary", None)
    ways = {} if dictionary is None else _by_senses(dictionary)
    ways[TEXT] = _as_texts(model, sets)
    main = BEST if dictionary is not None else TEXT
    missing, total = 0, 0
    found: dict[str, list[float]] = {name: [] for name in ways}
    counts = []
    for pairs in sets.values():
        scores = {name: np.array([way(pair) for pair in pairs]) for name, way in ways.items()}
        known = np.isfinite(scores[main])
        missing, total = missing + int((~known).sum()), total + len(pairs)
        gold = np.array([pair.score for pair in pairs])
        for name, own in scores.items():
            found[name].append(_spearman(own[known], gold[known]))
        counts.append(float(known.sum()))
    if not sum(counts):
        raise BadInput(f"{display_uri(source)}: the dictionary knows none of these words: make one of more text")
    more = {name: float(np.average(values, weights=counts)) for name, values in found.items() if name != main}
    more |= {"pairs": total, "missing": missing}
    return Result(f"Spearman, {main}", "sets", found[main], counts, list(sets), more=more)


def read_sets(source: str) -> dict[str, list[Pair]]:
    """Read the sets of a folder, by name.

    Raises:
        BadInput: there is none, or a line is no pair of words and a score.
    """
    sets = {}
    for file in list_files((source,)):
        if file.format != "txt":
            continue
        if file.size > _LARGEST:
            raise BadInput(f"{display_uri(file.uri)} has {file.size} bytes, of a set at most {_LARGEST} are read")
        with reading(file.uri, file.format):
            filesystem, path = filesystem_of(file.uri)
            with filesystem.open(path, "rb") as opened:
                lines = opened.read().decode("utf-8-sig", "replace").split("\n")
        sets[file.name.rpartition("/")[2].removesuffix(".txt")] = [
            _pair(file.uri, number, line) for number, line in enumerate(lines, 1) if line.strip()
        ]
    if not sets:
        raise BadInput(
            f"{display_uri(source)} holds no *.txt: put the sets of word similarity there, a line a pair: word word score"
        )
    return sets


def _pair(uri: str, number: int, line: str) -> Pair:
    words = line.split()
    try:
        first, second, score = words[0], words[1], float(words[2])
        if not math.isfinite(score):
            raise ValueError(f"{score} is no score")
    except (IndexError, ValueError) as error:
        raise BadInput(
            f"{display_uri(uri)}, line {number}: {line[:80]!r} is not `word word score`: mend or remove it"
        ) from error
    return Pair(first, second, score)


def _spearman(found: np.ndarray, gold: np.ndarray) -> float:
    """Correlate ranks; 0 where there is nothing to rank."""
    if len(gold) < 2 or not np.ptp(found) or not np.ptp(gold):
        return 0.0
    return float(stats.spearmanr(found, gold).statistic)


def _by_senses(dictionary: SenseDictionary) -> dict[str, Callable[[Pair], float]]:
    """Return the ways to compare words by their senses; NaN for words that the dictionary lacks."""
    look = _Words(dictionary)

    def compared(by: Callable[[Word, Word], np.ndarray]) -> Callable[[Pair], float]:
        def way(pair: Pair) -> float:
            words = look(pair.first), look(pair.second)
            return float("nan") if words[0] is None or words[1] is None else float(by(words[0], words[1]))

        return way

    return {
        BEST: compared(lambda a, b: (a.senses @ b.senses.T).max()),
        MEAN: compared(lambda a, b: (a.senses @ b.senses.T).mean()),
        ONE: compared(lambda a, b: a.mean @ b.mean),
    }


class _Words:
    """Looks words up, and keeps the last ones."""

    def __init__(self, dictionary: SenseDictionary) -> None:
        if dictionary.tokenizer_file is None:
            raise BadInput("this dictionary has no tokenizer to look words up with: build one from a teacher")
        self._dictionary = dictionary
        config = dictionary.config
        self._vocabulary = read_vocabulary(dictionary.tokenizer_file, config.vocab_size, config.tokenizer_fingerprint)
        self._cached = lru_cache(4096)(self._look)

    def __call__(self, word: str) -> Word | None:
        return self._cached(word)

    def _look(self, word: str) -> Word | None:
        """Return a word: a token's senses under all its spellings; of several tokens, means of a sense of each."""
        text = word.replace("_", " ")
        match = self._dictionary.find(text)
        if match.found:
            ids = [token.token_id for token in match.tokens if token.senses]
            parts = [self._dictionary.senses(i) for i in ids]
            senses = np.concatenate([np.asarray(part.centroids, np.float32) for part in parts])
            counts = np.concatenate([part.counts for part in parts])
            return Word(_unit(senses), _unit(counts @ senses))
        pieces = [self._dictionary.senses(i) for i in self._vocabulary.pieces(text)]
        if not pieces or any(not len(piece.counts) for piece in pieces):
            return None
        width = max(1, int(MOST ** (1 / len(pieces)) + 1e-9))
        rows = [np.argsort(-piece.counts, kind="stable")[:width] for piece in pieces]
        own = [np.asarray(piece.centroids, np.float32) for piece in pieces]
        choices = np.array(list(itertools.product(*rows)))
        senses = sum(part[choices[:, i]] for i, part in enumerate(own)) / len(own)
        means = [piece.counts @ part / piece.counts.sum() for piece, part in zip(pieces, own, strict=True)]
        return Word(_unit(np.asarray(senses)), _unit(np.mean(means, axis=0)))


def _as_texts(model: Model, sets: dict[str, list[Pair]]) -> Callable[[Pair], float]:
    """Return a way to compare words by their vectors as texts of one word."""
    words: Sequence[str] = sorted({word for pairs in sets.values() for pair in pairs for word in pair[:2]})
    vectors = _unit(model.encode([word.replace("_", " ") for word in words]))
    place = {word: number for number, word in enumerate(words)}
    return lambda pair: float(vectors[place[pair.first]] @ vectors[place[pair.second]])


def _unit(rows: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(norm > 0, norm, 1), np.float32)
