"""The page of a sentence: its tokens, how sure the sense of each is, and the senses that it may have."""

from dataclasses import dataclass

from msense.dictionary.contexts import Exemplar
from msense.student.encoder import SenseEncoder
from msense.student.token_senses import TokenSense

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


def sentence_spans(encoder: SenseEncoder, text: str, *, examples: int = 2) -> list[Span]:
    """Return the parts of a text in their order; together they are the text, of which the student may have read only a part.

    Raises:
        InputError: the text is invalid, or the student has no senses.
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


def _choices(encoder: SenseEncoder, token: TokenSense, examples: int) -> tuple[Choice, ...]:
    """Return the likely senses of a token with their nearest examples."""
    contexts: dict[int, list[Exemplar]] = {sense: [] for sense, _ in token.likely}
    for exemplar in encoder.dictionary.exemplars(token.token_id) if contexts else ():
        if len(own := contexts.get(exemplar.sense, [])) < examples:
            own.append(exemplar)
    return tuple(Choice(sense, probability, tuple(contexts[sense])) for sense, probability in token.likely)
