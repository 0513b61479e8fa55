"""What benchmarks share: one real run, its points by token, and figures by name.

In: the command line of `jobs/bench.py`. Out: the run's settings, files and points. Holds the points that are asked for.
"""

import argparse
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msense import storage
from msense.build import build_dictionary, cluster_settings
from msense.config import DEMO_CORPUS, DEMO_TEACHER, BuildConfig
from msense.errors import BadInput
from msense.evaluation.model2vec_peer import Peer
from msense.flags import validate
from msense.run_folder import RunFolder
from msense.teacher import describe
from msense.teacher_folder import body_folder
from msense.units import ClusterSettings, Range, read_ranges, sample

logger = logging.getLogger("msense.bench")

Figures = dict[str, float]


@dataclass(frozen=True)
class Tokens:
    """Points [N, D] grouped by token, as they are stored."""

    ids: np.ndarray  # int64 [T]
    sizes: np.ndarray  # int64 [T], points of each
    points: np.ndarray  # float16 [N, D]

    def where(self, chosen: np.ndarray) -> "Tokens":
        """Return some of the tokens, by a mask [T]."""
        return Tokens(self.ids[chosen], self.sizes[chosen], self.points[np.repeat(chosen, self.sizes)])

    def arrays(self) -> list[np.ndarray]:
        """Return each token's points as an array of its own, float32 [n, D], as other libraries want them."""
        return [part.astype(np.float32) for part in np.split(self.points, np.cumsum(self.sizes)[:-1])]


class Bench:
    """One real run that several benchmarks share: its occurrences and centroids are kept."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.workers: int = given.workers
        self.senses: int = given.senses
        self._data: str | None = given.data
        self.peer_python: str | None = given.peer_python
        self._sample: float | None = given.sample
        self._turns: int | None = given.turns
        settings = {name: getattr(given, name) for name in ("corpus", "workers", "senses", "max_occurrences", "output")}
        keep = ("passages", "occurrences", "centroids")
        self.config = validate(BuildConfig, {**settings, "teacher": DEMO_TEACHER, "keep": keep})
        self.run = RunFolder(storage.absolute(given.output))

    @property
    def dry_run(self) -> RunFolder:
        """Where a dry run of a sample of the corpus puts passages and plan."""
        return RunFolder(storage.join(self.run.root, "estimate"))

    @property
    def dim(self) -> int:
        """Width D of the teacher's embeddings."""
        return describe(DEMO_TEACHER, self.config)[0].dim

    def build(self, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - settings
        """Build the dictionary of the shared run, or take it as it is."""
        return build_dictionary(self.config.model_copy(update=changes))

    def sample(self, usual: float) -> float:
        """Return the share of the corpus to read: `--sample`, or what a benchmark usually reads of the demo's."""
        return self._sample or (usual if self.config.corpus == (DEMO_CORPUS,) else 1.0)

    def turns(self, usual: int) -> int:
        """Return how often to measure."""
        return self._turns or usual

    def start_afresh(self, name: str) -> None:
        """Delete the shared run for a benchmark.

        Raises:
            BadInput: its folder holds something else.
        """
        ours = any(storage.exists(run.manifest) for run in (self.run, self.dry_run))
        if storage.names(self.run.root) and not ours:
            raise BadInput(
                f"{self.run.root} is no run folder, and {name} would delete all in it: give another --output"
            )
        storage.remove(self.run.root)

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Read the clustered points: token ids int32 [N], grouped, and embeddings float16 [N, D]."""
        settings = self.cluster_settings()
        offsets = storage.load_arrays(self.run.offsets)["offsets"]
        whole = [Range(unit, int(row[0]), int(row[-1])) for unit, row in enumerate(offsets)]
        records, _ = read_ranges(settings, whole)
        order, _ = sample(records["key"], records["token"], settings.max_occurrences)
        return records["token"][order], records["embedding"][order].view(np.float16)

    def tokens(self) -> Tokens:
        """Read the clustered points, by token."""
        ids, points = self.points()
        token, sizes = np.unique(ids, return_counts=True)
        return Tokens(token.astype(np.int64), sizes, points)

    def cluster_settings(self) -> ClusterSettings:
        """Return the settings of the clustering stage."""
        return cluster_settings(self.config, self.run, describe(DEMO_TEACHER, self.config)[0])

    def data(self, name: str) -> Path:
        """Return a folder of labelled data.

        Raises:
            BadInput: no --data, or it has not that folder.
        """
        if self._data is None:
            raise BadInput(f"this benchmark reads {name}/: say with --data where the folders of labelled data are")
        folder = Path(self._data, name)
        if not folder.is_dir():
            raise BadInput(f"{folder} is not there: --data must name a folder that holds {name}/")
        return folder


@contextmanager
def model2vec(bench: Bench, threads: int | None = None) -> Iterator[Peer | None]:
    """Give model2vec, distilled from the demo teacher; None without a Python that has it."""
    if bench.peer_python is None:
        logger.info("no --peer-python, a Python with model2vec: its figures are left out")
        yield None
        return
    peer = Peer(bench.peer_python, body_folder(DEMO_TEACHER, None), threads or os.cpu_count() or 1)
    try:
        yield peer
    finally:
        peer.close()
