"""Print the senses of words (`python -m msense show DICTIONARY WORD ...`), or those of the tokens of a text."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from msense.dictionary import SenseDictionary
from msense.dictionary.contexts import Exemplar
from msense.dictionary.lookup import TokenMatch
from msense.student.encoder import SenseEncoder
from msense.student.token_senses import TokenSense
from msense.text import clean, whole_word, word_borders

_INDENT = 4
_LONGEST = 2000  # characters of an untrusted token or explanation
_LONGEST_LABEL = 24  # columns of a word beside its senses
_NARROWEST = 16  # columns of an example
_SPACE = "␣"  # printed for white space


def show_words(source: str, words: Sequence[str], exemplars: int, senses: int) -> int:
    """Print at most `senses` senses per token of the words, with at most `exemplars` contexts; return 1 if there is none."""
    dictionary = SenseDictionary.load(source)
    console = Console(highlight=False, emoji=False, markup=False)
    shown: set[int] = set()  # "Bank bank" matches the same tokens twice
    for match in map(dictionary.lookup, words):
        if not match.found:
            console.print(Text(clean(match.explain()[:_LONGEST])), soft_wrap=True)
        for token in match.tokens:
            if token.senses and token.token_id not in shown:
                _show_token(console, dictionary, token, exemplars, senses)
                shown.add(token.token_id)
    return 0 if shown else 1


def _show_token(console: Console, dictionary: SenseDictionary, token: TokenMatch, exemplars: int, limit: int) -> None:
    """Print the senses of a token, most frequent first."""
    own = dictionary.senses(token.token_id)
    occurrences = int(dictionary.token_counts[token.token_id])
    head = Text(clean(token.token[:_LONGEST]), style="bold")
    stats = f"token {token.token_id}, {token.senses} senses, {occurrences:,} occurrences in the corpus"
    console.print(head.append(f"  {stats}", style="not bold"), soft_wrap=True)
    contexts: dict[int, list[Exemplar]] = {}
    for exemplar in dictionary.exemplars(token.token_id) if exemplars else ():
        contexts.setdefault(exemplar.sense, []).append(exemplar)
    total = max(1, int(own.counts.sum()))
    for sense in np.argsort(-own.counts, kind="stable")[:limit].tolist():
        count = int(own.counts[sense])
        share, distance = count / total, own.rms_distance[sense]
        line = f"  sense {sense:<5} count {count:<9,} share {share:6.1%}   RMS distance {distance:.3g}"
        console.print(Text(line), soft_wrap=True)
        for exemplar in contexts.get(sense, [])[:exemplars]:
            width = max(console.width - _INDENT, 8)
            example = Text(" " * _INDENT).append_text(_context(exemplar, width, width // 2 - 2))
            console.print(example, no_wrap=True, overflow="crop")
    if token.senses > limit:
        console.print(Text(f"  {token.senses - limit} more senses: --senses {token.senses}"), soft_wrap=True)


def show_text(student: str, text: str) -> int:
    """Print a text word by word with the senses of its tokens, each with its nearest example; return 1 if it has none.

    A word of several tokens has a line of its own, above theirs.

    Raises:
        InputError: the text is invalid, or the student or its dictionary is missing, damaged, or has no senses.
    """
    encoder = SenseEncoder.from_pretrained(student)
    tokens = encoder.tokens(text)
    console = Console(highlight=False, emoji=False, markup=False)
    if not tokens:
        console.print(Text("the text has no tokens: give a sentence"), soft_wrap=True)
        return 1
    rows = _rows(text, tokens)
    width = min(max(cell_len(label) for label, _ in rows), _LONGEST_LABEL)
    console.print(Text(f"{set_cell_size('word', width)}  sense  prob  nearest example", style="dim"), soft_wrap=True)
    numbers = np.diff(encoder.dictionary.offsets)
    for label, token in rows:
        line = Text(set_cell_size(label, width), style="" if label.startswith("  ") else "bold")
        if token is not None:
            line.append(_sense(token, int(numbers[token.token_id])), style="not bold")
            room = max(console.width - line.cell_len, _NARROWEST)
            if token.nearest is not None:
                line.append_text(_context(token.nearest, room, 2 * room // 5))
        line.rstrip()
        console.print(line, no_wrap=True, overflow="crop")
    for note in _notes(text, tokens, encoder.config.max_length):
        console.print(Text(note, style="dim"), soft_wrap=True)
    return 0 if any(token.sense >= 0 for token in tokens) else 1


def _rows(text: str, tokens: Sequence[TokenSense]) -> list[tuple[str, TokenSense | None]]:
    """Return the lines of a text: the label of each, and its token, none for a word above its tokens."""
    borders = word_borders(text)
    rows: list[tuple[str, TokenSense | None]] = []
    for (first, last), group in groupby(tokens, lambda token: whole_word(text, borders, token.start, token.end)):
        label, own = _label(text[first:last]), list(group)
        if len(own) == 1:
            rows.append((label, own[0]))
            continue
        rows.append((label, None))
        for token in own:
            before, after = "·" * (token.start > first), "·" * (token.end < last)
            rows.append((f"  {before}{_label(text[token.start : token.end])}{after}", token))
    return rows


def _label(text: str) -> str:
    """Return a word as printed; a visible sign for white space and invisible characters."""
    return clean(text[:_LONGEST]).strip() or _SPACE


def _sense(token: TokenSense, senses: int) -> str:
    """Return the columns of a token's sense and its probability, which is not shown for a token of a single sense."""
    if token.sense < 0:
        return f"  {'-':>5}  {'':>4}  no senses"
    return f"  {token.sense:>5}  {'only' if senses == 1 else f'{token.probability:.0%}':>4}  "


def _notes(text: str, tokens: Sequence[TokenSense], max_length: int) -> Iterator[str]:
    """Yield what is missing from the output, and why."""
    rest = text[: min(token.start for token in tokens)] + text[max(token.end for token in tokens) :]
    if any(map(str.isalnum, rest)):
        yield f"the text is truncated: the student reads {max_length} tokens"
    if all(token.nearest is None for token in tokens):
        yield "no examples: the student's dictionary has none, as those on the hub, or those made with --exemplars 0"


def _context(exemplar: Exemplar, width: int, before: int) -> Text:
    """Return a context in one line of `width` columns; its word starts at column `before`, whatever its text."""
    parts = exemplar.left[-4 * width :], exemplar.word, exemplar.right[: 4 * width]
    left, word, right = (re.sub(r"\s+", " ", clean(part)) for part in parts)  # text is often indented
    space = " " * (len(word) - len(word.lstrip()))  # some tokens of older dictionaries include the space before
    left = _end(left + space, before)
    line = Text(" " * (before - cell_len(left)) + left)
    line.append(f"[{_cut(word.strip() or _SPACE, width - before - 2)}]", style="bold")
    line.append(_start(right, width - line.cell_len))
    return line


def _end(text: str, cells: int) -> str:
    """Return the end of a text that fits a number of terminal columns, from the start of a word if one fits."""
    start = next(place for place in word_borders(text) if cell_len(text[place:]) <= cells)
    if text[start:].strip():
        return text[start:]
    while cell_len(text) > cells:
        text = text[1:]
    return text


def _start(text: str, cells: int) -> str:
    """Return the start of a text that fits a number of terminal columns, to the end of a word if one fits."""
    stop = next((place for place in reversed(word_borders(text)) if cell_len(text[:place]) <= cells), 0)
    return text[:stop] if text[:stop].strip() else _cut(text, cells)


def _cut(text: str, cells: int) -> str:
    """Return text truncated to a number of terminal columns."""
    return text if cell_len(text) <= cells else set_cell_size(text, max(cells, 0))
