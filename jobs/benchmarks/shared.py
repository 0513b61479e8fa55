"""What benchmarks share: the command line's settings, a run of the corpus, and students of Banking77."""

import argparse
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.artifacts import ArtifactCache, data_folder
from msense.config.base import validate_config
from msense.config.build import BuildConfig
from msense.constants import DEMO_TEACHER
from msense.io import storage
from msense.pipelines.build import build_dictionary
from msense.run.folder import RunFolder

Figures = dict[str, float]
STUDENTS = {"layers2": "layers:2", "static": "static"}
SENSES = 50  # per token of their dictionary
OBJECTIVE = {"sense": 1.0, "pooled": 100.0, "replaced": 100.0}


class Bench(argparse.Namespace):
    """The command line's settings, and what is built from them when it is first needed."""

    @cached_property
    def config(self) -> BuildConfig:
        """Settings of the shared run, which keeps passages, occurrences and centroids."""
        settings = {name: getattr(self, name) for name in ("corpus", "workers", "senses", "max_occurrences", "output")}
        keep = ("passages", "occurrences", "centroids")
        return validate_config(BuildConfig, {**settings, "teacher": DEMO_TEACHER, "keep": keep})

    @property
    def run(self) -> RunFolder:
        """Folder of the shared run."""
        return RunFolder(storage.absolute(self.config.output))

    def build(self, **changes: Any) -> None:
        """Build the dictionary of the shared run, or resume it."""
        build_dictionary(self.config.model_copy(update=changes))

    @cached_property
    def cache(self) -> ArtifactCache:
        """Dictionaries and students of Banking77's training texts, beside the shared run."""
        corpus = [str(data_folder(self.data, "banking77") / "train.csv")]
        return ArtifactCache(Path(f"{self.run.root}-banking77"), corpus, self.workers)

    @cached_property
    def dictionary(self) -> Path:
        """The students' dictionary."""
        return self.cache.dictionary(SENSES)

    def student(self, name: str) -> Path:
        """Return a student, distilled first if it is missing."""
        return self.cache.student(self.dictionary, name, student=STUDENTS[name], objective=OBJECTIVE)
