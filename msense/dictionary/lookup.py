"""From words to a dictionary's tokens, and from tokens to the example contexts of their senses.

Comes in: a word and the teacher's tokenizer; a token and exemplars.parquet. Goes out: a `Match` that can explain
itself; `Exemplar` rows. Holds the tokenizer, and of the exemplars the row groups that a token touches.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from msense.dictionary.format import DictionaryFiles
from msense.errors import DictionaryError

if TYPE_CHECKING:
    import pyarrow as pa

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


class Vocabulary:
    """The teacher's tokenizer, for look-ups only."""

    def __init__(self, tokenizer_json: bytes) -> None:
        """Read a tokenizer.

        Raises:
            DictionaryError: the text is not that of a tokenizer.json.
        """
        try:
            model = json.loads(tokenizer_json)["model"]
            unknown = model.get("unk_id")
            name = model.get("unk_token") if unknown is None else model["vocab"][unknown][0]
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            raise DictionaryError("tokenizer.json is not a tokenizer: copy or build the dictionary again") from error
        self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
        self._unknown = self._tokenizer.token_to_id(name) if isinstance(name, str) else None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def find(self, word: str, sizes: np.ndarray) -> Match:
        """Look a word up under the tokenizer's variants of it.

        Args:
            word: one word, any case.
            sizes: int64 [V], senses of each token.
        """
        word = word.strip()
        if not word:
            return Match(word, [], [])
        first, rest = word[0], word[1:]
        spellings = list(dict.fromkeys((word, first.lower() + rest, first.upper() + rest)))
        ids = [self._tokenizer.token_to_id(start + spelling) for spelling in spellings for start in _WORD_STARTS]
        cuts = [self._cut(space + spelling) for spelling in spellings for space in ("", " ")]
        ids += [cut[0][0] for cut in cuts if len(cut) == 1]
        tokens = [
            TokenMatch(i, self._tokenizer.id_to_token(i) or "", int(sizes[i]) if i < len(sizes) else 0)
            for i in dict.fromkeys(ids)
            if i is not None
        ]
        pieces = [] if tokens else [token for _, token in min(cuts[:2], key=len)]
        return Match(word, tokens, pieces)

    def _cut(self, text: str) -> list[tuple[int, str]]:
        """Return the tokens of a text; none if any of it is unknown."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [] if self._unknown in encoding.ids else list(zip(encoding.ids, encoding.tokens, strict=True))


class Exemplar(NamedTuple):
    """A context of a point near a sense; rank 0 is the nearest."""

    sense: int
    rank: int
    distance: float
    left: str
    word: str
    right: str
    document_id: str


def exemplar_schema() -> "pa.Schema":
    """Return the columns of exemplars.parquet."""
    import pyarrow as pa

    numbers = [("token", pa.int32()), ("sense", pa.int32()), ("rank", pa.int32()), ("distance", pa.float32())]
    return pa.schema(numbers + [(name, pa.string()) for name in ("left", "word", "right", "document_id")])


def read_exemplars(files: DictionaryFiles, token: int | None = None) -> "pa.Table":
    """Read the exemplars of a token, or all.

    Raises:
        DictionaryError: the file is truncated, has other columns or leads out of the folder.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = exemplar_schema()
    if not files.exemplars.exists():
        return schema.empty_table()
    path = files.inside(files.exemplars)
    try:
        if not pq.read_schema(path).equals(schema):
            raise DictionaryError(f"{path} does not have the columns of exemplars: it is a foreign file")
        return pq.read_table(path, filters=None if token is None else [("token", "=", token)])
    except (pa.ArrowException, OSError) as error:
        raise DictionaryError(f"{path} cannot be read ({error}): copy or build the dictionary again") from error
