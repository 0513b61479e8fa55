"""Going on after a stop: which files of earlier drivers count, and the journal of what each driver did.

Comes in: the names of the files a stage will write. Goes out: the facts of those that are whole, after every byte was
read and hashed in tasks; what is not whole is removed. The driver holds the facts only.
"""

import logging
from collections.abc import Sequence
from typing import Any

from msense.io import storage
from msense.run.folder import RunFolder
from msense.run.journal import Journal
from msense.runtime.ray_executor import map_tasks
from msense.runtime.resources import Resources

logger = logging.getLogger(__name__)
FILES_A_TASK = 64


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
    for row in map_tasks(f"{stage}: checking finished files", _check, work, resources, run.inputs_hash, repair):
        for number, stats in zip(row["numbers"], row["facts"], strict=True):
            found[number] = stats
            if stats is None:
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


def _check(item: dict[str, Any], inputs_hash: str, repair: bool) -> dict[str, Any]:
    """Read and hash some files."""
    stats = []
    for file in item["files"]:
        stats.append(storage.stats_of(file, verify=True, inputs_hash=inputs_hash))
        if stats[-1] is None and repair:
            storage.remove(file)
            storage.remove(file + storage.MARKER)
    return {"numbers": item["numbers"], "facts": stats}
