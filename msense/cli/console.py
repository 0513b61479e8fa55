"""Logging, exit codes and tables of all jobs.

Exit codes: 0 success, 1 failure, 2 wrong usage or bad input, 130 Ctrl-C. Log lines go to stderr, results to stdout.
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

from msense.constants import LISTED_BAD_DOCUMENTS
from msense.errors import InputError, MsenseError
from msense.text import clean, plain, size

logger = logging.getLogger("msense")
WIDTH = 120  # columns of a file or pipe
_RESUME = "Finished work is kept: run the same command again to resume."


def run_job(job: Callable[[], int | None], *, resumes: bool = True) -> int:
    """Run a job and return its exit code, 0 for None; expected errors are printed without a traceback.

    With `resumes`, failures say that the same command goes on.
    """
    note = _RESUME if resumes else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_SafeFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("msense").setLevel(logging.INFO)
    sys.excepthook = _print_traceback
    try:
        return job() or 0
    except InputError as error:
        sys.stderr.write(plain(f"error: {error}\n"))
        return 2
    except _expected_errors() as error:
        logger.error("%s", f"failed: {_message(error)}\n{note}".rstrip())
        return 1
    except KeyboardInterrupt:
        logger.error("%s", f"stopped. {note}".rstrip())
        return 130


def _expected_errors() -> tuple[type[Exception], ...]:
    """Return the types of errors that end a job without a traceback."""
    from msense.io.filesystems import storage_error_types  # slow to import, and rarely needed

    return storage_error_types(MsenseError)


def _message(error: Exception) -> str:
    from msense.io.filesystems import error_message, s3_errors

    return error_message(error) if isinstance(error, s3_errors()) else str(error)


def show_table(title: str, rows: Sequence[Sequence[str]], head: Sequence[str] = (), note: str = "") -> None:
    """Print a table on stdout: names and values, or with `head` a column of names and right-aligned columns."""
    table = Table(title=Text(clean(title)), title_justify="left", show_header=bool(head), box=None, pad_edge=False)
    table.caption, table.caption_justify = Text(clean(note)) if note else None, "left"
    table.collapse_padding = bool(head)  # fits the ten columns of costs into 100 characters
    for number, name in enumerate(head or ("", "")):
        table.add_column(Text(clean(name)), justify="right" if head and number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    console().print(table)


def console() -> Console:
    """Return a console on stdout; without a terminal and COLUMNS it has `WIDTH` columns."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH)


def stage_rows(stages: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return one row per stage for `show_table`: its seconds and stats, no curves; bad documents have a row of their own."""
    rows = []
    for name, stats in stages.items():
        shown = {key: value for key, value in stats.items() if value and not isinstance(value, list)}
        texts = [_stat(key, value) for key, value in shown.items() if key not in ("seconds", "bad_documents")]
        rows.append((name, f"{stats['seconds']:,.1f} s  {', '.join(texts)}".rstrip()))
        if bad := stats.get("bad_documents"):
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in bad.items())
            total = f"{sum(bad.values()):,} bad document{'s' * (sum(bad.values()) > 1)} ({reasons})"
            rows.append(("skipped", f"{total}, the first {LISTED_BAD_DOCUMENTS} of each kind in bad_documents.jsonl"))
    return rows


def _stat(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{name.replace('_', ' ')}: " + ", ".join(f"{key} {figure:,.4g}" for key, figure in value.items())
    if name.endswith("bytes"):
        return f"{size(value)} {name.removesuffix('bytes').strip('_')}".rstrip()
    return f"{value:,} {name.replace('_', ' ')}"


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an unexpected error without the credentials that a library may quote."""
    sys.stderr.write(plain("".join(traceback.format_exception(kind, error, trace))))


class _SafeFormatter(logging.Formatter):
    """Removes control characters and credentials from log lines of any origin."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))
