"""`python -m msense`: look into a dictionary (`show`) or a run folder (`status`).

Comes in: a folder and words on the command line. Goes out: lines on the terminal, and the exit code. Holds one
dictionary, mapped. Text from a dictionary is shown without control characters and never as markup.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from msense.dictionary import SenseDictionary
from msense.dictionary.lookup import Exemplar, TokenMatch
from msense.errors import BadInput, MsenseError
from msense.text import clean, plain

_INDENT = 4
_LONGEST = 2000  # of what a tokenizer writes on one line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed or no word found, 2 wrong usage or bad input."""
    parser = argparse.ArgumentParser(prog="python -m msense", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser(
        "show",
        help="print the senses of words with example contexts",
        description="Print the senses of words, the most frequent first, each with contexts nearest to its centroid.",
        epilog="Example: python -m msense show runs/dictionary key cell --senses 5",
    )
    show.add_argument("dictionary", metavar="DICTIONARY", help="folder of a dictionary or of a run, or its URI")
    show.add_argument("words", metavar="WORD", nargs="+", help="words to look up; upper and lower case are both tried")
    show.add_argument(
        "--exemplars", type=_count, default=3, metavar="N", help="contexts a sense (default: %(default)s)"
    )
    show.add_argument("--senses", type=_count, default=6, metavar="N", help="senses a token (default: %(default)s)")
    status = commands.add_parser("status", help="show how far a run is", description="Show how far a run is.")
    status.add_argument("run", metavar="RUN", help="run folder or its URI")
    given = parser.parse_args(arguments)
    try:
        if given.command == "show":
            return show_words(given.dictionary, given.words, given.exemplars, given.senses)
        from msense.status import show_status

        show_status(given.run)
    except MsenseError as error:
        Console(stderr=True).print(Text(plain(f"error: {error}")), soft_wrap=True)
        return 2 if isinstance(error, BadInput) else 1
    return 0


def show_words(source: str, words: Sequence[str], exemplars: int, senses: int) -> int:
    """Print what a dictionary knows of some words.

    Args:
        source: the dictionary.
        words: to look up.
        exemplars: contexts a sense, at most.
        senses: senses a token, at most.

    Returns:
        0, or 1 if no word was found.
    """
    dictionary = SenseDictionary.load(source)
    console = Console(highlight=False, emoji=False, markup=False)
    shown: set[int] = set()  # "Bank bank" names the same tokens twice
    for match in map(dictionary.find, words):
        if not match.found:
            console.print(Text(clean(match.explain()[:_LONGEST])), soft_wrap=True)
        for token in match.tokens:
            if token.senses and token.token_id not in shown:
                _show_token(console, dictionary, token, exemplars, senses)
                shown.add(token.token_id)
    return 0 if shown else 1


def _show_token(console: Console, dictionary: SenseDictionary, token: TokenMatch, exemplars: int, limit: int) -> None:
    """Print the senses of a token, the most frequent first."""
    own = dictionary.senses(token.token_id)
    occurrences = int(dictionary.token_counts[token.token_id])
    head = Text(clean(token.token[:_LONGEST]), style="bold")
    head.append(
        f"  token {token.token_id}, {token.senses} senses, {occurrences:,} occurrences in the corpus", style="not bold"
    )
    console.print(head, soft_wrap=True)
    contexts: dict[int, list[Exemplar]] = {}
    for exemplar in dictionary.exemplars(token.token_id) if exemplars else ():
        contexts.setdefault(exemplar.sense, []).append(exemplar)
    total = max(1, int(own.counts.sum()))
    for sense in np.argsort(-own.counts, kind="stable")[:limit].tolist():
        count = int(own.counts[sense])
        line = f"  sense {sense:<5} count {count:<9,} share {count / total:6.1%}   spread {own.spread[sense]:.3g}"
        console.print(Text(line), soft_wrap=True)
        for exemplar in contexts.get(sense, [])[:exemplars]:
            console.print(_context(exemplar, console), no_wrap=True, overflow="crop")
    if token.senses > limit:
        console.print(Text(f"  {token.senses - limit} more senses: --senses {token.senses}"), soft_wrap=True)


def _context(exemplar: Exemplar, console: Console) -> Text:
    """Return a context on one line of the console, its word beginning in the same column as every other's."""
    width = max(console.width - _INDENT, 8)
    before = width // 2 - 2
    left, word, right = (clean(text) for text in (exemplar.left[-4 * width :], exemplar.word, exemplar.right))
    space = " " * (len(word) - len(word.lstrip()))  # some tokenizers count the space before a word as its own
    left, word = (left + space)[-width:], word.strip()
    while cell_len(left) > before:
        left = left[1:]
    line = Text(" " * (_INDENT + before - cell_len(left)) + left)
    room = width - before
    if console.is_terminal:
        line.append(_cut(word, room), style="bold")
    else:
        line.append(f"[{_cut(word, room - 2)}]")
    line.append(_cut(right[: 4 * width], _INDENT + width - line.cell_len))
    return line


def _cut(text: str, cells: int) -> str:
    """Return text cut to at most so many columns of the terminal."""
    return text if cell_len(text) <= cells else set_cell_size(text, max(cells, 0))


def _count(text: str) -> int:
    """Read a number from 0 of the command line."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
