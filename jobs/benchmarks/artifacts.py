"""Dictionaries, students and other models for benchmarks and results, made in a folder and reused."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msense.config.base import validate_config
from msense.config.build import BuildConfig
from msense.config.distill import DistillConfig
from msense.constants import DEMO_TEACHER
from msense.errors import InputError
from msense.pipelines.build import build_dictionary
from msense.pipelines.distill import distill_student

INPUTS = "made_of.json"  # what the files of a folder were made of


def data_folder(data: str | Path | None, name: str) -> Path:
    """Return a folder of the labelled data; raise InputError if `--data` is missing or lacks that folder."""
    folder = Path(data or "", name)
    if data is None or not folder.is_dir():
        raise InputError(f"{folder}/ does not exist: give as --data the folder that contains {name}/")
    return folder


def made_once(folder: Path, inputs: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """Return a folder that `make` fills, unless it exists already.

    Raises:
        InputError: the existing folder was made of other inputs.
    """
    content, new = json.dumps(inputs, sort_keys=True) + "\n", folder.with_name(f".{folder.name}.new")
    if not folder.exists():
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        make(new)
        (new / INPUTS).write_text(content, encoding="utf-8")
        new.rename(folder)
    elif (folder / INPUTS).read_text(encoding="utf-8") != content:
        raise InputError(f"{folder} was made from other inputs or with other settings: remove it")
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

    def student(self, dictionary: Path, name: str, **settings: Any) -> Path:
        """Distill a student on the labels that all students of a dictionary share; return its run folder.

        Raises:
            InputError: the existing student was made from another dictionary or with other settings.
        """
        output = self.folder / name
        settings |= {"dictionary": str(dictionary), "teacher": self.teacher, "workers": self.workers}
        distill_student(validate_config(DistillConfig, settings | {"output": str(output)}))
        return output
