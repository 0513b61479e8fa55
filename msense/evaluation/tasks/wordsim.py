"""Word similarity: Spearman correlation of human scores with cosines between the senses of two words.

A folder holds sets, `*.txt` with lines `word word score`. Similarities: the best pair of senses, the mean over all pairs, one
mean embedding per word, and the model's vectors of the words as texts.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats

from msense.corpus import list_files
from msense.corpus.files import corpus_filesystem, read_errors
from msense.dictionary import SenseDictionary
from msense.dictionary.lookup import read_vocabulary
from msense.errors import InputError
from msense.evaluation.models import Model
from msense.evaluation.result import Result
from msense.io.filesystems import display_uri

MAX_SENSES = 512  # senses of a word of several tokens, each combining the most frequent senses of its tokens
_MAX_BYTES = 64 << 20  # of a set
BEST, MEAN, ONE, TEXT = "best pair", "mean of pairs", "one embedding", "as texts"


class Pair(NamedTuple):
    """Two words and their similarity according to humans."""

    first: str
    second: str
    score: float


class Word(NamedTuple):
    """A word in the dictionary."""

    senses: np.ndarray  # float32 [K, D], unit length
    mean: np.ndarray  # float32 [D], unit length: of all its occurrences


def measure(model: Model, source: str) -> Result:
    """Correlate set by set; the score is the mean over sets, weighted by their number of pairs.

    Args:
        model: with a dictionary; without one, vectors of the words as texts are compared.
        source: folder of sets.

    Raises:
        InputError: a set is missing or invalid, or no pair is in the dictionary.
    """
    sets = read_sets(source)
    dictionary: SenseDictionary | None = getattr(model, "dictionary", None)
    similarities = {} if dictionary is None else _by_senses(dictionary)
    similarities[TEXT] = _as_texts(model, sets)
    main = BEST if dictionary is not None else TEXT
    correlations: dict[str, list[float]] = {name: [] for name in similarities}
    counts = []
    for pairs in sets.values():
        values = {name: np.array([similarity(pair) for pair in pairs]) for name, similarity in similarities.items()}
        known = np.isfinite(values[main])
        gold = np.array([pair.score for pair in pairs])
        for name, own in values.items():
            correlations[name].append(_spearman(own[known], gold[known]))
        counts.append(float(known.sum()))
    if not sum(counts):
        raise InputError(
            f"{display_uri(source)}: the dictionary contains no pair of these words: build it from more text"
        )
    more = {name: float(np.average(own, weights=counts)) for name, own in correlations.items() if name != main}
    total = sum(map(len, sets.values()))
    more |= {"pairs": total, "missing": total - int(sum(counts))}
    return Result(f"Spearman, {main}", "sets", correlations[main], counts, list(sets), more=more)


def read_sets(source: str) -> dict[str, list[Pair]]:
    """Read the sets of a folder by name; InputError if there is none, or a line is invalid."""
    sets = {}
    for file in list_files((source,)):
        if file.format != "txt":
            continue
        if file.size > _MAX_BYTES:
            raise InputError(
                f"{display_uri(file.uri)} has {file.size} bytes, but at most {_MAX_BYTES} are read: split it"
            )
        with read_errors(file.uri, file.format):
            filesystem, path = corpus_filesystem(file.uri)
            with filesystem.open(path, "rb") as opened:
                lines = opened.read().decode("utf-8-sig", "replace").split("\n")
        sets[file.name.rpartition("/")[2].removesuffix(".txt")] = [
            _pair(file.uri, number, line) for number, line in enumerate(lines, 1) if line.strip()
        ]
    if not sets:
        raise InputError(
            f"{display_uri(source)} contains no *.txt: put word similarity sets there, lines of word word score"
        )
    return sets


def _pair(uri: str, number: int, line: str) -> Pair:
    words = line.split()
    try:
        first, second, score = words[0], words[1], float(words[2])
        if not math.isfinite(score):
            raise ValueError(f"{score} is not finite")
    except (IndexError, ValueError) as error:
        raise InputError(
            f"{display_uri(uri)}, line {number}: {line[:80]!r} is not `word word score`: correct or remove it"
        ) from error
    return Pair(first, second, score)


def _spearman(found: np.ndarray, gold: np.ndarray) -> float:
    """Return the rank correlation; 0 if a side is constant."""
    if len(gold) < 2 or not np.ptp(found) or not np.ptp(gold):
        return 0.0
    return float(stats.spearmanr(found, gold).statistic)


def _by_senses(dictionary: SenseDictionary) -> dict[str, Callable[[Pair], float]]:
    """Return the similarities by senses; NaN for words that are not in the dictionary."""
    look_up = _lookup_of(dictionary)

    def compared(by: Callable[[Word, Word], np.ndarray]) -> Callable[[Pair], float]:
        def similarity(pair: Pair) -> float:
            first, second = look_up(pair.first), look_up(pair.second)
            return math.nan if first is None or second is None else float(by(first, second))

        return similarity

    return {
        BEST: compared(lambda a, b: (a.senses @ b.senses.T).max()),
        MEAN: compared(lambda a, b: (a.senses @ b.senses.T).mean()),
        ONE: compared(lambda a, b: a.mean @ b.mean),
    }


def _lookup_of(dictionary: SenseDictionary) -> Callable[[str], Word | None]:
    """Return a cached lookup of words."""
    if dictionary.tokenizer_file is None:
        raise InputError("this dictionary has no tokenizer to look words up with: build one from a teacher")
    config = dictionary.config
    vocabulary = read_vocabulary(dictionary.tokenizer_file, config.vocab_size, config.tokenizer_fingerprint)

    @lru_cache(4096)
    def look_up(word: str) -> Word | None:
        text = word.replace("_", " ")
        match = dictionary.lookup(text)
        if match.found:  # a token: the senses of all its spellings
            parts = [dictionary.senses(token.token_id) for token in match.tokens if token.senses]
            senses = np.concatenate([np.asarray(part.centroids, np.float32) for part in parts])
            counts = np.concatenate([part.counts for part in parts])
            return Word(_unit(senses), _unit(counts @ senses))
        tokens = [dictionary.senses(i) for i in vocabulary.pieces(text)]
        if not tokens or any(not len(token.counts) for token in tokens):
            return None
        # several tokens: means of one sense of each
        width = max(1, int(MAX_SENSES ** (1 / len(tokens)) + 1e-9))
        rows = [np.argsort(-token.counts, kind="stable")[:width] for token in tokens]
        own = [np.asarray(token.centroids, np.float32) for token in tokens]
        choices = np.array(list(itertools.product(*rows)))
        senses = np.asarray(sum(part[choices[:, i]] for i, part in enumerate(own)) / len(own))
        means = [token.counts @ part / token.counts.sum() for token, part in zip(tokens, own, strict=True)]
        return Word(_unit(senses), _unit(np.mean(means, axis=0)))

    return look_up


def _as_texts(model: Model, sets: dict[str, list[Pair]]) -> Callable[[Pair], float]:
    """Return the similarity of the vectors of two words, each encoded as a text."""
    words: Sequence[str] = sorted({word for pairs in sets.values() for pair in pairs for word in pair[:2]})
    vectors = _unit(model.encode([word.replace("_", " ") for word in words]))
    place = {word: number for number, word in enumerate(words)}
    return lambda pair: float(vectors[place[pair.first]] @ vectors[place[pair.second]])


def _unit(rows: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(norm > 0, norm, 1), np.float32)
