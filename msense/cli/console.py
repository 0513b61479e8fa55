"""What all jobs share: logging, exit codes, and the tables at the end.

Exit codes: 0 done, 1 failed, 2 wrong usage or bad input, 130 Ctrl-C. Log lines go to stderr, results to stdout.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from msense.errors import InputError, MsenseError
from msense.io.filesystems import s3_error_message, s3_errors
from msense.text import clean, plain, size

logger = logging.getLogger("msense")
WIDE = 120  # columns of a file or pipe


def run_job(job: Callable[[], None]) -> int:
    """Run a job and return its exit code; an error msense raises on purpose is told in its own words."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("msense").setLevel(logging.INFO)
    sys.excepthook = _tell_plainly
    try:
        job()
    except InputError as error:
        logger.error("error: %s", error)
        return 2
    except MsenseError as error:
        logger.error("failed: %s\nWhat is finished is kept: the same command goes on from there.", error)
        return 1
    except OSError as error:
        logger.error("failed: %s\nMend that and run the same command again: it goes on from what is finished.", error)
        return 1
    except s3_errors() as error:
        logger.error("failed: %s", s3_error_message(error))
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
    console().print(table)


def console() -> Console:
    """Return standard output for tables: as wide as the terminal, or `WIDE` where there is none and COLUMNS says nothing."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)


def stage_rows(stages: Mapping[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Return a row a stage for `show_table`: its seconds, counts and bytes."""
    rows = []
    for name, stats in stages.items():
        told = [
            f"{value:,} {key}"
            for key, value in stats.items()
            if key not in ("seconds", "bytes") and not key.startswith("bad") and value
        ]
        told += [size(stats["bytes"])] if "bytes" in stats else []
        rows.append((name, f"{stats['seconds']:,.1f} s  {', '.join(told)}"))
    return rows


def _tell_plainly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Write the traceback of what nobody foresaw, without credentials that a library quotes."""
    sys.stderr.write(plain("".join(traceback.format_exception(kind, error, trace))))


class _PlainFormatter(logging.Formatter):
    """Log lines that carry no control characters and no credentials, whoever wrote them."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))
