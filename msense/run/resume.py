"""Resuming: which files of earlier drivers are valid.

Every byte is read and hashed in tasks; invalid files are removed. The driver holds the stats of the files only.
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
    stage: str,
    run: RunFolder,
    files: Sequence[str],
    executor: Executor,
    journal: Journal | None = None,
    repair: bool = True,
) -> list[dict[str, Any] | None]:
    """Return the stats of each file of a stage that an earlier driver finished; None if missing or corrupted.

    Args:
        stage: for progress and the journal.
        run: the run; a file with another inputs hash is invalid.
        files: all files of the stage, in one folder.
        executor: where the files are read.
        journal: records how many files are kept and how many were corrupted.
        repair: remove invalid files and their markers, so that they are regenerated.
    """
    found: list[dict[str, Any] | None] = [None] * len(files)
    there = _markers(files)
    damaged = 0
    slices = [there[i : i + FILES_PER_TASK] for i in range(0, len(there), FILES_PER_TASK)]
    work = [{"numbers": numbers, "files": [files[n] for n in numbers]} for numbers in slices]
    for row in executor.map(f"{stage}: checking finished files", _check, work, run.inputs_hash, repair):
        for number, stats in zip(row["numbers"], row["facts"], strict=True):
            found[number] = stats
            if stats is None:
                damaged += 1
                outcome = "; it is regenerated" if repair else ""
                logger.warning("%s: %s is missing or corrupted%s", stage, files[number], outcome)
    if journal is not None:
        journal.add(stage, kept=len(there) - damaged, damaged=damaged)
    return found


def _markers(files: Sequence[str]) -> list[int]:
    """Return the numbers of the files that have a marker, with one listing of their folder."""
    if not files:
        return []
    names = storage.markers(files[0].rpartition("/")[0])
    return [n for n, file in enumerate(files) if file.rpartition("/")[2] in names]


def _check(item: dict[str, Any], inputs_hash: str, repair: bool) -> dict[str, Any]:
    """Read and hash files; return their stats."""
    stats = []
    for file in item["files"]:
        stats.append(storage.stats_of(file, verify=True, inputs_hash=inputs_hash))
        if stats[-1] is None and repair:
            storage.remove(file)
            storage.remove(file + storage.MARKER)
    return {"numbers": item["numbers"], "facts": stats}
