"""Initialize students from a teacher, another encoder or a dictionary's token means.

Memory: the weights of both models, and gradients of the student's.
"""

from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from msense.dictionary import SenseDictionary, TeacherName
from msense.errors import InputError, StudentError
from msense.io.untrusted import format_errors
from msense.student.config import LONGEST, StudentConfig, StudentSettings, check_dictionary
from msense.student.static import confidence, token_means
from msense.student.student import Student
from msense.student.transformer import TransformerBody, body_settings, load_weights
from msense.teacher.body import load_body, truncate_layers
from msense.teacher.files import body_folder
from msense.teacher.pooling import SentenceHead, load_head
from msense.teacher.spec import TeacherInfo, TeacherOptions, load_teacher_info, max_positions


def init_student(
    settings: StudentSettings,
    dictionary: SenseDictionary,
    teacher: str,
    revision: str | None = None,
    seen: np.ndarray | None = None,
) -> Student:
    """Return an untrained student in float32 on the CPU, of a dictionary and its teacher (name or folder, revision).

    `seen`, integers [V], are the token counts of the training passages; default: those of the dictionary's corpus.

    Raises:
        StudentError: dictionary, teacher and student do not match, or a setting is invalid.
        InputError: the teacher cannot be loaded.
    """
    if not 0 <= settings.prior_count < float("inf"):
        raise StudentError(f"prior_count is {settings.prior_count}, but must be finite and not negative")
    info, _ = load_teacher_info(teacher, TeacherOptions(revision=revision, prompt=dictionary.config.prompt))
    head = load_head(teacher, info)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.kind in ("static", "table"):
            student = Student(_config(settings, info, head, dictionary, None)).float()
            model = load_body(body_folder(teacher, revision), teacher, torch.float32)
        else:
            model = _load_transformer(settings.kind, info, teacher, revision)
            student = Student(_config(settings, info, head, dictionary, model)).float()
    body = student.body
    if isinstance(body, TransformerBody):
        load_weights(body, model)
    else:
        counts = dictionary.token_counts if seen is None else seen
        with torch.no_grad():
            body.means.copy_(token_means(dictionary, model.get_input_embeddings().weight))
            body.confidence.copy_(confidence(dictionary, counts, settings.prior_count))
            if student.config.is_table:  # special tokens surround the training texts
                special = list({*info.prefix, *info.suffix})
                body.means[special] = body.confidence[special] = 0.0
    head.pooling, head.skip = student.config.pooling, student.config.skip
    student.sentence_head = head
    return student


def _config(
    settings: StudentSettings, info: TeacherInfo, head: SentenceHead, dictionary: SenseDictionary, transformer: Any
) -> StudentConfig:
    """Return the student's config; maximum length and prompt are those that the dictionary was built with."""
    length = dictionary.config.max_length or info.max_length
    names = ("pooling", "prompt", "include_prompt", "include_frame", "skip")
    own: dict[str, Any] = {name: getattr(info, name) for name in names}
    if settings.kind == "table":  # a prompt that is not pooled has no influence
        body: dict[str, Any] = {}
        own = {"pooling": "mean", "prompt": info.prompt if info.include_prompt else ""}
        length = LONGEST
    elif transformer is None:
        body = {"static": {"units": settings.units, "kernel_size": settings.kernel_size}}
    else:
        body = {"body": body_settings(transformer)}
        length = min(length, max_positions(transformer.config.get_text_config()) or length)
    try:
        config = StudentConfig(
            kind=settings.kind,
            teacher=TeacherName(name=info.name, revision=info.revision, fingerprint=info.fingerprint),
            tokenizer_fingerprint=info.tokenizer_fingerprint,
            dim=info.dim,
            vocab_size=info.vocab_size,
            normalize=info.normalize,
            max_length=length,
            projections=tuple(projection.config for projection in head.projections),
            truncate_dim=info.truncate_dim,
            truncation_side=info.truncation_side,
            heads="one" if settings.kind == "table" else settings.heads,
            **own,
            **body,
        )
    except ValidationError as error:
        raise StudentError(
            f"invalid student of teacher {info.name!r} ({format_errors(error)}): change the settings or the teacher"
        ) from error
    check_dictionary(config, dictionary.config)
    return config


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
