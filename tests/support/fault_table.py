"""The README's table of faults, fault x stage -> outcome, compared with the outcomes that tests observe.

Tests report outcomes to the fixture `outcome`, which checks them against the README. `make test-all` prints the table and
fails on a cell of the README that no test has observed.
"""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
STAGES = ("passages", "plan", "embed", "senses", "clustering", "large tokens", "exemplars", "dictionary")
STAGES += ("labels", "training")  # of a distillation


def table(seen: dict[tuple[str, str], str]) -> str:
    """Return outcomes by (fault, stage) as a Markdown table."""
    faults = list(dict.fromkeys(fault for fault, _ in seen))
    lines = ["| fault | " + " | ".join(STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    lines += [f"| {fault} | " + " | ".join(seen.get((fault, stage), "") for stage in STAGES) + " |" for fault in faults]
    return "\n".join(lines)


def in_readme() -> dict[tuple[str, str], str]:
    """Return the README's table without empty cells."""
    lines = README.read_text(encoding="utf-8").splitlines()
    head = "| fault | " + " | ".join(STAGES) + " |"
    outcomes: dict[tuple[str, str], str] = {}
    for line in lines[lines.index(head) + 2 :] if head in lines else []:
        if not line.startswith("|"):
            break
        fault, *cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        outcomes |= {(fault, stage): cell for stage, cell in zip(STAGES, cells, strict=True) if cell}
    return outcomes
