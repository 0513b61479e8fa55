"""Spans: parts of a passage that are read as texts of their own, as queries are short and passages long.

Sentences are cut by rules that assume neither spaces nor English: at line breaks, and at terminators of any script (Unicode's
property Sentence_Terminal, ellipses and Tibetan shad) with the closing quotes and brackets after them. White space must follow,
except around scripts that are written without it.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise

import regex

from msense.io.hashing import hash64

KINDS = ("passage", "sentence", "run", "title", "query")  # numbers in the column `kind` of labels
SPANS = KINDS[1:4]
MIN_TOKENS = 3  # of a span, without special ones
MIN_PASSAGE = 32  # tokens of a passage with spans: shorter ones are as short as queries themselves
RUN_SENTENCES = (2, 4)
_SCRIPTS = ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")  # written without spaces
_SPACELESS = "".join(rf"\p{{Script={name}}}" for name in _SCRIPTS)
_TERMINAL = r"[\p{Sentence_Terminal}…༎།]"
_WIDE = r"[。．！？｡︒︕︖﹒﹖﹗។៕၊။༎།]"  # terminators of these
_INITIAL = r"(?<!(?<!\p{L})\p{L}(?=\.))"  # J. Smith, e.g. this
_CLOSING = r"[\p{Pe}\p{Pf}\"'＂＇]"
_BREAK = r"[\r\n\v\f\x85\u2028\u2029]"
_END = regex.compile(
    rf"(?<!{_TERMINAL}){_INITIAL}{_TERMINAL}++(?<!\d.(?=\d))"
    rf"(?:[{_CLOSING[1:-1]}\p{{Quotation_Mark}}]*+(?:\s+|$)|{_CLOSING}*+(?=[{_SPACELESS}])|(?<={_WIDE}){_CLOSING}*+)|{_BREAK}+"
)


def sentences(text: str) -> list[tuple[int, int]]:
    """Return the characters [start, stop) of the sentences of a text, without white space around them.

    Example:
        >>> [text[a:b] for text in ("It costs 3.50. Why?",) for a, b in sentences(text)]
        ['It costs 3.50.', 'Why?']
    """
    ends = [0, *(match.end() for match in _END.finditer(text)), len(text)]
    found = []
    for start, stop in pairwise(ends):
        body = text[start:stop].strip()
        if body:
            first = text.index(body[0], start)
            found.append((first, first + len(body)))
    return found


def spans_of(text: str, key: int, shares: Mapping[str, float], *, opens_document: bool) -> Iterator[tuple[int, str]]:
    """Yield kind and text of the spans of a passage that are read, each text once, without those that equal the passage.

    Args:
        text: of the passage.
        key: of the passage; with the number of a span it decides whether the span is read.
        shares: of the spans of each kind that are read.
        opens_document: whether the passage is the first of its document, whose first line is its title.
    """
    cut = sentences(text)
    found: dict[str, list[tuple[int, int]]] = {"title": [], "sentence": cut, "run": list(_runs(cut, key))}
    if opens_document and cut:
        line = regex.search(_BREAK, text, pos=cut[0][0])
        found["title"] = [(cut[0][0], line.start() if line else len(text))]
    seen = {text.strip()}
    for kind, places in found.items():
        for number, (start, stop) in enumerate(places):
            span = text[start:stop].strip()
            if span not in seen and _draw(key, kind, number) < shares.get(kind, 0.0) * 2**64:
                seen.add(span)
                yield KINDS.index(kind), span


def _runs(cut: list[tuple[int, int]], key: int) -> Iterator[tuple[int, int]]:
    """Yield consecutive runs of sentences; a single one that is left over is no run."""
    fewest, most = RUN_SENTENCES
    start = 0
    while len(cut) - start >= fewest:
        stop = min(len(cut), start + fewest + _draw(key, "length", start) % (most - fewest + 1))
        yield cut[start][0], cut[stop - 1][1]
        start = stop


def _draw(key: int, name: str, number: int) -> int:
    """Return 64 bits that depend on a passage's key, a name and a number."""
    return hash64(f"{key} {name} {number}".encode())
