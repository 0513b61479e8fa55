"""Cache keys of results: hashes of everything a result depends on. Equal keys mean equal results.

Weights and dictionaries are hashed by content; large data files by name, size and modification time.
"""

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from msense.constants import VERSION
from msense.corpus import list_files
from msense.corpus.labelled import split_files
from msense.dictionary import DictionaryFiles, SenseDictionary
from msense.errors import InputError
from msense.evaluation.spec import Spec, TaskSpec
from msense.evaluation.tasks import mteb
from msense.evaluation.tasks.beir import data_files
from msense.io.storage import sha256_of
from msense.student.files import student_folder
from msense.student.layout import StudentFiles
from msense.teacher.files import locate
from msense.teacher.spec import Attention, TeacherOptions, load_teacher_info

PACKAGES = ("torch", "transformers", "scikit-learn", "numpy")
OF_TASKS = {
    "mteb": ("mteb",),
    "retrieval": ("bm25s", "PyStemmer", "pytrec_eval-terrier"),
}  # further packages by task kind


def digest(values: Any) -> str:
    """Return a hash of JSON values, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the package versions that results depend on."""
    return {"msense": VERSION, **{name: version(name) for name in PACKAGES}}


def model_key(spec: Spec) -> str:
    """Return a hash of a model's files and settings; reads its weights."""
    key: dict[str, Any] = {"kind": spec.kind, "replace": spec.replace, "metric": spec.metric, "layers": spec.layers}
    key |= {"stemmer": spec.stemmer} if spec.kind == "bm25" else {}
    if spec.replace == "soft":
        key["temperature"] = spec.temperature
    attention = spec.attention
    if spec.kind == "replaced":
        dictionary = SenseDictionary.load(spec.source)
        key["dictionary"] = dictionary.fingerprint
        attention = dictionary.config.attention if attention == "auto" else attention
    if spec.kind in ("teacher", "truncated", "model2vec", "replaced"):
        key |= {"teacher": teacher_key(spec.teacher, spec.revision, attention), "dtype": spec.dtype}
    if spec.kind == "student":
        files = StudentFiles(student_folder(spec.source))
        own = [sha256_of(path) for path in files.model_files()]
        shipped = DictionaryFiles(files.dictionary).fingerprint() if files.dictionary.is_dir() else ""
        key["student"] = digest([own, shipped])
    if spec.kind == "encoder":
        folder = _encoder_folder(spec.source)
        local = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        stats = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime) for p in local]
        key["encoder"] = [version("sentence-transformers"), stats or [spec.source, spec.revision]]
    return digest(key)


def _encoder_folder(source: str) -> Path:
    """Return the folder of a sentence-transformers model, if it is one; InputError for what is clearly no such model."""
    folder = Path(source)
    if folder.is_file() or (source.startswith((".", "/", "~")) and not folder.is_dir()):
        raise InputError(
            f"--model {source}: no such folder; give a folder or a hub name, or KIND:FOLDER as --help lists"
        )
    modules = folder / "modules.json"
    if modules.is_file() and "msense." in modules.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"--model {source} is a student of msense: use student:{source}")
    return folder


def data_key(task: TaskSpec) -> str:
    """Return a hash of a task's data (names, sizes and modification times of its files); InputError if they are missing."""
    own = [version(package) for package in OF_TASKS.get(task.kind, ())]
    if not task.source:
        return digest([mteb.task_class(task.name).metadata.name, own]) if task.kind == "mteb" else task.name
    measured = task.of or task.kind
    if measured == "retrieval":
        files = [file for part in data_files(task.source, task.split) for file in part]
    elif measured in ("similarity", "pairs"):
        files = split_files(task.source, task.split)
    elif task.kind in ("classification", "mteb"):
        files = [file for part in ("train", "test") for file in split_files(task.source, part)]
    elif task.kind == "classifier" and task.source.startswith("hf://"):
        return task.source
    else:
        files = list_files((task.source,))
    return digest([own, [[file.name, file.size, file.fingerprint] for file in files]])


def teacher_key(name: str, revision: str | None, attention: Attention) -> str:
    """Return a hash of a teacher: weights, tokenizer, pooling, prompt, maximum length, and its classifier if any."""
    info, _ = load_teacher_info(name, TeacherOptions(revision=revision, attention=attention))
    unused = {"name", "revision", "include_frame"}  # the last is in `skip`, and older keys are without it
    unused |= {"attention"} if attention == "auto" else set()
    stats = {key: value for key, value in asdict(info).items() if key not in unused}
    head = locate(name, revision) / "classifier"  # glob of a missing folder is empty
    return digest([stats, [sha256_of(path) for path in sorted(head.glob("*")) if path.is_file()]])
