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

logger = logging.getLogger("msense.bench")
CAP = 1000  # clustered occurrences per token
MADE_OF = "made_of.json"


@dataclass(frozen=True)
class Made:
    """A student's folder and the metrics of its last epoch."""

    folder: Path
    metrics: dict[str, float]


class ArtifactCache:
    """Makes dictionaries and students in a folder and reuses existing ones."""

    def __init__(self, folder: Path, corpus: Sequence[str], workers: int, teacher: str = DEMO_TEACHER) -> None:
        self.folder = folder
        self.corpus = corpus
        self.workers = workers
        self.teacher = teacher

    def dictionary(self, senses: int | str) -> Path:
        """Build a dictionary of the corpus; return its run folder."""
        output = self.folder / f"dictionary-{senses}"
        given = {"corpus": list(self.corpus), "teacher": self.teacher, "senses": senses, "max_occurrences": CAP}
        build_dictionary(
            validate_config(BuildConfig, {**given, "metric": "l2", "workers": self.workers, "output": str(output)})
        )
        return output

    def student(self, dictionary: Path, name: str, **settings: Any) -> Made:
        """Distill a student; those of one dictionary and metric share their labels.

        Raises:
            InputError: the existing student was made from another dictionary or with other settings.
        """
        kept = self.folder / name
        labels = self.folder / f"labels-{dictionary.name}{'-dot' if settings.get('reference') else ''}"
        given: dict[str, Any] = {"dictionary": str(dictionary), "output": str(labels), "workers": self.workers}
        config = validate_config(DistillConfig, {**given, "teacher": self.teacher, **settings})
        inputs_hash = {"dictionary": SenseDictionary.load(dictionary).fingerprint, "labels": config.of_labels()}
        inputs_hash["training"] = config.of_training()
        if kept.exists():
            _check(kept / MADE_OF, inputs_hash)
        else:
            distill_student(config)
            run, new = RunFolder(str(labels)), kept.with_suffix(".new")
            shutil.move(run.student, new)
            shutil.move(run.metrics, new / "metrics.jsonl")
            (new / MADE_OF).write_text(json.dumps(inputs_hash, sort_keys=True) + "\n")
            new.rename(kept)
        last = (kept / "metrics.jsonl").read_text().splitlines()[-1]
        logger.info("%s: %s", name, last)
        return Made(kept, json.loads(last))


def _check(path: Path, inputs_hash: dict[str, Any]) -> None:
    recorded = json.loads(path.read_text()) if path.is_file() else None
    if recorded != json.loads(json.dumps(inputs_hash)):
        raise InputError(f"the student in {path.parent} was made from another dictionary or other settings: remove it")
