"""A student made ready to be used and shared: one folder of weights, tokenizer, dictionary, card, and what other libraries ask.

Comes in: a student, its dictionary, figures. Goes out: a folder that `SenseEncoder` and sentence-transformers load, config.json
written last. There is no code in it. Holds the weights once more, and a chunk of the dictionary.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from msense.dictionary import SenseDictionary
from msense.dictionary.format import Stored, atomic_path, copy_file
from msense.errors import StudentError
from msense.student.card import MODULE, student_card
from msense.student.config import StudentConfig, StudentFiles
from msense.student.files import save_student
from msense.student.student import Student
from msense.student.tokenizer import TextReader

ShippedSenses = Stored | Literal["none"]


def ship(
    folder: str | Path,
    student: Student,
    dictionary: SenseDictionary,
    *,
    senses: ShippedSenses = "float16",
    figures: Mapping[str, float] | None = None,
    max_length: int | None = None,
    prompt: str | None = None,
) -> None:
    """Write a student with all that it takes to use it; one that is there is replaced.

    Args:
        folder: where to; made if missing.
        student: what.
        dictionary: what it speaks in, from a folder with a tokenizer.
        senses: type of the dictionary's numbers; "none" leaves it out: there are sentence vectors then, and no senses.
        figures: for the card, by name.
        max_length: tokens of a text that are read; default: what the student says.
        prompt: put before every text; default: what the student says.

    Raises:
        StudentError: student and dictionary do not belong together, or the dictionary has no tokenizer.
        DictionaryError: the centroids are too large for `senses`.
    """
    known = (*get_args(Stored), "none")
    if senses not in known:
        raise StudentError(f"senses is {senses!r}, but must be one of {known}")
    told: dict[str, Any] = {
        name: value for name, value in (("max_length", max_length), ("prompt", prompt)) if value is not None
    }
    if Path(student.config.kind).is_absolute():
        told["kind"] = Path(student.config.kind).name  # where it lies is nobody's business
    config = StudentConfig.model_validate(student.config.model_dump() | told)
    check_dictionary(config, dictionary)
    source = dictionary.tokenizer_file
    if source is None:
        raise StudentError("the dictionary has no tokenizer: give one that was built from a teacher, and loaded")
    TextReader(source, config)  # refuses another tokenizer before anything is written
    files = StudentFiles(Path(folder))
    files.folder.mkdir(parents=True, exist_ok=True)
    files.config.unlink(missing_ok=True)
    copy_file(source, files.tokenizer)
    if senses == "none":
        shutil.rmtree(files.dictionary, ignore_errors=True)
    else:
        dictionary.save(files.dictionary, dtype=senses)
    write_settings(files, config)
    with atomic_path(files.card) as scratch:
        scratch.write_text(student_card(config, senses, figures or {}), encoding="utf-8")
    save_student(folder, student, config)


def check_dictionary(config: StudentConfig, dictionary: SenseDictionary) -> None:
    """Refuse a dictionary that a student does not speak in.

    Raises:
        StudentError: naming what differs.
    """
    its = dictionary.config
    facts = [
        ("tokenizer", config.tokenizer_fingerprint[:12], its.tokenizer_fingerprint[:12]),
        ("teacher", config.teacher.fingerprint[:12], its.teacher.fingerprint[:12]),
        ("width", config.dim, its.dim),
        ("vocabulary size", config.vocab_size, its.vocab_size),
    ]
    for name, of_student, of_dictionary in facts:
        if "" not in (of_student, of_dictionary) and of_student != of_dictionary:  # made in memory: says nothing of it
            raise StudentError(
                f"the student does not speak in this dictionary: its {name} is {of_student}, that of the dictionary is "
                f"{of_dictionary}; give the dictionary that it was trained with"
            )


def write_settings(files: StudentFiles, config: StudentConfig) -> None:
    """Write what sentence-transformers asks of a folder."""
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
