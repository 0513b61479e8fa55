"""What all jobs share: logging, exit codes, and the table at the end.

Exit codes: 0 done, 1 failed, 2 wrong usage or bad input. Log lines go to stderr, results to stdout.
"""

import logging
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from msense.errors import BadInput, MsenseError

logger = logging.getLogger("msense")

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")


def run_job(job: Callable[[], None]) -> int:
    """Run a job and return its exit code; an error msense raises on purpose is told in its own words."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("msense").setLevel(logging.INFO)
    try:
        job()
    except BadInput as error:
        logger.error("error: %s", _lines(error))
        return 2
    except MsenseError as error:
        logger.error("failed: %s\nThe same command goes on from what is finished.", _lines(error))
        return 1
    except OSError as error:
        logger.error(
            "failed: %s\nMend that and run the same command again: it goes on from what is finished.", _lines(error)
        )
        return 1
    except KeyboardInterrupt:
        logger.error("stopped; the same command goes on from what is finished")
        return 130
    return 0


def show_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print two columns of text on stdout."""
    table = Table(title=clean(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(clean(name)), Text(clean(value)))
    Console().print(table)


def size(count: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def clean(text: str) -> str:
    """Return text without escape sequences, control, format and other invisible characters; line breaks are spaces."""
    text = _ESCAPES.sub("", text)
    return "".join(
        " " if c in "\n\r\t" or (kind := unicodedata.category(c)) in ("Zl", "Zp") else "" if kind[0] == "C" else c
        for c in text
    )


def _lines(error: Exception) -> str:
    """Return an error's text fit for a terminal; its line breaks stay."""
    return "\n".join(clean(line) for line in str(error).splitlines())
