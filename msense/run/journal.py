"""The journal of a run: what each driver did, stage by stage."""

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from msense.errors import MsenseError
from msense.io import storage
from msense.run.folder import RunFolder
from msense.text import plain

logger = logging.getLogger(__name__)
DRIVERS_KEPT = 100


@dataclass
class Journal:
    """The records of a run's drivers, written after every change.

    A record has `began` (UTC), `host`, `pid`, `workers`, `stages` and `outcome` ("" if the driver is running or was
    killed). A stage has the numbers of files that were `kept`, `damaged` and `made`; a stage without `made` was not
    finished.

    Example:
        >>> journal = Journal.begin(RunFolder("run"), workers=2)
        >>> journal.add("passages", kept=3, damaged=0)
        >>> journal.end("finished")
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
        stages = self.drivers[-1]["stages"]
        total = Counter(stages.get(stage))
        total.update(counts)
        stages[stage] = dict(total)
        self.write()

    def end(self, outcome: str) -> None:
        """End this driver's record."""
        self.drivers[-1]["outcome"] = outcome
        self.write()

    @contextmanager
    def ending_with_errors(self) -> Iterator[None]:
        """End this driver's record with any error that is raised in this context."""
        try:
            yield
        except BaseException as error:
            kind = "" if isinstance(error, MsenseError) else f"{type(error).__name__}: "
            with suppress(MsenseError):  # the disk may be full; the first error is the one to report
                self.end(plain(f"failed: {kind}{error}"))
            raise

    def write(self) -> None:
        """Write the journal file."""
        storage.write_json(self.uri, {"drivers": self.drivers})


@contextmanager
def timed(stages: dict[str, dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """Time a stage and log its stats: those put into the yielded dict, which is added to `stages`."""
    stats: dict[str, Any] = {}
    logger.info("%s ...", name)
    began = time.monotonic()
    yield stats
    stats["seconds"] = round(time.monotonic() - began, 1)
    stages[name] = stats
    short = {key: value for key, value in stats.items() if not isinstance(value, list)}
    shown = (f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in short.items())
    logger.info("%s: %s", name, ", ".join(shown))
