"""From words to a dictionary's tokens.

Comes in: a word and the teacher's tokenizer, which nobody vouches for. Goes out: a `Match` that can explain itself.
Holds the tokenizer.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from msense.artefact import shown
from msense.dictionary.contexts import exemplar_schema
from msense.errors import DictionaryError, is_panic

__all__ = ["Exemplar", "Match", "TokenMatch", "Vocabulary", "exemplar_schema", "read_vocabulary"]

_BYTES, _BYTES_A_TOKEN, _MAX_BYTES = 1 << 20, 512, 64 << 20  # of a tokenizer.json; the longest known has 130 a token
_MAX_BRACKETS = 1 << 21  # a reader makes about a hundred bytes of each
_MAX_LETTERS, _MAX_SEARCHES, _MAX_CHARSMAP = 10**8, 16, 1 << 20
_GROWTH = {"ByteLevel": 2, "NFD": 3, "NFC": 3, "NFKD": 18, "NFKC": 18, "Precompiled": 18, "Lowercase": 2}
_WORD_STARTS = ("", "Ġ", "▁")  # how byte-level and SentencePiece vocabularies write "after a space"


class TokenMatch(NamedTuple):
    """A token that spells a word."""

    token_id: int
    token: str
    senses: int


@dataclass(frozen=True)
class Match:
    """What a dictionary knows of a word.

    Attributes:
        word: as asked for.
        tokens: the vocabulary's entries for the word: plain, after a space, and with the other first letter.
        pieces: when there is no such token: what the tokenizer cuts the word into; empty for an unknown word.
    """

    word: str
    tokens: list[TokenMatch]
    pieces: list[str]

    @property
    def found(self) -> bool:
        """Whether any token of the word has senses."""
        return any(token.senses for token in self.tokens)

    def explain(self) -> str:
        """Say in one sentence what was found, or why nothing was."""
        if self.found:
            listed = ", ".join(f"{t.token!r} (id {t.token_id}, {t.senses} senses)" for t in self.tokens if t.senses)
            return f"{self.word!r} is in the dictionary as {listed}."
        if self.tokens:
            listed = ", ".join(f"{t.token!r} (id {t.token_id})" for t in self.tokens)
            return (
                f"{self.word!r} is in the vocabulary as {listed}, but the dictionary holds no senses for it: "
                "it did not occur in the corpus, or is excluded as a special token."
            )
        if self.pieces:
            return (
                f"{self.word!r} is no token of its own: the tokenizer cuts it into {len(self.pieces)} pieces "
                f"({' '.join(self.pieces)}), and senses are kept for tokens; look up a piece or another word."
            )
        return f"{self.word!r} is unknown to this tokenizer: look up another word or spelling."


def read_vocabulary(path: Path, vocab_size: int, fingerprint: str) -> "Vocabulary":
    """Read a tokenizer.json unless it is far larger than its vocabulary asks for.

    Raises:
        DictionaryError: the file is not that tokenizer.
    """
    limit = min(_BYTES + _BYTES_A_TOKEN * vocab_size, _MAX_BYTES)
    if (size := path.stat().st_size) > limit:
        raise DictionaryError(
            f"{path} has {size} bytes, for {vocab_size} tokens at most {limit} are read: "
            "copy or build the dictionary again"
        )
    return Vocabulary(path.read_bytes(), fingerprint)


class Vocabulary:
    """The teacher's tokenizer, for look-ups.

    Attributes:
        tokenizer: without truncation and padding.
    """

    def __init__(self, tokenizer_json: bytes, fingerprint: str = "") -> None:
        """Read a tokenizer.

        Args:
            tokenizer_json: its definition.
            fingerprint: that the dictionary's config states; empty = none.

        Raises:
            DictionaryError: the text is not that of a tokenizer.json, or of another tokenizer.
        """
        brackets = tokenizer_json.count(b"[") + tokenizer_json.count(b"{")
        if brackets > _MAX_BRACKETS:
            raise DictionaryError(
                f"tokenizer.json is not a tokenizer: it has {brackets} brackets, at most {_MAX_BRACKETS} are read; "
                "copy or build the dictionary again"
            )
        with refused("is not a tokenizer"):
            definition = json.loads(tokenizer_json)
            model = definition["model"]
        _check_steps(definition)  # first: the library normalises added tokens when it reads them
        with refused("is not a tokenizer"):
            self.tokenizer = Tokenizer.from_buffer(tokenizer_json)
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            unknown = model.get("unk_id")
            name = model.get("unk_token") if unknown is None else model["vocab"][unknown][0]
            self._unknown = self.tokenizer.token_to_id(name) if isinstance(name, str) else None
        if fingerprint and _fingerprint(definition) != fingerprint:
            # Another version of the library, or the teacher's own file, may write the same tokenizer in other words.
            from msense.tokens import fingerprint as of_tokenizer

            if (found := of_tokenizer(self.tokenizer)) != fingerprint:
                raise DictionaryError(
                    f"tokenizer.json is not the dictionary's tokenizer: its fingerprint is {found}, config.json states "
                    f"{fingerprint!r}; copy or build the dictionary again"
                )

    def find(self, word: str, sizes: np.ndarray) -> Match:
        """Look a word up under the tokenizer's variants of it.

        Args:
            word: one word, any case.
            sizes: int64 [V], senses of each token.

        Raises:
            DictionaryError: the tokenizer fails at the word.
        """
        word = word.strip()
        if not word:
            return Match(word, [], [])
        first, rest = word[0], word[1:]
        spellings = list(dict.fromkeys((word, first.lower() + rest, first.upper() + rest)))
        ids = [self.tokenizer.token_to_id(start + spelling) for spelling in spellings for start in _WORD_STARTS]
        cuts = [self._cut(space + spelling) for spelling in spellings for space in ("", " ")]
        ids += [cut[0][0] for cut in cuts if len(cut) == 1]
        tokens = [
            TokenMatch(i, self.tokenizer.id_to_token(i) or "", int(sizes[i]) if i < len(sizes) else 0)
            for i in dict.fromkeys(ids)
            if i is not None
        ]
        pieces = [] if tokens else [token for _, token in min(cuts[:2], key=len)]
        return Match(word, tokens, pieces)

    def pieces(self, word: str) -> list[int]:
        """Return the tokens of a word, as it stands alone or after another one, whichever are fewer; none if any is unknown.

        Raises:
            DictionaryError: the tokenizer fails at the word.
        """
        cuts = [cut for cut in (self._cut(space + word) for space in ("", " ")) if cut]
        return [token for token, _ in min(cuts, key=len, default=[])]

    def _cut(self, text: str) -> list[tuple[int, str]]:
        """Return the tokens of a text; none if any of it is unknown."""
        with refused(f"fails at {text!r}"):
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return [] if self._unknown in encoding.ids else list(zip(encoding.ids, encoding.tokens, strict=True))


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn whatever a hostile tokenizer.json brings about into one error, panics of the library among them."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error) and not isinstance(error, Exception):
            raise
        reason = f"{type(error).__name__}: {shown(error)}"
        raise DictionaryError(f"tokenizer.json {what} ({reason}): copy or build the dictionary again") from error


def _fingerprint(definition: dict[str, Any]) -> str:
    """Return what `msense.tokens.fingerprint` gives for the tokenizer that a file was written from."""
    bare = {**definition, "truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def _check_steps(definition: dict[str, Any]) -> None:
    """Refuse a tokenizer whose steps would make a few letters gigabytes, or search them without end."""
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
        raise DictionaryError(
            f"tokenizer.json makes texts {growth:.3g} times longer or searches them by {searches} patterns, more than any "
            "known tokenizer: copy or build the dictionary again"
        )


def _growth(step: dict[str, Any], pattern: object) -> float:
    """Return how many times longer a normalizer or pre-tokenizer may make a text."""
    kind = str(step.get("type"))
    if kind == "Replace":
        content, plain = str(step.get("content")), pattern.get("String") if isinstance(pattern, dict) else pattern
        return max(1.0, len(content) / len(plain)) if plain and isinstance(plain, str) else 1.0 + len(content)
    if kind == "Prepend":
        return 1.0 + len(str(step.get("prepend")))
    if kind == "Precompiled" and len(str(step.get("precompiled_charsmap"))) > _MAX_CHARSMAP:
        return math.inf
    return _GROWTH.get(kind, 1)


class Exemplar(NamedTuple):
    """A context of a point near a sense; rank 0 is the nearest."""

    sense: int
    rank: int
    distance: float
    left: str
    word: str
    right: str
    document_id: str
