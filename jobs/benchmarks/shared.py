"""The run shared by several benchmarks: its settings, files and clustered points."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msense.clustering.nearest import sample
from msense.config.base import validate_config
from msense.config.build import DEMO_CORPUS, BuildConfig
from msense.constants import DEMO_TEACHER
from msense.errors import InputError
from msense.io import storage
from msense.io.arrays import load_arrays
from msense.pipelines.build import build_dictionary, cluster_settings
from msense.run.folder import RunFolder
from msense.stages.embedding_store import ClusterSettings, Range, read_ranges, stored
from msense.teacher.spec import load_teacher_info

Figures = dict[str, float]


@dataclass(frozen=True)
class Tokens:
    """Points of T tokens, grouped by token: ids int64 [T], sizes int64 [T], points float16 [N, D]."""

    ids: np.ndarray
    sizes: np.ndarray
    points: np.ndarray

    def where(self, chosen: np.ndarray) -> "Tokens":
        """Return the tokens selected by a mask [T]."""
        return Tokens(self.ids[chosen], self.sizes[chosen], self.points[np.repeat(chosen, self.sizes)])

    def arrays(self) -> list[np.ndarray]:
        """Return the points of each token, float32 [n, D]."""
        return [part.astype(np.float32) for part in np.split(self.points, np.cumsum(self.sizes)[:-1])]


class Bench:
    """The shared run, which keeps its passages, occurrences and centroids, and the command line's settings."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.workers: int = given.workers
        self.senses: int = given.senses
        self.peer_python: str | None = given.peer_python
        self.turns: int = given.turns
        self._data: str | None = given.data
        self._sample: float | None = given.sample
        settings = {name: getattr(given, name) for name in ("corpus", "workers", "senses", "max_occurrences", "output")}
        keep = ("passages", "occurrences", "centroids")
        self.config = validate_config(BuildConfig, {**settings, "teacher": DEMO_TEACHER, "keep": keep})
        self.run = RunFolder(storage.absolute(given.output))

    @property
    def dry_run(self) -> RunFolder:
        """Run folder of a dry run on a sample of the corpus."""
        return RunFolder(storage.join(self.run.root, "estimate"))

    def build(self, **changes: Any) -> dict[str, Any]:
        """Build the dictionary of the shared run, or resume it."""
        return build_dictionary(self.config.model_copy(update=changes))

    def sample(self, default: float) -> float:
        """Return `--sample`; otherwise `default` for the demo corpus and 1 for any other."""
        return self._sample or (default if self.config.corpus == (DEMO_CORPUS,) else 1.0)

    def start_afresh(self, name: str) -> None:
        """Delete the shared run; raise InputError if its folder holds something else."""
        is_run = any(storage.exists(run.manifest) for run in (self.run, self.dry_run))
        if storage.names(self.run.root) and not is_run:
            raise InputError(f"{self.run.root} is not a run folder, and {name} would delete it: give another --output")
        storage.remove(self.run.root)

    def tokens(self) -> Tokens:
        """Return the clustered points by token."""
        settings = self.cluster_settings()
        offsets = load_arrays(self.run.offsets)["offsets"]
        whole = [Range(partition, int(row[0]), int(row[-1])) for partition, row in enumerate(offsets)]
        records, _ = read_ranges(settings, whole)
        order, _ = sample(records["key"], records["token"], settings.max_occurrences)
        ids, sizes = np.unique(records["token"][order], return_counts=True)
        points = stored(records["embedding"][order], settings.store_dtype).to(torch.float16).numpy()
        return Tokens(ids.astype(np.int64), sizes, points)

    def cluster_settings(self) -> ClusterSettings:
        """Return the settings of the clustering stage."""
        return cluster_settings(self.config, self.run, load_teacher_info(DEMO_TEACHER, self.config)[0])

    def data(self, name: str) -> Path:
        """Return a folder of labelled data; raise InputError if `--data` is missing or lacks that folder."""
        if self._data is None:
            raise InputError(f"this benchmark reads {name}/: give --data, the folder that contains it")
        folder = Path(self._data, name)
        if not folder.is_dir():
            raise InputError(f"{folder} does not exist: give as --data a folder that contains {name}/")
        return folder
