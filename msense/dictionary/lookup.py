"""Look-up of words in the vocabulary of a dictionary, with an untrusted tokenizer.json."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from msense.errors import DictionaryError, is_panic
from msense.io.untrusted import printable
from msense.tokenizer import fingerprint as fingerprint_of

_BYTES, _BYTES_A_TOKEN, _MAX_BYTES = 1 << 20, 512, 64 << 20  # of tokenizer.json; the longest known has 130 per token
_MAX_BRACKETS = 1 << 21  # parsing takes about a hundred bytes per bracket
_MAX_LETTERS, _MAX_SEARCHES, _MAX_CHARSMAP = 10**8, 16, 1 << 20
_GROWTH = {"ByteLevel": 2, "NFD": 3, "NFC": 3, "NFKD": 18, "NFKC": 18, "Precompiled": 18, "Lowercase": 2}
_MAX_DECODER_GROWTH = 4.0
_REMEDY = "copy or build the dictionary again"
_WORD_STARTS = ("", "Ġ", "▁")  # byte-level and SentencePiece prefixes of a token after a space


class TokenMatch(NamedTuple):
    """A vocabulary entry for a word and its number of senses."""

    token_id: int
    token: str
    senses: int


@dataclass(frozen=True)
class Match:
    """Result of looking up a word.

    Example:
        >>> print(dictionary.lookup("bank").explain())
        'bank' is in the dictionary as 'bank' (id 2, 3 senses).
    """

    word: str  # as requested
    tokens: list[TokenMatch]  # plain, after a space, and with the other case of the first letter
    pieces: list[str]  # if there is none, the subword tokens of the word; empty for an unknown word

    @property
    def found(self) -> bool:
        """Whether any token of the word has senses."""
        return any(token.senses for token in self.tokens)

    def explain(self) -> str:
        """Return a sentence that describes the result or why there is none."""
        if self.found:
            listed = ", ".join(f"{t.token!r} (id {t.token_id}, {t.senses} senses)" for t in self.tokens if t.senses)
            return f"{self.word!r} is in the dictionary as {listed}."
        if self.tokens:
            listed = ", ".join(f"{t.token!r} (id {t.token_id})" for t in self.tokens)
            reason = "it does not occur in the corpus, or is excluded as a special token"
            return f"{self.word!r} is in the vocabulary as {listed}, but has no senses: {reason}."
        if self.pieces:
            split = f"the tokenizer splits it into {len(self.pieces)} tokens ({' '.join(self.pieces)})"
            return f"{self.word!r} is not a single token: {split}; look up one of these or another word."
        return f"{self.word!r} is unknown to the tokenizer: look up another word or spelling."


class Vocabulary:
    """The teacher's tokenizer, without truncation and padding, used to look up words."""

    def __init__(self, path: Path, vocab_size: int, fingerprint: str) -> None:
        """Load a tokenizer.json; raise DictionaryError if it is too large, invalid, or not of a (non-empty) fingerprint."""
        with tokenizer_errors("is not a tokenizer"):
            size, limit = path.stat().st_size, min(_BYTES + _BYTES_A_TOKEN * vocab_size, _MAX_BYTES)
            if size > limit:
                raise ValueError(f"it has {size} bytes, but the limit for {vocab_size} tokens is {limit}")
            tokenizer_json = path.read_bytes()
            if (brackets := tokenizer_json.count(b"[") + tokenizer_json.count(b"{")) > _MAX_BRACKETS:
                raise ValueError(f"it has {brackets} brackets, over the limit of {_MAX_BRACKETS}")
            definition = json.loads(tokenizer_json)
            model = definition["model"]
        self._decoder_growth = _decoder_growth(definition.get("decoder"))
        _check_steps(definition)  # before loading: the library normalizes added tokens on loading
        with tokenizer_errors("is not a tokenizer"):
            self.tokenizer = Tokenizer.from_buffer(tokenizer_json)
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            unknown = model.get("unk_id")
            name = model.get("unk_token") if unknown is None else model["vocab"][unknown][0]
            self._unknown = self.tokenizer.token_to_id(name) if isinstance(name, str) else None
        # another version of the library may serialize the same tokenizer differently
        if fingerprint and fingerprint_of(definition) != fingerprint != (own := fingerprint_of(self.tokenizer)):
            difference = f"its fingerprint is {own}, not {fingerprint!r} as in config.json"
            raise DictionaryError(f"tokenizer.json is not the dictionary's tokenizer: {difference}; {_REMEDY}")

    def lookup(self, word: str, sizes: np.ndarray) -> Match:
        """Return the vocabulary entries for a word in any case; `sizes` int64 [V] are the numbers of senses."""
        word = word.strip()
        if not word:
            return Match(word, [], [])
        first, rest = word[0], word[1:]
        spellings = list(dict.fromkeys((word, first.lower() + rest, first.upper() + rest)))
        ids = [self.tokenizer.token_to_id(start + spelling) for spelling in spellings for start in _WORD_STARTS]
        splits = [self._split(space + spelling) for spelling in spellings for space in ("", " ")]
        ids += [split[0][0] for split in splits if len(split) == 1]
        tokens = [
            TokenMatch(i, self.tokenizer.id_to_token(i) or "", int(sizes[i]) if i < len(sizes) else 0)
            for i in dict.fromkeys(ids)
            if i is not None
        ]
        pieces = [] if tokens else [token for _, token in min(splits[:2], key=len)]
        return Match(word, tokens, pieces)

    def pieces(self, word: str) -> list[int]:
        """Return the token ids of a word, with or without a preceding space; none if any is unknown."""
        splits = [split for split in (self._split(space + word) for space in ("", " ")) if split]
        return [token for token, _ in min(splits, key=len, default=[])]

    def texts(self, vocab_size: int) -> list[str]:
        """Return the text of each token id below `vocab_size`, without spaces around it; the token itself if it has none.

        Raises:
            DictionaryError: the tokenizer's decoder fails, or may make tokens far longer.
        """
        if self._decoder_growth > _MAX_DECODER_GROWTH:
            excess = f"has a decoder that may make tokens {self._decoder_growth:.3g} times longer"
            raise DictionaryError(f"tokenizer.json {excess}, more than any known tokenizer: {_REMEDY}")
        with tokenizer_errors("cannot decode its tokens"):
            texts = self.tokenizer.decode_batch([[i] for i in range(vocab_size)], skip_special_tokens=False)
            return [text.strip() or self.tokenizer.id_to_token(i) or "" for i, text in enumerate(texts)]

    def _split(self, text: str) -> list[tuple[int, str]]:
        """Return (id, token) of each token of a text; none if any is unknown."""
        with tokenizer_errors(f"fails on {text!r}"):
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return [] if self._unknown in encoding.ids else list(zip(encoding.ids, encoding.tokens, strict=True))


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Raise DictionaryError for any exception caused by a hostile tokenizer.json, including panics."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error) and not isinstance(error, Exception):
            raise
        reason = f"{type(error).__name__}: {printable(error)}"
        raise DictionaryError(f"tokenizer.json {what} ({reason}): {_REMEDY}") from error


def _check_steps(definition: dict[str, Any]) -> None:
    """Raise DictionaryError if processing could expand a short text to gigabytes or match many patterns."""
    added = definition.get("added_tokens")
    letters = 1000 + (sum(len(str(token)) for token in added) if isinstance(added, list) else 0)
    growth, searches = 1.0, 0
    waiting: list[Any] = [definition.get("normalizer"), definition.get("pre_tokenizer")]
    while waiting and growth * letters <= _MAX_LETTERS and searches <= _MAX_SEARCHES:
        step = waiting.pop()
        if isinstance(step, list):
            waiting += step
        elif isinstance(step, dict):
            waiting += [step.get("normalizers"), step.get("pretokenizers")]
            pattern = step.get("pattern")
            searches += isinstance(pattern, dict) and "String" not in pattern
            growth *= _growth(step, pattern)
    if growth * letters > _MAX_LETTERS or searches > _MAX_SEARCHES:
        excess = f"may make texts {growth:.3g} times longer and matches {searches} patterns"
        raise DictionaryError(f"tokenizer.json {excess}, more than any known tokenizer: {_REMEDY}")


def _decoder_growth(decoder: object) -> float:
    """Return the factor by which a decoder may lengthen a token."""
    growth, waiting = 1.0, [decoder]
    while waiting:
        step = waiting.pop()
        if isinstance(step, list):
            waiting += step
        elif isinstance(step, dict):
            waiting.append(step.get("decoders"))
            growth *= _growth(step, step.get("pattern"))
    return growth


def _growth(step: dict[str, Any], pattern: object) -> float:
    """Return the factor by which a normalizer or pre-tokenizer may lengthen a text."""
    kind = str(step.get("type"))
    if kind == "Replace":
        content, plain = str(step.get("content")), pattern.get("String") if isinstance(pattern, dict) else pattern
        return max(1.0, len(content) / len(plain)) if plain and isinstance(plain, str) else 1.0 + len(content)
    if kind == "Prepend":
        return 1.0 + len(str(step.get("prepend")))
    if kind == "Precompiled" and len(str(step.get("precompiled_charsmap"))) > _MAX_CHARSMAP:
        return math.inf
    return _GROWTH.get(kind, 1)
