"""Resuming: which files of earlier drivers are valid.

Files are read and hashed in tasks, and invalid ones are removed. The driver holds only the stats of the files.
"""

import logging
from collections.abc import Sequence
from typing import Any

from msense.io import storage
from msense.run.folder import RunFolder
from msense.run.journal import Journal
from msense.runtime import Executor

logger = logging.getLogger(__name__)
FILES_PER_TASK = 64


def finished(
    stage: str, run: RunFolder, files: Sequence[str], executor: Executor, journal: Journal | None = None
) -> list[dict[str, Any] | None]:
    """Return the stats of each file of a stage that an earlier driver finished; None if missing or corrupted.

    The files are in one folder. With the journal of the run at work, invalid files and their markers are removed, so that
    they are regenerated, and the journal records how many are kept and how many were corrupted.
    """
    repair = journal is not None
    result: list[dict[str, Any] | None] = [None] * len(files)
    marked = storage.markers(files[0].rpartition("/")[0]) if files else set()  # one listing
    numbers = [n for n, file in enumerate(files) if file.rpartition("/")[2] in marked]
    slices = [numbers[i : i + FILES_PER_TASK] for i in range(0, len(numbers), FILES_PER_TASK)]
    work = [{"numbers": part, "files": [files[n] for n in part]} for part in slices]
    for row in executor.map(f"{stage}: checking finished files", _check, work, run.inputs_hash, repair):
        for number, stats in zip(row["numbers"], row["stats"], strict=True):
            result[number] = stats
            if stats is None:
                outcome = "; it is regenerated" if repair else ""
                logger.warning("%s: %s is missing or corrupted%s", stage, files[number], outcome)
    if journal is not None:
        kept = sum(stats is not None for stats in result)
        journal.add(stage, kept=kept, damaged=len(numbers) - kept)
    return result


def _check(item: dict[str, Any], inputs_hash: str, repair: bool) -> dict[str, Any]:
    """Read and hash files; return their stats."""
    result = [storage.stats_of(file, verify=True, inputs_hash=inputs_hash) for file in item["files"]]
    for file, stats in zip(item["files"], result, strict=True):
        if stats is None and repair:
            storage.remove(file)
            storage.remove(file + storage.MARKER)
    return {"numbers": item["numbers"], "stats": result}
