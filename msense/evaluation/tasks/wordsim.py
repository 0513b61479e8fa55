"""Word similarity: Spearman correlation of human scores with cosines between the senses of two words.

A folder holds sets, `*.txt` with lines `word word score`. Similarities: the best pair of senses, the mean over all pairs, one
mean embedding per word, and the model's vectors of the words as texts.
"""

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd

from msense.corpus import list_files
from msense.dictionary import SenseDictionary
from msense.dictionary.lookup import Vocabulary
from msense.errors import InputError
from msense.evaluation.models import Model
from msense.evaluation.result import Result
from msense.evaluation.search import unit
from msense.evaluation.tasks import read_lines
from msense.io.filesystems import display_uri
from msense.metrics import METRICS

MAX_SENSES = 512  # senses of a word of several tokens, each combining the most frequent senses of its tokens
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


LookUp = Callable[[str], Word | None]


def measure(model: Model, source: str) -> Result:
    """Correlate set by set; the score is the mean over sets, weighted by their number of pairs.

    Without a dictionary, only vectors of the words as texts are compared.

    Raises:
        InputError: a set is missing or invalid, or no pair is in the dictionary.
    """
    sets = read_sets(source)
    dictionary: SenseDictionary | None = getattr(model, "dictionary", None)
    look_up = None if dictionary is None else _lookup_of(dictionary)
    names = words(sets)
    vectors = dict(zip(names, unit(model.encode([name.replace("_", " ") for name in names])), strict=True))
    rows = [
        {"set": name, "gold": pair.score, **_similarities(pair, vectors, look_up)}
        for name, pairs in sets.items()
        for pair in pairs
    ]
    main, *others = [TEXT] if dictionary is None else [BEST, MEAN, ONE, TEXT]
    known = pd.DataFrame(rows).dropna(subset=[main])
    if known.empty:
        raise InputError(
            f"{display_uri(source)}: the dictionary contains no pair of these words: build it from more text"
        )
    by_set = [known[known["set"] == name] for name in sets]
    counts = [float(len(own)) for own in by_set]

    def correlations(similarity: str) -> list[float]:
        return [METRICS["Spearman"](own[similarity].to_numpy(), own["gold"].to_numpy()) for own in by_set]

    more: dict[str, int | float] = {name: float(np.average(correlations(name), weights=counts)) for name in others}
    more |= {"pairs": len(rows), "missing": len(rows) - len(known)}
    return Result(f"Spearman, {main}", "sets", correlations(main), counts, list(sets), more=more)


def _similarities(pair: Pair, vectors: dict[str, np.ndarray], look_up: LookUp | None) -> dict[str, float]:
    """Return the similarities of a pair; NaN for words that are not in the dictionary."""
    as_texts = {TEXT: float(vectors[pair.first] @ vectors[pair.second])}
    if look_up is None:
        return as_texts
    a, b = look_up(pair.first), look_up(pair.second)
    if a is None or b is None:
        return {BEST: math.nan, MEAN: math.nan, ONE: math.nan, **as_texts}
    products = a.senses @ b.senses.T
    return {BEST: float(products.max()), MEAN: float(products.mean()), ONE: float(a.mean @ b.mean), **as_texts}


def words(sets: dict[str, list[Pair]]) -> list[str]:
    """Return the words of all sets, sorted."""
    return sorted({word for pairs in sets.values() for pair in pairs for word in pair[:2]})


def read_sets(source: str) -> dict[str, list[Pair]]:
    """Read the sets of a folder by name; InputError if there is none, or a line is invalid."""
    sets = {}
    for file in list_files((source,)):
        if file.format == "txt":
            lines = enumerate(read_lines(file.uri), 1)
            name = file.name.rpartition("/")[2].removesuffix(".txt")
            sets[name] = [_pair(file.uri, number, line) for number, line in lines if line.strip()]
    if not any(sets.values()):
        raise InputError(
            f"{display_uri(source)} contains no *.txt with pairs: put word similarity sets there, lines of word word score"
        )
    return sets


def _pair(uri: str, number: int, line: str) -> Pair:
    try:
        first, second, score = line.split()[:3]
        if not math.isfinite(float(score)):
            raise ValueError(f"{score} is not finite")
    except ValueError as error:
        raise InputError(
            f"{display_uri(uri)}, line {number}: {line[:80]!r} is not `word word score`: correct or remove it"
        ) from error
    return Pair(first, second, float(score))


def _lookup_of(dictionary: SenseDictionary) -> LookUp:
    """Return a cached lookup of words."""
    if dictionary.tokenizer_file is None:
        raise InputError("this dictionary has no tokenizer to look words up with: build one from a teacher")
    config = dictionary.config
    vocabulary = Vocabulary(dictionary.tokenizer_file, config.vocab_size, config.tokenizer_fingerprint)

    @cache
    def look_up(word: str) -> Word | None:
        text = word.replace("_", " ")
        match = dictionary.lookup(text)
        if match.found:  # a token: the senses of all its spellings
            parts = [dictionary.senses(token.token_id) for token in match.tokens if token.senses]
            senses = np.concatenate([np.asarray(part.centroids, np.float32) for part in parts])
            counts = np.concatenate([part.counts for part in parts])
            return Word(unit(senses), unit(counts @ senses))
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
        return Word(unit(senses), unit(np.mean(means, axis=0)))

    return look_up
