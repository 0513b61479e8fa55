"""Dictionaries and students for benchmarks and results, made by the jobs and cached in a folder."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msense.config.base import validate_config
from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.constants import DEMO_TEACHER
from msense.dictionary import SenseDictionary
from msense.errors import InputError
from msense.pipelines.build import build_dictionary
from msense.pipelines.distill import distill_student
from msense.run.folder import RunFolder

logger = logging.getLogger("msense.benchmark")
MAX_OCCURRENCES = 1000  # clustered occurrences per token
INPUTS = "made_of.json"  # the inputs of a student


@dataclass(frozen=True)
class Artifact:
    """A student's folder and the metrics of its last epoch."""

    folder: Path
    metrics: dict[str, float]


@dataclass(frozen=True)
class ArtifactCache:
    """Makes dictionaries and students in a folder and reuses existing ones."""

    folder: Path
    corpus: Sequence[str]
    workers: int
    teacher: str = DEMO_TEACHER

    def dictionary(self, senses: int | str) -> Path:
        """Build a dictionary of the corpus; return its run folder."""
        output = self.folder / f"dictionary-{senses}"
        given = {"corpus": list(self.corpus), "teacher": self.teacher, "senses": senses, "metric": "l2"}
        given |= {"max_occurrences": MAX_OCCURRENCES, "workers": self.workers, "output": str(output)}
        build_dictionary(validate_config(BuildConfig, given))
        return output

    def student(self, dictionary: Path, name: str, **settings: Any) -> Artifact:
        """Distill a student; those of one dictionary and metric share their labels.

        Raises:
            InputError: the existing student was made from another dictionary or with other settings.
        """
        kept = self.folder / name
        labels = self.folder / f"labels-{dictionary.name}{'-dot' if settings.get('reference') else ''}"
        given: dict[str, Any] = {"dictionary": str(dictionary), "output": str(labels), "workers": self.workers}
        config = validate_config(DistillConfig, {**given, "teacher": self.teacher, **settings})
        inputs = {"dictionary": SenseDictionary.load(dictionary).fingerprint, "labels": config.of_labels()}
        content = json.dumps({**inputs, "training": config.of_training()}, sort_keys=True) + "\n"
        if not kept.exists():
            distill_student(config)
            run, new = RunFolder(str(labels)), kept.with_suffix(".new")
            shutil.move(run.student, new)
            shutil.move(run.metrics, new / "metrics.jsonl")
            (new / INPUTS).write_text(content)
            new.rename(kept)
        elif not (kept / INPUTS).is_file() or (kept / INPUTS).read_text() != content:
            raise InputError(f"the student in {kept} was made from another dictionary or other settings: remove it")
        last = (kept / "metrics.jsonl").read_text().splitlines()[-1]
        logger.info("%s: %s", name, last)
        return Artifact(kept, json.loads(last))
