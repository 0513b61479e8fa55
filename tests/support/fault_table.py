"""The table of faults, fault x stage -> outcome, which a run of all tests writes into tests/README.md.

Tests report the outcomes that they have checked to the fixture `outcome`.
"""

from collections.abc import Mapping
from pathlib import Path

from pages import write_between

PAGE = Path(__file__).parents[1] / "README.md"
STAGES = ("passages", "plan", "embed", "senses", "clustering", "large tokens", "exemplars", "dictionary")
STAGES += ("labels", "training")  # of a distillation
FAULTS = (
    "worker killed",
    "rank killed",
    "node killed",
    "driver killed",
    "file truncated",
    "file deleted",
    "byte flipped",
)
FAULTS += ("disk full", "permission lost", "S3 throttled or disconnected", "S3 unavailable")
FAULTS += ("second driver", "input changed")


def table(seen: Mapping[tuple[str, str], str]) -> str:
    """Return outcomes by (fault, stage) as a Markdown table, faults that are not in `FAULTS` last."""
    observed = dict.fromkeys(fault for fault, _ in seen)
    faults = [*(fault for fault in FAULTS if fault in observed), *(fault for fault in observed if fault not in FAULTS)]
    lines = ["| fault | " + " | ".join(STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    lines += [f"| {fault} | " + " | ".join(seen.get((fault, stage), "") for stage in STAGES) + " |" for fault in faults]
    return "\n".join(lines)


def write(seen: Mapping[tuple[str, str], str], page: Path = PAGE) -> None:
    """Write the table of all outcomes into the page."""
    write_between(page, "faults", table(seen))
