"""Initialize students from a teacher, another encoder or a dictionary's token means. Memory: both models' weights."""

from typing import Any, get_args

import numpy as np
import torch

from msense.dictionary import SenseDictionary, TeacherName
from msense.errors import InputError, StudentError
from msense.student.config import StaticSizes, StudentConfig, StudentSettings, dictionary_mismatch
from msense.student.static import StaticBody, confidence, token_means
from msense.student.student import Student
from msense.student.transformer import body_settings, load_weights
from msense.teacher.body import load_body, truncate_layers
from msense.teacher.files import body_folder
from msense.teacher.pooling import Pooling
from msense.teacher.spec import TeacherInfo, TeacherOptions, load_teacher_info, max_positions


def init_student(
    settings: StudentSettings,
    dictionary: SenseDictionary,
    teacher: str,
    revision: str | None = None,
    seen: np.ndarray | None = None,
) -> Student:
    """Return an untrained student in float32 on the CPU.

    Args:
        settings: kind and sizes of the student.
        dictionary: the senses it will be trained on.
        teacher: name or folder of the dictionary's teacher.
        revision: of the teacher.
        seen: integers [V], token counts of the training passages; default: those of the dictionary's corpus.

    Raises:
        StudentError: dictionary, teacher and student do not match, or a setting is invalid.
        InputError: the teacher cannot be loaded.
    """
    info, _ = load_teacher_info(teacher, TeacherOptions(revision=revision))
    _check_teacher(info, dictionary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.kind == "static":
            sizes = StaticSizes(units=settings.units, kernel_size=settings.kernel_size)
            student = Student(_config(settings, info, dictionary, None, static=sizes))
            model = load_body(body_folder(teacher, revision), teacher, torch.float32)
        else:
            model = _load_transformer(settings.kind, info, teacher, revision)
            longest = max_positions(model.config.get_text_config())
            student = Student(_config(settings, info, dictionary, longest, body=body_settings(model)))
    body = student.body
    if isinstance(body, StaticBody):
        counts = dictionary.token_counts if seen is None else seen
        with torch.no_grad():
            body.means.copy_(token_means(dictionary, model.get_input_embeddings().weight))
            body.confidence.copy_(confidence(dictionary, counts, settings.prior_count))
    else:
        load_weights(body, model)
    return student


def _config(
    settings: StudentSettings, info: TeacherInfo, dictionary: SenseDictionary, longest: int | None, **body: Any
) -> StudentConfig:
    """Return the student's config; maximum length and prompt are those that the dictionary was built with."""
    length = dictionary.config.max_length or info.max_length
    return StudentConfig(
        kind=settings.kind,
        teacher=TeacherName(name=info.name, revision=info.revision, fingerprint=info.fingerprint),
        tokenizer_fingerprint=info.tokenizer_fingerprint,
        dim=info.dim,
        vocab_size=info.vocab_size,
        pooling=info.pooling,
        normalize=info.normalize,
        max_length=min(length, longest or length),
        prompt=dictionary.config.prompt,
        heads=settings.heads,
        **body,
    )


def _check_teacher(info: TeacherInfo, dictionary: SenseDictionary) -> None:
    given = (info.tokenizer_fingerprint, info.fingerprint, info.dim, info.vocab_size)
    if mismatch := dictionary_mismatch(dictionary.config, *given):
        raise StudentError(
            f"teacher {info.name!r} is not the dictionary's: the dictionary has {mismatch}; give "
            f"{dictionary.config.teacher.name!r} as it was when the dictionary was built"
        )
    if info.pooling not in get_args(Pooling):
        raise StudentError(
            f"teacher {info.name!r} uses pooling {info.pooling!r}, which students do not support: give a teacher with "
            f"one of {get_args(Pooling)}"
        )


def _load_transformer(kind: str, info: TeacherInfo, teacher: str, revision: str | None) -> Any:
    """Load the transformer that the student is initialized from."""
    if kind.startswith("layers:"):
        model = load_body(body_folder(teacher, revision), teacher, torch.float32)
        truncate_layers(model, kind)
        return model
    try:
        own, _ = load_teacher_info(kind, TeacherOptions())
        model = load_body(body_folder(kind, None), kind, torch.float32)
    except InputError as error:
        raise StudentError(f"cannot load student {kind!r}: {error}") from error
    if own.tokenizer_fingerprint != info.tokenizer_fingerprint:
        raise StudentError(
            f"student {kind!r} has another tokenizer ({own.tokenizer_fingerprint[:12]}, {own.vocab_size} tokens) than "
            f"teacher {info.name!r} ({info.tokenizer_fingerprint[:12]}, {info.vocab_size} tokens), which the senses "
            "belong to: give an encoder with the same tokenizer, layers:n or static"
        )
    return model
