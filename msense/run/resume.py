"""Going on after a stop: which files of earlier drivers count, and the journal of what each driver did.

Comes in: the names of the files a stage will write. Goes out: the facts of those that are whole, after every byte was
read and hashed in tasks; what is not whole is removed. The driver holds the facts only.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from msense import storage
from msense.errors import MsenseError
from msense.run_folder import RunFolder
from msense.runtime import Resources, map_tasks
from msense.text import plain, size
from msense.watch import spilled_bytes

logger = logging.getLogger(__name__)

FILES_A_TASK = 64
DRIVERS_KEPT = 100


@dataclass
class Journal:
    """What the drivers of a run did, a record each; written whenever a count is known.

    A record holds `began` (UTC), `host`, `pid`, `workers`, `stages` (per stage: files `kept` of earlier drivers, found
    `damaged`, and `made`; no `made` = the driver never got so far) and `outcome` ("" = none: killed
    or at work).
    """

    uri: str
    drivers: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def begin(run: RunFolder, workers: int) -> "Journal":
        """Open a run's journal and begin the record of this driver."""
        journal = Journal(run.journal, (storage.read_json(run.journal, {"drivers": list}) or {}).get("drivers", []))
        began = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"began": began, "host": socket.gethostname(), "pid": os.getpid(), "workers": workers}
        journal.drivers = [*journal.drivers, {**record, "stages": {}, "outcome": ""}][-DRIVERS_KEPT:]
        journal.write()
        return journal

    def add(self, stage: str, **counts: int) -> None:
        """Add to the counts of a stage."""
        found = self.drivers[-1]["stages"].setdefault(stage, {})
        for name, count in counts.items():
            found[name] = found.get(name, 0) + count
        self.write()

    def end(self, outcome: str) -> None:
        """End this driver's record."""
        self.drivers[-1]["outcome"] = outcome
        self.write()

    @contextmanager
    def ending_with_errors(self) -> Iterator[None]:
        """End this driver's record with any error that passes through."""
        try:
            yield
        except BaseException as error:
            kind = "" if isinstance(error, MsenseError) else f"{type(error).__name__}: "
            with suppress(MsenseError):  # the disk may be full: what is told is the first error
                self.end(plain(f"failed: {kind}{error}"))
            raise

    def write(self) -> None:
        """Write the journal down."""
        storage.write_json(self.uri, {"drivers": self.drivers})


@contextmanager
def timed(stages: dict[str, dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """Time a stage; what is put into the yielded dict becomes its facts in `stages`."""
    facts: dict[str, Any] = {}
    logger.info("%s ...", name)
    began, before = time.monotonic(), spilled_bytes()
    yield facts
    facts["seconds"] = round(time.monotonic() - began, 1)
    if spilled := spilled_bytes() - before:
        facts["spilled_bytes"] = spilled
        logger.warning(
            "%s: Ray moved %s of its object store to disk: give it more memory (`ray start --object-store-memory`)",
            name,
            size(spilled),
        )
    stages[name] = facts
    told = (f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in facts.items())
    logger.info("%s: %s", name, ", ".join(told))


def finished(
    stage: str,
    run: RunFolder,
    files: Sequence[str],
    resources: Resources,
    journal: Journal | None = None,
    repair: bool = True,
) -> list[dict[str, Any] | None]:
    """Tell which files of a stage an earlier driver has finished.

    Args:
        stage: for progress and the journal.
        run: the run; a file made of other things does not count.
        files: all files of the stage, in one folder.
        resources: how many tasks at a time.
        journal: where to note how many are kept and how many were damaged.
        repair: remove a file that does not count and its marker, so that it is made again.

    Returns:
        The facts of each file; None if it is not there, or was cut short, or has a byte that changed.
    """
    found: list[dict[str, Any] | None] = [None] * len(files)
    there = _markers(files)
    damaged = 0
    slices = [there[i : i + FILES_A_TASK] for i in range(0, len(there), FILES_A_TASK)]
    work = [{"numbers": numbers, "files": [files[n] for n in numbers]} for numbers in slices]
    for row in map_tasks(f"{stage}: checking finished files", _check, work, resources, run.made_of, repair):
        for number, facts in zip(row["numbers"], row["facts"], strict=True):
            found[number] = facts
            if facts is None:
                damaged += 1
                logger.warning(
                    "%s: %s is damaged or gone%s", stage, files[number], "; it is made again" if repair else ""
                )
    if journal is not None:
        journal.add(stage, kept=len(there) - damaged, damaged=damaged)
    return found


def _markers(files: Sequence[str]) -> list[int]:
    """Return the numbers of the files that have a marker, by one listing of their folder."""
    if not files:
        return []
    names = storage.markers(files[0].rpartition("/")[0])
    return [n for n, file in enumerate(files) if file.rpartition("/")[2] in names]


def _check(item: dict[str, Any], made_of: str, repair: bool) -> dict[str, Any]:
    """Read and hash some files."""
    facts = []
    for file in item["files"]:
        facts.append(storage.facts_of(file, verify=True, made_of=made_of))
        if facts[-1] is None and repair:
            storage.remove(file)
            storage.remove(file + storage.MARKER)
    return {"numbers": item["numbers"], "facts": facts}
