"""The run that the measurements share: a corpus and the demo teacher in, a run folder that keeps all intermediates out."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msense import storage
from msense.build import build_dictionary, cluster_settings
from msense.config import DEMO_TEACHER, BuildConfig
from msense.run_folder import RunFolder
from msense.teacher import describe
from msense.units import ClusterSettings, Range, read_ranges, sample

Figures = dict[str, float]


class Bench:
    """One real run that several measurements share: its occurrences and centroids are kept."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.workers: int = given.workers
        self.senses: int = given.senses
        self.data = Path(given.data) if given.data else None
        self.config = BuildConfig(
            corpus=tuple(given.corpus),
            teacher=DEMO_TEACHER,
            workers=given.workers,
            senses=given.senses,
            max_occurrences=given.max_occurrences,
            output=given.output,
            keep=("passages", "occurrences", "centroids"),
        )
        self.run = RunFolder(storage.absolute(given.output))

    def build(self, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - settings
        """Build the dictionary of the shared run, or take it as it is."""
        return build_dictionary(self.config.model_copy(update=changes))

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Read the clustered points: token ids int32 [N], grouped, and embeddings float16 [N, D]."""
        settings = self.cluster_settings()
        offsets = storage.load_arrays(self.run.offsets)["offsets"]
        whole = [Range(unit, int(row[0]), int(row[-1])) for unit, row in enumerate(offsets)]
        records, _ = read_ranges(settings, whole)
        order, _ = sample(records["key"], records["token"], settings.max_occurrences)
        return records["token"][order], records["embedding"][order].view(np.float16)

    def cluster_settings(self) -> ClusterSettings:
        """Return the settings of the clustering stage."""
        return cluster_settings(self.config, self.run, describe(DEMO_TEACHER, self.config)[0])


def in_turn(sides: Sequence[Callable[[], float]], times: int) -> list[float]:
    """Return the median seconds of several measurements made turn by turn, each of which tells its own."""
    found = [[side() for side in sides] for _ in range(times)]
    return [statistics.median(seconds) for seconds in zip(*found, strict=True)]


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that a piece of work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
