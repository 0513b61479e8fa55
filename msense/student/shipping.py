"""Write a complete student folder: weights, tokenizer, dictionary, model card, files of sentence-transformers."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from msense.dictionary import SenseDictionary
from msense.dictionary.layout import Stored
from msense.errors import StudentError
from msense.io.atomic import atomic_path, copy_file
from msense.student.card import MODULE, student_card
from msense.student.config import StudentConfig, StudentFiles, dictionary_mismatch
from msense.student.files import save_student
from msense.student.student import Student
from msense.student.tokenizer import StudentTokenizer

StoredSenses = Stored | Literal["none"]


def save_pretrained(
    folder: str | Path,
    student: Student,
    dictionary: SenseDictionary,
    *,
    senses: StoredSenses = "float16",
    figures: Mapping[str, float] | None = None,
    max_length: int | None = None,
    prompt: str | None = None,
) -> None:
    """Write a folder that `SenseEncoder` and sentence-transformers load, replacing an existing one; config.json last.

    Args:
        folder: created if missing.
        student: the student.
        dictionary: the student's dictionary, loaded from a folder with a tokenizer.
        senses: storage dtype of the dictionary's centroids; "none" leaves the dictionary out (sentence vectors only).
        figures: metrics for the model card.
        max_length: maximum tokens per text; default: the student's own.
        prompt: prefix of every text; default: the student's own.

    Raises:
        StudentError: student and dictionary do not match, or the dictionary has no tokenizer.
        DictionaryError: the centroids exceed the range of `senses`.
    """
    allowed = (*get_args(Stored), "none")
    if senses not in allowed:
        raise StudentError(f"invalid senses {senses!r}: use one of {allowed}")
    given = {"max_length": max_length, "prompt": prompt}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if Path(student.config.kind).is_absolute():
        changes["kind"] = Path(student.config.kind).name  # do not publish local paths
    config = StudentConfig.model_validate(student.config.model_dump() | changes)
    check_dictionary(config, dictionary)
    source = dictionary.tokenizer_file
    if source is None:
        raise StudentError("the dictionary has no tokenizer: load one that was built from a teacher")
    StudentTokenizer(source, config)  # validates the tokenizer before anything is written
    files = StudentFiles(Path(folder))
    files.folder.mkdir(parents=True, exist_ok=True)
    files.config.unlink(missing_ok=True)
    copy_file(source, files.tokenizer)
    if senses == "none":
        shutil.rmtree(files.dictionary, ignore_errors=True)
    else:
        dictionary.save(files.dictionary, dtype=senses)
    write_sentence_transformers_files(files, config)
    with atomic_path(files.card) as scratch:
        scratch.write_text(student_card(config, senses, figures or {}), encoding="utf-8")
    save_student(folder, student, config)


def check_dictionary(config: StudentConfig, dictionary: SenseDictionary) -> None:
    """Raise StudentError unless tokenizer, teacher, dimension and vocabulary size are equal."""
    given = (config.tokenizer_fingerprint, config.teacher.fingerprint, config.dim, config.vocab_size)
    if mismatch := dictionary_mismatch(dictionary.config, *given):
        raise StudentError(
            f"the dictionary does not match the student: it has {mismatch}; give the dictionary used for training"
        )


def write_sentence_transformers_files(files: StudentFiles, config: StudentConfig) -> None:
    """Write the files that sentence-transformers reads: modules and prompts."""
    module = {"idx": 0, "name": "0", "path": "", "type": MODULE}
    prompts = {"default": config.prompt} if config.prompt else {}
    settings = {
        "model_type": "SentenceTransformer",
        "prompts": prompts,
        "default_prompt_name": next(iter(prompts), None),
        "similarity_fn_name": "cosine",
    }
    for path, content in ((files.modules, [module]), (files.settings, settings)):
        with atomic_path(path) as scratch:
            scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
