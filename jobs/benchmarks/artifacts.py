"""Dictionaries and students for benchmarks and results, made by the jobs and cached in a folder."""

import json
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

INPUTS = "made_of.json"  # the inputs of a student


def data_folder(data: str | Path | None, name: str) -> Path:
    """Return a folder of the labelled data; raise InputError if `--data` is missing or lacks that folder."""
    folder = Path(data or "", name)
    if data is None or not folder.is_dir():
        raise InputError(f"{folder}/ does not exist: give as --data the folder that contains {name}/")
    return folder


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
        given |= {"max_occurrences": 1000, "workers": self.workers, "output": str(output)}
        build_dictionary(validate_config(BuildConfig, given))
        return output

    def labels(self, dictionary: Path) -> Path:
        """Return the run folder of the labels that all students of a dictionary share."""
        return self.folder / f"labels-{dictionary.name}"

    def student(self, dictionary: Path, name: str, **settings: Any) -> Path:
        """Distill a student; return its folder, which also has the metrics of its training.

        Raises:
            InputError: the existing student was made from another dictionary or with other settings.
        """
        kept, labels = self.folder / name, str(self.labels(dictionary))
        settings |= {"dictionary": str(dictionary), "teacher": self.teacher, "output": labels, "workers": self.workers}
        config = validate_config(DistillConfig, settings)
        inputs = {"dictionary": SenseDictionary.load(dictionary).fingerprint, "labels": config.of_labels()}
        content = json.dumps({**inputs, "training": config.of_training()}, sort_keys=True) + "\n"
        if not kept.exists():
            distill_student(config)
            run, new = RunFolder(labels), kept.with_suffix(".new")
            shutil.move(run.student, new)
            shutil.move(run.metrics, new / "metrics.jsonl")
            (new / INPUTS).write_text(content)
            new.rename(kept)
        elif (kept / INPUTS).read_text() != content:
            raise InputError(f"the student in {kept} was made from another dictionary or other settings: remove it")
        return kept
