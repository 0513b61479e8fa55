"""Dictionaries and students that benchmarks and results are about, made by the jobs and kept in a folder.

In: text. Out: folders; what is there already is taken as it is. Holds settings only.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msense.build import build_dictionary
from msense.config import DEMO_TEACHER, BuildConfig
from msense.dictionary import SenseDictionary
from msense.distill_config import DistillConfig
from msense.distill_run import distill_student
from msense.errors import BadInput
from msense.flags import validate
from msense.run_folder import RunFolder

logger = logging.getLogger("msense.bench")

CAP = 1000  # occurrences clustered a token
MADE_OF = "made_of.json"


@dataclass(frozen=True)
class Made:
    """A student."""

    folder: Path
    metrics: dict[str, float]  # of the last epoch


class Workshop:
    """Makes dictionaries and students in a folder, or takes those that are there."""

    def __init__(self, folder: Path, corpus: Sequence[str], workers: int, teacher: str = DEMO_TEACHER) -> None:
        self.folder = folder
        self.corpus = corpus
        self.workers = workers
        self.teacher = teacher

    def dictionary(self, senses: int | str) -> Path:
        """Build a dictionary of the corpus."""
        output = self.folder / f"dictionary-{senses}"
        given = {"corpus": list(self.corpus), "teacher": self.teacher, "senses": senses, "max_occurrences": CAP}
        build_dictionary(
            validate(BuildConfig, {**given, "metric": "l2", "workers": self.workers, "output": str(output)})
        )
        return output

    def student(self, dictionary: Path, name: str, **settings: Any) -> Made:  # noqa: ANN401 - of a distillation
        """Distill a student; all of one dictionary and metric share their labels."""
        kept = self.folder / name
        labels = self.folder / f"labels-{dictionary.name}{'-dot' if settings.get('reference') else ''}"
        given: dict[str, Any] = {"dictionary": str(dictionary), "output": str(labels), "workers": self.workers}
        config = validate(DistillConfig, {**given, "teacher": self.teacher, **settings})
        made_of = {"dictionary": SenseDictionary.load(dictionary).fingerprint, "labels": config.of_labels()}
        made_of["training"] = config.of_training()
        if kept.exists():
            _check(kept / MADE_OF, made_of)
        else:
            distill_student(config)
            run = RunFolder(str(labels))
            shutil.move(run.student, kept.with_suffix(".new"))
            shutil.move(run.metrics, kept.with_suffix(".new") / "metrics.jsonl")
            (kept.with_suffix(".new") / MADE_OF).write_text(json.dumps(made_of, sort_keys=True) + "\n")
            kept.with_suffix(".new").rename(kept)
        last = (kept / "metrics.jsonl").read_text().splitlines()[-1]
        logger.info("%s: %s", name, last)
        return Made(kept, json.loads(last))


def _check(path: Path, made_of: dict[str, Any]) -> None:
    """Refuse a student that was made of other things."""
    told = json.loads(path.read_text()) if path.is_file() else None
    if told != json.loads(json.dumps(made_of)):
        raise BadInput(f"the student in {path.parent} was made of another dictionary or with other settings: remove it")
