"""Distill a small student from a teacher and its sense dictionary: `python jobs/distill.py --help`."""

import logging
import sys
from typing import Any

from msense.cli.console import run_job, show_table, stage_rows
from msense.cli.flags import parse_flags
from msense.config.distill import DistillConfig
from msense.pipelines.distill import distill_student
from msense.text import size

DESCRIPTION = """Label a text with the senses that the teacher sees in it, and train a small student on them.

Without --corpus the text is the one that the dictionary was made of. Run the same command again after any interruption:
it goes on from what is finished."""


def show_dry_run(found: dict[str, Any]) -> None:
    """Print what the labels would take."""
    rows = [
        ("passages to label", f"{found['passages']:,}, {found['tokens']:,} tokens"),
        ("disk: senses", size(found["labels_bytes"])),
        (f"disk: --soft-targets {found['soft_targets']}", f"{size(found['soft_targets_bytes'])} more"),
        ("disk: --pooled", f"{size(found['pooled_bytes'])} more"),
        ("disk: in all, as set", size(found["total_bytes"])),
        ("cluster offers", found["offered"]),
        ("job asks for", found["asked"]),
        ("workers", f"{found['workers']} ({found['device']}), {found['units']} units to share"),
    ]
    if rate := found.get("tokens_per_second"):
        seconds = found["tokens"] / rate
        told = f"{seconds / 3600:,.1f} hours" if seconds > 7200 else f"{seconds / 60:,.1f} minutes"
        rows.append(("teacher", f"{rate:,.0f} tokens/s in all: {told}, with each option the same"))
    elif rate == 0:
        rows.append(("teacher", "too little text to time"))
    else:
        rows.append(("teacher", "reads these tokens once, with each option the same; --time-teacher tells how long"))
    show_table("Dry run: what the labels would take", rows)


def show_summary(summary: dict[str, Any]) -> None:
    """Print what was made."""
    rows = stage_rows(summary["stages"])
    show_table("Student", [*rows, ("student", summary["student"])])


def main() -> None:
    """Distill, and show what was made."""
    config = parse_flags(DistillConfig, DESCRIPTION)
    logging.getLogger("msense").setLevel(config.log_level.upper())
    summary = distill_student(config)
    if config.dry_run:
        show_dry_run(summary["estimate"])
    else:
        show_summary(summary)


if __name__ == "__main__":
    sys.exit(run_job(main))
