"""Text for people (sizes, messages without control characters or secrets, excerpts) and for lexical search (its words)."""

import os
import re
import unicodedata
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise

import regex

_USER = re.compile(r"://[^\s/'\"<>]*@")
_QUERY = re.compile(r"(://[^\s?#'\"<>)]*)[?#][^\s'\"<>)]*")
_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|(?<=Bearer )[^\s'\"]{8,}|(?<=Signature=)[^\s'\"&]{8,}",
    re.ASCII,
)
_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL|_AUTH\b", re.IGNORECASE)
_MAX_MESSAGE = 1000  # characters of a library's message
_MIN_SECRET = 8  # characters; shorter values such as "true" and numbers are not secrets
_LETTER = r"[\p{L}\p{M}\p{N}]"
_SCRIPTS = (
    r"[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{Line_Break=SA}]"  # without spaces; SA: Thai, Lao, Khmer, ...
)
_UNSPACED = regex.compile(rf"[{_LETTER}&&{_SCRIPTS}]+", regex.V1)
_WORD = regex.compile(
    rf"[{_LETTER}&&{_SCRIPTS}]+|[{_LETTER}--{_SCRIPTS}]+|\p{{RI}}{{2}}|\p{{Extended_Pictographic}}", regex.V1
)
_ASCII_WORD = re.compile("[a-z0-9]+")
_BORDER = regex.compile(r"\b", regex.WORD | regex.V1)  # of Unicode's default words (UAX 29)
_EXCERPT = 120  # characters of an excerpt before, in, and after its word
_CHARACTER = regex.compile(r"\X")  # with its combining marks
_INVISIBLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}--\u200b]", regex.V1)  # not U+200B, which is a space
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")


def size(count: float) -> str:
    """Format a number of bytes with a decimal unit, such as "1.5 MB"."""
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if count < 1000:
            break
        count, unit = count / 1000, larger
    return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"


def clean(text: str) -> str:
    """Return text without escape sequences, control, format and other invisible characters; line breaks become spaces."""
    text = _ESCAPES.sub("", text)
    return "".join(
        " " if c in "\n\r\t" or (kind := unicodedata.category(c)) in ("Zl", "Zp") else "" if kind[0] == "C" else c
        for c in text
    )


def plain(text: str) -> str:
    """Return lines that are safe to print or log: cleaned and redacted."""
    return "\n".join(redact(clean(line)) for line in text.split("\n"))


def redact(text: str) -> str:
    """Return text without secrets.

    Removed are user, password, query and fragment of URIs, the values of environment variables with names of secrets, and
    what looks like a token of the Hub, of AWS, or of an HTTP header.
    """
    text = _QUERY.sub(r"\1", _USER.sub("://", text))
    for secret in _secrets():
        text = text.replace(secret, "***")
    return _TOKEN.sub("***", text)


def _secrets() -> list[str]:
    """Return the secrets in the environment, longest first, as one may contain another."""
    values = {value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= _MIN_SECRET}
    return sorted((value for value in values if value[0] != "/"), key=len, reverse=True)


def is_utf8(text: str) -> bool:
    """Return whether text can be encoded; file names with other bytes cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, redacted; with the error type where the message alone is unclear."""
    kind = f"{type(error).__name__}: " if isinstance(error, LookupError | TypeError | AttributeError) else ""
    lines = (str(error).strip() or "no reason given").splitlines()
    message = redact(kind + " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")]))
    return message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + "..."  # some quote whole values


def one_line(value: object) -> str:
    """Return text that fits a Markdown table cell: printable characters only, without pipes."""
    return "".join(c if c.isprintable() else " " for c in str(value)).replace("|", "/")


def words(text: str) -> list[str]:
    """Return the words of a text in any language, in lower case, for lexical search.

    A word is a run of letters, marks and digits, or an emoji. Runs of scripts that are written without spaces (Chinese, Japanese,
    Thai, Lao, Khmer, Burmese, ...) give their pairs of adjacent characters instead. Accents are kept.

    Example:
        >>> words("Die Straße, 東京都")
        ['die', 'strasse', '東京', '京都']
    """
    if text.isascii():  # the same, several times as fast
        return _ASCII_WORD.findall(text.lower())
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text))
    found: list[str] = _WORD.findall(unicodedata.normalize("NFKC", text.casefold()))
    return [part for word in found for part in _pairs(word)] if _UNSPACED.search(text) else found


def _pairs(word: str) -> list[str]:
    """Return the pairs of adjacent characters of a word without spaces, and any other word as it is."""
    characters = _CHARACTER.findall(word) if _UNSPACED.match(word) else []
    return [a + b for a, b in pairwise(characters)] or [word]


def word_borders(text: str) -> Sequence[int]:
    """Return the places between Unicode's default words (UAX 29), increasing, from 0 to the length of the text.

    White space and punctuation count as words. Scripts that are written without spaces have borders between characters.
    """
    return array("i", [0, *(match.start() for match in _BORDER.finditer(text)), len(text)])


def whole_word(text: str, borders: Sequence[int], start: int, stop: int) -> tuple[int, int]:
    """Return the place of the words that characters [start, stop) are part of, or [start, stop) if it is white space.

    `borders` are those of the text. White space around the characters is left out.
    """
    own = text[start:stop]
    if not own.strip():
        return start, stop
    first, last = start + len(own) - len(own.lstrip()), start + len(own.rstrip())
    return borders[bisect_right(borders, first) - 1], borders[bisect_left(borders, last)]


def excerpt(text: str, borders: Sequence[int], start: int, stop: int) -> tuple[str, str, str]:
    """Return the whole word that characters [start, stop) are part of, and the text before and after it: (left, word, right).

    Each has at most 120 characters; left and right are cut between words, if there are any.

    Example:
        >>> excerpt("A naïve idea", word_borders("A naïve idea"), 4, 7)
        ('A ', 'naïve', ' idea')
    """
    first, last = whole_word(text, borders, start, stop)
    first = max(first, start - _EXCERPT // 2)
    last = min(last, first + _EXCERPT)
    begin = borders[bisect_left(borders, max(0, first - _EXCERPT))]
    end = borders[bisect_right(borders, min(len(text), last + _EXCERPT)) - 1]
    begin = begin if begin < first else max(0, first - _EXCERPT)
    end = end if end > last else min(len(text), last + _EXCERPT)
    return text[begin:first], text[first:last], text[last:end]
