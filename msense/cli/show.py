"""Print the senses of words: `python -m msense show DICTIONARY WORD ...`."""

from collections.abc import Sequence

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from msense.dictionary import SenseDictionary
from msense.dictionary.contexts import Exemplar
from msense.dictionary.lookup import TokenMatch
from msense.text import clean

_INDENT = 4
_LONGEST = 2000  # characters of an untrusted token or explanation


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
            console.print(_context(exemplar, console), no_wrap=True, overflow="crop")
    if token.senses > limit:
        console.print(Text(f"  {token.senses - limit} more senses: --senses {token.senses}"), soft_wrap=True)


def _context(exemplar: Exemplar, console: Console) -> Text:
    """Return a context as one line of the console; the word starts in the same column on every line."""
    width = max(console.width - _INDENT, 8)
    before = width // 2 - 2
    left, word, right = (clean(text) for text in (exemplar.left[-4 * width :], exemplar.word, exemplar.right))
    space = " " * (len(word) - len(word.lstrip()))  # some tokens include the preceding space
    left, word = (left + space)[-width:], word.strip()
    while cell_len(left) > before:
        left = left[1:]
    line = Text(" " * (_INDENT + before - cell_len(left)) + left)
    room = width - before
    line.append(f"[{_cut(word, room - 2)}]", style="bold")
    line.append(_cut(right[: 4 * width], _INDENT + width - line.cell_len))
    return line


def _cut(text: str, cells: int) -> str:
    """Return text truncated to a number of terminal columns."""
    return text if cell_len(text) <= cells else set_cell_size(text, max(cells, 0))
