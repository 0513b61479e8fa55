"""Build a sense dictionary from a corpus and a teacher: `python jobs/build_dict.py --help`."""

import logging
import sys
from typing import Any

from msense.cli.console import run_job, show_table, stage_rows
from msense.cli.flags import parse_flags
from msense.config.build import BuildConfig
from msense.corpus.chunking import LISTED_BAD_DOCUMENTS
from msense.pipelines.build import build_dictionary
from msense.text import size

DESCRIPTION = """Read a corpus with a teacher and cluster every token's embeddings into a sense dictionary.

With neither --corpus nor --teacher it builds the embedded demo: docstrings of installed Python packages, read by
all-MiniLM-L6-v2. Run the same command again after any interruption: it goes on from what is finished."""


def show_dry_run(found: dict[str, Any]) -> None:
    """Print what a run would read, write and need."""
    about = "about " if found["sample"] < 1 else ""
    rows = [
        ("documents", f"{about}{found['documents']:,.0f} ({about}{found['bad_documents']:,.0f} bad)"),
        ("passages", f"{about}{found['passages']:,.0f}, {found['tokens']:,.0f} tokens"),
        ("passages needed", f"{about}{found['needed']:,.0f}, {found['needed_tokens']:,.0f} tokens"),
        ("teacher tokens saved", f"{found['saved']:.1%}"),
        ("occurrences stored", f"{about}{found['stored']:,.0f}"),
        ("tokens with senses", f"{found['kinds']:,}, {found['at_cap']:,} of them at the cap"),
        ("points per token", f"median {found['points_median']:,.0f}, mean {found['points_mean']:,.1f}"),
        ("senses", f"{about}{found['senses']:,.0f} at most"),
        ("disk: passages", about + size(found["passages_bytes"])),
        ("disk: occurrences", about + size(found["occurrences_bytes"])),
        ("disk: dictionary", about + size(found["dictionary_bytes"]) + " and exemplars"),
        ("memory: teacher actor", f"weights and {size(found['unit_memory'])} a unit"),
        ("memory: clustering task", about + size(found["clustering_memory"])),
        ("cluster offers", found["offered"]),
        ("job asks for", found["asked"]),
        ("workers", f"{found['workers']} ({found['device']}), {found['units']} units to share"),
    ]
    if rate := found.get("tokens_per_second"):
        seconds = found["needed_tokens"] / rate
        told = f"{seconds / 3600:,.1f} hours" if seconds > 7200 else f"{seconds / 60:,.1f} minutes"
        rows.append(("teacher", f"{rate:,.0f} tokens/s in all: {told}"))
    elif rate == 0:
        rows.append(("teacher", "too little text to time"))
    part = f" on {found['sample']:.2%} of the documents" if about else ""
    show_table(f"Dry run{part}: what the run would read, write and need", rows)


def show_summary(summary: dict[str, Any]) -> None:
    """Print what was built."""
    rows = stage_rows(summary["stages"])
    passages = summary["stages"].get("passages", {})
    bad = {key.removeprefix("bad: "): count for key, count in passages.items() if key.startswith("bad: ")}
    if bad:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in bad.items())
        total = f"{sum(bad.values()):,} bad document{'s' if sum(bad.values()) > 1 else ''}"
        where = f"the first {LISTED_BAD_DOCUMENTS} of each kind in bad_documents.jsonl"
        rows.append(("skipped", f"{total} ({reasons}), {where}"))
    rows.append(("dictionary", summary["dictionary"]))
    show_table("Sense dictionary", rows)


def main() -> None:
    """Build, and show what was built."""
    config = parse_flags(BuildConfig, DESCRIPTION)
    logging.getLogger("msense").setLevel(config.log_level.upper())
    summary = build_dictionary(config)
    if config.dry_run:
        show_dry_run(summary["estimate"])
    else:
        show_summary(summary)


if __name__ == "__main__":
    sys.exit(run_job(main))
