"""The page of a sentence: its tokens, how sure the sense of each is, and the senses that it may have."""

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import torch

from msense.dictionary import SenseDictionary
from msense.dictionary.contexts import Exemplar
from msense.errors import InputError
from msense.student.config import dictionary_mismatch
from msense.student.token_senses import TokenSense, kept_tokens, token_senses
from msense.student.tokenizer import check_text

if TYPE_CHECKING:
    from msense.evaluation.models import TeacherModel

_SHOWN, _LEAST = 3, 0.01  # senses of a token that are shown however unlikely, and the probability of any other
LEVELS = 4  # steps of certainty that a page distinguishes


@dataclass(frozen=True)
class Choice:
    """A sense that a token may have."""

    sense: int
    probability: float
    examples: tuple[Exemplar, ...]


@dataclass(frozen=True)
class Span:
    """A part of the text: a token, or what stands between tokens."""

    text: str
    token: TokenSense | None = None
    choices: tuple[Choice, ...] = ()

    @property
    def level(self) -> int:
        """Certainty, 1 to `LEVELS` (every sense is as likely as not to it is almost sure); 0 without senses."""
        if self.token is None or not self.choices:
            return 0
        return min(LEVELS, 1 + int(self.token.probability * LEVELS))


class Reader(Protocol):
    """What reads a text in senses: a student, or the teacher itself."""

    @property
    def dictionary(self) -> SenseDictionary:
        """The senses."""

    def tokens(self, text: str) -> list[TokenSense]:
        """Return the tokens of a text with their senses."""


class TeacherReader:
    """The teacher of a dictionary, which is loaded with the first text: seconds, and the memory of its weights."""

    def __init__(self, dictionary: SenseDictionary, teacher: str, revision: str | None = None) -> None:
        """Use a teacher by its folder or hub name."""
        self.dictionary, self._teacher, self._revision = dictionary, teacher, revision
        self._model: TeacherModel | None = None
        self._lock = Lock()

    def tokens(self, text: str) -> list[TokenSense]:
        """Return the tokens of a text, truncated to the dictionary's longest passage, with their senses.

        Raises:
            InputError: the text is invalid, or the teacher is missing or not the dictionary's.
        """
        check_text("the text", text)
        with self._lock:  # the model reads one text at a time
            self._model = model = self._model or self._loaded()
            embeddings = torch.from_numpy(model.read([text]).senses)
        encoding = model.tokenizer.encode(model.prompt + text)
        kept = kept_tokens(encoding, model.prompt)
        return token_senses(self.dictionary, encoding, kept, embeddings[kept], model.prompt)

    def _loaded(self) -> "TeacherModel":
        from msense.evaluation.models import TeacherModel
        from msense.evaluation.spec import Spec

        spec = Spec("the teacher", "teacher", teacher=self._teacher, revision=self._revision)
        model = TeacherModel(spec, "cpu", torch.get_num_threads(), like=self.dictionary)
        own = model.info
        values = (own.tokenizer_fingerprint, own.fingerprint, own.dim, own.vocab_size)
        if mismatch := dictionary_mismatch(self.dictionary.config, *values):
            raise InputError(
                f"teacher {own.name!r} is not the dictionary's, which has {mismatch}: name it by --teacher"
            )
        return model


def sentence_spans(encoder: Reader, text: str, *, examples: int = 2) -> list[Span]:
    """Return the parts of a text in their order; together they are the text, of which only a part may have been read.

    Raises:
        InputError: the text is invalid, or the reader has no senses.
        DictionaryError: its dictionary is damaged.
    """
    spans: list[Span] = []
    end = 0
    for token in encoder.tokens(text):
        if token.end <= end:  # one of several tokens of a character: the first stands for all
            continue
        start = max(token.start, end)
        if start > end:
            spans.append(Span(text[end:start]))
        spans.append(Span(text[start : token.end], token, _choices(encoder, token, examples)))
        end = token.end
    return spans + ([Span(text[end:])] if end < len(text) else [])


def _choices(encoder: Reader, token: TokenSense, examples: int) -> tuple[Choice, ...]:
    """Return the likely senses of a token, at least `_SHOWN` of them, with their nearest examples."""
    likely = [own for place, own in enumerate(token.likely) if place < _SHOWN or own[1] >= _LEAST]
    contexts: dict[int, list[Exemplar]] = {sense: [] for sense, _ in likely}
    for exemplar in encoder.dictionary.exemplars(token.token_id) if contexts else ():
        if len(own := contexts.get(exemplar.sense, [])) < examples:
            own.append(exemplar)
    return tuple(Choice(sense, probability, tuple(contexts[sense])) for sense, probability in likely)
