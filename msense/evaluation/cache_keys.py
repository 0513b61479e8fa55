"""Cache keys of results: hashes of everything a result depends on. Equal keys mean equal results.

Weights and dictionaries are hashed by content; large data files by name, size and modification time.
"""

import hashlib
import json
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from msense import __version__
from msense.config import BuildConfig
from msense.corpus import list_files
from msense.dictionary import DictionaryFiles, SenseDictionary
from msense.evaluation import mteb_tasks
from msense.evaluation.models import folder_of_student
from msense.evaluation.spec import Spec, TaskSpec
from msense.labelled import part_files
from msense.storage import sha256_of
from msense.student.config import StudentFiles
from msense.teacher import describe
from msense.teacher_folder import locate

PACKAGES = ("torch", "transformers", "scikit-learn", "numpy")


def digest(told: Any) -> str:  # noqa: ANN401 - JSON values
    """Return a hash of JSON values, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@cache
def versions() -> dict[str, str]:
    """Return the package versions that results depend on."""
    return {"msense": __version__, **{name: version(name) for name in PACKAGES}}


def of_model(spec: Spec) -> str:
    """Return a hash of a model's files and settings; reads its weights."""
    key: dict[str, Any] = {"kind": spec.kind, "replace": spec.replace, "metric": spec.metric, "layers": spec.layers}
    if spec.replace == "soft":
        key["temperature"] = spec.temperature
    if spec.kind in ("teacher", "truncated", "model2vec", "replaced"):
        key |= {"teacher": of_teacher(spec.teacher, spec.revision), "dtype": spec.dtype}
    if spec.kind == "replaced":
        key["dictionary"] = SenseDictionary.load(spec.source).fingerprint
    if spec.kind == "student":
        files = StudentFiles(folder_of_student(spec.source))
        own = [sha256_of(path) for path in (files.weights, files.config)]
        shipped = DictionaryFiles(files.dictionary).fingerprint() if files.dictionary.is_dir() else ""
        key["student"] = digest([own, shipped])
    if spec.kind == "encoder":
        folder = Path(spec.source)
        local = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        stats = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime) for p in local]
        key["encoder"] = stats or [spec.source, spec.revision]
    return digest(key)


def of_data(task: TaskSpec) -> str:
    """Return a hash of a task's data: names, sizes and modification times of its files.

    Raises:
        BadInput: data are missing; the message says what to download and where to put it.
    """
    own = version("mteb") if task.kind == "mteb" and find_spec("mteb") else ""
    if not task.source:
        return digest([mteb_tasks.task_class(task.name).metadata.name, own]) if task.kind == "mteb" else task.name
    if task.kind in ("classification", "mteb"):
        files = [file for part in ("train", "test") for file in part_files(task.source, part)]
    elif task.kind == "classifier" and task.source.startswith("hf://"):
        return task.source
    else:
        files = list_files((task.source,))
    return digest([own, [[file.name, file.size, file.fingerprint] for file in files]])


def of_teacher(name: str, revision: str | None) -> str:
    """Return a hash of a teacher: weights, tokenizer, pooling, prompt, maximum length, and its classifier if any."""
    info, _ = describe(name, BuildConfig(revision=revision))
    facts = {key: value for key, value in asdict(info).items() if key not in ("name", "revision")}
    head = locate(name, revision) / "classifier"  # glob of a missing folder is empty
    return digest([facts, [sha256_of(path) for path in sorted(head.glob("*")) if path.is_file()]])
