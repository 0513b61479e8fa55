"""`python -m msense`: inspect a dictionary (`show`) or a run folder (`status`).

Text from a dictionary is printed without control characters and never interpreted as markup.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from msense.cli.show import show_words
from msense.errors import InputError, MsenseError
from msense.text import plain


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 success, 1 failure or no match, 2 wrong usage or bad input."""
    parser = argparse.ArgumentParser(prog="python -m msense", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser(
        "show",
        help="print the senses of words with example contexts",
        description="Print the senses of words, most frequent first, with the contexts nearest to each centroid.",
        epilog="Example: python -m msense show runs/dictionary key cell --senses 5",
    )
    show.add_argument("dictionary", metavar="DICTIONARY", help="folder or URI of a dictionary or run")
    show.add_argument("words", metavar="WORD", nargs="+", help="words to look up, in upper and lower case")
    for flag, default, name in (("--exemplars", 3, "contexts per sense"), ("--senses", 6, "senses per token")):
        text = f"maximum {name} (default: %(default)s)"
        show.add_argument(flag, type=_count, default=default, metavar="N", help=text)
    status = commands.add_parser(
        "status", help="print the progress of a run", description="Print the progress of a run."
    )
    status.add_argument("run", metavar="RUN", help="folder or URI of a run")
    given = parser.parse_args(arguments)
    try:
        if given.command == "show":
            return show_words(given.dictionary, given.words, given.exemplars, given.senses)
        from msense.cli.status import show_status

        show_status(given.run)
    except MsenseError as error:
        Console(stderr=True).print(Text(plain(f"error: {error}")), soft_wrap=True)
        return 2 if isinstance(error, InputError) else 1
    return 0


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a non-negative integer")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
